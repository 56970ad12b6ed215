"""What a training reads of a closed pairs artifact: pictures as latents, captions as features, rows of one expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ray_jobs.generate_pairs import derived_pool, latent_pool
from ray_jobs.run import Run
from safetydpo.artifacts.latents import latent_deviations, latent_means
from safetydpo.artifacts.pool_index import check_pool_inputs, read_pool
from safetydpo.artifacts.records import read_record
from safetydpo.artifacts.schemas import (
    IMAGE_MANIFEST,
    LATENTS,
    PROMPT_PAIRS,
    SELECTIONS,
    TEXT_EMBEDDINGS,
    caption_sha256,
    flipped_image_id,
)
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import read_table
from safetydpo.config.schema import Config
from safetydpo.config.training import DpoConfig

if TYPE_CHECKING:
    from ray_jobs.expert_plan import ExpertUnit
    from safetydpo.dpo.batch import PreferenceData, PreferenceRow, RetentionRow


@dataclass(frozen=True)
class PairTables:
    """Texts and pictures of all pairs, by their ids."""

    texts: Mapping[str, tuple[str, str]]
    """Pair id -> unsafe and safe text."""
    images: Mapping[tuple[str, str], tuple[str, str]]
    """(pair or prompt id, side) -> image id and prompt; pictures that failed are not among them."""


@dataclass(frozen=True)
class TrainingTables(PairTables):
    """Everything a lane reads, once, for all of its experts."""

    latents: Mapping[str, np.ndarray[Any, Any]]
    embeddings: Mapping[str, np.ndarray[Any, Any]]
    pooled: Mapping[str, np.ndarray[Any, Any]] | None = None
    """Pooled features of captions; None where the model family has none."""
    deviations: Mapping[str, np.ndarray[Any, Any]] | None = None
    """Deviations of latents; None where no draw needs them."""


def read_pair_tables(pairs_folder: Location) -> PairTables:
    """Read the pairs of a pairs artifact, without latents or features."""
    record = read_record(pairs_folder)
    failed = set(record.failed_units) if record is not None else set()
    manifest = read_table(pairs_folder / "images.parquet", IMAGE_MANIFEST).to_pylist()
    pairs = read_table(pairs_folder / "prompt_pairs.parquet", PROMPT_PAIRS).to_pylist()
    return PairTables(
        texts={row["pair_id"]: (row["unsafe_text"], row["safe_text"]) for row in pairs},
        images={
            (row["owner_id"], row["side"]): (row["image_id"], row["prompt"])
            for row in manifest
            if row["image_id"] not in failed
        },
    )


def check_training_pools(run: Run) -> None:
    """Refuse latents and caption features of another base model, where their batches say of which one they are.

    Raises:
        SafetyDPOError: naming both fingerprints.
    """
    for pool, what in ((latent_pool(run), "latents"), (derived_pool(run, "captions"), "caption features")):
        check_pool_inputs(pool, {"base": run.base_fingerprint}, what=what)


def read_training_tables(run: Run, pairs_folder: Location) -> TrainingTables:
    """Read manifest, latents and caption features of a pairs artifact; pictures that failed are not among them.

    Raises:
        SafetyDPOError: if latents or features are of another base model.
    """
    check_training_pools(run)
    tables = read_pair_tables(pairs_folder)
    wanted = {image_id for image_id, _ in tables.images.values()}
    dpo = run.config.identity.dpo
    if dpo.flip_rate > 0:
        wanted |= {flipped_image_id(image_id) for (_, side), (image_id, _) in tables.images.items() if side != "benign"}
    latents = read_pool(latent_pool(run), LATENTS, wanted=wanted, id_column="image_id")
    # The pool holds those of every run on this store.
    texts = {"", *(prompt for _, prompt in tables.images.values())}
    texts.update(text for both in tables.texts.values() for text in both)
    captions = read_pool(
        derived_pool(run, "captions"),
        TEXT_EMBEDDINGS,
        wanted={caption_sha256(text) for text in texts},
        id_column="caption_sha256",
    )
    return TrainingTables(
        texts=tables.texts,
        images=tables.images,
        latents=latent_means(latents),
        embeddings=_arrays(captions, "caption_sha256", "embedding", ("tokens", "width")),
        pooled=_pooled(captions),
        deviations=latent_deviations(latents) if dpo.latent_sampling == "sample" else None,
    )


def _pooled(captions: pa.Table) -> dict[str, np.ndarray[Any, Any]] | None:
    with_pooled = captions.filter(pa.compute.is_valid(captions.column("pooled")))
    return _arrays(with_pooled, "caption_sha256", "pooled", ("pooled_width",)) if with_pooled.num_rows else None


def _arrays(table: pa.Table, key: str, value: str, shape: Sequence[str]) -> dict[str, np.ndarray[Any, Any]]:
    return {
        row[key]: np.frombuffer(row[value], dtype=np.float16).reshape([row[axis] for axis in shape])
        for row in table.to_pylist()
    }


def read_kept(pairs_folder: Location) -> set[str]:
    """Return the ids of the pairs that were good enough."""
    rows = read_table(pairs_folder / "selections.parquet", SELECTIONS).to_pylist()
    return {row["pair_id"] for row in rows if row["kept"]}


def preference_rows(tables: PairTables, pair_ids: Sequence[str]) -> list[PreferenceRow]:
    """Return the preference of each pair, in that order."""
    from safetydpo.dpo.batch import PreferenceRow

    return [
        PreferenceRow(
            pair_id=pair_id,
            safe_image_id=tables.images[pair_id, "safe"][0],
            unsafe_image_id=tables.images[pair_id, "unsafe"][0],
            safe_caption_sha256=caption_sha256(tables.texts[pair_id][1]),
            unsafe_caption_sha256=caption_sha256(tables.texts[pair_id][0]),
        )
        for pair_id in pair_ids
    ]


def preference_data(tables: TrainingTables, unit: ExpertUnit, backbone: Any, config: Config) -> PreferenceData:
    """Gather one expert's preferences from the tables.

    Raises:
        SafetyDPOError: if the unit has no pairs, or latents or captions are missing or broken.
    """
    from safetydpo.dpo.batch import RetentionRow

    kept_pictures = [picture for (_owner, side), picture in tables.images.items() if side == "benign"]
    sides = ("safe", "unsafe") if unit.dpo.retention_pictures == "others" else ("safe",)
    kept_pictures += [tables.images[pair_id, side] for pair_id in unit.others.ids() for side in sides]
    # Two pairs may share a picture; it is kept once.
    benign = [RetentionRow(image_id, caption_sha256(prompt)) for image_id, prompt in dict(kept_pictures).items()]
    retention = benign if unit.dpo.retention_weight > 0 else []
    return pair_data(tables, unit.pair_ids, unit.dpo, backbone, config, retention=retention)


def pair_data(
    tables: TrainingTables,
    pair_ids: Sequence[str],
    dpo: DpoConfig,
    backbone: Any,
    config: Config,
    *,
    retention: Sequence[RetentionRow] = (),
) -> PreferenceData:
    """Gather the preferences of some pairs from the tables, and what the draws of these settings need.

    Raises:
        SafetyDPOError: if there is no pair, or latents or captions are missing or broken.
    """
    from safetydpo.dpo.batch import PreferenceData

    sampler = config.identity.sampler
    return PreferenceData.from_tables(
        preference_rows(tables, pair_ids),
        latents=tables.latents,
        embeddings=tables.embeddings,
        latent_shape=backbone.latent_shape(height=sampler.height, width=sampler.width),
        retention=retention,
        pooled=tables.pooled,
        deviations=tables.deviations,
        with_flipped=dpo.flip_rate > 0,
    )
