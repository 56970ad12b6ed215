"""Draw pictures from prompts so that a picture's bytes depend on its own row only; PNG in and out.

Axis legend: `row` prompts, `height width` picture axes.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from safetydpo.config.schema import SamplerConfig
from safetydpo.diffusion.backbone import Backbone, Condition, GuidanceCallback
from safetydpo.errors import SafetyDPOError

PNG_COMPRESS_LEVEL = 6


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
    negative_prompt: str = "",
    callback: GuidanceCallback | None = None,
) -> UInt8[Tensor, "row height width 3"]:
    """Draw one picture per (prompt, seed), on the CPU, in the order given.

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
    if negative_prompt and backbone.guidance_is_embedded:
        raise SafetyDPOError(
            f"expected a model with an unguided branch for the negative prompt {negative_prompt!r}, found one that is "
            "told the guidance scale (FLUX.1 dev): leave the negative prompt empty, or call Backbone.sample with "
            "prompts that carry a guidance of their own"
        )
    if not prompts:
        return torch.zeros(0, sampler.height, sampler.width, 3, dtype=torch.uint8)
    size = sampler.batch_size
    with torch.no_grad(), _deterministic(backbone.device):
        empty = backbone.encode_prompts([negative_prompt] * size)
        pictures = []
        for start in range(0, len(prompts), size):
            rows = range(start, min(start + size, len(prompts)))
            padded = [*rows, *[rows[-1]] * (size - len(rows))]
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


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    # On a GPU the strict mode needs an environment variable set before start (CUBLAS_WORKSPACE_CONFIG), so there
    # only cuDNN is asked for reproducible kernels; on a CPU the strict mode costs nothing.
    strict, cudnn = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict)
        torch.backends.cudnn.deterministic = cudnn


def encode_png(image: UInt8[Tensor, "height width 3"]) -> bytes:
    """Return the PNG file of a picture, at a fixed compression level and without metadata: equal in, equal out."""
    buffer = io.BytesIO()
    Image.fromarray(image.cpu().numpy()).save(buffer, format="PNG", compress_level=PNG_COMPRESS_LEVEL)
    return buffer.getvalue()


def decode_png(data: bytes) -> UInt8[np.ndarray, "height width 3"]:
    """Return the pixels of a PNG file.

    Raises:
        SafetyDPOError: if the bytes are no complete PNG in red, green, blue.
    """
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            image.load()
            mode = image.mode
            pixels = np.array(image)
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise SafetyDPOError(
            f"expected a complete PNG, found {len(data)} bytes that do not decode ({error}): render the picture again"
        ) from None
    if mode != "RGB":
        raise SafetyDPOError(f"expected a PNG in mode RGB, found mode {mode}: convert it to red, green, blue first")
    return pixels
