"""Draw pictures from prompts so that a picture's bytes depend on its own row only.

Axis legend: `row` prompts, `height width` picture axes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from safetydpo.config.schema import SamplerConfig
from safetydpo.diffusion.backbone import Backbone, Condition, GuidanceCallback
from safetydpo.diffusion.schedule import start_step_for_strength
from safetydpo.errors import SafetyDPOError


def initial_noise(
    seeds: Sequence[int], *, shape: tuple[int, int, int]
) -> Float[Tensor, "row channel latent_height latent_width"]:
    """Return unit Gaussian latents, each row drawn on the CPU from its own seed: equal on every device."""
    return torch.stack([torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds])


def render(
    backbone: Backbone,
    *,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampler: SamplerConfig,
    negative_prompt: str | Condition = "",
    callback: GuidanceCallback | None = None,
) -> UInt8[Tensor, "row height width 3"]:
    """Draw one picture per (prompt, seed), on the CPU, in the order given.

    The unguided branch sees `negative_prompt`, a text or a condition of one row; `callback` guides (see
    `Backbone.sample`).

    Every forward pass holds `sampler.batch_size` rows; the last batch is padded with its last row. So a
    picture's bytes depend on its prompt, its seed, the sampler and the model, not on its neighbours or position.

    Raises:
        SafetyDPOError: if there are not as many seeds as prompts, or a negative prompt for a model that has no
            unguided branch.
    """
    if len(prompts) != len(seeds):
        raise SafetyDPOError(
            f"expected one seed per prompt, found {len(prompts)} prompts and {len(seeds)} seeds: "
            "derive a seed for every row"
        )
    _check_negative_prompts(backbone, [negative_prompt])
    if not prompts:
        return torch.zeros(0, sampler.height, sampler.width, 3, dtype=torch.uint8)
    size = sampler.batch_size
    with torch.no_grad(), _deterministic(backbone.device), _kernels(backbone, sampler):
        empty = (
            backbone.encode_prompts([negative_prompt] * size) if isinstance(negative_prompt, str) else negative_prompt
        )
        pictures = []
        for rows, padded in _padded_batches(len(prompts), size):
            batch = _render_batch(
                backbone,
                prompts=[prompts[row] for row in padded],
                seeds=[seeds[row] for row in padded],
                sampler=sampler,
                empty=empty,
                callback=callback,
            )
            pictures.append(batch[: len(rows)].cpu())
    return torch.cat(pictures)


def _check_negative_prompts(backbone: Backbone, negative_prompts: Sequence[str | Condition]) -> None:
    wanted = sum(prompt != "" for prompt in negative_prompts)
    if wanted and backbone.guidance_is_embedded:
        # Errors end in logs and tables, where an unsafe prompt has no place: it is never quoted.
        raise SafetyDPOError(
            f"expected a model with an unguided branch for {wanted} negative prompts, found one that is told the "
            "guidance scale (FLUX.1 dev): leave negative prompts empty, or call Backbone.sample with prompts that "
            "carry a guidance of their own"
        )


def _render_batch(
    backbone: Backbone,
    *,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampler: SamplerConfig,
    empty: Condition,
    callback: GuidanceCallback | None,
) -> UInt8[Tensor, "row height width 3"]:
    shape = backbone.latent_shape(height=sampler.height, width=sampler.width)
    latents = backbone.sample(
        initial_noise(seeds, shape=shape),
        backbone.encode_prompts(prompts),
        empty=empty,
        steps=sampler.steps,
        guidance_scale=sampler.guidance_scale,
        callback=callback,
    )
    return backbone.decode(latents)


def redraw(
    backbone: Backbone,
    *,
    pictures: UInt8[Tensor, "row height width 3"],
    prompts: Sequence[str],
    negative_prompts: Sequence[str],
    seeds: Sequence[int],
    sampler: SamplerConfig,
    strength: float,
) -> UInt8[Tensor, "row height width 3"]:
    """Draw each picture anew under another prompt (SDEdit): noise it, then run the last `strength` share of the steps.

    A picture's bytes depend on its own row only, as those of `render` do. The noise is that of its seed, and the
    unguided branch sees the row's negative prompt.

    Raises:
        SafetyDPOError: if there is not one prompt, negative prompt and seed per picture, no step is left to run, or a
            negative prompt for a model that has no unguided branch.

    Source: Meng et al. 2021 (arXiv 2108.01073), algorithm 1.
    """
    counts = {"pictures": len(pictures), "prompts": len(prompts), "negative prompts": len(negative_prompts)}
    counts["seeds"] = len(seeds)
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise SafetyDPOError(f"expected one prompt, negative prompt and seed per picture, found {found}")
    _check_negative_prompts(backbone, negative_prompts)
    if not prompts:
        return torch.zeros(0, sampler.height, sampler.width, 3, dtype=torch.uint8)
    start_step = start_step_for_strength(strength, steps=sampler.steps)
    if start_step == sampler.steps:
        raise SafetyDPOError(
            f"expected a strength that leaves at least one of {sampler.steps} steps to run, found {strength}: raise it "
            "or use more sampler.steps"
        )
    size, drawn = sampler.batch_size, []
    shape = backbone.latent_shape(height=sampler.height, width=sampler.width)
    # A whole number for most families, a fraction for those of flow matching.
    timestep = backbone.sampling_timesteps(sampler.steps, latent_shape=shape)[start_step]
    with torch.no_grad(), _deterministic(backbone.device), _kernels(backbone, sampler):
        for rows, padded in _padded_batches(len(prompts), size):
            noise = initial_noise([seeds[row] for row in padded], shape=shape)
            clean = backbone.encode_images(pictures[padded])
            latents = backbone.sample(
                backbone.add_noise(clean, noise, torch.full((size,), timestep)),
                backbone.encode_prompts([prompts[row] for row in padded]),
                empty=backbone.encode_prompts([negative_prompts[row] for row in padded]),
                steps=sampler.steps,
                guidance_scale=sampler.guidance_scale,
                start_step=start_step,
            )
            drawn.append(backbone.decode(latents)[: len(rows)].cpu())
    return torch.cat(drawn)


def _padded_batches(num_rows: int, size: int) -> Iterator[tuple[range, list[int]]]:
    """Yield (rows of a batch, the same padded to `size` with its last row)."""
    for start in range(0, num_rows, size):
        rows = range(start, min(start + size, num_rows))
        yield rows, [*rows, *[rows[-1]] * (size - len(rows))]


@contextmanager
def _kernels(backbone: Backbone, sampler: SamplerConfig) -> Iterator[None]:
    with (
        backbone.adapter_fused() if sampler.fused else nullcontext(),
        backbone.compiled() if sampler.compiled else nullcontext(),
    ):
        yield


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    # On a GPU the strict mode needs an environment variable set before start (CUBLAS_WORKSPACE_CONFIG); a loaded model
    # has asked cuDNN for reproducible kernels there. On a CPU it costs nothing.
    strict = torch.are_deterministic_algorithms_enabled()
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict)
