"""What the final measurement of a run consists of and what of it is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ray_jobs.attack_prompts import STAGE as ATTACKS
from ray_jobs.attack_prompts import attack_sets, attacked, count_attacks
from ray_jobs.baselines import BASE, RESULT_FILE, candidate_folder, candidates_of, comparator_key
from ray_jobs.benchmark_prompts import benchmark_prompts, benchmark_sets
from ray_jobs.evaluate import (
    EVERYTHING,
    EvaluatedRow,
    build_manifest,
    comparator_rows,
    expert_sets,
    list_rows,
    outcomes_key,
    outcomes_pool,
    outcomes_stage,
    row_prompts,
    shared_prompts,
)
from ray_jobs.pools import plan_missing
from ray_jobs.run import Run
from ray_jobs.search_merges import validation_prompts
from safetydpo.artifacts.records import Record, find_closed, read_pointers
from safetydpo.artifacts.schemas import IMAGE_MANIFEST
from safetydpo.artifacts.tables import table_from_rows
from safetydpo.config.experts import ALL_SINGLE
from safetydpo.config.schema import IdentityConfig
from safetydpo.evaluation.attack_metrics import ATTACK_PREFIX
from safetydpo.evaluation.rows import RowSource
from safetydpo.planning.estimate import StageWork
from safetydpo.prompts.sets import Prompt


@dataclass(frozen=True)
class Adapters:
    """The adapters of a run that are there, and the names of all that it will have."""

    experts: Mapping[str, Record]
    merged: Mapping[str, Record]
    searched: Record | None
    expert_names: Sequence[str]
    is_searched: bool
    """Whether the run has a search."""


def evaluation_work(run: Run, adapters: Adapters, *, is_model_here: bool) -> StageWork:
    """Return the test pictures of all rows, and those by which comparators are tuned.

    What is not there yet (adapters, attack prompts) is counted only: its pictures have no name to look for.
    """
    identity = run.config.identity
    evaluation = identity.evaluation
    tuned = _tuned(run) if is_model_here else {}
    rows = _rows_there(run, adapters, tuned) if is_model_here else []
    named = {row.source.name for row in rows}
    waiting = [row for row in attacked(_all_rows(identity, adapters, run), evaluation) if row.source.name not in named]
    prompts, are_made = _prompts(run)
    counted = sum(len(row_prompts(row, prompts)) for row in waiting)
    if not are_made:
        rows_with_attacks = sum(row.source.kind in ("base", *evaluation.attacked_rows) for row in (*rows, *waiting))
        counted += rows_with_attacks * count_attacks(identity)
    total, done, is_closed = counted * len(evaluation.seeds), 0, False
    if rows:
        manifest = build_manifest(run, rows, prompts)
        total += len(manifest)
        is_closed = not waiting and are_made and find_closed(run.store, outcomes_key(run, manifest)) is not None
        table = table_from_rows(manifest, IMAGE_MANIFEST)
        missing = 0 if is_closed else plan_missing(outcomes_pool(run), table, outcomes_stage(run)).num_rows
        done = len(manifest) - missing
    tuning, tuning_done = tuning_pictures(run, tuned, is_model_here=is_model_here)
    detail = f"{len(rows) + len(waiting):,} rows, {len(evaluation.seeds):,} seeds"
    if tuning:
        detail += f"; {tuning:,} to tune {len(evaluation.comparators):,} comparators"
    return StageWork(
        "evaluate",
        "pictures",
        total + tuning,
        done + tuning_done,
        identity.sampler.steps,
        is_closed=is_closed,
        detail=detail,
    )


def _tuned(run: Run) -> dict[str, Record]:
    names = run.config.identity.evaluation.comparators
    found = {name: find_closed(run.store, comparator_key(run, name)) for name in names}
    return {name: record for name, record in found.items() if record is not None}


def _rows_there(run: Run, adapters: Adapters, tuned: Mapping[str, Record]) -> list[EvaluatedRow]:
    rows = list_rows(run, adapters.experts, adapters.merged, adapters.searched)
    return attacked([*rows, *comparator_rows(run, tuned)], run.config.identity.evaluation)


def _prompts(run: Run) -> tuple[dict[str, list[Prompt]], bool]:
    """Return the test prompts by set, and whether those of attacks are among them or there are none."""
    prompts = {**shared_prompts(run), **benchmark_prompts(run.config)}
    attacks = run.config.identity.evaluation.attacks
    if not attacks or ATTACKS in read_pointers(run.run_dir):
        return {**prompts, **attack_sets(run)}, True
    return {**prompts, **{f"{ATTACK_PREFIX}{name}": [] for name in attacks}}, False


def tuning_pictures(run: Run, tuned: Mapping[str, Record], *, is_model_here: bool) -> tuple[int, int]:
    """Return the pictures of all candidates of comparators and of the base beside them, and those of measured ones."""
    names = run.config.identity.evaluation.comparators
    if not names:
        return 0, 0
    each, total, done = len(validation_prompts(run)), 0, 0
    for name in (BASE, *names):
        candidates = len(candidates_of(run, name))
        total += candidates * each
        if not is_model_here:
            continue
        key = comparator_key(run, name)
        if name in tuned or find_closed(run.store, key) is not None:
            done += candidates * each
        else:
            folders = (candidate_folder(run.folder(key), index) for index in range(candidates))
            done += each * sum((folder / RESULT_FILE).is_file() for folder in folders)
    return total, done


def _all_rows(identity: IdentityConfig, adapters: Adapters, run: Run) -> list[EvaluatedRow]:
    """Return the rows that the run will have, whether or not their adapters are there."""
    evaluation, everything = identity.evaluation, (*EVERYTHING, *benchmark_sets(run.config))
    rows = [EvaluatedRow(RowSource("base", "base"), "", everything)]
    for name in adapters.expert_names:
        if name == ALL_SINGLE:
            rows.append(EvaluatedRow(RowSource(name, "all_single"), "", everything))
        elif evaluation.expert_rows:
            source = RowSource(f"expert:{name}", "expert")
            rows.append(EvaluatedRow(source, "", expert_sets(evaluation), evaluation.expert_prompts_per_category))
    rows += [EvaluatedRow(RowSource(name, "merged"), "", everything) for name in identity.merge.methods]
    rows += [EvaluatedRow(RowSource(name, "comparator"), "", everything) for name in evaluation.comparators]
    if adapters.is_searched:
        rows.append(EvaluatedRow(RowSource("searched", "searched"), "", everything))
    return rows
