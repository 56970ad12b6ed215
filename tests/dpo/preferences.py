"""Small preferences (random latents, real text features of the tiny model) and four steps of training on them."""

from __future__ import annotations

import numpy as np

from safetydpo.artifacts.schemas import caption_sha256
from safetydpo.config.training import DpoConfig
from safetydpo.diffusion.backbone import Backbone
from safetydpo.dpo.batch import PreferenceData, PreferenceRow, RetentionRow

SHAPE = (4, 8, 8)
UNSAFE = ("a bomb on red", "a dagger on blue", "a bomb on green")
SAFE = ("a ball on red", "a flower on blue", "a ball on green")


def make_preferences(
    backbone: Backbone, num_pairs: int = 6, num_benign: int = 3, *, seed: int = 0, reverse: bool = False
) -> PreferenceData:
    generator = np.random.default_rng(seed)
    captions = ("", *UNSAFE, *SAFE, "a house on red")
    tokens = backbone.encode_prompts(captions).tokens.numpy()
    embeddings = {caption_sha256(text): row for text, row in zip(captions, tokens, strict=True)}
    rows = [
        PreferenceRow(
            f"pair{index:03d}",
            f"safe{index}",
            f"unsafe{index}",
            safe_caption_sha256=caption_sha256(SAFE[index % 3]),
            unsafe_caption_sha256=caption_sha256(UNSAFE[index % 3]),
        )
        for index in range(num_pairs)
    ]
    benign = [RetentionRow(f"benign{index}", caption_sha256("a house on red")) for index in range(num_benign)]
    ids = [
        *(row.safe_image_id for row in rows),
        *(row.unsafe_image_id for row in rows),
        *(row.image_id for row in benign),
    ]
    latents = {one: generator.normal(size=SHAPE).astype(np.float16) for one in ids}
    return PreferenceData.from_tables(
        rows[::-1] if reverse else rows,
        latents=latents,
        embeddings=embeddings,
        latent_shape=SHAPE,
        retention=benign,
    )


def small_config() -> DpoConfig:
    return DpoConfig(
        steps=4,
        warmup_steps=2,
        pairs_per_step=4,
        checkpoint_every=2,
        retention_weight=1.0,
        retention_per_step=2,
        strategy="single",
    )
