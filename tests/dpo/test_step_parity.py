from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from safetydpo.config.training import DpoConfig, LoraConfig
from safetydpo.diffusion.stable_diffusion import StableDiffusion
from safetydpo.dpo.batch import PreferenceData, step_batch
from safetydpo.dpo.step import policy_loss
from tests.dpo.plain_step import plain_policy_loss
from tests.dpo.slot import fill_slot
from tests.tiny import build_tiny_model

Make = Callable[..., PreferenceData]
Loss = Callable[..., tuple[Tensor, Tensor]]

SETTINGS: dict[str, dict[str, Any]] = {
    "small": {},
    "pairs alone": {"retention_weight": 0.0, "safe_rise_weight": 0.0},
    "everything that there was": {
        "beta": 10.0,
        "error_weighting": "velocity",
        "captions": "unsafe",
        "retention_weight": 3.0,
        "redirection_weight": 2.0,
        "safe_likelihood_weight": 0.5,
    },
}


def outcome(loss_of: Loss, backbone: StableDiffusion, data: PreferenceData, config: DpoConfig) -> list[Tensor]:
    batch = step_batch(data, 3, config=config, run_seed=5, expert="hate", num_timesteps=1000)
    loss, metrics = loss_of(backbone, batch, config=config)
    loss.backward()
    gradients = [parameter.grad for _, parameter in backbone.adapter_parameters()]
    for _, parameter in backbone.adapter_parameters():
        parameter.grad = None
    return [loss.detach(), metrics, *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_defaults_compute_what_the_step_without_options_did_bit_for_bit(
    kind: str, setting: str, tmp_path: Path, make_data: Make, config: DpoConfig, lora: LoraConfig
) -> None:
    """Loss, every number and every gradient, on a network that has moved away from its base."""
    build_tiny_model(tmp_path, prediction_type=kind)
    backbone = StableDiffusion.from_folder(tmp_path)
    fill_slot(backbone, lora, moved=True)
    config = config.model_copy(update=SETTINGS[setting])
    now = outcome(policy_loss, backbone, make_data(), config)
    before = outcome(plain_policy_loss, backbone, make_data(), config)
    assert len(now) == len(before) == 2 + len(backbone.adapter_parameters())
    assert all(torch.equal(one, other) for one, other in zip(now, before, strict=True))


# Loss, then the four errors, measured with the step that had no options.
MEASURED = {
    ("epsilon", "small"): (1.781301, 1.146579, 1.135777, 1.129754, 1.124951),
    ("epsilon", "everything that there was"): (2.340016, 4.713950, 4.643546, 4.655517, 4.610483),
    ("v_prediction", "small"): (0.7621576, 1.042726, 1.072008, 1.048961, 1.071934),
    ("v_prediction", "everything that there was"): (0.8450667, 1.040772, 1.072836, 1.044945, 1.072595),
}


@pytest.mark.parametrize(("kind", "setting"), MEASURED)
def test_defaults_compute_the_numbers_that_were_measured_before(
    kind: str, setting: str, tmp_path: Path, make_data: Make, config: DpoConfig, lora: LoraConfig
) -> None:
    """Holds the comparison above to the past: two copies could be changed together.

    Processors round float32 networks differently, by about 1e-6 of an error; beta / 2 = 50 makes up to 5e-4 of a logit
    out of 1e-5.
    """
    build_tiny_model(tmp_path, prediction_type=kind)
    backbone = StableDiffusion.from_folder(tmp_path)
    fill_slot(backbone, lora, moved=True)
    _, metrics, *_ = outcome(policy_loss, backbone, make_data(), config.model_copy(update=SETTINGS[setting]))
    loss, *errors = MEASURED[kind, setting]
    assert float(metrics[0]) == pytest.approx(loss, abs=5e-4)
    assert metrics[6:10].tolist() == pytest.approx(errors, rel=1e-5)
