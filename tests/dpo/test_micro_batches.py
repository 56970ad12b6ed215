from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from safetydpo.config.training import DpoConfig, LoraConfig
from safetydpo.diffusion.backbone import Condition
from safetydpo.diffusion.stable_diffusion import StableDiffusion
from safetydpo.dpo.batch import PreferenceData, StepBatch, step_batch
from safetydpo.dpo.engine import open_engine
from safetydpo.dpo.micro_batches import micro_batches
from safetydpo.dpo.step import policy_loss
from safetydpo.errors import UsageError
from tests.dpo.lessons import random_layers

Make = Callable[..., PreferenceData]


def batch_of(data: PreferenceData, config: DpoConfig) -> StepBatch:
    return step_batch(data, 0, config=config, run_seed=5, expert="hate", num_timesteps=1000)


def test_by_hand(make_data: Make, config: DpoConfig):
    """4 pairs and 2 benign pictures in parts of 2 pairs: rows 0, 1 with benign 0, then rows 2, 3 with benign 1."""
    batch = batch_of(make_data(), config)
    first, second = micro_batches(batch, pairs_per_forward=2)
    assert torch.equal(first.noise, batch.noise[:2])
    assert torch.equal(second.condition.tokens, batch.condition.tokens[2:])
    assert torch.equal(first.retention_noise, batch.retention_noise[:1])
    assert torch.equal(second.retention_condition.tokens, batch.retention_condition.tokens[1:])


def test_none_is_the_batch_itself(make_data: Make, config: DpoConfig):
    batch = batch_of(make_data(), config)
    (whole,) = micro_batches(batch, pairs_per_forward=None)
    assert whole is batch


@given(parts=st.integers(1, 4), per_part=st.integers(1, 3), benign_per_part=st.integers(0, 2))
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_parts_laid_end_to_end_are_the_batch(
    parts: int, per_part: int, benign_per_part: int, make_data: Make, config: DpoConfig
):
    config = config.model_copy(
        update={
            "pairs_per_step": parts * per_part,
            "retention_per_step": parts * benign_per_part,
            "retention_weight": float(benign_per_part > 0),
        }
    )
    batch = batch_of(make_data(), config)
    found = list(micro_batches(batch, pairs_per_forward=per_part))
    assert [one.num_pairs for one in found] == [per_part] * parts
    for field in fields(batch):
        whole, shares = getattr(batch, field.name), [getattr(one, field.name) for one in found]
        if isinstance(whole, Condition):
            whole, shares = whole.tokens, [share.tokens for share in shares]
        assert torch.equal(torch.cat(shares), whole), field.name


@pytest.mark.parametrize(
    ("at_once", "benign", "message"),
    [(3, 2, r"pairs_per_forward \(3\) .* found 4 pairs and 2 benign"), (1, 2, r"\(1\) .* found 4 pairs and 2 benign")],
)
def test_uneven_parts_are_refused(at_once: int, benign: int, message: str, make_data: Make, config: DpoConfig):
    batch = batch_of(make_data(), config.model_copy(update={"retention_per_step": benign}))
    with pytest.raises(UsageError, match=message):
        list(micro_batches(batch, pairs_per_forward=at_once))


@pytest.mark.parametrize("at_once", [1, 2])
def test_accumulated_gradients_are_those_of_one_batch(
    at_once: int, backbone: StableDiffusion, make_data: Make, config: DpoConfig, lora: LoraConfig
):
    """All terms on, a trained adapter: gradients within 2e-6 of the largest one, numbers to 1e-5 of their size.

    A logit is beta / 2 = 50 times a difference of float32 errors of about 1, so its own last digits are 50 x 1.2e-7.
    """
    config = config.model_copy(
        update={
            "redirection_weight": 1.0,
            "safe_likelihood_weight": 1.0,
            "retention_per_step": 4,
            "pairs_per_forward": at_once,
        }
    )
    engine = open_engine(backbone, config=config, lora=lora)
    backbone.load_adapter(random_layers(backbone, seed=3, size=0.02))
    batch = batch_of(make_data(), config)
    parameters = [parameter for _, parameter in backbone.adapter_parameters()]
    loss, whole = policy_loss(backbone, batch, config=config)
    expected = torch.autograd.grad(loss, parameters)
    parts = list(micro_batches(batch, pairs_per_forward=at_once))
    numbers = []
    for part in parts:
        loss, measured = policy_loss(backbone, part, config=config)
        engine.accumulate(loss / len(parts))
        numbers.append(measured)
    largest = max(float(one.abs().max()) for one in expected)
    for parameter, wanted in zip(parameters, expected, strict=True):
        assert parameter.grad is not None
        assert float((parameter.grad - wanted).abs().max()) < 2e-6 * largest
    assert torch.allclose(torch.stack(numbers).mean(dim=0), whole, rtol=1e-5, atol=6e-6)
    engine.close()
