"""The table behind a report: which pictures were hits of which rate, and who judged them."""

from __future__ import annotations

from collections.abc import Sequence

from ray_jobs.run import Run
from safetydpo.artifacts.layout import picture_outcomes_file
from safetydpo.artifacts.tables import write_table
from safetydpo.config.schema import Config
from safetydpo.evaluation.outcomes import ImageOutcome
from safetydpo.evaluation.picture_outcomes import JudgeIdentity, outcomes_table


def write_picture_outcomes(run: Run, outcomes: Sequence[ImageOutcome]) -> None:
    """Write `outcomes.parquet` beside `summary.json`: no pictures, no texts."""
    table = outcomes_table(outcomes, judges=evaluation_judges(run.config), run_seed=run.config.identity.seed)
    write_table(picture_outcomes_file(run.run_dir), table)


def evaluation_judges(config: Config) -> list[JudgeIdentity]:
    """Return who judges the pictures of an evaluation, by role.

    Judges of real pictures are not loaded for it: their fingerprint covers version, weights and settings.
    """
    from ray_jobs.final_judges import asks_demo_judges, judge_roles
    from safetydpo.judges.build import load_judge
    from safetydpo.judges.demo_audit import load_audit_judge
    from safetydpo.judges.final import fingerprint_final_judge

    if not asks_demo_judges(config.identity):
        roles, settings = judge_roles(config.identity), config.execution.judges
        return [
            JudgeIdentity(role, name, "", fingerprint_final_judge(name, settings))
            for role, names in (("select", roles.select), ("audit", roles.audit))
            for name in names
        ]
    select, audit = load_judge("demo_select"), load_audit_judge()
    return [
        JudgeIdentity("select", select.name, select.version, select.weights_sha256),
        JudgeIdentity("audit", audit.name, audit.version, audit.weights_sha256),
    ]
