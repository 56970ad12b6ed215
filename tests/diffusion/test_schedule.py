from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from safetydpo.diffusion.schedule import (
    add_noise,
    add_noise_flow,
    draw_timesteps,
    epsilon_target,
    epsilon_to_clean,
    flow_sigmas,
    flow_target,
    flow_to_epsilon,
    min_snr_weights_epsilon,
    min_snr_weights_flow,
    min_snr_weights_v,
    shift_for_tokens,
    sigmas_at,
    start_step_for_strength,
    timesteps_at,
    v_target,
    v_to_epsilon,
    velocity_weights_epsilon,
)


def pixel(value: float, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full((1, 1, 1, 1), value, dtype=dtype)


def test_one_pixel_by_hand():
    """a_t = 0.64: sqrt = 0.8, sqrt(1 - a_t) = 0.6. With z = 1 and n = 2:

    z_t = 0.8 * 1 + 0.6 * 2 = 2.0;  v = 0.8 * 2 - 0.6 * 1 = 1.0;
    n from v = 0.8 * 1.0 + 0.6 * 2.0 = 2.0;  z from n = (2.0 - 0.6 * 2) / 0.8 = 1.0.
    """
    at = {"timesteps": torch.tensor([1]), "alphas_cumprod": torch.tensor([0.9, 0.64])}
    noisy = add_noise(pixel(1.0), pixel(2.0), **at)
    v = v_target(pixel(1.0), pixel(2.0), **at)
    assert noisy.item() == pytest.approx(2.0)
    assert v.item() == pytest.approx(1.0)
    assert v_to_epsilon(v, noisy, **at).item() == pytest.approx(2.0)
    assert epsilon_to_clean(pixel(2.0), noisy, **at).item() == pytest.approx(1.0)
    assert epsilon_target(pixel(1.0), pixel(2.0)).item() == 2.0


def test_one_flow_pixel_by_hand():
    """s = 0.25, z = 1, n = 3: z_s = 0.75 * 1 + 0.25 * 3 = 1.5; u = 3 - 1 = 2; n = 1.5 + 0.75 * 2 = 3."""
    sigmas = torch.tensor([0.25])
    noisy = add_noise_flow(pixel(1.0), pixel(3.0), sigmas=sigmas)
    velocity = flow_target(pixel(1.0), pixel(3.0))
    assert noisy.item() == 1.5
    assert velocity.item() == 2.0
    assert flow_to_epsilon(velocity, noisy, sigmas=sigmas).item() == 3.0


def test_min_snr_weights_by_hand():
    """gamma 5. a = 0.9: SNR 9, weights 5/9 and 5/10. a = 0.5: SNR 1, weights 1 and 1/2. a = 0: SNR 0, weights 1, 0."""
    alphas = torch.tensor([0.9, 0.5, 0.0])
    steps = torch.arange(3)
    np.testing.assert_allclose(min_snr_weights_epsilon(steps, alphas), [5 / 9, 1.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(min_snr_weights_v(steps, alphas), [0.5, 0.5, 0.0], rtol=1e-6)


def test_min_snr_weights_equal_numpy_on_the_whole_schedule():
    alphas = DDPMScheduler(beta_schedule="scaled_linear").alphas_cumprod
    a = alphas.double().numpy()
    snr = a / (1 - a)
    steps = torch.arange(1000)
    np.testing.assert_allclose(
        min_snr_weights_epsilon(steps, alphas.double(), gamma=3.0), np.minimum(snr, 3) / snr, rtol=1e-12
    )
    np.testing.assert_allclose(
        min_snr_weights_v(steps, alphas.double(), gamma=3.0), np.minimum(snr, 3) / (snr + 1), rtol=1e-12
    )


def test_min_snr_weights_of_flow_by_hand():
    """gamma 5. s = 0.5: SNR 1, 0.25 * 1. s = 0.2: SNR 16, 0.04 * 5 = 0.2. s = 1: SNR 0, weight 0."""
    weights = min_snr_weights_flow(torch.arange(3), torch.tensor([0.5, 0.2, 1.0]))
    np.testing.assert_allclose(weights, [0.25, 0.2, 0.0], rtol=1e-6)


def test_min_snr_weights_of_flow_equal_numpy_on_the_whole_schedule():
    sigmas = flow_sigmas(1000, shift=3.0).double()
    s = sigmas.numpy()
    found = min_snr_weights_flow(torch.arange(1000), sigmas, gamma=3.0)
    np.testing.assert_allclose(found, s**2 * np.minimum((1 - s) ** 2 / s**2, 3.0), rtol=1e-12, atol=1e-15)
    # Largest at s = 1 / (1 + sqrt(gamma)).
    assert float(sigmas[found.argmax()]) == pytest.approx(1 / (1 + 3**0.5), abs=2e-3)


@pytest.mark.parametrize("step", [20, 400, 900])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_min_snr_weights_are_those_of_the_clean_pictures_error(kind: str, step: int):
    """From one noisy latent: change the prediction by d, work out the clean latents anew, compare squared errors.

    Min-SNR's own statement: the error of the clean picture counts min(SNR, gamma)."""
    generator = torch.Generator().manual_seed(step)
    steps = torch.tensor([step])
    latents, noise, change = (torch.randn(1, 2, 3, 3, generator=generator, dtype=torch.float64) for _ in "abc")
    gamma = 2.0
    if kind == "flow":
        sigmas = flow_sigmas(1000, shift=3.0).double()
        share = sigmas[steps]
        snr, weights = (1 - share) ** 2 / share**2, min_snr_weights_flow(steps, sigmas, gamma=gamma)
        noisy = add_noise_flow(latents, noise, sigmas=share)
        clean = noisy - share * (flow_target(latents, noise) + change)
    else:
        alphas = DDPMScheduler(beta_schedule="scaled_linear").alphas_cumprod.double()
        at = {"timesteps": steps, "alphas_cumprod": alphas}
        snr = alphas[steps] / (1 - alphas[steps])
        noisy = add_noise(latents, noise, **at)
        if kind == "epsilon":
            weights, epsilon = min_snr_weights_epsilon(steps, alphas, gamma=gamma), noise + change
        else:
            weights = min_snr_weights_v(steps, alphas, gamma=gamma)
            epsilon = v_to_epsilon(v_target(latents, noise, **at) + change, noisy, **at)
        clean = epsilon_to_clean(epsilon, noisy, **at)
    wanted = float(snr.clamp(max=gamma)) * float((clean - latents).square().mean())
    assert float(weights) * float(change.square().mean()) == pytest.approx(wanted, rel=1e-9)


def test_velocity_weights_by_hand():
    """1 / a: a = 0.5 gives 2, a = 0.1 gives 10; a = 0.01 would give 100 and is held at 20."""
    weights = velocity_weights_epsilon(torch.arange(3), torch.tensor([0.5, 0.1, 0.01]))
    np.testing.assert_allclose(weights, [2.0, 10.0, 20.0], rtol=1e-6)


@pytest.mark.parametrize("step", [0, 300, 700])
def test_velocity_weights_turn_errors_of_epsilon_into_errors_of_v(step):
    """From one noisy latent: change epsilon by d, work out clean latents and v anew, compare the squared errors."""
    generator = torch.Generator().manual_seed(step)
    alphas = DDPMScheduler(beta_schedule="scaled_linear").alphas_cumprod.double()
    steps = torch.tensor([step])
    latents, noise, change = (torch.randn(1, 2, 3, 3, generator=generator, dtype=torch.float64) for _ in "abc")
    noisy = add_noise(latents, noise, timesteps=steps, alphas_cumprod=alphas)
    guess = noise + change
    clean = epsilon_to_clean(guess, noisy, timesteps=steps, alphas_cumprod=alphas)
    errors = v_target(clean, guess, timesteps=steps, alphas_cumprod=alphas) - v_target(
        latents, noise, timesteps=steps, alphas_cumprod=alphas
    )
    weight = float(velocity_weights_epsilon(steps, alphas, maximum=1e9))
    assert float(errors.square().mean()) == pytest.approx(weight * float(change.square().mean()), rel=1e-9)


def test_noising_and_v_equal_diffusers_bit_for_bit():
    reference = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 1000, 4, 2, 2, generator=generator)
    at = {"timesteps": torch.arange(1000), "alphas_cumprod": reference.alphas_cumprod}
    assert torch.equal(add_noise(latents, noise, **at), reference.add_noise(latents, noise, at["timesteps"]))
    assert torch.equal(v_target(latents, noise, **at), reference.get_velocity(latents, noise, at["timesteps"]))


@given(
    alpha=st.floats(0.01, 0.99),
    clean=st.floats(-4, 4),
    noise=st.floats(-4, 4),
)
def test_every_prediction_kind_gives_back_the_noise(alpha: float, clean: float, noise: float):
    z, n = pixel(clean, dtype=torch.float64), pixel(noise, dtype=torch.float64)
    at = {"timesteps": torch.tensor([0]), "alphas_cumprod": torch.tensor([alpha], dtype=torch.float64)}
    noisy = add_noise(z, n, **at)
    assert v_to_epsilon(v_target(z, n, **at), noisy, **at).item() == pytest.approx(noise, abs=1e-12)
    assert epsilon_to_clean(n, noisy, **at).item() == pytest.approx(clean, abs=1e-12)
    sigmas = torch.tensor([alpha], dtype=torch.float64)
    on_line = add_noise_flow(z, n, sigmas=sigmas)
    assert flow_to_epsilon(flow_target(z, n), on_line, sigmas=sigmas).item() == pytest.approx(noise, abs=1e-12)


def test_half_precision_latents_keep_their_type():
    at = {"timesteps": torch.tensor([0]), "alphas_cumprod": torch.tensor([0.5])}
    assert add_noise(pixel(1.0).half(), pixel(1.0).half(), **at).dtype == torch.float16


def test_shapes_are_checked():
    with pytest.raises(TypeCheckError):
        add_noise(torch.zeros(2, 1, 1), torch.zeros(2, 1, 1), timesteps=torch.tensor([0]), alphas_cumprod=torch.ones(1))


def test_draw_timesteps_covers_the_range_and_repeats_with_the_seed():
    drawn = draw_timesteps(2000, torch.Generator().manual_seed(3), num_train_timesteps=10, low=4)
    assert sorted(set(drawn.tolist())) == [4, 5, 6, 7, 8, 9]
    assert torch.equal(drawn, draw_timesteps(2000, torch.Generator().manual_seed(3), num_train_timesteps=10, low=4))


def test_draw_timesteps_refuses_an_empty_range():
    with pytest.raises(ValueError, match="expected 0 <= low < num_train_timesteps, found low 10 and 10"):
        draw_timesteps(1, torch.Generator(), num_train_timesteps=10, low=10)


@pytest.mark.parametrize(("strength", "start"), [(1.0, 0), (0.0, 10), (0.5, 5), (0.39, 7)])
def test_start_step_by_hand(strength: float, start: int):
    """10 steps: floor(10 * 0.39) = 3 steps are run, so the first is number 7."""
    assert start_step_for_strength(strength, steps=10) == start


def test_start_step_refuses_a_strength_above_one():
    with pytest.raises(ValueError, match=r"expected a strength in \[0, 1\], found 1.5"):
        start_step_for_strength(1.5, steps=10)


def test_flow_sigmas_by_hand():
    """Four timesteps, shift 3: b = 1/4, 1/2, 3/4, 1 gives 3b / (1 + 2b) = 0.5, 0.75, 0.9, 1."""
    assert flow_sigmas(4).tolist() == [0.25, 0.5, 0.75, 1.0]
    torch.testing.assert_close(flow_sigmas(4, shift=3.0), torch.tensor([0.5, 0.75, 0.9, 1.0]))


@pytest.mark.parametrize("shift", [1.0, 1.7, 3.0, 0.5])
def test_flow_sigmas_are_the_training_grid_of_diffusers(shift: float):
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift).sigmas.flip(0)
    torch.testing.assert_close(flow_sigmas(1000, shift=shift), theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("steps", "shift"), [(0, 1.0), (10, 0.0), (10, -1.0)])
def test_flow_sigmas_refuse_an_empty_schedule(steps: int, shift: float):
    with pytest.raises(ValueError, match="expected at least 1 timestep and a shift above 0, found"):
        flow_sigmas(steps, shift=shift)


def test_sigmas_between_timesteps_by_hand():
    """Halfway between 0.5 and 0.75 lies 0.625, a quarter of the way from 0.9 to 1.0 lies 0.925."""
    sigmas = torch.tensor([0.5, 0.75, 0.9, 1.0])
    assert torch.equal(sigmas_at(torch.tensor([3, 0]), sigmas), torch.tensor([1.0, 0.5]))
    torch.testing.assert_close(
        sigmas_at(torch.tensor([0.5, 2.25, 3.0]), sigmas), torch.tensor([0.625, 0.925, 1.0]), rtol=0, atol=1e-7
    )
    torch.testing.assert_close(
        timesteps_at(torch.tensor([0.625, 0.925, 1.0, 0.1]), sigmas), torch.tensor([0.5, 2.25, 3.0, 0.0])
    )


@given(times=st.lists(st.floats(0, 999, width=32), min_size=1, max_size=8), shift=st.floats(0.3, 8.0))
def test_timesteps_and_sigmas_are_inverse_and_equal_numpy(times: list[float], shift: float):
    share = np.arange(1, 1001) / 1000
    reference = shift * share / (1 + (shift - 1) * share)
    sigmas = flow_sigmas(1000, shift=shift)
    found = sigmas_at(torch.tensor(times), sigmas)
    np.testing.assert_allclose(found.numpy(), np.interp(times, np.arange(1000), reference), rtol=1e-4, atol=1e-6)
    back = timesteps_at(found.double(), sigmas.double())
    assert sigmas_at(back, sigmas.double()).numpy() == pytest.approx(found.double().numpy(), abs=1e-6)
    assert back.numpy() == pytest.approx(np.array(times), abs=0.05)


def test_the_flow_path_equals_diffusers_and_numpy():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 1000, 4, 2, 2, generator=generator)
    timesteps = torch.arange(1000)
    sigmas = sigmas_at(timesteps, flow_sigmas(1000, shift=3.0))
    noisy = add_noise_flow(latents, noise, sigmas=sigmas)
    torch.testing.assert_close(
        noisy, scheduler.scale_noise(latents, scheduler.timesteps.flip(0), noise), rtol=1e-5, atol=1e-6
    )
    by_hand = (1 - sigmas.numpy())[:, None, None, None] * latents.numpy()
    by_hand = by_hand + sigmas.numpy()[:, None, None, None] * noise.numpy()
    np.testing.assert_allclose(noisy.numpy(), by_hand, rtol=1e-6, atol=1e-6)
    assert np.array_equal(flow_target(latents, noise).numpy(), noise.numpy() - latents.numpy())


def test_shift_of_a_picture_by_hand():
    """FLUX.1: 0.5 at 256 patches, 1.15 at 4096: half of the way (2176) is 0.825; as diffusers computes it."""
    line = {"base_shift": 0.5, "max_shift": 1.15}
    for tokens, wanted in ((256, 0.5), (4096, 1.15), (2176, 0.825)):
        found = shift_for_tokens(tokens, base_tokens=256, max_tokens=4096, **line)
        assert found == pytest.approx(wanted)
        assert found == pytest.approx(calculate_shift(tokens, 256, 4096, **line))
