"""What holds of every method."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from safetydpo.artifacts.adapters import LoraLayer
from safetydpo.errors import UsageError
from safetydpo.merging import methods
from safetydpo.merging.algebra import delta
from safetydpo.merging.method import LayerExperts
from safetydpo.merging.registry import METHODS, collect_methods, density_methods, find_method, unweighted_methods
from safetydpo.merging.votes import score_neurons
from tests.merging.layer_cases import random_experts

WEIGHTED = sorted(name for name, m in METHODS.items() if m.takes_weights and not m.normalises_weights)


def test_the_methods_that_there_are():
    assert set(METHODS) == {
        *("sum", "average", "linear", "svd", "ties", "dare", "dare_ties", "della", "breadcrumbs", "magnitude"),
        *("knots", "tsv", "iso", "regmean", "distill", "max_magnitude", "random_winner"),
        *("co_merge", "element", "delta_neuron", "component"),
    }
    assert set(density_methods()) == {"ties", "magnitude", "dare", "dare_ties", "della", "breadcrumbs", "knots"}
    assert unweighted_methods() == ("distill",)
    for name, method in METHODS.items():
        assert find_method(name) is method
        assert method.paper
        assert method.when_to_use
        text = method.function.__doc__ or ""
        assert "Source:" in text
        assert "Use it" in text or "control" in text
    with pytest.raises(UsageError, match=r"out of average, breadcrumbs, .*, tsv, found 'tie'"):
        find_method("tie")


@pytest.mark.parametrize("name", sorted(name for name, method in METHODS.items() if not method.reshapes))
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_one_expert_of_weight_one_comes_back(name, dtype, limit):
    experts = random_experts(1, density=1.0, dtype=dtype)
    merged, expert = delta(METHODS[name].function(experts).layer), delta(experts.layers[0])
    assert float((merged - expert).norm() / expert.norm()) <= limit


@pytest.mark.parametrize("name", WEIGHTED)
def test_a_weight_is_an_expert_with_a_scaled_delta(name):
    weights = [0.5, 2.0, 1.25]
    plain = random_experts(3, weights=weights)
    inputs = torch.randn(10, 4, 8, generator=torch.Generator().manual_seed(9))
    layers = [LoraLayer(layer.down, layer.up * w) for layer, w in zip(plain.layers, weights, strict=True)]

    def build(parts: list[LoraLayer], factors: list[float]) -> LayerExperts:
        scores = [score_neurons(part, inputs) for part in parts]
        return replace(plain, layers=parts, weights=factors, scores=scores)

    one = METHODS[name].function(build(list(plain.layers), weights)).layer
    other = METHODS[name].function(build(layers, [1.0] * 3)).layer
    torch.testing.assert_close(delta(one), delta(other), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", WEIGHTED)
def test_a_method_that_uses_no_density_or_seed_says_so(name):
    method, experts = METHODS[name], random_experts(3)
    first = delta(method.function(experts).layer)
    assert torch.equal(first, delta(method.function(replace(experts, density=0.3)).layer)) != method.uses_density
    assert torch.equal(first, delta(method.function(replace(experts, seed=77)).layer)) != method.draws


@pytest.mark.parametrize("name", sorted(METHODS))
def test_nothing_given_is_changed(name):
    experts = replace(random_experts(3, weights=[1.0, 1.0, 1.0]), distilled=random_experts(1).layers[0])
    before = [(layer.down.clone(), layer.up.clone()) for layer in experts.layers]
    METHODS[name].function(experts)
    for layer, (down, up) in zip(experts.layers, before, strict=True):
        assert torch.equal(layer.down, down)
        assert torch.equal(layer.up, up)


def test_two_methods_of_one_name_and_files_without_one_are_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    (tmp_path / "again.py").write_text("from safetydpo.merging.methods.linear import METHODS\n")
    with pytest.raises(ValueError, match=r"each merge method once, found 'average' again in linear.py: rename it"):
        collect_methods()
    (tmp_path / "again.py").unlink()
    (tmp_path / "zero.py").write_text("")
    with pytest.raises(ValueError, match=r"at least one entry in merging/methods/zero.py, found none"):
        collect_methods()
    for name in ("again", "zero"):
        sys.modules.pop(f"{methods.__name__}.{name}", None)


def test_the_page_on_merging_lists_every_method_with_its_paper(root: Path) -> None:
    page = (root / "docs" / "merging.md").read_text()
    for name, method in METHODS.items():
        assert f"| `{name}` | {method.paper} | {method.when_to_use} |" in page
