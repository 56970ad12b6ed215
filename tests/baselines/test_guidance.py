from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from safetydpo.baselines.guidance import erasing_target, next_momentum, safety_guidance, safety_scale


def of(*values: float) -> Tensor:
    return torch.tensor(values).reshape(1, len(values), 1, 1)


def test_scale_momentum_and_guidance_by_hand():
    """eps_p - eps_S = (0.1, -0.1): only the second is below lambda = 0.05; phi = 2 x -0.1, so mu = (0, 0.2).

    gamma = mu (eps_S - eps_0) + s_m nu = (0 x 0.3, 0.2 x 0.2) + 0.5 (1, 1) = (0.5, 0.54);
    nu <- 0.7 (1, 1) + 0.3 gamma = (0.85, 0.862).
    """
    empty, prompt, safety, momentum = of(0.1, 0.1), of(0.5, 0.2), of(0.4, 0.3), of(1.0, 1.0)
    mu = safety_scale(prompt, safety, scale=2.0, threshold=0.05)
    torch.testing.assert_close(mu, of(0.0, 0.2))
    gamma = safety_guidance(empty, prompt, safety, momentum=momentum, scale=2.0, threshold=0.05, momentum_scale=0.5)
    torch.testing.assert_close(gamma, of(0.5, 0.54))
    torch.testing.assert_close(next_momentum(momentum, gamma, beta=0.7), of(0.85, 0.862))


def test_the_scale_is_at_most_one():
    """|phi| = 5000 x 0.3 is cut to 1."""
    torch.testing.assert_close(safety_scale(of(0.1), of(0.4), scale=5000.0, threshold=0.0), of(1.0))


def test_differences_of_v_are_turned_into_noise():
    """Half as much noise per unit: the difference -0.1 counts as -0.05, which is above a threshold of -0.07."""
    settings = {"scale": 2.0, "threshold": -0.07}
    torch.testing.assert_close(safety_scale(of(0.2), of(0.3), **settings), of(0.2))
    torch.testing.assert_close(safety_scale(of(0.2), of(0.3), noise_factor=0.5, **settings), of(0.0))


def test_erasing_target_by_hand():
    """eps_0 - 2 (eps_p - eps_0): 1 - 2 (3 - 1) = -3 and 0.5 - 2 (0.25 - 0.5) = 1."""
    torch.testing.assert_close(erasing_target(of(1.0, 0.5), of(3.0, 0.25), negative_guidance=2.0), of(-3.0, 1.0))


@given(st.integers(0, 2**31 - 1), st.floats(0.1, 1.0), st.floats(0.0, 3.0))
def test_the_target_is_the_same_for_noise_and_v(seed: int, alpha: float, negative_guidance: float):
    """v = (eps - s z) / a is affine in eps and the target's weights sum to 1, so that the two commute."""
    generator = torch.Generator().manual_seed(seed)
    empty, prompt, latents = torch.randn(3, 2, 1, 2, 2, generator=generator, dtype=torch.float64)
    sigma = (1 - alpha**2) ** 0.5

    def to_v(noise: Tensor) -> Tensor:
        return (noise - sigma * latents) / alpha

    expected = to_v(erasing_target(empty, prompt, negative_guidance=negative_guidance))
    found = erasing_target(to_v(empty), to_v(prompt), negative_guidance=negative_guidance)
    torch.testing.assert_close(found, expected)


@given(st.integers(0, 2**31 - 1), st.floats(0.0, 100.0), st.floats(-1.0, 1.0))
def test_it_acts_only_where_the_prompt_comes_near(seed: int, scale: float, threshold: float):
    generator = torch.Generator().manual_seed(seed)
    empty, prompt, safety = torch.randn(3, 2, 1, 2, 2, generator=generator)
    mu = safety_scale(prompt, safety, scale=scale, threshold=threshold)
    assert bool(((mu >= 0) & (mu <= 1)).all())
    assert bool((mu[prompt - safety >= threshold] == 0).all())
    gamma = safety_guidance(
        empty, prompt, safety, momentum=torch.zeros_like(mu), scale=scale, threshold=threshold, momentum_scale=0.3
    )
    assert bool((gamma.abs() <= (safety - empty).abs()).all())


def test_it_equals_the_diffusers_pipeline_step_by_step():
    """The published implementation of the same equations, over four steps with a warm-up of two."""
    from diffusers.pipelines.deprecated.stable_diffusion_safe.pipeline_stable_diffusion_safe import (
        StableDiffusionPipelineSafe,
    )

    generator = torch.Generator().manual_seed(0)
    ours = theirs = torch.zeros(2, 4, 3, 3)
    for step in range(4):
        empty, prompt, safety = torch.randn(3, 2, 4, 3, 3, generator=generator)
        guidance, theirs = StableDiffusionPipelineSafe.perform_safety_guidance(
            None, True, theirs, prompt - empty, (prompt, empty, safety), step, 3.0, 2, 0.1, 0.3, 0.4
        )
        gamma = safety_guidance(empty, prompt, safety, momentum=ours, scale=3.0, threshold=0.1, momentum_scale=0.3)
        ours = next_momentum(ours, gamma, beta=0.4)
        torch.testing.assert_close(prompt - empty - (gamma if step >= 2 else 0.0), guidance)
        torch.testing.assert_close(ours, theirs)


def test_shapes_are_checked():
    with pytest.raises(Exception, match="(?i)type-check"):
        safety_scale(torch.zeros(1, 2), torch.zeros(1, 3), scale=1.0, threshold=0.0)
