"""Stage 2: one safety expert per category, trained by Ray Train with DeepSpeed, several at once.

Experts are trained in lanes (`ray_jobs/lanes.py`): Ray Train runs whose workers load the base model once and train one
expert after another. An expert is published by creating its record; a lane that is killed loses the steps since its
last checkpoint, from which the next attempt goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ray_jobs.cluster import connect, workers_for
from ray_jobs.generate_pairs import derived_pool, latent_pool
from ray_jobs.lanes import Task, run_lanes
from ray_jobs.progress import progress_bar
from ray_jobs.run import Run
from safetydpo.artifacts.attempts import clear_attempts
from safetydpo.artifacts.pool_index import read_pool
from safetydpo.artifacts.records import ArtifactKey, Record, find_closed, read_record
from safetydpo.artifacts.schemas import (
    IMAGE_MANIFEST,
    LATENTS,
    MEMBERSHIPS,
    PROMPT_PAIRS,
    SELECTIONS,
    TEXT_EMBEDDINGS,
    caption_sha256,
)
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import fingerprint_rows, read_table
from safetydpo.config.schema import Config
from safetydpo.config.training import DpoConfig
from safetydpo.errors import SafetyDPOError

RECIPE_VERSION = 2
ALL_SINGLE = "all_single"
CHECKPOINT_FILE = "checkpoint.safetensors"
PASSES_PER_STEP = 2
"""A training step costs about as much as this many passes through the denoiser when sampling."""
LABEL = "expert steps"
TOLD_FAILURES = 5
"""Failed experts that the error of a command tells of."""


@dataclass(frozen=True)
class ExpertUnit:
    """One expert to be trained: its name, its pairs, and the settings of its training.

    `other_pair_ids` are pairs of other experts whose pictures the retention term keeps as they are.
    """

    name: str
    pair_ids: tuple[str, ...]
    other_pair_ids: tuple[str, ...]
    categories: tuple[str, ...]
    dpo: DpoConfig
    key: ArtifactKey


def train_experts(run: Run, pairs: Record, pairs_folder: Location) -> dict[str, Record]:
    """Make or find every expert of a run; return their records by name, `all_single` among them if wanted."""
    units = plan_experts(run, pairs, pairs_folder)
    pending = [unit for unit in units if find_closed(run.store, unit.key) is None]
    failures = _train(run, pending, pairs_folder) if pending else {}
    trained = {unit.name for unit in pending}
    records: dict[str, Record] = {}
    for unit in units:
        record = find_closed(run.store, unit.key)
        if record is not None:
            if unit.name in trained:
                run.made.append(unit.key.folder_name)
            # Killed between the record and this, a command leaves it behind, and nothing else would ever look.
            _clear(run.folder(unit.key), record)
            records[unit.name] = run.build(f"expert:{unit.name}", unit.key, lambda _folder: {})
        elif unit.name not in failures:
            raise SafetyDPOError(
                f"expected a finished expert {unit.name!r} in {run.folder(unit.key)}, found none: run the command again"
            )
    if failures:
        raise _failed(failures, len(units))
    return records


def _clear(folder: Location, record: Record) -> None:
    # Before experts had attempts, the checkpoint lay beside the record.
    (folder / CHECKPOINT_FILE).delete()
    if "attempt" in record.details:
        clear_attempts(folder, keep=record.details["attempt"], without=CHECKPOINT_FILE)


def _failed(failures: Mapping[str, str], total: int) -> SafetyDPOError:
    told = [f"{name} ({reason})" for name, reason in sorted(failures.items())[:TOLD_FAILURES]]
    rest = f" and {len(failures) - TOLD_FAILURES} more" if len(failures) > TOLD_FAILURES else ""
    return SafetyDPOError(
        f"expected {total} trained experts, found {len(failures)} that failed: {'; '.join(told)}{rest}; the others are "
        "closed. Mend the cause, then run the same command again, which tries these anew"
    )


def plan_experts(run: Run, pairs: Record, pairs_folder: Location) -> list[ExpertUnit]:
    """Return one unit per category, plus `all_single`; a pair of two categories trains both experts."""
    identity = run.config.identity
    kept = {
        row["pair_id"] for row in read_table(pairs_folder / "selections.parquet", SELECTIONS).to_pylist() if row["kept"]
    }
    members: dict[str, set[str]] = {category: set() for category in identity.prompts.categories}
    for row in read_table(pairs_folder / "memberships.parquet", MEMBERSHIPS).to_pylist():
        if row["pair_id"] in kept and row["category"] in members:
            members[row["category"]].add(row["pair_id"])
    everything = set().union(*members.values())
    units = [
        _unit(run, pairs, category, members[category], everything - members[category], (category,), identity.dpo)
        for category in identity.prompts.categories
    ]
    if identity.experts.all_single:
        steps = max(1, round(identity.dpo.steps * identity.experts.all_single_step_factor))
        dpo = identity.dpo.model_copy(update={"steps": steps})
        units.append(_unit(run, pairs, ALL_SINGLE, everything, set(), identity.prompts.categories, dpo))
    return units


def _unit(
    run: Run,
    pairs: Record,
    name: str,
    pair_ids: set[str],
    other_pair_ids: set[str],
    categories: tuple[str, ...],
    dpo: DpoConfig,
) -> ExpertUnit:
    identity = run.config.identity
    others = other_pair_ids if dpo.retention_weight > 0 and dpo.retention_pictures != "neutral" else set()
    # Benign pictures take part in training only with the retention term; without it they must not change a hash.
    benign = benign_fingerprint(pairs) if dpo.retention_weight > 0 else ""
    key = ArtifactKey(
        stage="experts",
        name=name,
        identity={
            "name": name,
            "seed": identity.seed,
            "base": identity.base.model_dump(mode="json"),
            "sampler": identity.sampler.model_dump(mode="json"),
            "lora": identity.lora.model_dump(mode="json"),
            "dpo": dpo.model_dump(mode="json"),
        },
        inputs={
            "base": run.base_fingerprint,
            "pairs": fingerprint_rows((pair_id, "") for pair_id in pair_ids),
            "retention": benign,
            "retention_pairs": fingerprint_rows((pair_id, "") for pair_id in others) if others else "",
        },
        recipe_version=RECIPE_VERSION,
    )
    return ExpertUnit(name, tuple(sorted(pair_ids)), tuple(sorted(others)), categories, dpo, key)


def benign_fingerprint(pairs: Record) -> str:
    """Return what stands for the benign pictures in the key of a training: their prompts, without those that failed.

    A picture that failed when the pairs closed may be drawn by another run of the same store later; a training under
    the same key must not change by that, so it leaves the picture out for good.
    """
    prompts = str(pairs.inputs["retention_prompts"])
    if not pairs.failed_units:
        return prompts
    return fingerprint_rows([(prompts, ""), *((image_id, "failed") for image_id in pairs.failed_units)])


def _train(run: Run, units: Sequence[ExpertUnit], pairs_folder: Location) -> dict[str, str]:
    """Train what is open; return {name: reason} of the experts that failed."""
    from ray_jobs.expert_worker import train_lane

    connect(run.config)
    steps = max(unit.dpo.steps for unit in units)
    num_lanes = workers_for(run.config.execution, tasks=len(units), passes_per_task=steps * PASSES_PER_STEP)
    tasks = [Task(unit.name, run.folder(unit.key), unit.dpo.steps) for unit in units]
    with progress_bar(LABEL, total=sum(unit.dpo.steps for unit in units)) as board:
        settings = {
            "config": run.config.model_dump(mode="json"),
            "units": [unit_to_json(unit) for unit in units],
            "pairs_folder": pairs_folder.name,
            "board": board,
        }
        return run_lanes(run, tasks, train_lane, settings, num_lanes=num_lanes)


def unit_to_json(unit: ExpertUnit) -> dict[str, Any]:
    """Return a unit as plain values, which is what a train function receives."""
    content = asdict(unit)
    content["dpo"] = unit.dpo.model_dump(mode="json")
    content["key"] = asdict(unit.key)
    return content


def unit_from_json(content: Mapping[str, Any]) -> ExpertUnit:
    """Return the unit of `unit_to_json`."""
    return ExpertUnit(
        name=content["name"],
        pair_ids=tuple(content["pair_ids"]),
        other_pair_ids=tuple(content["other_pair_ids"]),
        categories=tuple(content["categories"]),
        dpo=DpoConfig(**content["dpo"]),
        key=ArtifactKey(**content["key"]),
    )


@dataclass(frozen=True)
class TrainingTables:
    """Everything a lane reads, once, for all of its experts."""

    texts: Mapping[str, tuple[str, str]]
    images: Mapping[tuple[str, str], tuple[str, str]]
    latents: Mapping[str, np.ndarray[Any, Any]]
    embeddings: Mapping[str, np.ndarray[Any, Any]]
    pooled: Mapping[str, np.ndarray[Any, Any]] | None = None
    """Pooled features of captions; None where the model family has none."""


def read_training_tables(run: Run, pairs_folder: Location) -> TrainingTables:
    """Read manifest, latents and caption features of a pairs artifact; pictures that failed are not among them."""
    record = read_record(pairs_folder)
    failed = set(record.failed_units) if record is not None else set()
    everything = read_table(pairs_folder / "images.parquet", IMAGE_MANIFEST).to_pylist()
    manifest = [row for row in everything if row["image_id"] not in failed]
    pairs = read_table(pairs_folder / "prompt_pairs.parquet", PROMPT_PAIRS).to_pylist()
    wanted = {row["image_id"] for row in manifest}
    latents = read_pool(latent_pool(run), LATENTS, wanted=wanted, id_column="image_id")
    # The pool holds those of every run on this store.
    texts = {"", *(row["prompt"] for row in manifest)}
    texts.update(row[side] for row in pairs for side in ("unsafe_text", "safe_text"))
    captions = read_pool(
        derived_pool(run, "captions"),
        TEXT_EMBEDDINGS,
        wanted={caption_sha256(text) for text in texts},
        id_column="caption_sha256",
    )
    return TrainingTables(
        texts={row["pair_id"]: (row["unsafe_text"], row["safe_text"]) for row in pairs},
        images={(row["owner_id"], row["side"]): (row["image_id"], row["prompt"]) for row in manifest},
        latents=_arrays(latents, "image_id", "latent", ("channels", "height", "width")),
        embeddings=_arrays(captions, "caption_sha256", "embedding", ("tokens", "width")),
        pooled=_pooled(captions),
    )


def _pooled(captions: pa.Table) -> dict[str, np.ndarray[Any, Any]] | None:
    with_pooled = captions.filter(pa.compute.is_valid(captions.column("pooled")))
    return _arrays(with_pooled, "caption_sha256", "pooled", ("pooled_width",)) if with_pooled.num_rows else None


def _arrays(table: pa.Table, key: str, value: str, shape: Sequence[str]) -> dict[str, np.ndarray[Any, Any]]:
    return {
        row[key]: np.frombuffer(row[value], dtype=np.float16).reshape([row[axis] for axis in shape])
        for row in table.to_pylist()
    }


def preference_data(tables: TrainingTables, unit: ExpertUnit, backbone: Any, config: Config) -> Any:
    """Gather one expert's preferences from the tables.

    Raises:
        SafetyDPOError: if the unit has no pairs, or latents or captions are missing or broken.
    """
    from safetydpo.dpo.batch import PreferenceData, PreferenceRow, RetentionRow

    sampler = config.identity.sampler
    rows = [
        PreferenceRow(
            pair_id=pair_id,
            safe_image_id=tables.images[pair_id, "safe"][0],
            unsafe_image_id=tables.images[pair_id, "unsafe"][0],
            safe_caption_sha256=caption_sha256(tables.texts[pair_id][1]),
            unsafe_caption_sha256=caption_sha256(tables.texts[pair_id][0]),
        )
        for pair_id in unit.pair_ids
    ]
    kept_pictures = [picture for (_owner, side), picture in tables.images.items() if side == "benign"]
    sides = ("safe", "unsafe") if unit.dpo.retention_pictures == "others" else ("safe",)
    kept_pictures += [tables.images[pair_id, side] for pair_id in unit.other_pair_ids for side in sides]
    # Two pairs may share a picture; it is kept once.
    benign = [RetentionRow(image_id, caption_sha256(prompt)) for image_id, prompt in dict(kept_pictures).items()]
    return PreferenceData.from_tables(
        rows,
        latents=tables.latents,
        embeddings=tables.embeddings,
        latent_shape=backbone.latent_shape(height=sampler.height, width=sampler.width),
        retention=benign if unit.dpo.retention_weight > 0 else [],
        pooled=tables.pooled,
    )
