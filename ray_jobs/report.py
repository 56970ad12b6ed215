"""Stage 6: `summary.json` and the report page of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from ray_jobs.diagnosis import read_overlap, read_winners
from ray_jobs.evaluate import EvaluatedRow
from ray_jobs.expert_files import record_files, record_folder
from ray_jobs.outcomes import Outcomes, read_outcomes, reference_features
from ray_jobs.picture_features import measure_pictures, read_measures
from ray_jobs.prompt_tables import chosen_pairs
from ray_jobs.publish import card_file, publish_adapter
from ray_jobs.run import Run, package_versions
from ray_jobs.stored_outcomes import write_picture_outcomes
from safetydpo.artifacts.layout import (
    concept_rates_file,
    merged_adapter_file,
    picture_outcomes_file,
    report_file,
    report_record,
    summary_file,
)
from safetydpo.artifacts.records import Record, read_pointers
from safetydpo.artifacts.schemas import CONCEPT_RATES, TRIALS, sha256_of
from safetydpo.artifacts.tables import read_table, table_from_rows, write_table
from safetydpo.config.load import identity_of
from safetydpo.config.pairs import GENERATE
from safetydpo.errors import SafetyDPOError
from safetydpo.evaluation.attack_metrics import ATTACK_PREFIX
from safetydpo.evaluation.benchmark_metrics import is_of_benchmark
from safetydpo.evaluation.concept_rates import concept_rates
from safetydpo.evaluation.report import render_report
from safetydpo.evaluation.report_records import (
    ContactSheet,
    LineageEntry,
    SearchTrial,
    SearchTrials,
    SheetPair,
    SheetPicture,
    TrainingCurve,
)
from safetydpo.evaluation.results import headline_row
from safetydpo.evaluation.rows import build_rows, list_failures
from safetydpo.evaluation.summary import Summary, build_summary, dump_summary, parse_summary
from safetydpo.search.objective import judge_metrics
from safetydpo.search.pareto import pareto_front

RECIPE_VERSION = 5
PICTURES_PER_SHEET = 12
CURVES = ("loss", "implicit_accuracy", "error_policy_safe", "error_policy_unsafe", "gradient_norm")


@dataclass(frozen=True)
class Finished:
    """What a report is made from: the records of the stages before it and the rows of its table."""

    experts: Mapping[str, Record]
    search: Record
    searched: Record
    outcomes: Record
    rows: Sequence[EvaluatedRow]
    merged: Mapping[str, Record]
    diagnosis: Record


def write_report(run: Run, finished: Finished) -> Summary:
    """Write the final adapter with its card, `summary.json` and `index.html` of a run; return the summary.

    Nothing is written if they stand there already, made from the same inputs.
    """
    rows = finished.rows
    measured = measure_pictures(run, finished.outcomes, rows)
    inputs = report_inputs(run, finished)
    written = find_report(run, inputs)
    if written is not None:
        return written
    joined = read_outcomes(run, finished.outcomes, rows)
    _, drawings = reference_features()
    measures = read_measures(run, finished.outcomes, measured, rows)
    identity = run.config.identity
    summary = build_summary(
        build_rows(
            joined.outcomes,
            [row.source for row in rows],
            run_seed=identity.seed,
            drawings=drawings,
            measures=measures,
            training_texts=_training_texts(run),
            categories=identity.prompts.categories,
        ),
        list_failures(joined.outcomes, measures=measures),
        timing_seconds=run.seconds(),
        config_hash=sha256_of(identity_of(run.config)),
        versions=package_versions(),
    )
    publish_adapter(run, finished.searched, row="searched", summary=summary)
    summary_file(run.run_dir).write_bytes(dump_summary(summary).encode())
    of_concepts = [asdict(rate) for rate in concept_rates(joined.outcomes)]
    write_table(concept_rates_file(run.run_dir), table_from_rows(of_concepts, CONCEPT_RATES))
    write_picture_outcomes(run, joined.outcomes)
    overlap = read_overlap(run, finished.diagnosis)
    page = render_report(
        summary,
        trials=_trials(run, finished.search),
        search_details=finished.search.details,
        training=_curves(run, finished.experts),
        sheets=_sheets(summary, joined),
        overlap=overlap,
        winners=read_winners(run, finished.merged, dict(zip(overlap.names, overlap.categories, strict=True))),
        lineage=_lineage(run),
        title=f"Safety report of run {run.config.name}",
    )
    report_file(run.run_dir).write_bytes(page.encode())
    record = {"inputs": inputs, "made_at": datetime.now(tz=UTC).isoformat(timespec="seconds")}
    report_record(run.run_dir).write_bytes(json.dumps(record, indent=2).encode() + b"\n")
    run.made.append("report")
    return summary


def _training_texts(run: Run) -> set[str]:
    """Return the captions that the experts were trained on; of given picture pairs none are known here."""
    identity = run.config.identity
    if identity.pairs.source != GENERATE:
        return set()
    pairs = chosen_pairs(identity.prompts, seed=identity.seed)
    return {text for pair in pairs for text in (pair.unsafe_text, pair.safe_text)}


def report_inputs(run: Run, finished: Finished) -> str:
    """Return a hash over all that the files of `write_report` are made from."""
    # The time of writing is written after it and would make every report the input of another.
    timing = {stage: seconds for stage, seconds in run.seconds().items() if stage != "report"}
    return sha256_of(
        {
            "recipe_version": RECIPE_VERSION,
            "config": identity_of(run.config),
            "experts": {name: record.fingerprint for name, record in finished.experts.items()},
            "search": finished.search.fingerprint,
            "searched": finished.searched.fingerprint,
            "outcomes": finished.outcomes.fingerprint,
            "merged": {name: record.fingerprint for name, record in finished.merged.items()},
            "diagnosis": finished.diagnosis.fingerprint,
            "rows": [asdict(row.source) for row in finished.rows],
            "pointers": read_pointers(run.run_dir),
            "timing": timing,
            "versions": package_versions(),
        }
    )


def find_report(run: Run, inputs: str) -> Summary | None:
    """Return the summary that stands in the run folder if its report is whole and made from `inputs`, else None."""
    record = report_record(run.run_dir)
    files = (
        record, summary_file(run.run_dir), picture_outcomes_file(run.run_dir), report_file(run.run_dir),
        merged_adapter_file(run.run_dir), card_file(run),
    )  # fmt: skip
    if not all(file.is_file() for file in files):
        return None
    try:
        if json.loads(record.read_bytes())["inputs"] != inputs:
            return None
        return parse_summary(summary_file(run.run_dir).read_bytes().decode())
    except (ValueError, KeyError, TypeError, SafetyDPOError):
        # A report that cannot be read is no loss: it is written again from what the store holds.
        return None


def _trials(run: Run, search: Record) -> SearchTrials:
    config = run.config.identity.search
    rows = read_table(record_folder(run, search) / "trials", TRIALS).to_pylist()
    base: Mapping[str, float] = search.details["base"]
    measured = [
        (row, json.loads(row["metrics"]), json.loads(row["candidate"])) for row in rows if row["status"] == "ok"
    ]
    points = [
        (
            metrics["ip_select"] + config.unrecognisable_weight * metrics["unrecognisable_rate"],
            metrics["neutral_rate"] / base["neutral_rate"],
            metrics["neighbour_retention"] / base["neighbour_retention"],
        )
        for _, metrics, _ in measured
    ]
    front = set(pareto_front(points, ("min", "max", "max")))
    return SearchTrials(
        trials=tuple(
            SearchTrial(
                number=row["trial"],
                method=candidate["method"],
                ip=metrics["ip_select"],
                unrecognisable=metrics["unrecognisable_rate"],
                price=point[0],
                neutral=point[1],
                neighbour=point[2],
                feasible=judge_metrics(metrics, base=base, search=config).feasible,
                on_front=index in front,
                chosen=row["trial"] == search.details["trial"],
                scale=candidate["global_scale"],
            )
            for index, ((row, metrics, candidate), point) in enumerate(zip(measured, points, strict=True))
        ),
        neutral_floor=config.neutral_floor,
        neighbour_floor=config.neighbour_floor,
    )


def _curves(run: Run, experts: Mapping[str, Record]) -> list[TrainingCurve]:
    curves = []
    for name, record in experts.items():
        text = (record_files(run, record) / "training.jsonl").read_bytes().decode()
        steps = [json.loads(line) for line in text.splitlines()]
        curves.append(
            TrainingCurve(
                expert=name,
                steps=tuple(step["step"] for step in steps),
                values={key: tuple(float(step[key]) for step in steps) for key in CURVES},
            )
        )
    return curves


def _sheets(summary: Summary, joined: Outcomes) -> list[ContactSheet]:
    best = headline_row(summary)
    if best is None:
        return []
    aligned = best["name"]
    groups: dict[str, list[Any]] = {}
    unsafe_base = {
        (outcome.prompt_id, outcome.seed)
        for outcome in joined.outcomes
        if outcome.row_name == "base" and any(verdict.unsafe for verdict in outcome.verdicts.values())
    }
    for outcome in joined.outcomes:
        if outcome.row_name == aligned and not is_of_benchmark(outcome.prompt_set):
            is_attack = outcome.prompt_set.startswith(ATTACK_PREFIX)
            title = outcome.prompt_set if is_attack else outcome.category or outcome.prompt_set
            groups.setdefault(title, []).append(outcome)
    sheets = []
    for title, members in groups.items():
        pairs = []
        for outcome in members[:PICTURES_PER_SHEET]:
            key = (outcome.prompt_id, outcome.seed)
            harmful = outcome.prompt_set in ("unsafe", "ood") or outcome.prompt_set.startswith(ATTACK_PREFIX)
            still_unsafe = any(verdict.unsafe for verdict in outcome.verdicts.values())
            pairs.append(
                SheetPair(
                    prompt=outcome.text,
                    seed=outcome.seed,
                    base=SheetPicture(joined.pictures["base", *key], unsafe=harmful or key in unsafe_base),
                    aligned=SheetPicture(joined.pictures[aligned, *key], unsafe=still_unsafe),
                )
            )
        sheets.append(ContactSheet(title=title, aligned_name=aligned, pairs=tuple(pairs)))
    return sheets


def _lineage(run: Run) -> list[LineageEntry]:
    entries = [LineageEntry("base", run.config.identity.base.model, run.base_fingerprint)]
    for name, pointer in sorted(read_pointers(run.run_dir).items()):
        entries.append(LineageEntry(pointer["stage"], name, pointer["hash"]))
    return entries
