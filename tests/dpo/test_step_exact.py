"""The reference is the network itself with its adapter off: exact at step 0, for every kind of prediction and loss."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from safetydpo.config.schema import BaseModelConfig
from safetydpo.config.training import DpoConfig, LoraConfig
from safetydpo.diffusion.backbone import Backbone
from safetydpo.diffusion.build import load_backbone
from safetydpo.diffusion.stable_diffusion import StableDiffusion
from safetydpo.dpo.batch import PreferenceData, StepBatch, step_batch
from safetydpo.dpo.loss import preference_loss, squared_error
from safetydpo.dpo.step import METRICS, policy_loss
from tests.diffusion.tiny_models import build_model
from tests.dpo.preferences import small_config
from tests.dpo.slot import fill_slot
from tests.dpo.test_families import preferences
from tests.dpo.test_loss_kinds import AT_STEP_ZERO

LORA = LoraConfig(rank=2)
# Epsilon, v-prediction and flow matching.
FAMILIES = {"sd1": "epsilon", "sd2": "v_prediction", "sd3": "flow"}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place: Path = tmp_path_factory.mktemp(request.param)
    build_model(request.param, place)
    (place / "kind.txt").write_text(FAMILIES[request.param])
    return place


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def backbone(request: pytest.FixtureRequest, folder: Path) -> Backbone:
    return load_backbone(BaseModelConfig(model=str(folder), dtype=request.param))


def batch_of(backbone: Backbone, data: PreferenceData, config: DpoConfig) -> StepBatch:
    return step_batch(data, 0, config=config, run_seed=5, expert="hate", num_timesteps=backbone.num_train_timesteps)


def test_step_zero_is_exact_for_every_loss(backbone: Backbone, folder: Path) -> None:
    """beta = 5000 would show any difference in the last bit.

    Mean and value are enough to say that *every* logit is 0: -log sigmoid is strictly convex, so a mean of exactly ln 2
    at a mean logit of exactly 0 leaves no room for others."""
    assert backbone.prediction_type == (folder / "kind.txt").read_text()
    data = preferences(backbone)
    fill_slot(backbone, LORA)
    everything: dict[str, Any] = {"beta": 5000.0, "error_weighting": "min_snr", "output_preservation_weight": 2.0}
    for kind, value in AT_STEP_ZERO.items():
        config = small_config().model_copy(update={**everything, "loss": kind})
        loss, metrics = policy_loss(backbone, batch_of(backbone, data, config), config=config)
        named = dict(zip(METRICS, metrics.tolist(), strict=True))
        assert torch.equal(loss.detach(), torch.tensor(value, dtype=torch.float32)), kind
        assert (named["margin"], named["implicit_accuracy"], named["safe_rise"]) == (0.0, 0.5, 0.0)
        assert named["retention"] == 0.0
        assert named["error_policy_safe"] == named["error_reference_safe"] > 0
        assert named["error_policy_unsafe"] == named["error_reference_unsafe"] > 0


@pytest.mark.parametrize(("size", "least"), [(0.1, 0.04), (0.5, 0.25)])
def test_a_reference_reduced_in_float16_would_give_wrong_logits(size: float, least: float) -> None:
    """One prediction as policy and as reference, 256 pairs of 4 x 64 x 64, beta / 2 = 2500, mean squared error `size`.

    With the reference's error reduced in float16 beside a policy's in float32, the logits of equal networks are off by
    0.06 and 0.4 (root mean square); ours are exactly 0."""
    generator = torch.Generator().manual_seed(0)
    shape = (512, 4, 64, 64)
    target = torch.randn(shape, generator=generator).half()
    prediction = (target.float() + math.sqrt(size) * torch.randn(shape, generator=generator)).half()
    policy = squared_error(prediction, target)
    assert float(policy.mean()) == pytest.approx(size, rel=0.01)
    in_half = F.mse_loss(prediction, target, reduction="none").mean(dim=(1, 2, 3))
    assert in_half.dtype == torch.float16

    def logits(reference: torch.Tensor) -> torch.Tensor:
        return preference_loss(
            *policy.chunk(2),
            error_reference_safe=reference.chunk(2)[0],
            error_reference_unsafe=reference.chunk(2)[1],
            beta=5000.0,
            safe_rise_weight=0.0,
        ).logits

    assert float(logits(in_half.float()).square().mean().sqrt()) > least
    assert torch.equal(logits(squared_error(prediction, target)), torch.zeros(256))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss": "hinge", "error_weighting": "velocity", "redirection_weight": 0.5},
        {"loss": "ipo", "safe_likelihood_weight": 0.5},
        {"loss": "kto", "error_weighting": "min_snr"},
        {"loss": "mapo", "safe_rise_weight": 0.0, "safe_likelihood_weight": 0.04, "output_preservation_weight": 3.0},
    ],
    ids=lambda changes: changes.get("loss", "sigmoid"),
)
def test_the_gradient_of_a_whole_step_agrees_with_finite_differences(
    changes: dict[str, Any], tiny_folder: Path, make_data: Any
) -> None:
    """Central differences in float64 along a random direction of all adapter tensors, through network and loss.

    The reference point of `kto` is held still, as it is for the gradient."""
    backbone = StableDiffusion.from_folder(tiny_folder, dtype=torch.float64)
    fill_slot(backbone, LORA, moved=True)
    backbone.network.double()
    config = small_config().model_copy(update={"beta": 5.0, **changes})
    batch = batch_of(backbone, make_data(), config)
    parameters = [parameter for _, parameter in backbone.adapter_parameters()]
    assert {parameter.dtype for parameter in parameters} == {torch.float64}

    def loss() -> torch.Tensor:
        point = torch.tensor(0.2, dtype=torch.float64)
        return policy_loss(backbone, batch, config=config, mean_over_processes=lambda _: point)[0]

    gradients = torch.autograd.grad(loss(), parameters)
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(one.shape, generator=generator, dtype=torch.float64) for one in parameters]

    def moved(step: float) -> float:
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(step * direction)
            value = float(loss())
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.sub_(step * direction)
        return value

    slope = sum(float((one * other).sum()) for one, other in zip(gradients, directions, strict=True))
    assert abs(slope) > 1e-3
    assert slope == pytest.approx((moved(1e-5) - moved(-1e-5)) / 2e-5, rel=1e-6)
