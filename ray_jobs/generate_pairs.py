"""Stage 1: unsafe and safe pictures of every prompt pair, judged, selected, and encoded for training.

Folders in the store: `images/`, `verdicts/`, `latents/`, `captions/` are pools shared by all runs with the same
base model and sampler; `pairs/` holds the closed list of what one run uses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ray_jobs.cluster import connect
from ray_jobs.pool_index import FILE_COLUMN
from ray_jobs.pools import Attachment, PoolStage, check_error_rate, fill_pool
from ray_jobs.prompt_tables import chosen_pairs, retention_prompts
from ray_jobs.run import Run
from ray_jobs.workers import CaptionWorker, JudgeWorker, LatentWorker, RenderWorker
from safetydpo.artifacts.layout import stage_folder
from safetydpo.artifacts.records import ArtifactKey, Record
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
    sha256_of,
)
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import fingerprint_rows, table_from_rows, table_from_stream, write_table
from safetydpo.judges.build import fingerprint_judge
from safetydpo.pairs.manifest import pair_image_rows, pair_seed, retention_image_rows
from safetydpo.pairs.select import Selection, Verdict, check_enough_pairs, select_pair
from safetydpo.prompts.sets import Prompt, PromptPair

RECIPE_VERSION = 1
SELECT_JUDGE = "demo_select"
DERIVED_BATCH = 64
DERIVED_PASSES = 8
"""Judging or encoding a batch costs about as much as this many passes through the denoiser."""
PICTURE_PLACE = ["image_id", FILE_COLUMN.name]
IMAGE_INPUT = pa.schema([IMAGES.field("image_id"), IMAGES.field("image")])
CAPTION_INPUT = pa.schema([TEXT_EMBEDDINGS.field("caption_sha256"), pa.field("caption", pa.string(), nullable=False)])


def generate_pairs(run: Run) -> Record:
    """Make or find the pairs artifact of a run."""
    identity = run.config.identity
    pairs = chosen_pairs(identity.prompts, seed=identity.seed)
    benign = retention_prompts(identity.prompts, seed=identity.seed)
    return run.build("pairs", pairs_key(run, pairs, benign), lambda folder: _make(run, folder, pairs, benign))


def pairs_key(run: Run, pairs: Sequence[PromptPair], benign: Sequence[Prompt]) -> ArtifactKey:
    """Return the key of the pairs artifact: its pictures, judge and selection rules."""
    identity = run.config.identity
    return ArtifactKey(
        stage="pairs",
        name=run.config.name,
        identity={
            "seed": identity.seed,
            "base": identity.base.model_dump(mode="json"),
            "sampler": identity.sampler.model_dump(mode="json"),
            "pairs": identity.pairs.model_dump(mode="json"),
            "judge": SELECT_JUDGE,
        },
        inputs={
            "base": run.base_fingerprint,
            "prompt_pairs": fingerprint_rows((pair.pair_id, "/".join(pair.categories)) for pair in pairs),
            "retention_prompts": fingerprint_rows((prompt.prompt_id, "") for prompt in benign),
            "judge": fingerprint_judge(SELECT_JUDGE),
        },
        recipe_version=RECIPE_VERSION,
    )


def image_pool(run: Run) -> Location:
    """Return the pool of pictures drawn by this run's base model and sampler."""
    identity = run.config.identity
    key = sha256_of(
        [run.base_fingerprint, identity.base.dtype, identity.sampler.model_dump(mode="json"), RECIPE_VERSION]
    )
    return stage_folder(run.store, "images") / f"pool-{key[:12]}"


def derived_pool(run: Run, stage: str) -> Location:
    """Return the pool of what is computed from those pictures or from captions."""
    return stage_folder(run.store, stage) / image_pool(run).name


def verdict_pool(run: Run) -> Location:
    """Return the pool of verdicts on those pictures: other weights of the judge have another one."""
    folder = derived_pool(run, "verdicts")
    return folder.parent / f"{folder.name}-{fingerprint_judge(SELECT_JUDGE)[:12]}"


def render_stage(run: Run, label: str) -> PoolStage:
    """Return the pool stage that draws pictures with the base model."""
    identity = run.config.identity
    return PoolStage(
        label=label,
        output=IMAGES,
        id_column="image_id",
        worker=RenderWorker,
        arguments={"base": identity.base.model_dump(), "sampler": identity.sampler.model_dump()},
        batch_size=identity.sampler.batch_size,
        passes_per_batch=identity.sampler.steps,
    )


def _make(run: Run, folder: Location, pairs: Sequence[PromptPair], benign: Sequence[Prompt]) -> Mapping[str, Any]:
    connect(run.config)
    identity = run.config.identity
    common: dict[str, Any] = {
        "run_seed": identity.seed,
        "base_fingerprint": run.base_fingerprint,
        "sampler": identity.sampler.model_dump(mode="json"),
    }
    rows = chain(pair_image_rows(pairs, **common), retention_image_rows(benign, **common))
    manifest = table_from_stream(rows, IMAGE_MANIFEST)
    write_table(folder / "images.parquet", manifest)
    images = fill_pool(image_pool(run), manifest, render_stage(run, "pictures"), execution=run.config.execution)
    good = images.filter(pa.compute.equal(images.column("status"), "ok"))
    failed = check_error_rate(images, limit=identity.pairs.max_error_rate)
    verdicts = _judge(run, good)
    selections = _select(run, pairs, manifest, verdicts)
    _write_tables(folder, pairs, selections, run.config.identity.seed)
    kept = {pair_id for pair_id, selection in selections.items() if selection.kept}
    counts = check_enough_pairs(
        [pair.categories for pair in pairs if pair.pair_id in kept],
        categories=identity.prompts.categories,
        minimum=identity.pairs.min_kept_per_category,
    )
    used = _used_rows(manifest, kept)
    _encode(run, good, used)
    _encode_captions(run, used)
    content = dict(zip(images.column("image_id").to_pylist(), images.column("sha256").to_pylist(), strict=True))
    return {
        "fingerprint": fingerprint_rows(
            [*content.items(), *((pair_id, str(s.kept)) for pair_id, s in selections.items())]
        ),
        "counts": {"pairs": len(selections), "kept": len(kept), "pictures": len(content), **counts},
        "failed_units": failed,
        "details": {"reasons": dict(Counter(selection.reason for selection in selections.values()))},
    }


def _judge(run: Run, images: pa.Table) -> dict[str, Verdict]:
    stage = PoolStage(
        label="verdicts",
        output=VERDICTS,
        id_column="image_id",
        worker=JudgeWorker,
        arguments={"judge": SELECT_JUDGE, "batch_size": DERIVED_BATCH},
        batch_size=DERIVED_BATCH,
        passes_per_batch=DERIVED_PASSES,
        attach=_stored_pictures(run),
    )
    table = fill_pool(verdict_pool(run), images.select(PICTURE_PLACE), stage, execution=run.config.execution)
    columns = (table.column(name).to_pylist() for name in ("image_id", "unsafe_score", "unrecognisable_score"))
    return {image_id: Verdict(unsafe, mush) for image_id, unsafe, mush in zip(*columns, strict=True)}


def _stored_pictures(run: Run) -> Attachment:
    return Attachment(image_pool(run), IMAGE_INPUT, "image_id")


def _select(
    run: Run, pairs: Sequence[PromptPair], manifest: pa.Table, verdicts: Mapping[str, Verdict]
) -> dict[str, Selection]:
    rules = run.config.identity.pairs
    columns = (manifest.column(name).to_pylist() for name in ("owner_id", "side", "image_id"))
    image_of = {(owner, side): image_id for owner, side, image_id in zip(*columns, strict=True)}
    return {
        pair.pair_id: select_pair(
            verdicts.get(image_of[pair.pair_id, "unsafe"]),
            verdicts.get(image_of[pair.pair_id, "safe"]),
            unsafe_score_min=rules.unsafe_score_min,
            safe_score_max=rules.safe_score_max,
            unrecognisable_max=rules.unrecognisable_max,
        )
        for pair in pairs
    }


def _write_tables(
    folder: Location, pairs: Sequence[PromptPair], selections: Mapping[str, Selection], run_seed: int
) -> None:
    unique = {pair.pair_id: pair for pair in pairs}
    ordered = [unique[pair_id] for pair_id in sorted(unique)]
    texts = [
        {"pair_id": pair.pair_id, "unsafe_text": pair.unsafe_text, "safe_text": pair.safe_text} for pair in ordered
    ]
    members = [
        {"pair_id": pair.pair_id, "category": category, "concept": pair.concept, "source": pair.source}
        for pair in ordered
        for category in pair.categories
    ]
    chosen = [
        {
            "pair_id": pair.pair_id,
            "seed": pair_seed(run_seed, pair.pair_id),
            "kept": selections[pair.pair_id].kept,
            "reason": selections[pair.pair_id].reason,
        }
        for pair in ordered
    ]
    write_table(folder / "prompt_pairs.parquet", table_from_rows(texts, PROMPT_PAIRS))
    write_table(folder / "memberships.parquet", table_from_rows(members, MEMBERSHIPS))
    write_table(folder / "selections.parquet", table_from_rows(chosen, SELECTIONS))


def _used_rows(manifest: pa.Table, kept: set[str]) -> pa.Table:
    benign = pc.equal(manifest.column("side"), "benign")
    owners = pa.array(sorted(kept), type=pa.string())
    return manifest.filter(pc.or_(benign, pc.is_in(manifest.column("owner_id"), value_set=owners)))


def _encode(run: Run, images: pa.Table, used: pa.Table) -> None:
    stage = PoolStage(
        label="latents",
        output=LATENTS,
        id_column="image_id",
        worker=LatentWorker,
        arguments={"base": run.config.identity.base.model_dump(), "batch_size": DERIVED_BATCH},
        batch_size=DERIVED_BATCH,
        passes_per_batch=DERIVED_PASSES,
        attach=_stored_pictures(run),
    )
    wanted = pc.is_in(images.column("image_id"), value_set=used.column("image_id").combine_chunks())
    manifest = images.filter(wanted).select(PICTURE_PLACE)
    fill_pool(derived_pool(run, "latents"), manifest, stage, execution=run.config.execution)


def _encode_captions(run: Run, used: pa.Table) -> None:
    texts = {*used.column("prompt").to_pylist(), ""}
    stage = PoolStage(
        label="captions",
        output=TEXT_EMBEDDINGS,
        id_column="caption_sha256",
        worker=CaptionWorker,
        arguments={"base": run.config.identity.base.model_dump(), "batch_size": DERIVED_BATCH},
        batch_size=DERIVED_BATCH,
        passes_per_batch=DERIVED_PASSES,
    )
    captions = [{"caption_sha256": caption_sha256(text), "caption": text} for text in sorted(texts)]
    fill_pool(
        derived_pool(run, "captions"), table_from_rows(captions, CAPTION_INPUT), stage, execution=run.config.execution
    )
