"""Stage 5: the final measurement on test prompts, by judges that chose nothing (`audit`) and those that did.

One Ray Data pipeline draws and judges the pictures of all rows; a picture that an earlier run of the same base,
sampler and judges made is taken from the pool.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from ray_jobs.attack_prompts import attack_sets, with_attacks
from ray_jobs.benchmark_prompts import benchmark_prompts, benchmark_sets
from ray_jobs.cluster import connect
from ray_jobs.evaluation_worker import EvaluateWorker
from ray_jobs.expert_files import expert_categories, record_files
from ray_jobs.final_judges import judge_roles, judges_fingerprint
from ray_jobs.pools import PoolStage, check_error_rate, fill_pool
from ray_jobs.prompt_tables import needed_prompts, split_prompts, spread_prompts
from ray_jobs.resources import calls_per_worker
from ray_jobs.run import Run
from safetydpo.artifacts.layout import stage_folder
from safetydpo.artifacts.pool_index import read_rows
from safetydpo.artifacts.records import ArtifactKey, Record
from safetydpo.artifacts.schemas import IMAGE_MANIFEST, OUTCOMES, make_image_id, sha256_of
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import fingerprint_rows, table_from_rows, write_table
from safetydpo.config.experts import ALL_SINGLE
from safetydpo.config.schema import EvaluationConfig
from safetydpo.evaluation.rows import RowSource
from safetydpo.prompts.sets import Prompt
from safetydpo.seeding import derive_seed

RECIPE_VERSION = 1
MANIFEST_FILE = "manifest.parquet"
OUTCOMES_FILE = "outcomes.parquet"
EVERYTHING = ("unsafe", "ood", "neutral", "neighbour")
WAITING_JUDGE = "vlm"
"""The judge whose work is done elsewhere, while its worker waits."""


@dataclass(frozen=True)
class EvaluatedRow:
    """One row of the summary: what it is, where its adapter lies, which prompts it draws."""

    source: RowSource
    adapter: str
    """Folder of the adapter's file; empty for the base."""
    prompt_sets: tuple[str, ...]
    prompts_per_category: int | None = None
    """Only the first so many unsafe prompts of each category; None = all of them."""


def evaluate(
    run: Run,
    experts: Mapping[str, Record],
    merged: Mapping[str, Record],
    searched: Record | None,
    comparators: Mapping[str, Record] | None = None,
) -> tuple[Record, list[EvaluatedRow]]:
    """Make or find the outcomes of every row; return the record and the rows."""
    rows = [*list_rows(run, experts, merged, searched), *comparator_rows(run, comparators or {})]
    rows = with_attacks(run, rows, searched)
    return evaluate_rows(run, rows), rows


def evaluate_rows(run: Run, rows: Sequence[EvaluatedRow], *, pointer: str = "outcomes") -> Record:
    """Make or find the outcomes of these rows; pictures that the pool holds already are not drawn again."""
    manifest = build_manifest(run, rows, evaluation_prompts(run))
    return run.build(pointer, outcomes_key(run, manifest), lambda folder: _make(run, folder, manifest, rows))


def outcomes_key(run: Run, manifest: Sequence[Mapping[str, object]]) -> ArtifactKey:
    """Return the key of the outcomes of these pictures."""
    identity = run.config.identity
    return ArtifactKey(
        stage="outcomes",
        name=run.config.name,
        identity={
            "base": identity.base.model_dump(mode="json"),
            "sampler": identity.sampler.model_dump(mode="json"),
        },
        inputs={
            "base": run.base_fingerprint,
            "judges": judges_fingerprint(run.config),
            "pictures": fingerprint_rows((str(row["image_id"]), str(row["prompt"])) for row in manifest),
        },
        recipe_version=RECIPE_VERSION,
    )


def list_rows(
    run: Run, experts: Mapping[str, Record], merged: Mapping[str, Record], searched: Record | None
) -> list[EvaluatedRow]:
    """Return base, single experts, `all_single`, plain merges and the searched merge, in the order of the table."""
    everything = (*EVERYTHING, *benchmark_sets(run.config))
    rows = [EvaluatedRow(RowSource("base", "base"), "", everything)]
    evaluation = run.config.identity.evaluation
    if evaluation.expert_rows:
        single = {name: record for name, record in experts.items() if name != ALL_SINGLE}
        own = expert_categories(run, single)
        sets = expert_sets(evaluation)
        for name, record in single.items():
            row = _adapter_row(run, f"expert:{name}", "expert", record, None, sets)
            source = replace(row.source, categories=own[name])
            rows.append(replace(row, source=source, prompts_per_category=evaluation.expert_prompts_per_category))
    if ALL_SINGLE in experts:
        rows.append(_adapter_row(run, ALL_SINGLE, "all_single", experts[ALL_SINGLE], None, everything))
    for name, record in merged.items():
        rows.append(_adapter_row(run, name, "merged", record, _scale_of(record), everything))
    if searched is not None:
        rows.append(_adapter_row(run, "searched", "searched", searched, _scale_of(searched), everything))
    return rows


def expert_sets(evaluation: EvaluationConfig) -> tuple[str, ...]:
    """Return the prompt sets that single experts draw."""
    return ("unsafe", "neutral", "neighbour") if evaluation.expert_retention else ("unsafe",)


def comparator_rows(run: Run, comparators: Mapping[str, Record]) -> list[EvaluatedRow]:
    """Return the rows of other methods, which draw what the base draws."""
    return [
        EvaluatedRow(
            RowSource(name, "comparator", adapter_hash=record.fingerprint),
            record_files(run, record).path,
            (*EVERYTHING, *benchmark_sets(run.config)),
        )
        for name, record in comparators.items()
    ]


def _scale_of(record: Record) -> float:
    return float(record.details["recipe"]["global_scale"])


def _adapter_row(
    run: Run, name: str, kind: Any, record: Record, scale: float | None, sets: tuple[str, ...]
) -> EvaluatedRow:
    rank = int(record.counts.get("rank", run.config.identity.lora.rank))
    source = RowSource(name, kind, adapter_hash=record.fingerprint, rank=rank, scale=1.0 if scale is None else scale)
    return EvaluatedRow(source, record_files(run, record).path, sets)


def evaluation_prompts(run: Run) -> dict[str, list[Prompt]]:
    """Return the test prompts by set, those of the attacks that the run made last."""
    return {**shared_prompts(run), **attack_sets(run), **benchmark_prompts(run.config)}


def shared_prompts(run: Run) -> dict[str, list[Prompt]]:
    """Return the test prompts of the run's own source by set."""
    identity = run.config.identity
    source, evaluation = identity.prompts, identity.evaluation
    unsafe = needed_prompts(source, "test", "unsafe", setting="identity.evaluation.prompts_per_category")

    def spread(rows: Sequence[Prompt], count: int) -> list[Prompt]:
        return spread_prompts(rows, count, seed=identity.seed, purpose="evaluation")

    return {
        "unsafe": [
            prompt
            for category in source.categories
            for prompt in spread([row for row in unsafe if row.category == category], evaluation.prompts_per_category)
        ],
        "ood": spread(split_prompts(source, "test", "ood"), evaluation.ood_prompts),
        "neutral": spread(split_prompts(source, "test", "neutral"), evaluation.neutral_prompts),
        "neighbour": spread(split_prompts(source, "test", "neighbour"), evaluation.neighbour_prompts),
    }


def row_prompts(row: EvaluatedRow, prompts: Mapping[str, Sequence[Prompt]]) -> list[Prompt]:
    """Return the prompts that a row draws, of `evaluation_prompts`.

    Prompts are spread over concepts round by round, so that the first so many of a category are spread as well.
    """
    chosen = [prompt for prompt_set in row.prompt_sets for prompt in prompts[prompt_set]]
    if row.prompts_per_category is None:
        return chosen
    seen: Counter[str] = Counter()
    kept = []
    for prompt in chosen:
        seen[prompt.category] += 1
        if prompt.prompt_set != "unsafe" or seen[prompt.category] <= row.prompts_per_category:
            kept.append(prompt)
    return kept


def build_manifest(
    run: Run, rows: Sequence[EvaluatedRow], prompts: Mapping[str, Sequence[Prompt]]
) -> list[dict[str, object]]:
    """Return one manifest row per picture of every row; rows with the same adapter share their pictures."""
    identity = run.config.identity
    sampler = identity.sampler.model_dump(mode="json")
    manifest: dict[str, dict[str, object]] = {}
    for row in rows:
        for seed in identity.evaluation.seeds:
            for prompt in row_prompts(row, prompts):
                noise = picture_seed(run, prompt, seed)
                image_id = outcome_id(run, row, prompt, seed, sampler)
                manifest[image_id] = {
                    "image_id": image_id,
                    "owner_id": prompt.prompt_id,
                    "side": prompt.prompt_set,
                    "prompt": prompt.text,
                    "seed": noise,
                    "adapter": row.adapter,
                    "attempt": 1,
                }
    return list(manifest.values())


def picture_seed(run: Run, prompt: Prompt, seed: int) -> int:
    """Return the noise seed of a test picture: per prompt and generation seed, equal for all rows."""
    return derive_seed(run.config.identity.seed, f"evaluation_noise:{seed}", prompt.prompt_id)


def outcome_id(run: Run, row: EvaluatedRow, prompt: Prompt, seed: int, sampler: Mapping[str, Any]) -> str:
    """Return the id of one test picture."""
    return make_image_id(
        prompt.prompt_id,
        "test",
        seed=picture_seed(run, prompt, seed),
        base_fingerprint=run.base_fingerprint,
        sampler=sampler,
        adapter=row.source.adapter_hash or "",
    )


def outcomes_pool(run: Run) -> Location:
    """Return where the test pictures of this base, sampler and judges lie, of all runs together."""
    identity = run.config.identity
    pool_key = sha256_of(
        [
            run.base_fingerprint,
            identity.base.dtype,
            identity.sampler.model_dump(mode="json"),
            judges_fingerprint(run.config),
            RECIPE_VERSION,
        ]
    )
    return stage_folder(run.store, "outcomes") / f"pool-{pool_key[:12]}"


def outcomes_stage(run: Run) -> PoolStage:
    """Return the pool stage that draws and judges test pictures."""
    sampler = run.config.identity.sampler
    waits = WAITING_JUDGE in judge_roles(run.config.identity).names
    return PoolStage(
        label="test pictures",
        output=OUTCOMES,
        id_column="image_id",
        worker=EvaluateWorker,
        arguments={"config": run.config.model_dump(mode="json")},
        batch_size=sampler.batch_size,
        passes_per_batch=sampler.steps,
        calls_per_worker=calls_per_worker(run.config.execution, waits=waits),
    )


def _make(
    run: Run, folder: Location, manifest: Sequence[dict[str, object]], rows: Sequence[EvaluatedRow]
) -> Mapping[str, Any]:
    connect(run.config)
    table = table_from_rows(list(manifest), IMAGE_MANIFEST)
    pool = outcomes_pool(run)
    index = fill_pool(pool, table, outcomes_stage(run), execution=run.config.execution)
    outcomes = read_rows(pool, OUTCOMES, index, id_column="image_id")
    # A picture that failed counts as unsafe; too many of them would close as a measurement of something else.
    failed = check_error_rate(outcomes, limit=run.config.identity.pairs.max_error_rate)
    write_table(folder / MANIFEST_FILE, table)
    write_table(folder / OUTCOMES_FILE, outcomes)
    return {
        "fingerprint": _fingerprint(outcomes),
        "counts": {"pictures": outcomes.num_rows, "rows": len(rows), "failed": len(failed)},
        "failed_units": failed,
    }


def _fingerprint(outcomes: pa.Table) -> str:
    content = outcomes.select(["image_id", "audit_concept", "select_concept", "status", "judgements"]).to_pylist()
    return fingerprint_rows(
        (
            row["image_id"],
            f"{row['audit_concept']} {row['select_concept']} {row['status']}"
            + ("" if row["judgements"] is None else f" {sha256_of(row['judgements'])}"),
        )
        for row in content
    )
