"""Stage 6: the scores of a run in every shape, its final adapter with a card, and the report page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from ray_jobs.diagnosis import read_overlap, read_winners
from ray_jobs.draw_uses import read_draw_reuse
from ray_jobs.evaluate import EvaluatedRow
from ray_jobs.expert_files import record_folder
from ray_jobs.final_judges import shared_judges
from ray_jobs.outcomes import Outcomes, read_outcomes, reference_features
from ray_jobs.picture_features import measure_pictures, read_measures
from ray_jobs.prompt_tables import chosen_pairs
from ray_jobs.publish import card_file, publish_adapter
from ray_jobs.report_sources import describe_setup, read_costs, read_curves, read_lineage, read_trials
from ray_jobs.run import Run, package_versions
from ray_jobs.stored_outcomes import write_picture_outcomes
from safetydpo.artifacts.evaluation_schemas import CONCEPT_RATES, METRIC_ROWS
from safetydpo.artifacts.json_text import parse_json
from safetydpo.artifacts.layout import (
    concept_rates_file,
    merged_adapter_file,
    metrics_file,
    picture_outcomes_file,
    redacted_report_file,
    report_file,
    report_record,
    summary_file,
)
from safetydpo.artifacts.records import Record, read_pointers
from safetydpo.artifacts.schemas import sha256_of
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import table_from_rows, write_table
from safetydpo.config.load import identity_of
from safetydpo.config.pairs import GENERATE
from safetydpo.config.schema import EvaluationConfig
from safetydpo.errors import SafetyDPOError
from safetydpo.evaluation.concept_rates import concept_rates
from safetydpo.evaluation.exports import metric_rows, metrics_csv, tracked_metrics
from safetydpo.evaluation.report import render_report
from safetydpo.evaluation.report_records import ContactSheet
from safetydpo.evaluation.report_sheets import choose_sheets, fill_sheets, picture_keys
from safetydpo.evaluation.results import headline_row
from safetydpo.evaluation.rows import build_rows, list_failures
from safetydpo.evaluation.summary import Summary, build_summary, dump_summary, find_base, overall_rows, parse_summary

RECIPE_VERSION = 6
CLIP_OF_DEMO = EvaluationConfig().clip
SEARCHED = "searched"
"""Row of the adapter that is published."""


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
    pairs: Record | None = None


def write_report(run: Run, finished: Finished, *, redacted: bool = False) -> Summary:
    """Write a run's final adapter with its card, its scores and its page; return the summary.

    Nothing is written if they stand there already, made from the same inputs. A redacted page is a file of its own.
    """
    measured = measure_pictures(run, finished.outcomes, finished.rows)
    inputs = report_inputs(run, finished)
    written = find_report(run, inputs, redacted=redacted)
    if written is not None:
        return written
    joined = read_outcomes(run, finished.outcomes, finished.rows)
    summary = _summarize(run, finished, joined, measured)
    publish_adapter(run, finished.searched, row=SEARCHED, summary=summary)
    _write_scores(run, summary)
    of_concepts = [asdict(rate) for rate in concept_rates(joined.outcomes)]
    write_table(concept_rates_file(run.run_dir), table_from_rows(of_concepts, CONCEPT_RATES))
    write_picture_outcomes(run, joined.outcomes)
    page = render_page(run, finished, summary, joined, redacted=redacted)
    page_file(run, redacted=redacted).write_bytes(page.encode())
    _track(run, summary)
    _close(run, inputs, redacted=redacted)
    run.made.append("report")
    return summary


def _summarize(run: Run, finished: Finished, joined: Outcomes, measured: Record | None) -> Summary:
    identity = run.config.identity
    # Of other pictures and another CLIP model's features, drawings are no reference.
    drawings = reference_features()[1] if identity.evaluation.clip == CLIP_OF_DEMO else None
    measures = read_measures(run, finished.outcomes, measured, finished.rows)
    return build_summary(
        build_rows(
            joined.outcomes,
            [row.source for row in finished.rows],
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


def _write_scores(run: Run, summary: Summary) -> None:
    """Write the summary as JSON, and its metrics in long form as CSV and Parquet."""
    summary_file(run.run_dir).write_bytes(dump_summary(summary).encode())
    rows = metric_rows(summary)
    metrics_file(run.run_dir, "csv").write_bytes(metrics_csv(rows).encode())
    write_table(metrics_file(run.run_dir, "parquet"), table_from_rows(rows, METRIC_ROWS))


def render_page(run: Run, finished: Finished, summary: Summary, joined: Outcomes, *, redacted: bool) -> str:
    """Return the page of a run."""
    overlap, pairs = read_overlap(run, finished.diagnosis), finished.pairs
    return render_report(
        summary,
        trials=read_trials(run, finished.search),
        search_details=finished.search.details,
        training=read_curves(run, finished.experts),
        sheets=_sheets(run, summary, joined),
        overlap=overlap,
        winners=read_winners(run, finished.merged, dict(zip(overlap.names, overlap.categories, strict=True))),
        draws=None if pairs is None else read_draw_reuse(run, finished.experts, pairs, record_folder(run, pairs)),
        costs=read_costs(run, _by_stage(finished)),
        setup=describe_setup(run, finished.outcomes),
        lineage=read_lineage(run),
        title=f"Safety report of run {run.config.name}",
        redacted=redacted,
        shared_judges=shared_judges(run.config.identity),
    )


def page_file(run: Run, *, redacted: bool) -> Location:
    """Return where a run's page stands."""
    return redacted_report_file(run.run_dir) if redacted else report_file(run.run_dir)


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
            "costs": {stage: cost for stage, cost in run.costs().items() if stage != "report"},
            "versions": package_versions(),
        }
    )


def find_report(run: Run, inputs: str, *, redacted: bool = False) -> Summary | None:
    """Return the summary that stands in the run folder if its report is whole and made from `inputs`, else None."""
    folder = run.run_dir
    files = (
        report_record(folder), summary_file(folder), metrics_file(folder, "csv"), metrics_file(folder, "parquet"),
        picture_outcomes_file(folder), concept_rates_file(folder), page_file(run, redacted=redacted),
        merged_adapter_file(folder), card_file(run),
    )  # fmt: skip
    if not all(file.is_file() for file in files):
        return None
    try:
        if _read_inputs(run).get(_entry(redacted=redacted)) != inputs:
            return None
        return parse_summary(summary_file(folder).read_bytes().decode())
    except (ValueError, KeyError, TypeError, AttributeError, SafetyDPOError):
        # A report that cannot be read is no loss: it is written again from what the store holds.
        return None


def _entry(*, redacted: bool) -> str:
    return "redacted_inputs" if redacted else "inputs"


def _read_inputs(run: Run) -> dict[str, Any]:
    return parse_json(report_record(run.run_dir).read_bytes())


def _close(run: Run, inputs: str, *, redacted: bool) -> None:
    """Write the record that names the inputs of each page; a page of other inputs goes with its entry."""
    record: dict[str, Any] = {
        _entry(redacted=redacted): inputs,
        "made_at": datetime.now(tz=UTC).isoformat(timespec="seconds"),
    }
    other = page_file(run, redacted=not redacted)
    if other.is_file():
        try:
            before = _read_inputs(run).get(_entry(redacted=not redacted))
        except (ValueError, AttributeError, SafetyDPOError):
            before = None
        if before == inputs:
            record[_entry(redacted=not redacted)] = inputs
        else:
            # It would stand beside scores that are not its own.
            other.delete()
    report_record(run.run_dir).write_bytes(json.dumps(record, indent=2).encode() + b"\n")


def _track(run: Run, summary: Summary) -> None:
    """Send the final numbers of the published adapter to the loggers of the config."""
    row = next((row for row in overall_rows(summary) if row["name"] == SEARCHED), None)
    if row is None:
        return
    from safetydpo.artifacts.metric_sinks import open_trackers

    settings = {"config_hash": summary["config_hash"], "adapter_hash": row["adapter_hash"] or "", "row": row["name"]}
    place = run.run_dir.make_folder()
    trackers = open_trackers(
        run.config.execution.loggers,
        name=f"{run.config.name} test",
        group=run.config.name,
        settings=settings,
        folder=place.local_path if place.is_local else None,
    )
    for tracker in trackers:
        tracker.write(tracked_metrics(row), step=0)
        tracker.close()


def _sheets(run: Run, summary: Summary, joined: Outcomes) -> list[ContactSheet]:
    best, base = headline_row(summary), find_base(summary)
    if best is None or base is None:
        return []
    names = {"aligned": best["name"], "base": base["name"]}
    chosen = choose_sheets(joined.outcomes, **names, run_seed=run.config.identity.seed)
    return fill_sheets(chosen, joined.pictures.read(picture_keys(chosen, **names)), **names)


def _by_stage(finished: Finished) -> dict[str, list[Record]]:
    return {
        "pairs": [] if finished.pairs is None else [finished.pairs],
        "train": list(finished.experts.values()),
        "merge": list(finished.merged.values()),
        "search": [finished.search],
        "evaluate": [finished.outcomes],
    }
