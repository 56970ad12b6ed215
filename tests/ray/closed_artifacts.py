"""Closed artifacts of the first stages, made by hand in milliseconds, under the keys that a run asks for.

So a command finds its early stages done, and fails (or not) at the stage that a test is about, without Ray.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ray_jobs.expert_files import record_folder
from ray_jobs.expert_plan import plan_experts
from ray_jobs.generate_pairs import SELECT_JUDGE, derived_pool, latent_pool, pairs_key, verdict_pool
from ray_jobs.places import image_pool
from ray_jobs.prompt_tables import chosen_pairs, retention_prompts
from ray_jobs.run import Run, with_absolute_paths
from safetydpo.artifacts.adapters import AdapterMetadata, LoraLayer, adapter_hash, write_adapter
from safetydpo.artifacts.layout import ADAPTER_FILE
from safetydpo.artifacts.records import Record
from safetydpo.artifacts.schemas import (
    IMAGE_MANIFEST,
    IMAGES,
    LATENTS,
    MEMBERSHIPS,
    PROMPT_PAIRS,
    SELECTIONS,
    TEXT_EMBEDDINGS,
    VERDICTS,
    caption_sha256,
)
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import table_from_rows, write_table
from safetydpo.config.load import load_config
from safetydpo.pairs.manifest import pair_image_rows, retention_image_rows

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def open_run(config: Path, settings: list[str]) -> Run:
    """The run that the command with the same arguments makes."""
    return Run(with_absolute_paths(load_config(config, settings)))


def close_pairs(run: Run) -> tuple[Record, Location]:
    """Close the pairs artifact: true prompt pairs, all kept, no pictures."""
    identity = run.config.identity
    pairs = chosen_pairs(identity.prompts, seed=identity.seed)
    key = pairs_key(run, pairs, retention_prompts(identity.prompts, seed=identity.seed))

    def make(folder: Location) -> Mapping[str, object]:
        unique = {pair.pair_id: pair for pair in pairs}.values()
        texts = [{"pair_id": p.pair_id, "unsafe_text": p.unsafe_text, "safe_text": p.safe_text} for p in unique]
        members = [
            {"pair_id": p.pair_id, "category": category, "concept": p.concept, "source": p.source}
            for p in unique
            for category in p.categories
        ]
        chosen = [{"pair_id": p.pair_id, "seed": 1, "kept": True, "reason": "kept"} for p in unique]
        write_table(folder / "images.parquet", IMAGE_MANIFEST.empty_table())
        write_table(folder / "prompt_pairs.parquet", table_from_rows(texts, PROMPT_PAIRS))
        write_table(folder / "memberships.parquet", table_from_rows(members, MEMBERSHIPS))
        write_table(folder / "selections.parquet", table_from_rows(chosen, SELECTIONS))
        return {"fingerprint": "pairs"}

    return run.make(key, make), run.folder(key)


def close_training_data(run: Run) -> tuple[Record, Location]:
    """Close pairs whose pictures have latents of noise and captions with the base's own features."""
    from safetydpo.diffusion.build import load_backbone

    identity = run.config.identity
    record, folder = close_pairs(run)
    benign = retention_prompts(identity.prompts, seed=identity.seed)
    common: dict[str, Any] = {
        "run_seed": identity.seed,
        "base_fingerprint": run.base_fingerprint,
        "sampler": identity.sampler.model_dump(mode="json"),
    }
    chosen = {pair.pair_id: pair for pair in chosen_pairs(identity.prompts, seed=identity.seed)}
    rows = [*pair_image_rows(list(chosen.values()), **common), *retention_image_rows(benign, **common)]
    write_table(folder / "images.parquet", table_from_rows(rows, IMAGE_MANIFEST))
    backbone = load_backbone(identity.base)
    shape = backbone.latent_shape(height=identity.sampler.height, width=identity.sampler.width)
    generator = np.random.default_rng(0)
    sizes = dict(zip(("channels", "height", "width"), shape, strict=True))
    latents = [
        {"image_id": row["image_id"], "latent": generator.normal(size=shape).astype(np.float16).tobytes(), **sizes}
        for row in rows
    ]
    close_batch(latent_pool(run), table_from_rows([{"deviation": None, **row} for row in latents], LATENTS))
    texts = {pair_text for pair in chosen.values() for pair_text in (pair.unsafe_text, pair.safe_text)}
    captions = sorted({"", *texts, *(str(row["prompt"]) for row in rows)})
    features = backbone.encode_prompts(captions).tokens.half().numpy()
    table = [
        {
            "caption_sha256": caption_sha256(text),
            "embedding": feature.tobytes(),
            "tokens": feature.shape[0],
            "width": feature.shape[1],
            "pooled": None,
            "pooled_width": None,
        }
        for text, feature in zip(captions, features, strict=True)
    ]
    close_batch(derived_pool(run, "captions"), table_from_rows(table, TEXT_EMBEDDINGS))
    return record, folder


def close_experts(run: Run) -> dict[str, Location]:
    """Close pairs and one adapter of one layer per expert; return the adapter files by expert."""
    record, folder = close_pairs(run)
    files = {}
    for index, unit in enumerate(plan_experts(run, record, folder)):
        layers = {LAYER: LoraLayer(torch.full((2, 4), 1.0 + index), torch.ones(4, 2))}

        def make(target: Location, layers: dict[str, LoraLayer] = layers) -> Mapping[str, object]:
            write_adapter(target / ADAPTER_FILE, layers, metadata=AdapterMetadata(run.base_fingerprint))
            return {"fingerprint": adapter_hash(layers)}

        made = run.make(unit.key, make)
        files[unit.name] = record_folder(run, made) / ADAPTER_FILE
    return files


def all_files(folder: Path) -> list[str]:
    """Every file below, hidden ones too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def close_pictures(run: Run, *, unsafe_score_of: Mapping[str, float]) -> None:
    """Close the pools of pictures and verdicts, each unsafe picture with its category's score."""
    identity = run.config.identity
    pairs = chosen_pairs(identity.prompts, seed=identity.seed)
    score_of = {pair.pair_id: unsafe_score_of[pair.category] for pair in pairs}
    common: dict[str, Any] = {
        "run_seed": identity.seed,
        "base_fingerprint": run.base_fingerprint,
        "sampler": identity.sampler.model_dump(mode="json"),
    }
    benign = retention_image_rows(retention_prompts(identity.prompts, seed=identity.seed), **common)
    rows = [*pair_image_rows(pairs, **common), *benign]
    picture = {"image": b"x", "sha256": "x", "status": "ok", "error": "", "attempt": 1}
    picture |= {"width": 32, "height": 32, "format": "png"}
    verdict = {"judge": "hand", "version": "1", "unrecognisable_score": 0.0, "concept": "", "background": ""}
    verdict |= {"is_unsafe": False, "is_unrecognisable": False}
    images = [{"image_id": row["image_id"], **picture} for row in rows]
    verdicts = [
        {
            "image_id": row["image_id"],
            "unsafe_score": score_of[str(row["owner_id"])] if row["side"] == "unsafe" else 0.0,
            **verdict,
        }
        for row in rows
    ]
    close_batch(image_pool(run), table_from_rows(images, IMAGES))
    close_batch(verdict_pool(run, SELECT_JUDGE), table_from_rows(verdicts, VERDICTS))


def close_batch(pool: Location, table: pa.Table) -> Location:
    """Close a batch of a pool that holds `table`; return its file."""
    batch = pool / "batch-by-hand"
    write_table(batch / "data" / "part.parquet", table)
    (batch / "record.json").write_bytes(b"{}")
    return batch / "data" / "part.parquet"
