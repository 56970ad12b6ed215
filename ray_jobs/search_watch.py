"""`safetydpo search --watch`: how a search gets on, from its log files alone. No Ray, nothing started or changed."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray_jobs.run import Run, with_absolute_paths
from ray_jobs.search_files import BASE_FILE, PROGRESS_FILE
from ray_jobs.trial_log import MeasurementLog, TrialLog, best_trial
from safetydpo.artifacts.json_text import parse_json
from safetydpo.artifacts.layout import RECORD_FILE
from safetydpo.artifacts.records import read_pointers
from safetydpo.artifacts.storage import Location
from safetydpo.config.schema import Config
from safetydpo.config.search import SearchConfig
from safetydpo.errors import SafetyDPOError
from safetydpo.search.progress import Progress, progress_of

POLL_SECONDS = 2.0


def watch_search(config: Config, *, once: bool | None = None) -> None:
    """Show a table until the search is closed or Ctrl-C; once where the output is no terminal (`once`).

    Raises:
        SafetyDPOError: if this run has begun no search.
    """
    from rich.live import Live

    from ray_jobs.terminal import TextConsole

    run = Run(with_absolute_paths(config))
    folder = find_search(run)
    console = TextConsole()
    if not sys.stdout.isatty() if once is None else once:
        console.print(search_table(run, folder))
        return
    with Live(search_table(run, folder), console=console, auto_refresh=False) as live:
        while not (folder / RECORD_FILE).is_file():
            time.sleep(POLL_SECONDS)
            live.update(search_table(run, folder), refresh=True)


def find_search(run: Run) -> Location:
    """Return the folder of the run's search: that which this run began last, or the closed one that it points at.

    Raises:
        SafetyDPOError: if there is none.
    """
    stage = run.store / "search"
    begun: list[tuple[float, str]] = []
    for file in stage.walk() if stage.is_folder() else ():
        if file.name == PROGRESS_FILE:
            content = parse_json(file.read_bytes())
            if content["run_dir"] == run.run_dir.path:
                begun.append((content["started_at"], file.parent.name))
    if begun:
        return stage / max(begun)[1]
    pointer = read_pointers(run.run_dir).get("search")
    if pointer is not None:
        return stage / pointer["folder"]
    raise SafetyDPOError(
        f"expected a search that was begun in {run.run_dir}, found none: start it with `safetydpo search` and the same "
        "config, then watch it from another terminal"
    )


@dataclass(frozen=True)
class SearchState:
    """What is known of a search at one moment."""

    name: str
    """Of its folder."""
    is_closed: bool
    counts: Mapping[str, int]
    """Trials that have ended, by how."""
    progress: Progress
    best: Mapping[str, Any] | None
    """`trial`, `method`, `global_scale`, `objective`, `feasible` of the best so far; None = none measured in full."""
    pictures: int
    limits: Mapping[str, Any]
    """Budgets and prices, as the search began with."""


def read_search(run: Run, folder: Location) -> SearchState:
    """Return what the logs of a search say."""
    search = run.config.identity.search
    log, measurements = TrialLog(folder / "trials"), MeasurementLog(folder / "measurements")
    known: dict[str, Any] = {}
    if (folder / PROGRESS_FILE).is_file():
        known = parse_json((folder / PROGRESS_FILE).read_bytes())
    rows = log.rows()
    progress = progress_of(
        ended=len(rows),
        trials=search.trials,
        spans=measurements.spans(),
        price_per_second=known.get("price_per_second", 0.0),
    )
    return SearchState(
        name=folder.name,
        is_closed=(folder / RECORD_FILE).is_file(),
        counts=dict(Counter(row["status"] for row in rows)),
        progress=progress,
        best=_best(rows, folder, search),
        pictures=sum(row["pictures"] for row in measurements.rows()),
        limits=known,
    )


def search_lines(state: SearchState) -> list[tuple[str, str]]:
    """Return what is known of a search as names and values."""
    progress = state.progress
    return [
        ("trials", f"{progress.ended} of {progress.trials} ({_counts(state.counts)})"),
        ("best so far", _told_best(state.best)),
        ("time left", "closed" if state.is_closed else _left(progress)),
        ("pictures", f"{state.pictures:,}"),
        ("spent", _spent(progress, state.limits)),
    ]


def search_table(run: Run, folder: Location) -> Any:
    """Return what is known of a search as a table of names and values."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False, show_header=False)
    table.title, table.title_justify = f"search of run {run.config.name}: {folder.name}", "left"
    for name, value in search_lines(read_search(run, folder)):
        table.add_row(name, value)
    return table


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {status}" for status, count in sorted(counts.items())) or "none yet"


def _best(rows: list[dict[str, Any]], folder: Location, search: SearchConfig) -> dict[str, Any] | None:
    if not (folder / BASE_FILE).is_file():
        return None
    return best_trial(rows, base=parse_json((folder / BASE_FILE).read_bytes()), search=search)


def _told_best(best: Mapping[str, Any] | None) -> str:
    if best is None:
        return "none measured in full yet"
    floors = "" if best["feasible"] else ", misses a floor"
    made = f"{best['method']} x {best['global_scale']:.2f}"
    return f"trial {best['trial']}, {made}: objective {best['objective']:.3f}{floors}"


def _left(progress: Progress) -> str:
    if progress.seconds_left is None:
        return "not known yet"
    return f"{clock(progress.seconds_left)} at the pace so far"


def clock(seconds: float) -> str:
    """Return seconds as H:MM:SS."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def _spent(progress: Progress, known: Mapping[str, Any]) -> str:
    spend = progress.spend
    told = f"{spend.busy_seconds:.0f} s of trials"
    if known.get("time_budget_s") is not None:
        told += f" of {known['time_budget_s']:g} s"
    told += f", {spend.worker_seconds / 3600:.3f} worker hours"
    if known.get("price_per_second"):
        told += f", cost {spend.cost:.2f}"
        if known.get("cost_budget") is not None:
            told += f" of {known['cost_budget']:g}"
    return told
