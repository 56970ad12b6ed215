"""Stage 1: unsafe and safe pictures of every prompt pair, judged, selected, and encoded for training.

Folders in the store: `images/`, `verdicts/`, `latents/`, `captions/` are pools shared by all runs with the same
base model and sampler; `pairs/` holds the closed list of what one run uses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ray_jobs.cluster import connect
from ray_jobs.pair_workers import Measure, SdeditWorker
from ray_jobs.places import PAIRS_RECIPE_VERSION, image_pool, variant
from ray_jobs.pools import Attachment, PoolStage, check_error_rate, fill_pool
from ray_jobs.prompt_tables import chosen_pairs, retention_prompts
from ray_jobs.resources import calls_per_worker
from ray_jobs.run import Run
from ray_jobs.verify_pairs import (
    DERIVED_BATCH,
    DERIVED_PASSES,
    PICTURE,
    PICTURE_PLACE,
    PicturePools,
    fingerprint_judges,
    fingerprint_measures,
    layout_limits,
    stored_pictures,
    verify_pairs,
)
from ray_jobs.workers import CaptionWorker, FlippedLatentWorker, LatentWorker, RenderWorker
from safetydpo.artifacts.layout import stage_folder
from safetydpo.artifacts.pool_index import FILE_COLUMN
from safetydpo.artifacts.records import ArtifactKey, Record
from safetydpo.artifacts.schemas import (
    IMAGE_MANIFEST,
    IMAGES,
    LATENTS,
    MEMBERSHIPS,
    PER_CONCEPT,
    PROMPT_PAIRS,
    SELECTIONS,
    TEXT_EMBEDDINGS,
    caption_sha256,
    flipped_image_id,
)
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import fingerprint_rows, table_from_rows, table_from_stream, write_table
from safetydpo.config.schema import SamplerConfig
from safetydpo.judges.build import fingerprint_judge
from safetydpo.pairs.concepts import concepts_below, count_reasons
from safetydpo.pairs.manifest import pair_image_rows, pair_seed, retention_image_rows
from safetydpo.pairs.select import Selection, check_enough_pairs
from safetydpo.prompts.sets import Prompt, PromptPair

SELECT_JUDGE = "demo_select"
"""The judge of the merge search by default; that of pairs is `identity.pairs.judges`."""
LARGEST_SMALL_PICTURE = 64 * 64
"""Pixels of a picture up to which 64 of them are encoded at once."""
SDEDIT_MANIFEST = pa.schema(
    [
        *IMAGE_MANIFEST,
        pa.field("negative_prompt", pa.string(), nullable=False),
        pa.field("source_id", pa.string(), nullable=False),
        FILE_COLUMN,
    ]
)
CAPTION_INPUT = pa.schema([TEXT_EMBEDDINGS.field("caption_sha256"), pa.field("caption", pa.string(), nullable=False)])


def generate_pairs(run: Run) -> Record:
    """Make or find the pairs artifact of a run."""
    identity = run.config.identity
    pairs = chosen_pairs(identity.prompts, seed=identity.seed)
    benign = retention_prompts(identity.prompts, seed=identity.seed)
    return run.build("pairs", pairs_key(run, pairs, benign), lambda folder: _make(run, folder, pairs, benign))


def pairs_key(run: Run, pairs: Sequence[PromptPair], benign: Sequence[Prompt]) -> ArtifactKey:
    """Return the key of the pairs artifact: its pictures, judges and selection rules."""
    identity = run.config.identity
    return ArtifactKey(
        stage="pairs",
        name=run.config.name,
        identity={
            "seed": identity.seed,
            "base": identity.base.model_dump(mode="json"),
            "sampler": identity.sampler.model_dump(mode="json"),
            "pairs": identity.pairs.model_dump(mode="json"),
            "judge": "+".join(identity.pairs.judges),
        },
        inputs={
            "base": run.base_fingerprint,
            "prompt_pairs": fingerprint_rows((pair.pair_id, "/".join(pair.categories)) for pair in pairs),
            "retention_prompts": fingerprint_rows((prompt.prompt_id, "") for prompt in benign),
            "judge": fingerprint_judges(identity.pairs, run.config.execution.judges),
            **fingerprint_measures(identity.pairs),
            **_concepts_input(run, pairs),
        },
        recipe_version=PAIRS_RECIPE_VERSION,
    )


def _concepts_input(run: Run, pairs: Sequence[PromptPair]) -> dict[str, str]:
    """Return what makes a key follow the concepts of pairs: they are counted, and may be capped.

    Those of the demo world come with the package, and its keys are older than this input.
    """
    identity = run.config.identity
    if identity.prompts.source == "demo" and identity.pairs.max_kept_per_concept is None:
        return {}
    return {"concepts": fingerprint_rows((pair.pair_id, pair.concept) for pair in pairs)}


def derived_pool(run: Run, stage: str) -> Location:
    """Return the pool of what is computed from those pictures or from captions."""
    return stage_folder(run.store, stage) / image_pool(run).name


def verdict_pool(run: Run, judge: str) -> Location:
    """Return the pool of a judge's verdicts on those pictures: other weights of the judge have another one."""
    return variant(derived_pool(run, "verdicts"), fingerprint_judge(judge, run.config.execution.judges)[:12])


def layout_pool(run: Run, measure: Measure) -> Location:
    """Return the pool of what the layouts of those pictures are compared by."""
    networks = fingerprint_measures(run.config.identity.pairs).values() if measure == "embedding" else ()
    return variant(derived_pool(run, "layouts"), "-".join([measure, *(network[:12] for network in networks)]))


def latent_pool(run: Run) -> Location:
    """Return the pool of the latents of those pictures: with deviations they are other rows than without."""
    pool = derived_pool(run, "latents")
    return pool if run.config.identity.pairs.latents == "mean" else variant(pool, "deviation")


def render_stage(run: Run, label: str) -> PoolStage:
    """Return the pool stage that draws pictures with the base model."""
    identity = run.config.identity
    return PoolStage(
        label=label,
        output=IMAGES,
        id_column="image_id",
        worker=RenderWorker,
        arguments={
            "base": identity.base.model_dump(),
            "sampler": identity.sampler.model_dump(),
            "picture_format": identity.pairs.picture_format,
        },
        batch_size=identity.sampler.batch_size,
        passes_per_batch=identity.sampler.steps,
        calls_per_worker=calls_per_worker(run.config.execution),
    )


def picture_manifest(run: Run, pairs: Sequence[PromptPair], benign: Sequence[Prompt]) -> pa.Table:
    """Return the list of work: a row for each picture of these pairs and benign prompts."""
    identity = run.config.identity
    common: dict[str, Any] = {
        "run_seed": identity.seed,
        "base_fingerprint": run.base_fingerprint,
        "sampler": identity.sampler.model_dump(mode="json"),
    }
    rules = identity.pairs
    edit = {"strength": rules.sdedit_strength, "negative": rules.sdedit_negative}
    sdedit = edit if rules.safe_picture == "sdedit" else None
    rows = chain(pair_image_rows(pairs, **common, sdedit=sdedit), retention_image_rows(benign, **common))
    return table_from_stream(rows, IMAGE_MANIFEST)


def _make(run: Run, folder: Location, pairs: Sequence[PromptPair], benign: Sequence[Prompt]) -> Mapping[str, Any]:
    connect(run.config)
    rules = run.config.identity.pairs
    manifest = picture_manifest(run, pairs, benign)
    write_table(folder / "images.parquet", manifest)
    images = _draw_and_edit(run, manifest) if rules.safe_picture == "sdedit" else draw_pictures(run, manifest)
    good = images.filter(pc.equal(images.column("status"), "ok"))
    failed = check_error_rate(images, limit=rules.max_error_rate)
    verified = verify_pairs(
        pairs,
        good,
        image_of=_picture_ids(manifest),
        rules=rules,
        pools=PicturePools(
            pictures=image_pool(run),
            verdicts={judge: verdict_pool(run, judge) for judge in rules.judges},
            layouts={measure: layout_pool(run, measure) for measure in layout_limits(rules)},
        ),
        execution=run.config.execution,
    )
    selections = verified.selections
    _write_tables(folder, pairs, selections, run.config.identity.seed)
    concepts = _write_concepts(folder, pairs, selections)
    kept = {pair_id for pair_id, selection in selections.items() if selection.kept}
    counts = check_enough_pairs(
        [pair.categories for pair in pairs if pair.pair_id in kept],
        categories=run.config.identity.prompts.categories,
        minimum=rules.min_kept_per_category,
    )
    used = _used_rows(manifest, kept)
    encode_pictures(run, good, used)
    encode_captions(run, used)
    content = dict(zip(images.column("image_id").to_pylist(), images.column("sha256").to_pylist(), strict=True))
    # A safe picture whose source failed was never begun; it is none that downstream may look for.
    never_begun = [image_id for image_id in manifest.column("image_id").to_pylist() if image_id not in content]
    return {
        "fingerprint": fingerprint_rows(
            [*content.items(), *((pair_id, str(s.kept)) for pair_id, s in selections.items())]
        ),
        "counts": {"pairs": len(selections), "kept": len(kept), "pictures": len(content), **counts},
        "failed_units": [*failed, *never_begun, *verified.failed],
        "details": {
            "reasons": dict(Counter(selection.reason for selection in selections.values())),
            "concepts_below_minimum": concepts_below(concepts, minimum=rules.min_kept_per_concept),
            "not_judged": list(verified.not_judged),
        },
    }


def _picture_ids(manifest: pa.Table) -> dict[tuple[str, str], str]:
    columns = (manifest.column(name).to_pylist() for name in ("owner_id", "side", "image_id"))
    return {(owner, side): image_id for owner, side, image_id in zip(*columns, strict=True)}


def draw_pictures(run: Run, manifest: pa.Table) -> pa.Table:
    """Draw what the pool of pictures lacks; return the index of all of them."""
    return fill_pool(image_pool(run), manifest, render_stage(run, "pictures"), execution=run.config.execution)


def _draw_and_edit(run: Run, manifest: pa.Table) -> pa.Table:
    """Draw all but the safe pictures, then make these from the unsafe ones that succeeded."""
    identity = run.config.identity
    is_safe = pc.equal(manifest.column("side"), "safe")
    drawn = draw_pictures(run, manifest.filter(pc.invert(is_safe)))
    check_error_rate(drawn, limit=identity.pairs.max_error_rate)
    stage = replace(
        render_stage(run, "safe pictures"),
        worker=SdeditWorker,
        arguments={**render_stage(run, "").arguments, "strength": identity.pairs.sdedit_strength},
        attach=Attachment(image_pool(run), PICTURE, "image_id", by="source_id", rename={"image": "source"}),
    )
    edits = table_from_stream(
        _edits(manifest, drawn, away=identity.pairs.sdedit_negative == "unsafe_prompt"), SDEDIT_MANIFEST
    )
    edited = fill_pool(image_pool(run), edits, stage, execution=run.config.execution)
    return pa.concat_tables([drawn, edited])


def _edits(manifest: pa.Table, drawn: pa.Table, *, away: bool) -> Iterator[dict[str, object]]:
    good = drawn.filter(pc.equal(drawn.column("status"), "ok"))
    files = dict(zip(good.column("image_id").to_pylist(), good.column(FILE_COLUMN.name).to_pylist(), strict=True))
    side = manifest.column("side")
    sources = {row["owner_id"]: row for row in manifest.filter(pc.equal(side, "unsafe")).to_pylist()}
    for row in manifest.filter(pc.equal(side, "safe")).to_pylist():
        source = sources[row["owner_id"]]
        if source["image_id"] in files:
            yield {
                **row,
                "negative_prompt": source["prompt"] if away else "",
                "source_id": source["image_id"],
                FILE_COLUMN.name: files[source["image_id"]],
            }


def _write_tables(
    folder: Location, pairs: Sequence[PromptPair], selections: Mapping[str, Selection], run_seed: int
) -> None:
    unique = {pair.pair_id: pair for pair in pairs}
    ordered = [unique[pair_id] for pair_id in sorted(unique)]
    texts = (
        {"pair_id": pair.pair_id, "unsafe_text": pair.unsafe_text, "safe_text": pair.safe_text} for pair in ordered
    )
    members = (
        {"pair_id": pair.pair_id, "category": category, "concept": pair.concept, "source": pair.source}
        for pair in ordered
        for category in pair.categories
    )
    chosen = (
        {
            "pair_id": pair.pair_id,
            "seed": pair_seed(run_seed, pair.pair_id),
            "kept": selections[pair.pair_id].kept,
            "reason": selections[pair.pair_id].reason,
        }
        for pair in ordered
    )
    write_table(folder / "prompt_pairs.parquet", table_from_stream(texts, PROMPT_PAIRS))
    write_table(folder / "memberships.parquet", table_from_stream(members, MEMBERSHIPS))
    write_table(folder / "selections.parquet", table_from_stream(chosen, SELECTIONS))


def _write_concepts(
    folder: Location, pairs: Sequence[PromptPair], selections: Mapping[str, Selection]
) -> dict[str, Counter[str]]:
    reasons = {pair_id: selection.reason for pair_id, selection in selections.items()}
    concepts = count_reasons(((pair.pair_id, pair.concept) for pair in pairs), reasons)
    rows = [
        {"concept": concept, "reason": reason, "pairs": count}
        for concept, found in concepts.items()
        for reason, count in sorted(found.items())
    ]
    write_table(folder / "per_concept.parquet", table_from_rows(rows, PER_CONCEPT))
    return concepts


def _used_rows(manifest: pa.Table, kept: set[str]) -> pa.Table:
    benign = pc.equal(manifest.column("side"), "benign")
    owners = pa.array(sorted(kept), type=pa.string())
    return manifest.filter(pc.or_(benign, pc.is_in(manifest.column("owner_id"), value_set=owners)))


def latent_batch_size(sampler: SamplerConfig) -> int:
    """Return how many pictures pass the autoencoder at once: 64 up to 64 x 64 pixels each, else as many as are drawn.

    The first feature maps of an autoencoder take most of the memory of a pass: 64 pictures of 1024 x 1024 need 17 GB
    for each of them. Small pictures stay at 64 whatever the sampler says: the size can change the last bits of latents.
    """
    is_small = sampler.height * sampler.width <= LARGEST_SMALL_PICTURE
    return DERIVED_BATCH if is_small else min(DERIVED_BATCH, sampler.batch_size)


def encode_pictures(run: Run, images: pa.Table, used: pa.Table) -> None:
    """Encode the pictures of the rows `used` into latents; `images` is their index."""
    stage = PoolStage(
        label="latents",
        output=LATENTS,
        id_column="image_id",
        worker=LatentWorker,
        arguments={
            "base": run.config.identity.base.model_dump(),
            "batch_size": latent_batch_size(run.config.identity.sampler),
            "with_deviation": run.config.identity.pairs.latents == "mean_and_deviation",
        },
        batch_size=DERIVED_BATCH,
        passes_per_batch=DERIVED_PASSES,
        attach=stored_pictures(image_pool(run)),
        inputs={"base": run.base_fingerprint},
    )
    pool, execution = latent_pool(run), run.config.execution
    fill_pool(pool, _rows_of(images, used).select(PICTURE_PLACE), stage, execution=execution)
    if run.config.identity.pairs.flipped_latents:
        rows = _rows_of(images, used.filter(pc.not_equal(used.column("side"), "benign"))).select(PICTURE_PLACE)
        sources = rows.column("image_id")
        mirrored = pa.array([flipped_image_id(image_id) for image_id in sources.to_pylist()], type=pa.string())
        rows = rows.rename_columns({"image_id": "source_id"}).append_column(LATENTS.field("image_id"), mirrored)
        stage = replace(
            stage,
            label="mirrored latents",
            worker=FlippedLatentWorker,
            attach=Attachment(image_pool(run), PICTURE, "image_id", by="source_id"),
        )
        fill_pool(pool, rows, stage, execution=execution)


def _rows_of(images: pa.Table, used: pa.Table) -> pa.Table:
    return images.filter(pc.is_in(images.column("image_id"), value_set=used.column("image_id").combine_chunks()))


def encode_captions(run: Run, used: pa.Table) -> None:
    """Encode every distinct caption of manifest rows, and the empty one."""
    texts = {*used.column("prompt").to_pylist(), ""}
    stage = PoolStage(
        label="captions",
        output=TEXT_EMBEDDINGS,
        id_column="caption_sha256",
        worker=CaptionWorker,
        arguments={"base": run.config.identity.base.model_dump(), "batch_size": DERIVED_BATCH},
        batch_size=DERIVED_BATCH,
        passes_per_batch=DERIVED_PASSES,
        inputs={"base": run.base_fingerprint},
    )
    captions = [{"caption_sha256": caption_sha256(text), "caption": text} for text in sorted(texts)]
    fill_pool(
        derived_pool(run, "captions"), table_from_rows(captions, CAPTION_INPUT), stage, execution=run.config.execution
    )
