"""Write the reference features: 2,000 held-out neutral drawings seen by the demo CLIP's picture tower.

Fréchet and kernel distances of generated pictures are taken against them; they ship with the weights, because drawing
needs a font that a user's machine lacks. The 128 projected features, scaled to length one, are reduced to 48 by the
principal components of these very drawings; the components stand in the file as `projection`, so that any picture's
features can be had the same way: unit @ projection. (No mean is taken off: a shift that both sets share changes no
distance.)

Axis legend: n = drawings, d = 128 projected features, f = 48 kept features.
"""

from __future__ import annotations

import time

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from safetydpo.artifacts.layout import demo_weights
from safetydpo.demo.concepts import BACKGROUNDS, select_concepts
from safetydpo.demo.drawings import draw_many
from safetydpo.demo.train_text import embed_pictures, load_clip
from safetydpo.demo.training import BUILD_SEED, record_measurement
from safetydpo.seeding import derive_numpy

REFERENCE_FILE = "reference_features.safetensors"
NUM_DRAWINGS = 2000
NUM_FEATURES = 48
FIRST_DRAW_SEED = 2000
"""Draw seeds from here on are used by nothing else."""


def fit_components(features: Float[Tensor, "n d"], *, num_features: int) -> tuple[Float[Tensor, "d f"], float]:
    """Compute the leading principal components (as columns) and the share of variance they keep."""
    _, singular, rows = torch.linalg.svd(features - features.mean(dim=0), full_matrices=False)
    kept = singular[:num_features].square().sum() / singular.square().sum()
    return rows[:num_features].T.contiguous(), kept.item()


@torch.no_grad()
def build_features() -> None:
    """Draw the held-out neutral drawings, reduce their features and write `reference_features.safetensors`."""
    started = time.monotonic()
    concepts, backgrounds = select_concepts("neutral"), list(BACKGROUNDS)
    numbers = derive_numpy(BUILD_SEED, "demo/features", "rows")
    rows = [
        (
            concepts[int(numbers.integers(len(concepts)))],
            backgrounds[int(numbers.integers(len(backgrounds)))],
            FIRST_DRAW_SEED + index,
        )
        for index in range(NUM_DRAWINGS)
    ]
    clip = load_clip()
    pictures = torch.from_numpy(draw_many(rows))
    unit = embed_pictures(clip, pictures)
    projection, kept = fit_components(unit, num_features=NUM_FEATURES)
    save_file(
        {"features": unit @ projection, "projection": projection},
        str(demo_weights() / REFERENCE_FILE),
        metadata={
            "num_drawings": str(NUM_DRAWINGS),
            "source": "neutral concepts, draw seeds from 2000 on, projected features of clip/ in fp32, length one",
            "reduction": f"principal components, {kept:.4f} of the variance kept",
        },
    )
    record_measurement(
        "features",
        {
            "num_drawings": NUM_DRAWINGS,
            "num_features": NUM_FEATURES,
            "variance_kept": kept,
            "build_seconds": round(time.monotonic() - started),
        },
    )
