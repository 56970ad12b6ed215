"""`summary.json` of an evaluation that no search came before: of pictures whose judges no search can ask."""

from __future__ import annotations

from collections.abc import Sequence

from ray_jobs.evaluate import EvaluatedRow
from ray_jobs.outcomes import read_outcomes
from ray_jobs.run import Run, package_versions
from safetydpo.artifacts.layout import summary_file
from safetydpo.artifacts.records import Record
from safetydpo.artifacts.schemas import sha256_of
from safetydpo.config.load import identity_of
from safetydpo.evaluation.rows import build_rows, list_failures
from safetydpo.evaluation.summary import Summary, build_summary, dump_summary


def write_summary(run: Run, record: Record, rows: Sequence[EvaluatedRow]) -> Summary:
    """Write the summary of all rows' pictures into the run folder and return it."""
    outcomes = read_outcomes(run, record, rows).outcomes
    summary = build_summary(
        build_rows(outcomes, [row.source for row in rows], run_seed=run.config.identity.seed),
        list_failures(outcomes),
        timing_seconds=run.seconds(),
        config_hash=sha256_of(identity_of(run.config)),
        versions=package_versions(),
    )
    summary_file(run.run_dir).write_bytes(dump_summary(summary).encode())
    return summary
