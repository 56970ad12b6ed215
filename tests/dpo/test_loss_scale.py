from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safetydpo.dpo.loss_scale import GROWTH_INTERVAL, INITIAL, LossScale, initial_loss_scale


def test_by_hand():
    """65536 overflows to 32768; the 2000th step in a row after that doubles it again; another overflow counts too."""
    scale = LossScale().after_overflow()
    assert (scale.value, scale.skipped) == (32768.0, 1)
    for _ in range(1999):
        scale = scale.after_step()
    assert (scale.value, scale.good_steps) == (32768.0, 1999)
    scale = scale.after_step()
    assert scale == LossScale(65536.0, 0, 1)
    assert scale.after_step().after_overflow() == LossScale(32768.0, 0, 2)


@given(start=st.integers(0, 3), fates=st.lists(st.booleans(), max_size=12))
def test_agrees_with_the_scaler_of_torch(start: int, fates: list[bool]):
    """The same sequence of good and overflowed steps, begun shortly before the scale grows."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(1))
    scaler.load_state_dict(scaler.state_dict() | {"_growth_tracker": GROWTH_INTERVAL - start})
    ours = LossScale(good_steps=GROWTH_INTERVAL - start)
    if start == 0:
        ours = LossScale()
        scaler.load_state_dict(scaler.state_dict() | {"_growth_tracker": 0})
    for overflows in fates:
        parameter.grad = torch.full((1,), float("inf") if overflows else 1.0)
        scaler.step(optimizer)
        scaler.update()
        ours = ours.after_overflow() if overflows else ours.after_step()
        assert ours.value == scaler.get_scale()
        assert ours.good_steps == scaler.state_dict()["_growth_tracker"]
    assert ours.skipped == sum(fates)


@pytest.mark.parametrize(
    ("rule", "dtype", "scaled"),
    [
        ("auto", torch.float16, True),
        ("auto", torch.bfloat16, False),
        ("auto", torch.float32, False),
        ("none", torch.float16, False),
        ("dynamic", torch.float32, True),
    ],
)
def test_who_is_scaled(rule: str, dtype: torch.dtype, scaled: bool):
    assert initial_loss_scale(rule, dtype) == (LossScale(INITIAL) if scaled else None)  # type: ignore[arg-type]
