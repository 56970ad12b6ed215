"""`safetydpo watch RUN`: how a run gets on, in the terminal or as JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ray_jobs.terminal import output_console
from safetydpo.errors import visible

if TYPE_CHECKING:
    from ray_jobs.watch import RunState, StageState, WorkState

POLL_SECONDS = {"local": 2.0, "remote": 10.0}
SHOWN_LANES = 16


def watch(
    run: Annotated[str, typer.Argument(help="Run folder, s3:// address of one, or config file.", show_default=False)],
    settings: Annotated[
        list[str] | None, typer.Argument(help="key.path=value, beside a config file.", show_default=False)
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Show how it stands now, and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, as --once.")] = False,
    store: Annotated[
        str | None, typer.Option(help="Where the store is from here, if the run's commands name it otherwise.")
    ] = None,
) -> None:
    """Show how a run gets on, from its files alone, on any machine that reaches them; start and change nothing."""
    from ray_jobs.watch import RunReader, run_folder

    folder = run_folder(run, settings or [])
    reader = RunReader(folder, store=store)
    if as_json:
        print(json.dumps(asdict(reader.read()), indent=2, sort_keys=True))
    elif once or not sys.stdout.isatty():
        output_console(width_of_a_log=110).print(run_view(reader.read()))
    else:
        _live(reader, pause=POLL_SECONDS["local" if folder.is_local else "remote"])


def _live(reader: Any, *, pause: float) -> None:
    from rich.live import Live

    state = reader.read()
    with Live(run_view(state), console=output_console(width_of_a_log=110), auto_refresh=False) as live:
        while not state.is_over:
            time.sleep(pause)
            state = reader.read()
            live.update(run_view(state), refresh=True)


def run_view(state: RunState) -> Any:
    """Return the state of a run as something that rich can show."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    for name in ("stage", "", "work"):
        table.add_column(name, no_wrap=name != "work")
    for name in ("done", "rate", "left"):
        table.add_column(name, justify="right", no_wrap=True)
    for stage in state.stages:
        for cells in _stage_rows(stage):
            table.add_row(*cells)
    facts = Table(box=None, padding=(0, 1), show_header=False, show_edge=False)
    for name, value in fact_lines(state):
        facts.add_row(name, value)
    return Group(Text(visible(f"run {state.run_id or state.run} in {state.run_dir}"), overflow="fold"), table, facts)


def _stage_rows(stage: StageState) -> list[tuple[str, ...]]:
    from ray_jobs.search_watch import clock

    standing = stage.standing if stage.seconds is None else f"{stage.standing} {clock(stage.seconds)}"
    rows = [_work_cells(work) for work in stage.work] or [("", "", "", "")]
    heads = [(stage.stage, standing)] + [("", "")] * (len(rows) - 1)
    told = [(*head, *row) for head, row in zip(heads, rows, strict=True)]
    return told + ([("", "", stage.error, "", "", "")] if stage.error else [])


def _work_cells(work: WorkState) -> tuple[str, ...]:
    from ray_jobs.search_watch import clock

    rate = "" if work.per_second is None else _rate(work.per_second)
    left = "" if work.seconds_left is None else clock(work.seconds_left)
    return work.label, f"{work.done:,}/{work.total:,}", rate, left


def _rate(per_second: float) -> str:
    return f"{per_second:.1f}/s" if per_second >= 1 else f"{60 * per_second:.1f}/min"


def fact_lines(state: RunState) -> list[tuple[str, str]]:
    """Return what is known beside the work of the stages, as names and values."""
    from ray_jobs.search_watch import search_lines

    lines = []
    if state.pairs:
        lines.append(("pairs", f"{state.pairs['kept']:,} kept of {state.pairs['pairs']:,}"))
    if state.experts.counts:
        lines.append(("experts", _counted(state.experts.counts, ("done", "running", "failed", "open"))))
    lanes = list(state.experts.lanes.items())
    lines += [(f"  lane {lane.rpartition('-')[2]}", expert) for lane, expert in lanes[:SHOWN_LANES]]
    if len(lanes) > SHOWN_LANES:
        lines.append(("", f"and {len(lanes) - SHOWN_LANES} more lanes"))
    if state.search is not None:
        lines += [(f"search {name}", value) for name, value in search_lines(state.search)]
    lines.append(("spent", _spent(state.spend)))
    return lines


def _counted(counts: Mapping[str, int], order: tuple[str, ...]) -> str:
    return ", ".join(f"{counts[name]:,} {name}" for name in order if counts.get(name))


def _spent(spend: Mapping[str, float | None]) -> str:
    parts = [f"{(spend['seconds'] or 0.0) / 3600:.2f} h"]
    for name, unit in (("cpu_seconds", "CPU h"), ("gpu_seconds", "GPU h")):
        value = spend[name]
        if value:
            parts.append(f"{value / 3600:.2f} {unit}")
    if spend["cost"] is not None:
        parts.append(f"cost {spend['cost']:.2f}")
    return ", ".join(parts) + " by what has ended"
