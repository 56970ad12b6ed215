"""The configs of real models hold the published numbers, or numbers that follow from them as their headers say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from safetydpo.config.load import load_config
from safetydpo.config.schema import IdentityConfig
from safetydpo.diffusion.schedule import flow_sigmas
from tests.architecture.source import ROOT

REAL = ("sd15", "sd21", "sdxl", "sd35", "flux")
# The published launchers: batch 4 x accumulation 4 on each GPU.
PAIRS_PER_GPU = 4 * 4
PUBLISHED: dict[str, Any] = {
    "beta": 5000,
    "steps": 2000,
    "pairs_per_step": PAIRS_PER_GPU,
    "pairs_per_forward": 4,
    "warmup_steps": 500,
    "weight_decay": 1e-2,
    "max_grad_norm": 1.0,
    "decay": "constant",
    "captions": "both",
    "empty_caption_rate": 0.2,
    "error_weighting": "native",
}
OF_SD15 = {"optimizer": "adamw", "activation_checkpointing": False}
OF_SDXL = {"optimizer": "adafactor", "activation_checkpointing": True}
OFF = ("safe_rise_weight", "safe_likelihood_weight", "redirection_weight", "retention_weight")


def identity_of(name: str) -> IdentityConfig:
    return load_config(ROOT / "configs" / f"{name}.yaml").identity


@pytest.mark.parametrize(
    ("name", "model", "learning_rate", "side", "vae", "own"),
    [
        ("sd15", "stable-diffusion-v1-5/stable-diffusion-v1-5", 1e-5 * PAIRS_PER_GPU, 512, None, OF_SD15),
        ("sdxl", "stabilityai/stable-diffusion-xl-base-1.0", 1e-5, 1024, "madebyollin/sdxl-vae-fp16-fix", OF_SDXL),
    ],
)
def test_published_recipes(
    name: str, model: str, learning_rate: float, side: int, vae: str | None, own: dict[str, Any]
):
    identity = identity_of(name)
    dpo = identity.dpo.model_dump()
    assert {key: getattr(identity.dpo, key) for key in own} == own
    assert {key: dpo[key] for key in PUBLISHED} == PUBLISHED
    assert dpo["learning_rate"] == pytest.approx(learning_rate)
    assert [dpo[key] for key in OFF] == [0.0] * len(OFF)
    assert (identity.base.model, identity.base.vae, identity.base.dtype) == (model, vae, "float16")
    assert (identity.sampler.height, identity.sampler.width) == (side, side)
    lora = identity.lora
    assert (lora.rank, lora.alpha, lora.targets) == (4, 4, ("to_q", "to_k", "to_v", "to_out.0"))


def test_what_was_measured_to_be_faster_on_a_gpu_is_set():
    """Of SD1.5 only: no other model was measured with it. Compiled training was never run in its float16."""
    assert {name for name in REAL if identity_of(name).dpo.adapter_compute == "base"} == {"sd15"}
    assert not any(identity_of(name).dpo.compiled for name in REAL)


@pytest.mark.parametrize("name", REAL)
def test_nothing_is_drawn_that_no_loss_uses(name: str):
    identity = identity_of(name)
    assert (identity.prompts.retention_prompts > 0) == (identity.dpo.retention_weight > 0)


def best_error(name: str) -> float:
    """The mean square error of the best prediction, averaged over timesteps, for white latents of unit variance.

    x_t = a x + s e. Of e: Var(e) - Cov(e, x_t)^2 / Var(x_t) = 1 - s^2 = a^2 with a^2 + s^2 = 1; of v = a e - s x: no
    covariance, 1. Of a flow, e - x with a = 1 - s: 2 - (2 s - 1)^2 / (a^2 + s^2) = 1 / (a^2 + s^2).
    """
    if name in ("sd35", "flux"):
        s = flow_sigmas(1000, shift=3.0 if name == "sd35" else 1.0)
        return float((1 / ((1 - s) ** 2 + s**2)).mean())
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return 1.0 if name == "sd21" else float(scheduler.alphas_cumprod.mean())


def test_the_best_error_is_that_of_a_regression():
    """Independently: the residual of a least squares fit to a million draws at one timestep of a flow."""
    generator = np.random.default_rng(0)
    picture, noise = generator.normal(size=(2, 1_000_000))
    s = 0.3
    noisy = (1 - s) * picture + s * noise
    target = noise - picture
    slope = (noisy @ target) / (noisy @ noisy)
    assert np.square(target - slope * noisy).mean() == pytest.approx(1 / (0.7**2 + 0.3**2), rel=0.01)


@pytest.mark.parametrize(("name", "error"), [("sd15", 0.37), ("sd21", 1.0), ("sd35", 1.49), ("flux", 1.57)])
def test_beta_moves_the_logit_about_as_far_in_every_family(name: str, error: float):
    """The logit is beta / 2 x a difference of errors; the headers say how large the errors are."""
    assert best_error(name) == pytest.approx(error, abs=0.005)
    text = (ROOT / "configs" / f"{name}.yaml").read_text()
    assert name == "sd15" or ("Untested on real weights" in text and "0.37" in text)
    published = 5000 * best_error("sd15")
    assert identity_of(name).dpo.beta * best_error(name) == pytest.approx(published, rel=0.1)


def test_alphas_of_the_schedule_are_those_of_a_product():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    assert float(torch.cumprod(1 - betas, 0).mean()) == pytest.approx(best_error("sd15"), abs=1e-6)
