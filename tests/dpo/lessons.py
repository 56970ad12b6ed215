"""A few rows of two experts and of the base, experts with random changes, and a few steps of distillation on them."""

from __future__ import annotations

import numpy as np
import torch

from safetydpo.artifacts.adapters import LoraLayer, LoraSignature
from safetydpo.artifacts.schemas import caption_sha256
from safetydpo.config.training import DistillConfig
from safetydpo.diffusion.backbone import Backbone
from safetydpo.dpo.distillation import BASE, DistillationData, TaughtRow
from tests.dpo.preferences import SAFE, SHAPE, UNSAFE

SIGNATURE = LoraSignature(rank=2, alpha=2.0, targets=("to_q", "to_k", "to_v", "to_out.0"))


def make_rows() -> list[TaughtRow]:
    """Six rows of `hate`, three of `violence`, five of the base."""
    taught = [TaughtRow("hate", f"image{i}", caption_sha256(UNSAFE[i % 2])) for i in range(6)]
    taught += [TaughtRow("violence", f"image{i}", caption_sha256(UNSAFE[2])) for i in range(3)]
    return taught + [TaughtRow(BASE, f"image{i}", caption_sha256(SAFE[i % 3])) for i in range(5)]


def make_lessons(backbone: Backbone, rows: list[TaughtRow] | None = None) -> DistillationData:
    captions = ("", *UNSAFE, *SAFE)
    tokens = backbone.encode_prompts(captions).tokens.numpy()
    generator = np.random.default_rng(3)
    return DistillationData.from_tables(
        make_rows() if rows is None else rows,
        latents={f"image{i}": generator.normal(size=SHAPE).astype(np.float16) for i in range(6)},
        embeddings={caption_sha256(text): row for text, row in zip(captions, tokens, strict=True)},
        latent_shape=SHAPE,
    )


def random_layers(backbone: Backbone, *, seed: int, size: float = 0.1) -> dict[str, LoraLayer]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: LoraLayer(
            down=torch.randn(SIGNATURE.rank, d_in, generator=generator) / d_in**0.5,
            up=size * torch.randn(d_out, SIGNATURE.rank, generator=generator),
        )
        for name, (d_in, d_out) in backbone.named_linear_layers(SIGNATURE.targets)
    }


def small_distillation(**changes: object) -> DistillConfig:
    settings: dict[str, object] = {
        "steps": 4,
        "warmup_steps": 1,
        "rows_per_step": 4,
        "benign_rate": 0.5,
        "checkpoint_every": 2,
        "learning_rate": 1e-2,
        "strategy": "single",
    }
    return DistillConfig.model_validate(settings | changes)
