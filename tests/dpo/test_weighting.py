from __future__ import annotations

import pytest
import torch

from safetydpo.config.training import DpoConfig
from safetydpo.diffusion.stable_diffusion import StableDiffusion
from safetydpo.dpo.weighting import error_weights


def test_weights_are_those_that_the_setting_names(backbone: StableDiffusion):
    timesteps = torch.tensor([0, 500, 999])

    def weights(**settings: object) -> torch.Tensor | None:
        return error_weights(backbone, timesteps, config=DpoConfig.model_validate(settings))

    assert weights() is None
    velocity, snr, small = (
        weights(error_weighting="velocity"),
        weights(error_weighting="min_snr"),
        weights(error_weighting="min_snr", min_snr_gamma=1.0),
    )
    assert velocity is not None
    assert snr is not None
    assert small is not None
    assert torch.equal(velocity, backbone.velocity_weights(timesteps))
    assert torch.equal(snr, backbone.min_snr_weights(timesteps, gamma=5.0))
    assert float(small[0]) == pytest.approx(float(snr[0]) / 5)
    assert float(snr[2]) == 1.0
