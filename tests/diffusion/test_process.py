from __future__ import annotations

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from safetydpo.diffusion.process import Diffusion, FlowMatching
from safetydpo.errors import SafetyDPOError

CPU = torch.device("cpu")
V_TO_ZERO = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def test_zero_terminal_snr_is_read_from_the_scheduler():
    """At the last timestep nothing of the picture is left: z_t = n, v = -z, and the noise is read off z_t."""
    process = Diffusion(dict(DDIMScheduler(**V_TO_ZERO).config), device=CPU)
    assert float(process.alphas_cumprod[-1]) == 0.0
    latents, noise = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    last = torch.full((3,), 999)
    noisy = process.add_noise(latents, noise, last)
    assert torch.equal(noisy, noise)
    target = process.target(latents, noise, last, kind="native")
    assert torch.equal(target, -latents)
    assert torch.equal(process.to_epsilon(target, noisy, last), noise)
    assert torch.equal(process.velocity_weights(last), torch.ones(3))
    assert int(process.solver(10, num_patches=None).timesteps[0]) == 999


def test_an_epsilon_network_with_zero_terminal_snr_is_refused():
    config = dict(DDIMScheduler(**V_TO_ZERO | {"prediction_type": "epsilon"}).config)
    with pytest.raises(SafetyDPOError, match="expected prediction_type v_prediction with rescale_betas_zero_snr"):
        Diffusion(config, device=CPU)


def test_a_schedule_without_betas_is_refused():
    config = dict(EDMEulerScheduler().config) | {"_class_name": "EDMEulerScheduler"}
    with pytest.raises(SafetyDPOError, match="expected a scheduler of a diffusion model .* found 'EDMEulerScheduler'"):
        Diffusion(config, device=CPU)


def test_stochastic_samplers_are_made_deterministic():
    sde = dict(DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++").config)
    assert Diffusion(sde, device=CPU).solver(3, num_patches=None).config.algorithm_type == "dpmsolver++"
    flow = dict(FlowMatchEulerDiscreteScheduler(stochastic_sampling=True).config) | {
        "_class_name": "FlowMatchEulerDiscreteScheduler"
    }
    solver = FlowMatching(flow, device=CPU, first_sigmas="scheduler").solver(3, num_patches=None)
    assert not solver.config.stochastic_sampling


def flow(**settings: object) -> dict[str, object]:
    config = dict(FlowMatchEulerDiscreteScheduler(**settings).config)
    return config | {"_class_name": "FlowMatchEulerDiscreteScheduler"}


def test_network_times_of_a_flow_model_by_hand():
    """Shift 3, 1000 timesteps: t = 499 is b = 0.5, s = 1.5 / 2 = 0.75, told as 750; t = 999 is pure noise, 1000."""
    process = FlowMatching(flow(shift=3.0), device=CPU, first_sigmas="scheduler")
    assert process.prediction_type == "flow"
    assert process.network_times(torch.tensor([499, 999])).tolist() == pytest.approx([750.0, 1000.0])
    assert process.timesteps_of(torch.tensor([750.0, 1000.0])) == pytest.approx([499.0, 999.0], abs=1e-3)


def test_a_dynamic_shift_needs_the_size_of_the_picture_and_is_one_of_sampling_only():
    process = FlowMatching(flow(use_dynamic_shifting=True, shift=3.0), device=CPU, first_sigmas="linear")
    torch.testing.assert_close(process.sigmas, torch.arange(1, 1001) / 1000)
    with pytest.raises(SafetyDPOError, match="expected the size of the picture, because this model's sampling steps"):
        process.solver(4, num_patches=None)
    small, large = (process.solver(4, num_patches=patches).sigmas for patches in (256, 4096))
    assert (large[1:4] > small[1:4]).all()
    # exp(0.5) at 256 patches: s = e^0.5 / (e^0.5 + 1 / 0.75 - 1) for the second of four steps.
    assert float(small[1]) == pytest.approx(1.6487213 / (1.6487213 + 1 / 3), rel=1e-5)


@pytest.mark.parametrize(
    ("config", "found"),
    [(flow(invert_sigmas=True), "with invert_sigmas"), (flow() | {"_class_name": "DDIMScheduler"}, "'DDIMScheduler'")],
)
def test_another_flow_scheduler_is_refused(config: dict[str, object], found: str):
    with pytest.raises(SafetyDPOError, match=f"expected a FlowMatchEulerDiscreteScheduler .*{found}"):
        FlowMatching(config, device=CPU, first_sigmas="scheduler")
