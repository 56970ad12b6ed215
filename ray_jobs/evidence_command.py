"""What `safetydpo evidence` prints: the list of units, progress, and where the tables went."""

from __future__ import annotations

from ray_jobs.terminal import output_console
from safetydpo.config.pairs import GENERATE
from safetydpo.config.schema import Config
from safetydpo.errors import UsageError


def run_evidence(
    config: Config, *, seed: int | None, row: str | None, minutes: float | None, only_list: bool, only_tables: bool
) -> None:
    """List units, or measure those that are not done and write the tables, or write the tables only."""
    from ray_jobs.cluster import disconnect
    from ray_jobs.evidence import measure, plan_units, write_tables

    if config.identity.pairs.source != GENERATE:
        raise UsageError(
            f"expected identity.pairs.source {GENERATE!r} for evidence, whose units are known before any pair is made, "
            f"found {config.identity.pairs.source!r}: use `safetydpo run` for each seed"
        )
    if config.identity.evaluation.comparators:
        raise UsageError(
            "expected no identity.evaluation.comparators for evidence, whose rows are the run's own adapters, found "
            f"{', '.join(config.identity.evaluation.comparators)}: use `safetydpo run`, or python -m "
            "benchmarks.comparators for tables over several seeds"
        )
    console = output_console(width_of_a_log=170, highlight=False)
    if only_list:
        units = plan_units(config, seed=seed, row=row)
        for unit in units:
            console.print(f"seed {unit.seed}  {unit.row:<28} {unit.state:<6} {unit.file}")
        console.print(f"{sum(unit.state == 'done' for unit in units)} of {len(units)} units are done")
        if any(unit.state == "other" for unit in units):
            console.print("other: a record made with other settings or code stands there; it will be replaced")
        return
    if not only_tables:
        try:
            measure(config, seed=seed, row=row, minutes=minutes, say=console.print)
        finally:
            disconnect()
    evidence = write_tables(config)
    pages = [page for page in (config.evidence.page, config.evidence.short_page) if page is not None]
    if evidence is None:
        console.print("no table is written: the base is not measured yet")
    elif pages:
        console.print(f"tables of {len(evidence.units)} units are in {' and '.join(pages)}")
