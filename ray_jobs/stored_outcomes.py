"""The table behind a report: which pictures were hits of which rate, and who judged them."""

from __future__ import annotations

from collections.abc import Sequence

from ray_jobs.run import Run
from safetydpo.artifacts.layout import picture_outcomes_file
from safetydpo.artifacts.tables import write_table
from safetydpo.evaluation.outcomes import ImageOutcome
from safetydpo.evaluation.picture_outcomes import JudgeIdentity, outcomes_table


def write_picture_outcomes(run: Run, outcomes: Sequence[ImageOutcome]) -> None:
    """Write `outcomes.parquet` beside `summary.json`: no pictures, no texts."""
    table = outcomes_table(outcomes, judges=evaluation_judges(), run_seed=run.config.identity.seed)
    write_table(picture_outcomes_file(run.run_dir), table)


def evaluation_judges() -> list[JudgeIdentity]:
    """Return who judges the pictures of an evaluation, by role."""
    from safetydpo.judges.build import load_judge
    from safetydpo.judges.demo_audit import load_audit_judge

    select, audit = load_judge("demo_select"), load_audit_judge()
    return [
        JudgeIdentity("select", select.name, select.version, select.weights_sha256),
        JudgeIdentity("audit", audit.name, audit.version, audit.weights_sha256),
    ]
