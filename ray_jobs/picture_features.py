"""Part of stage 6: what networks say of stored test pictures beside the judges, for distances and perceptual changes.

Features and comparisons lie in pools like pictures do: what an earlier run measured of the same pictures with the same
weights is not measured again. Only neutral prompts are measured: the question is what an adapter does to benign
pictures.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ray_jobs.cluster import connect
from ray_jobs.evaluate import (
    OUTCOMES_FILE,
    EvaluatedRow,
    evaluation_prompts,
    outcome_id,
    outcomes_pool,
    row_prompts,
)
from ray_jobs.expert_files import record_folder
from ray_jobs.picture_workers import PICTURE, ChangeWorker, FeatureWorker
from ray_jobs.pools import Attachment, PoolStage, check_error_rate, fill_pool
from ray_jobs.run import Run
from safetydpo.artifacts.evaluation_schemas import PICTURE_CHANGES, PICTURE_FEATURES
from safetydpo.artifacts.layout import stage_folder
from safetydpo.artifacts.pool_index import FILE_COLUMN, read_index, read_rows
from safetydpo.artifacts.records import ArtifactKey, Record
from safetydpo.artifacts.schemas import OUTCOMES, make_change_id, sha256_of
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import fingerprint_rows, read_table, table_from_rows, write_table
from safetydpo.config.measures import MeasuresConfig
from safetydpo.errors import UsageError
from safetydpo.evaluation.feature_metrics import PictureKey, PictureMeasures
from safetydpo.judges.build import clip_folder, fingerprint_files
from safetydpo.judges.convolutions import HEADS_FILE, MODEL_FILE

RECIPE_VERSION = 1
BATCH_SIZE = 64
PASSES_PER_BATCH = 8
FEATURE_MANIFEST = pa.schema([PICTURE_FEATURES.field("image_id"), PICTURE_FEATURES.field("attempt"), FILE_COLUMN])
REFERENCE_MANIFEST = pa.schema([*list(FEATURE_MANIFEST)[:2], pa.field("path", pa.string(), nullable=False)])
CHANGE_MANIFEST = pa.schema(
    [
        PICTURE_CHANGES.field("change_id"),
        PICTURE_CHANGES.field("attempt"),
        pa.field("image_id", pa.string(), nullable=False),
        FILE_COLUMN,
        pa.field("base_image_id", pa.string(), nullable=False),
        pa.field("base_file", pa.string(), nullable=False),
    ]
)
INCEPTION = "inception"
REFERENCE = "reference"
PICTURE_FILES = (".png", ".webp")


@dataclass(frozen=True)
class _Asked:
    """One picture of a row, and the base's of the same prompt and seed."""

    key: PictureKey
    image_id: str
    base_image_id: str


def measure_pictures(run: Run, outcomes: Record, rows: Sequence[EvaluatedRow]) -> Record | None:
    """Make or find what networks say of the pictures of these rows; None if no network is asked.

    Raises:
        UsageError: if a folder of the settings does not exist.
        SafetyDPOError: if weights are missing, or too many pictures fail.
    """
    measures = run.config.identity.evaluation.measures
    fingerprints = network_fingerprints(measures)
    if not fingerprints:
        return None
    asked = _asked(run, rows)
    key = ArtifactKey(
        stage="picture_measures",
        name=run.config.name,
        identity={"networks": sorted(fingerprints)},
        inputs={
            "outcomes": outcomes.hash,
            "pictures": fingerprint_rows((sha256_of(list(one.key)), one.image_id) for one in asked),
            **fingerprints,
        },
        recipe_version=RECIPE_VERSION,
    )
    return run.build(
        "picture_measures", key, lambda folder: _make(run, folder, asked, measures=measures, fingerprints=fingerprints)
    )


def network_fingerprints(measures: MeasuresConfig) -> dict[str, str]:
    """Return the sha256 of the weights of every network that is asked, and of the reference pictures.

    Raises:
        UsageError: if a folder of the settings does not exist.
        SafetyDPOError: if weights are missing.
    """
    found: dict[str, str] = {name: fingerprint_files(_folder(measures, name)) for name in measures.perceptual}
    if measures.inception is not None:
        file = Path(measures.inception).expanduser()
        if not file.is_file():
            raise UsageError(
                f"expected the weights of Inception-v3 at {file} (identity.evaluation.measures.inception), found no "
                "file: save the state dict of pytorch-fid or torchvision there, as safetensors"
            )
        found[INCEPTION] = hashlib.sha256(file.read_bytes()).hexdigest()
    if measures.reference_pictures is not None:
        found[REFERENCE] = fingerprint_rows((name, name) for name in _reference_files(measures.reference_pictures))
    return found


def _folder(measures: MeasuresConfig, name: str) -> Path:
    if name == "clip_tower":
        return clip_folder(measures.clip, setting="identity.evaluation.measures.clip")
    folder = Path(str(getattr(measures, name))).expanduser()
    if not folder.is_dir():
        raise UsageError(
            f"expected a folder with the weights of {name} at {folder} (identity.evaluation.measures.{name}), found "
            "none: correct the path"
        )
    if not (folder / MODEL_FILE).is_file():
        raise UsageError(
            f"expected the weights of {name} at {folder / MODEL_FILE}, found none: save torchvision's state dict of "
            f"{name} there as safetensors, and the heads of lpips beside it as {HEADS_FILE}"
        )
    return folder


def _reference_files(folder: str) -> dict[str, Path]:
    """Return the pictures of a folder by the sha256 of their bytes; a picture that lies there twice counts once."""
    place = Path(folder).expanduser()
    files = sorted(file for file in place.glob("*") if file.suffix.lower() in PICTURE_FILES)
    if len(files) < 2:
        raise UsageError(
            f"expected at least 2 PNG or WebP pictures in {place} (identity.evaluation.measures.reference_pictures), "
            f"found {len(files)}: correct the path"
        )
    return dict(sorted((hashlib.sha256(file.read_bytes()).hexdigest(), file) for file in files))


def _asked(run: Run, rows: Sequence[EvaluatedRow]) -> list[_Asked]:
    identity = run.config.identity
    sampler = identity.sampler.model_dump(mode="json")
    prompts = evaluation_prompts(run)
    base = next(row for row in rows if row.source.kind == "base")
    return [
        _Asked(
            (row.source.name, prompt.prompt_id, seed),
            outcome_id(run, row, prompt, seed, sampler),
            outcome_id(run, base, prompt, seed, sampler),
        )
        for row in rows
        for seed in identity.evaluation.seeds
        for prompt in row_prompts(row, prompts)
        if prompt.prompt_set == "neutral"
    ]


def _make(
    run: Run, folder: Location, asked: Sequence[_Asked], *, measures: MeasuresConfig, fingerprints: Mapping[str, str]
) -> Mapping[str, Any]:
    connect(run.config)
    tables = _measure_changes(run, asked, measures=measures, fingerprints=fingerprints)
    if measures.inception is not None:
        tables |= _measure_features(run, asked, measures=measures, fingerprint=fingerprints[INCEPTION])
    for name, table in tables.items():
        write_table(folder / f"{name}.parquet", table)
    failed = [f"{name}:{row_id}" for name, table in tables.items() for row_id in _failed_ids(table)]
    return {
        "fingerprint": sha256_of([key_part for name in sorted(tables) for key_part in (name, _content(tables[name]))]),
        "counts": {name: table.num_rows for name, table in tables.items()},
        "failed_units": failed,
    }


def _pool(run: Run, network: str, fingerprint: str) -> Location:
    key = sha256_of([fingerprint, RECIPE_VERSION])
    return stage_folder(run.store, "picture_measures") / f"{network}-{key[:12]}"


def _measure_changes(
    run: Run, asked: Sequence[_Asked], *, measures: MeasuresConfig, fingerprints: Mapping[str, str]
) -> dict[str, pa.Table]:
    pictures = outcomes_pool(run)
    manifest = table_from_rows(_change_rows(asked, _places(pictures, asked)), CHANGE_MANIFEST)
    tables: dict[str, pa.Table] = {}
    for name in measures.perceptual:
        arguments = {"network": name, "folder": str(_folder(measures, name).absolute()), "pictures": pictures}
        attach = Attachment(pictures, PICTURE, "image_id")
        stage = _stage(f"changes by {name}", PICTURE_CHANGES, ChangeWorker, arguments, attach)
        tables[name] = _fill(run, _pool(run, name, fingerprints[name]), manifest, stage)
    return tables


def _measure_features(
    run: Run, asked: Sequence[_Asked], *, measures: MeasuresConfig, fingerprint: str
) -> dict[str, pa.Table]:
    pictures, pool = outcomes_pool(run), _pool(run, INCEPTION, fingerprint)
    places = _places(pictures, asked)
    arguments = {"file": str(Path(str(measures.inception)).expanduser().absolute())}
    drawn = dict.fromkeys(one.image_id for one in asked if one.image_id in places)
    rows = [{"image_id": image_id, "attempt": 1, FILE_COLUMN.name: places[image_id]} for image_id in drawn]
    attach = Attachment(pictures, PICTURE, "image_id")
    stage = _stage("inception features", PICTURE_FEATURES, FeatureWorker, arguments, attach)
    tables = {INCEPTION: _fill(run, pool, table_from_rows(rows, FEATURE_MANIFEST), stage)}
    if measures.reference_pictures is not None:
        files = _reference_files(measures.reference_pictures)
        given = [{"image_id": name, "attempt": 1, "path": str(path.absolute())} for name, path in files.items()]
        stage = _stage("reference features", PICTURE_FEATURES, FeatureWorker, arguments)
        tables[REFERENCE] = _fill(run, pool, table_from_rows(given, REFERENCE_MANIFEST), stage)
    return tables


def _stage(
    label: str, output: pa.Schema, worker: type, arguments: Mapping[str, Any], attach: Attachment | None = None
) -> PoolStage:
    return PoolStage(
        label=label,
        output=output,
        id_column=output.names[0],
        worker=worker,
        arguments={**arguments, "batch_size": BATCH_SIZE},
        batch_size=BATCH_SIZE,
        passes_per_batch=PASSES_PER_BATCH,
        attach=attach,
    )


def _fill(run: Run, pool: Location, manifest: pa.Table, stage: PoolStage) -> pa.Table:
    index = fill_pool(pool, manifest, stage, execution=run.config.execution)
    table = read_rows(pool, stage.output, index, id_column=stage.id_column)
    # A picture without features stays out of distances; too many of them, and they would be of something else.
    check_error_rate(
        table.rename_columns(["image_id", *table.column_names[1:]]), limit=run.config.identity.pairs.max_error_rate
    )
    return table


def _failed_ids(table: pa.Table) -> list[str]:
    return [row[table.column_names[0]] for row in table.drop_columns(table.column_names[1]).to_pylist() if row["error"]]


def _content(table: pa.Table) -> str:
    """Return a fingerprint of what was measured."""
    first, second = table.column_names[:2]
    return fingerprint_rows((row[first], sha256_of(row[second])) for row in table.select([first, second]).to_pylist())


def _places(pictures: Location, asked: Sequence[_Asked]) -> dict[str, str]:
    """Return the file of every picture that was drawn; failed ones have none."""
    wanted = {image_id for one in asked for image_id in (one.image_id, one.base_image_id)}
    index = read_index(pictures, OUTCOMES, wanted=wanted, id_column="image_id")
    return {row["image_id"]: row[FILE_COLUMN.name] for row in index.to_pylist() if row["status"] == "ok"}


def _change_rows(asked: Sequence[_Asked], places: Mapping[str, str]) -> list[dict[str, object]]:
    rows = {}
    for one in asked:
        if one.image_id != one.base_image_id and one.image_id in places and one.base_image_id in places:
            change_id = make_change_id(one.image_id, one.base_image_id)
            rows[change_id] = {
                "change_id": change_id,
                "attempt": 1,
                "image_id": one.image_id,
                FILE_COLUMN.name: places[one.image_id],
                "base_image_id": one.base_image_id,
                "base_file": places[one.base_image_id],
            }
    return list(rows.values())


def read_measures(run: Run, outcomes: Record, measured: Record | None, rows: Sequence[EvaluatedRow]) -> PictureMeasures:
    """Return what was measured, by picture, and why it is missing of some."""
    measures = run.config.identity.evaluation.measures
    asked = _asked(run, rows)
    failures: dict[tuple[str, PictureKey], str] = {}
    embeddings = _embeddings(run, outcomes, asked, failures) if measures.cmmd else {}
    if measured is None:
        return PictureMeasures(embeddings=embeddings, failures=failures)
    folder = record_folder(run, measured)
    changes: dict[str, dict[PictureKey, float]] = {}
    for name in measures.perceptual:
        found = _by_id(folder / f"{name}.parquet", PICTURE_CHANGES)
        changes[name] = {}
        for one in asked:
            row = found.get(make_change_id(one.image_id, one.base_image_id))
            _take(row, "distance", f"change by {name}", one.key, changes[name], failures)
    features: dict[PictureKey, Any] = {}
    reference = None
    if measures.inception is not None:
        found = _by_id(folder / f"{INCEPTION}.parquet", PICTURE_FEATURES)
        for one in asked:
            _take(found.get(one.image_id), "values", "inception features", one.key, features, failures)
        if measures.reference_pictures is not None:
            rows_found = _by_id(folder / f"{REFERENCE}.parquet", PICTURE_FEATURES).values()
            reference = np.array([row["values"] for row in rows_found if row["status"] == "ok"], dtype=np.float64)
    return PictureMeasures(
        embeddings=embeddings,
        inception={key: np.array(values, dtype=np.float64) for key, values in features.items()},
        inception_reference=reference,
        changes=changes,
        failures=failures,
    )


def _take(
    row: Mapping[str, Any] | None,
    column: str,
    what: str,
    key: PictureKey,
    found: dict[PictureKey, Any],
    failures: dict[tuple[str, PictureKey], str],
) -> None:
    # No row: the picture itself, or the base's, could not be drawn, which is said of it already; or it is the base's.
    if row is not None and row["status"] == "ok":
        found[key] = row[column]
    elif row is not None:
        failures[what, key] = row["error"]


def _by_id(file: Location, schema: pa.Schema) -> dict[str, dict[str, Any]]:
    return {row[schema.names[0]]: row for row in read_table(file, schema).to_pylist()}


def _embeddings(
    run: Run, outcomes: Record, asked: Sequence[_Asked], failures: dict[tuple[str, PictureKey], str]
) -> dict[PictureKey, Any]:
    columns = ["image_id", "status", "clip_embedding"]
    table = read_table(record_folder(run, outcomes) / OUTCOMES_FILE, OUTCOMES, columns=columns)
    stored = {row["image_id"]: row["clip_embedding"] for row in table.to_pylist() if row["status"] == "ok"}
    found = {}
    for one in asked:
        embedding = np.array(stored.get(one.image_id, ()), dtype=np.float64)
        if embedding.size and np.isfinite(embedding).all():
            found[one.key] = embedding
        elif one.image_id in stored:
            failures["CLIP embedding", one.key] = "expected finite numbers, found a NaN, an infinity or nothing"
    return found
