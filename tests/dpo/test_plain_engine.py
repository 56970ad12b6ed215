from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from safetydpo.config.training import DpoConfig
from safetydpo.dpo.engine import fresh_state
from safetydpo.dpo.loss_scale import LossScale
from safetydpo.dpo.optimizers import OptimizerState
from safetydpo.dpo.plain_engine import DdpEngine, SingleEngine, clip_gradients
from safetydpo.errors import SafetyDPOError


def parameters() -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"down": (2, 5), "up": (3, 2)}
    return [(name, torch.nn.Parameter(torch.randn(shape, generator=generator))) for name, shape in shapes.items()]


def loss_of(named: list[tuple[str, torch.Tensor]], step: int) -> torch.Tensor:
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
    return ((x @ named[0][1].T @ named[1][1].T - 1.0) ** 2).mean()


def test_clipping_by_hand() -> None:
    """Norm of (3, 0) and (0, 4) is 5; clipped to 1 both shrink by 5 (+ 1e-6 in the divisor)."""
    gradients = [torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])]
    assert float(clip_gradients(gradients, max_norm=1.0)) == 5.0
    assert torch.allclose(torch.cat(gradients), torch.tensor([0.6, 0.0, 0.0, 0.8]), rtol=1e-6)


def test_clipping_agrees_with_torch_and_leaves_small_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    for max_norm in (0.5, 1e6):
        ours = [torch.randn(7, 3, generator=generator), torch.randn(4, generator=generator)]
        theirs = [torch.nn.Parameter(torch.zeros_like(one)) for one in ours]
        for parameter, gradient in zip(theirs, ours, strict=True):
            parameter.grad = gradient.clone()
        norm = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        before = [one.clone() for one in ours]
        assert torch.allclose(clip_gradients(ours, max_norm=max_norm), norm, rtol=1e-6)
        for mine, parameter, old in zip(ours, theirs, before, strict=True):
            assert parameter.grad is not None
            assert torch.allclose(mine, parameter.grad, rtol=1e-6)
            assert torch.equal(mine, old) == (max_norm > 1)


def test_step_agrees_with_torch_used_the_plain_way() -> None:
    """AdamW after `clip_grad_norm_`, five steps with a rising learning rate."""
    config = DpoConfig(max_grad_norm=0.1, weight_decay=0.1)
    ours, theirs = parameters(), parameters()
    engine = SingleEngine(ours, config=config)
    optimizer = torch.optim.AdamW([p for _, p in theirs], lr=1.0, weight_decay=0.1)
    for step in range(5):
        engine.backward(loss_of(ours, step))
        engine.step(learning_rate=1e-2 * (step + 1))
        loss_of(theirs, step).backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in theirs], 0.1)
        optimizer.param_groups[0]["lr"] = 1e-2 * (step + 1)
        optimizer.step()
        optimizer.zero_grad()
    for (_, mine), (_, other) in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, other, rtol=1e-5, atol=1e-7)


def test_state_round_trip_continues_with_equal_bits() -> None:
    config = DpoConfig()
    through, resumed = parameters(), parameters()
    engine = SingleEngine(through, config=config)
    for step in range(3):
        engine.backward(loss_of(through, step))
        engine.step(learning_rate=1e-2)
    saved = engine.state()
    assert saved.step == 3
    other = SingleEngine(resumed, config=config)
    other.load_state(saved)
    for step in range(3, 6):
        for one, named in ((engine, through), (other, resumed)):
            one.backward(loss_of(named, step))
            one.step(learning_rate=1e-2)
    for (_, mine), (_, other_one) in zip(through, resumed, strict=True):
        assert torch.equal(mine, other_one)


def test_state_is_a_copy() -> None:
    named = parameters()
    engine = SingleEngine(named, config=DpoConfig())
    before = engine.state()
    assert before.optimizer.tensors == {}
    engine.backward(loss_of(named, 0))
    engine.step(learning_rate=1.0)
    assert not torch.equal(before.parameters["up"], named[1][1])


def test_state_of_other_parameters_is_refused() -> None:
    engine = SingleEngine(parameters(), config=DpoConfig())
    state = fresh_state(dict(parameters()))
    renamed = dataclasses.replace(state, parameters={"down": state.parameters["down"], "left": state.parameters["up"]})
    with pytest.raises(SafetyDPOError, match=r"state of the 2 installed adapter parameters, found 2 .* at 'left'"):
        engine.load_state(renamed)
    reshaped = dataclasses.replace(state, parameters={**state.parameters, "up": torch.zeros(9)})
    with pytest.raises(SafetyDPOError, match="a first difference at 'up'"):
        engine.load_state(reshaped)
    without = dataclasses.replace(state, average={"down": state.parameters["down"]})
    with pytest.raises(SafetyDPOError, match=r"found 1 and a first difference at 'up'"):
        engine.load_state(without)
    unknown = dataclasses.replace(state, optimizer=OptimizerState({"exp_avg": {"left": state.parameters["down"]}}))
    with pytest.raises(SafetyDPOError, match=r"found 1 and a first difference at 'left'"):
        engine.load_state(unknown)


def test_a_scaled_loss_gives_the_same_steps() -> None:
    """A factor of 65536 in float32 rounds nothing: equal bits, and the same norms."""
    config = DpoConfig(max_grad_norm=0.1)
    plain, scaled = parameters(), parameters()
    engines = (
        (SingleEngine(plain, config=config), plain),
        (SingleEngine(scaled, config=config, loss_scale=LossScale()), scaled),
    )
    for step in range(4):
        norms = []
        for engine, named in engines:
            engine.backward(loss_of(named, step))
            norms.append(engine.step(learning_rate=1e-2))
        assert norms[0] == norms[1]
    assert all(torch.equal(one, other) for (_, one), (_, other) in zip(plain, scaled, strict=True))
    assert engines[1][0].state().loss_scale == LossScale(good_steps=4)


@pytest.mark.parametrize("scale", [None, LossScale()])
def test_gradients_that_are_not_finite_change_nothing(scale: LossScale | None) -> None:
    named = parameters()
    engine = SingleEngine(named, config=DpoConfig(ema_decay=0.5), loss_scale=scale)
    engine.load_state(fresh_state(dict(named)))
    engine.backward(loss_of(named, 0))
    engine.step(learning_rate=1e-2)
    before = engine.state()
    engine.backward(loss_of(named, 1) * math.inf)
    assert not math.isfinite(engine.step(learning_rate=1e-2))
    after = engine.state()
    assert after.step == before.step == 1
    assert all(torch.equal(after.parameters[name], before.parameters[name]) for name in before.parameters)
    assert all(torch.equal(after.average[name], before.average[name]) for name in before.average)
    assert all(
        torch.equal(after.optimizer.tensors[key][name], tensor)
        for key, group in before.optimizer.tensors.items()
        for name, tensor in group.items()
    )
    assert all(parameter.grad is None for _, parameter in named)
    assert after.loss_scale == (None if scale is None else LossScale(32768.0, 0, 1))


def test_running_mean_by_hand() -> None:
    """With decay 0.5: the parameters p1 after the first step, then 2/11 p1 + 9/11 p2; published, then taken back."""
    named = parameters()
    engine = SingleEngine(named, config=DpoConfig(ema_decay=0.5))
    engine.load_state(fresh_state(dict(named)))
    seen = []
    for step in range(2):
        engine.backward(loss_of(named, step))
        engine.step(learning_rate=0.1)
        seen.append(named[0][1].detach().clone())
    expected = 2 / 11 * seen[0] + 9 / 11 * seen[1]
    assert torch.allclose(engine.state().average["down"], expected, atol=1e-6)
    with engine.published():
        assert torch.allclose(named[0][1], expected, atol=1e-6)
    assert torch.equal(named[0][1], seen[1])


def test_the_next_expert_starts_a_mean_of_its_own() -> None:
    named = parameters()
    engine = SingleEngine(named, config=DpoConfig(ema_decay=0.999))
    start = fresh_state(dict(named))
    for _ in range(2):
        engine.load_state(start)
        assert torch.equal(engine.state().average["up"], start.parameters["up"])
        engine.backward(loss_of(named, 0))
        engine.step(learning_rate=0.1)
        assert torch.equal(engine.state().average["up"], named[1][1])


def test_without_a_running_mean_the_parameters_are_published() -> None:
    named = parameters()
    engine = SingleEngine(named, config=DpoConfig())
    before = named[0][1].detach().clone()
    with engine.published():
        assert torch.equal(named[0][1], before)
    assert engine.state().average == {}


def test_accumulated_parts_add_up() -> None:
    """Two halves of a mean give the gradient of the whole, in both engines."""
    whole, halves = parameters(), parameters()
    engines = [SingleEngine(one, config=DpoConfig()) for one in (whole, halves)]
    engines[0].backward((loss_of(whole, 0) + loss_of(whole, 1)) / 2)
    engines[1].accumulate(loss_of(halves, 0) / 2)
    engines[1].backward(loss_of(halves, 1) / 2)
    for (_, one), (_, other) in zip(whole, halves, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.allclose(one.grad, other.grad, rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("process_group")
def test_ddp_in_one_process_equals_the_plain_loop() -> None:
    """Equal bits, with accumulation and a running mean."""
    config = DpoConfig(max_grad_norm=0.1, ema_decay=0.9)
    single, ddp = parameters(), parameters()
    engines = ((SingleEngine(single, config=config), single), (DdpEngine(ddp, config=config), ddp))
    for engine, named in engines:
        engine.load_state(fresh_state(dict(named)))
        for step in range(3):
            engine.accumulate(loss_of(named, step) / 2)
            engine.backward(loss_of(named, step + 10) / 2)
            engine.step(learning_rate=1e-2)
    one, other = (engine.state() for engine, _ in engines)
    assert all(torch.equal(one.parameters[name], other.parameters[name]) for name in one.parameters)
    assert all(torch.equal(one.average[name], other.average[name]) for name in one.average)
