"""Draw pictures from the trained base model with plain diffusers, a seed per row; what the build checks itself with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from jaxtyping import UInt8

from safetydpo.artifacts.layout import demo_weights
from safetydpo.errors import SafetyDPOError
from safetydpo.seeding import derive_torch

NUM_SAMPLING_STEPS = 10
GUIDANCE = 4.0
BATCH_SIZE = 64


def load_base(folder: Path | None = None) -> StableDiffusionPipeline:
    """Load the base model in fp32, its progress bar off.

    Raises:
        SafetyDPOError: It has not been built.
    """
    folder = folder or demo_weights() / "base"
    if not (folder / "model_index.json").is_file():
        raise SafetyDPOError(
            f"expected the demo base model in {folder}, found no model_index.json. "
            "Run `python -m safetydpo.demo.build unet`, or reinstall the package with its weights."
        )
    pipeline = StableDiffusionPipeline.from_pretrained(str(folder), torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def sample_pictures(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    *,
    run_seed: int,
    stage: str,
    guidance: float = GUIDANCE,
    steps: int = NUM_SAMPLING_STEPS,
) -> UInt8[np.ndarray, "n h w 3"]:
    """Draw one picture per prompt; row i's noise depends on (run seed, stage, i) and not on the batch."""
    batches: list[np.ndarray] = []
    for first in range(0, len(prompts), BATCH_SIZE):
        texts = list(prompts[first : first + BATCH_SIZE])
        generators = [derive_torch(run_seed, stage, str(first + row)) for row in range(len(texts))]
        images = pipeline(
            texts,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generators,
            output_type="np",
        ).images
        batches.append((images * 255).round().astype(np.uint8))
    return np.concatenate(batches)
