from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safetydpo.config.training import DpoConfig, LoraConfig
from safetydpo.diffusion.stable_diffusion import StableDiffusion
from safetydpo.dpo.engine import learning_rate_at, lora_signature, open_engine
from safetydpo.dpo.plain_engine import SingleEngine
from safetydpo.errors import UsageError


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


def test_signature_of_a_lora_config() -> None:
    assert lora_signature(LoraConfig(rank=4)).alpha == 4.0
    assert lora_signature(LoraConfig(rank=4, alpha=8.0)).alpha == 8.0


def test_open_engine_installs_the_slot(backbone: StableDiffusion, config: DpoConfig, lora: LoraConfig) -> None:
    engine = open_engine(backbone, config=config, lora=lora)
    assert set(engine.state().parameters) == {name for name, _ in backbone.adapter_parameters()}
    engine.close()


def test_plain_loop_with_several_processes_is_refused(
    backbone: StableDiffusion, config: DpoConfig, lora: LoraConfig
) -> None:
    with pytest.raises(UsageError, match=r"expected 1 process per expert for dpo\.strategy 'single', found 2"):
        open_engine(backbone, config=config, lora=lora, world_size=2)


def test_a_float16_base_is_trained_with_a_loss_scale(
    shared_backbone: StableDiffusion, config: DpoConfig, lora: LoraConfig
) -> None:
    for dtype, expected in ((torch.float32, None), (torch.bfloat16, None), (torch.float16, 65536.0)):
        backbone = copy.deepcopy(shared_backbone)
        backbone.network.to(dtype)
        engine = open_engine(backbone, config=config, lora=lora)
        assert isinstance(engine, SingleEngine)
        assert (engine.loss_scale and engine.loss_scale.value) == expected


def test_activation_checkpointing_is_set_by_each_opening(
    backbone: StableDiffusion, config: DpoConfig, lora: LoraConfig
) -> None:
    for wanted in (True, False):
        open_engine(backbone, config=config.model_copy(update={"activation_checkpointing": wanted}), lora=lora)
        assert backbone.network.is_gradient_checkpointing is wanted
