from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safetydpo.config.schema import BaseModelConfig
from safetydpo.config.training import DpoConfig, LoraConfig
from safetydpo.diffusion.build import load_backbone
from safetydpo.diffusion.stable_diffusion import StableDiffusion
from safetydpo.dpo.engine import (
    SingleEngine,
    clip_gradients,
    fresh_state,
    learning_rate_at,
    lora_signature,
    open_engine,
)
from safetydpo.errors import SafetyDPOError, UsageError
from tests.diffusion.tiny_models import build_model


def parameters() -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"down": (2, 5), "up": (3, 2)}
    return [(name, torch.nn.Parameter(torch.randn(shape, generator=generator))) for name, shape in shapes.items()]


def loss_of(named: list[tuple[str, torch.Tensor]], step: int) -> torch.Tensor:
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
    return ((x @ named[0][1].T @ named[1][1].T - 1.0) ** 2).mean()


def test_learning_rate_by_hand() -> None:
    """Peak 8, warm-up 4: 2, 4, 6, 8, 8, ...; without warm-up the peak at once."""
    assert [learning_rate_at(step, peak=8.0, warmup_steps=4, steps=6) for step in range(6)] == [2, 4, 6, 8, 8, 8]
    assert learning_rate_at(0, peak=8.0, warmup_steps=0, steps=1) == 8.0


def test_cosine_decay_by_hand() -> None:
    """Peak 8, warm-up 2 of 6 steps: 4, 8, then t = 0, 1/4, 1/2, 3/4: 8, 8 * (1 + sqrt(1/2)) / 2 = 6.8284, 4, 1.1716."""
    rates = [learning_rate_at(step, peak=8.0, warmup_steps=2, steps=6, decay="cosine") for step in range(6)]
    assert rates == pytest.approx([4.0, 8.0, 8.0, 6.82843, 4.0, 1.17157], abs=1e-5)


@given(warmup=st.integers(0, 50), more=st.integers(1, 100))
def test_cosine_decay_agrees_with_torch(warmup: int, more: int) -> None:
    """torch's own scheduler, started when the warm-up ends, gives the same rates."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=more)
    for step in range(warmup, warmup + more):
        found = learning_rate_at(step, peak=1e-3, warmup_steps=warmup, steps=warmup + more, decay="cosine")
        assert found == pytest.approx(scheduler.get_last_lr()[0], rel=1e-6, abs=1e-9)
        optimizer.step()
        scheduler.step()


@given(step=st.integers(0, 10_000), warmup=st.integers(0, 500))
def test_learning_rate_never_exceeds_the_peak_nor_falls(step: int, warmup: int) -> None:
    now, then = (learning_rate_at(s, peak=1e-3, warmup_steps=warmup, steps=20_000) for s in (step, step + 1))
    assert 0 < now <= then <= 1e-3


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
    assert all(float(one.abs().max()) == 0 for one in before.exp_avg.values())
    engine.backward(loss_of(named, 0))
    engine.step(learning_rate=1.0)
    assert not torch.equal(before.parameters["up"], named[1][1])


def test_state_of_other_parameters_is_refused() -> None:
    engine = SingleEngine(parameters(), config=DpoConfig())
    state = fresh_state(dict(parameters()))
    renamed = dataclasses.replace(state, parameters={"down": state.parameters["down"], "left": state.parameters["up"]})
    with pytest.raises(SafetyDPOError, match=r"state of the 2 installed adapter parameters, found 2 .* at 'left'"):
        engine.load_state(renamed)
    reshaped = dataclasses.replace(state, exp_avg={**state.exp_avg, "up": torch.zeros(9)})
    with pytest.raises(SafetyDPOError, match="a first difference at 'up'"):
        engine.load_state(reshaped)


def test_signature_of_a_lora_config() -> None:
    assert lora_signature(LoraConfig(rank=4)).alpha == 4.0
    assert lora_signature(LoraConfig(rank=4, alpha=8.0)).alpha == 8.0


def test_the_signature_differs_by_attention_only_where_that_is_chosen() -> None:
    """Adapters, checkpoints and initial draws of experts without the setting are those of before."""
    assert lora_signature(LoraConfig(rank=4)).targets == ("to_q", "to_k", "to_v", "to_out.0")
    chosen = lora_signature(LoraConfig(rank=4, targets=("to_q", "to_v"), attention="cross"))
    assert chosen.targets == ("attn2.to_q", "attn2.to_v")


@pytest.mark.parametrize(("attention", "block"), [("self", "attn1"), ("cross", "attn2")])
def test_open_engine_installs_one_kind_of_attention(
    attention: str, block: str, backbone: StableDiffusion, config: DpoConfig
) -> None:
    both = [name for name, _ in backbone.named_linear_layers(LoraConfig().targets)]
    engine = open_engine(backbone, config=config, lora=LoraConfig.model_validate({"rank": 2, "attention": attention}))
    modules = {name.rsplit(".lora_", 1)[0] for name in engine.state().parameters}
    assert modules == {name for name in both if f".{block}." in name}
    assert 2 * len(modules) == len(both)
    engine.close()


def test_attention_of_a_transformer_cannot_be_chosen(config: DpoConfig, tmp_path: Path) -> None:
    build_model("sd3", tmp_path)
    model = load_backbone(BaseModelConfig(model=str(tmp_path)))
    with pytest.raises(
        UsageError, match=r"expected lora\.attention 'all' for a transformer, found 'self': only U-Nets"
    ):
        open_engine(model, config=config, lora=LoraConfig(attention="self"))


def test_open_engine_installs_the_slot(backbone: StableDiffusion, config: DpoConfig, lora: LoraConfig) -> None:
    engine = open_engine(backbone, config=config, lora=lora)
    assert set(engine.state().parameters) == {name for name, _ in backbone.adapter_parameters()}
    engine.close()


def test_plain_loop_with_several_processes_is_refused(
    backbone: StableDiffusion, config: DpoConfig, lora: LoraConfig
) -> None:
    with pytest.raises(UsageError, match=r"expected 1 process per expert for dpo\.strategy 'single', found 2"):
        open_engine(backbone, config=config, lora=lora, world_size=2)
