from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from safetydpo.artifacts.adapters import LoraLayer
from safetydpo.errors import SafetyDPOError
from safetydpo.merging.algebra import delta
from safetydpo.merging.methods import fitted, linear
from tests.merging.layer_cases import dense_experts, random_experts


def test_distill_takes_the_fitted_layer_or_says_that_there_is_none():
    experts = random_experts(2)
    assert fitted.distill(replace(experts, distilled=experts.layers[1])).layer is experts.layers[1]
    with pytest.raises(SafetyDPOError, match="expected a distilled adapter of these experts for 'q', found none"):
        fitted.distill(experts)


def test_regmean_by_hand(monkeypatch):
    """Without ridge. Expert 1 sees only h = e1 (G = diag(4, 0)), expert 2 only e2 (G = diag(0, 2)), benign inputs are
    e2 with G = diag(0, 6). Sum diag(4, 8). Row [1 5] of expert 1 -> [1 * 4 / 4, 0]; row [7 2] of expert 2 ->
    [0, 2 * 2 / 8]: together [1, 0.5]. Each expert loses what it does to inputs it never sees."""
    monkeypatch.setattr(fitted, "RIDGE", 0.0)
    experts = replace(
        dense_experts([[1.0, 5.0]], [[7.0, 2.0]]),
        moments=[torch.diag(torch.tensor([4.0, 0.0])), torch.diag(torch.tensor([0.0, 2.0]))],
        benign_moment=torch.diag(torch.tensor([0.0, 6.0])),
    )
    assert delta(fitted.regmean(experts).layer).tolist() == [[1.0, 0.5]]


def test_regmean_solves_the_least_squares_problem():
    """numpy's lstsq on the stacked inputs: each expert's inputs with its own outputs, benign inputs with zeros, and a
    ridge written as extra rows."""
    generator = torch.Generator().manual_seed(2)
    experts = random_experts(3, weights=[0.5, 2.0, 1.25])
    inputs = [torch.randn(20, 8, generator=generator, dtype=torch.float64) for _ in range(4)]
    moments = [values.T @ values for values in inputs]
    ridge = fitted.RIDGE * torch.stack(moments).sum(0).diagonal().mean()
    outputs = [
        values @ (weight * delta(layer).double()).T
        for values, weight, layer in zip(inputs[:3], experts.weights, experts.layers, strict=True)
    ]
    rows = torch.cat([*inputs, ridge.sqrt() * torch.eye(8, dtype=torch.float64)])
    wanted = torch.cat([*outputs, torch.zeros(28, 6, dtype=torch.float64)])
    solution = np.linalg.lstsq(rows.numpy(), wanted.numpy(), rcond=None)[0].T
    found = fitted.regmean(replace(experts, moments=moments[:3], benign_moment=moments[3])).layer
    assert found.down.shape[0] == 9
    torch.testing.assert_close(delta(found).double(), torch.from_numpy(solution), rtol=1e-4, atol=1e-5)


def test_regmean_does_less_to_benign_inputs_than_the_sum():
    experts = random_experts(3)
    benign = experts.benign_moment
    assert benign is not None

    def energy(layer: LoraLayer) -> float:
        return float((delta(layer) @ benign @ delta(layer).T).trace())

    assert energy(fitted.regmean(experts).layer) < 0.5 * energy(linear.sum_deltas(experts).layer)


def test_regmean_says_what_is_missing():
    with pytest.raises(SafetyDPOError, match=r"moments of the inputs of 1 experts and of benign .* 'q', found 0"):
        fitted.regmean(dense_experts([[1.0]]))
