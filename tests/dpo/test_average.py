from __future__ import annotations

import pytest
import torch
from diffusers.training_utils import EMAModel
from hypothesis import given
from hypothesis import strategies as st

from safetydpo.dpo.average import average_decay, update_average


def test_decay_by_hand():
    """0 at first, then 2/11, 3/12, 4/13, ... until (1 + n) / (10 + n) passes 0.9 at n = 80."""
    found = [average_decay(n, decay=0.9) for n in (0, 1, 2, 3, 79, 80, 81, 10_000)]
    assert found == pytest.approx([0.0, 2 / 11, 0.25, 4 / 13, 80 / 89, 0.9, 0.9, 0.9])


def test_mean_by_hand():
    """Parameters 8, 19, 31 after three steps: 8; 2/11 * 8 + 9/11 * 19 = 17; 1/4 * 17 + 3/4 * 31 = 27.5."""
    average = {"a": torch.zeros(1)}
    seen = []
    for step, value in enumerate((8.0, 19.0, 31.0)):
        update_average(average, {"a": torch.tensor([value])}, num_updates=step, decay=0.999)
        seen.append(float(average["a"]))
    assert seen == pytest.approx([8.0, 17.0, 27.5])


@given(decay=st.floats(0.0, 0.9999), num_updates=st.integers(0, 100_000))
def test_decay_rises_to_its_limit(decay: float, num_updates: int):
    now, then = (average_decay(n, decay=decay) for n in (num_updates, num_updates + 1))
    assert 0.0 <= now <= then <= decay


@given(decay=st.floats(0.0, 0.9999), seed=st.integers(0, 100))
def test_agrees_with_diffusers(decay: float, seed: int):
    generator = torch.Generator().manual_seed(seed)
    parameter = torch.nn.Parameter(torch.randn(3, generator=generator))
    theirs = EMAModel([parameter], decay=decay)
    ours = {"a": parameter.detach().clone()}
    for step in range(20):
        parameter.data.add_(torch.randn(3, generator=generator))
        theirs.step([parameter])
        update_average(ours, {"a": parameter}, num_updates=step, decay=decay)
        assert torch.allclose(ours["a"], theirs.shadow_params[0], atol=1e-6)
