"""What `safetydpo merge-evidence` prints: the list of units, progress, and where the tables went."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ray_jobs.terminal import output_console
from safetydpo.config.pairs import GENERATE
from safetydpo.config.schema import Config
from safetydpo.errors import UsageError


def run_merge_evidence(
    config: Config,
    *,
    part: str | None = None,
    seed: int | None = None,
    method: str | None = None,
    count: int | None = None,
    minutes: float | None = None,
    only_list: bool = False,
    only_tables: bool = False,
) -> None:
    """List units, or measure those that are not done and write the tables, or write the tables only."""
    from ray_jobs.merge_evidence import measure_merges
    from ray_jobs.merge_evidence_plan import plan_merges
    from ray_jobs.merge_evidence_tables import write_merge_tables

    identity = config.identity
    if identity.pairs.source != GENERATE or identity.experts.group_by != "concept":
        raise UsageError(
            f"expected identity.pairs.source {GENERATE!r} and identity.experts.group_by 'concept' for merge-evidence, "
            f"which takes one expert per concept of pairs that it draws, found {identity.pairs.source!r} and "
            f"{identity.experts.group_by!r}: use configs/merge_evidence.yaml"
        )
    console = output_console(width_of_a_log=170, highlight=False)
    if only_list:
        units = plan_merges(config, part=part, seed=seed, method=method, count=count)
        for unit in units:
            console.print(f"{unit.name:<55} {unit.state:<6} {unit.file}")
        console.print(f"{sum(unit.state == 'done' for unit in units)} of {len(units)} units are done")
        return
    if not only_tables:
        measure_merges(config, part=part, seed=seed, method=method, count=count, minutes=minutes, say=console.print)
    written = write_merge_tables(config)
    console.print(
        f"tables are in {' and '.join(written)}" if written else "no table is written: no unit is measured yet"
    )


def merge_evidence(
    config: Annotated[Path | None, typer.Argument(help="YAML file; configs/merge_evidence.yaml if left out")] = None,
    settings: Annotated[list[str] | None, typer.Argument(help="key.path=value", show_default=False)] = None,
    part: Annotated[str | None, typer.Option(help="Only the screen, the grid or the factors.")] = None,
    seed: Annotated[int | None, typer.Option(help="Only this seed of merge_evidence.seeds.")] = None,
    method: Annotated[str | None, typer.Option(help="Only this method, such as ties or all_single.")] = None,
    count: Annotated[int | None, typer.Option(help="Only merges of this number of experts.")] = None,
    minutes: Annotated[float | None, typer.Option(min=0, help="Start no new unit after this time.")] = None,
    list_units: Annotated[bool, typer.Option("--list", help="Show the units and which are done; run nothing.")] = False,
    tables: Annotated[
        bool, typer.Option("--tables", help="Only write tables and plots again from the records.")
    ] = False,
) -> None:
    """Measure merge methods over numbers of experts, unit by unit, and write their tables and plots (hours)."""
    from ray_jobs.cli import shipped_config
    from safetydpo.config.load import load_config

    given = list(settings or [])
    if config is not None and "=" in str(config) and not config.is_file():
        given, config = [str(config), *given], None
    run_merge_evidence(
        load_config(config or shipped_config("merge_evidence.yaml"), given),
        part=part,
        seed=seed,
        method=method,
        count=count,
        minutes=minutes,
        only_list=list_units,
        only_tables=tables,
    )
