from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console

from ray_jobs.run import Run
from ray_jobs.search_files import BASE_FILE
from ray_jobs.search_summary import write_progress
from ray_jobs.search_watch import find_search, read_search, search_table
from ray_jobs.trial_log import MeasurementLog, TrialLog
from safetydpo.artifacts.storage import Location
from safetydpo.errors import SafetyDPOError
from safetydpo.search.space import Candidate
from tests.ray.closed_artifacts import all_files, open_run
from tests.ray.commands import Command
from tests.ray.smoke_place import SMOKE

BASE = {"neutral_rate": 0.8, "neighbour_retention": 1.0}
BUDGET = "execution.search={time_budget_s: 600, cost_budget: 2, price_per_cpu_hour: 36}"


def shown(run: Run) -> str:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(search_table(run, find_search(run)))
    return console.export_text()


def begin(run: Run, name: str) -> Location:
    folder = (run.store / "search" / name).make_folder()
    write_progress(run, folder)
    return folder


def place(tmp_path: Path, *settings: str) -> Run:
    return open_run(SMOKE, [f"store={tmp_path}/store", f"run_dir={tmp_path}/run", *settings])


def test_progress_best_time_left_and_spend_by_hand(tmp_path: Path) -> None:
    """2 of 4 trials in 20 s, 10 s a trial: 20 s are left. 2 x 10 s at 36 an hour cost 0.20. Trial 1 misses a floor."""
    run = place(tmp_path, BUDGET)
    folder = begin(run, "smoke-1")
    for text in ("0 of 4 (none yet)", "none measured in full yet", "not known yet"):
        assert text in shown(run)
    (folder / BASE_FILE).write_bytes(json.dumps(BASE).encode())
    log, measurements = TrialLog(folder / "trials"), MeasurementLog(folder / "measurements")
    for number, neutral in enumerate((0.8, 0.4)):
        candidate = Candidate("ties", 1.0 + number, (("hate", 1.0),), 0.3)
        metrics = {**BASE, "ip_select": 0.25 - 0.2 * number, "unrecognisable_rate": 0.0, "neutral_rate": neutral}
        result = {"status": "ok", "objective": 0.25, "metrics": json.dumps(metrics), "error": ""}
        log.add(number, candidate, result)
        measurements.add(candidate, 0, {**result, "started_at": 10.0 * number, "seconds": 10.0, "pictures": 30})
    text = shown(run)
    for part in (
        "2 of 4 (2 ok)",
        "trial 0, ties x 1.00: objective 0.250",
        "0:00:20 at the pace so far",
        "60",
        "20 s of trials of 600 s, 0.006 worker hours, cost 0.20 of 2",
    ):
        assert part in text, text
    # As `safetydpo watch --json` prints it; `asdict` makes pairs of a Counter's keys and numbers.
    state = json.loads(json.dumps(asdict(read_search(run, find_search(run)))))
    assert state["counts"] == {"ok": 2}


def test_the_search_that_this_run_began_last_is_watched(tmp_path: Path) -> None:
    run = place(tmp_path)
    begin(run, "smoke-old")
    time.sleep(0.01)
    begin(run, "smoke-new")
    other = open_run(SMOKE, [f"store={tmp_path}/store", f"run_dir={tmp_path}/other"])
    begin(other, "smoke-other")
    assert find_search(run).name == "smoke-new"
    assert find_search(other).name == "smoke-other"


def test_watching_what_was_never_begun_says_how_to_begin(tmp_path: Path, command: Command) -> None:
    with pytest.raises(SafetyDPOError, match="expected a search that was begun in .*, found none: start it with"):
        find_search(place(tmp_path))
    seen = command.raw("search", str(command.config), "--watch", *command.places)
    seen.assert_one_line("start it with `safetydpo search`", code=1)


def test_watching_shows_the_table_once_where_nobody_sees_it_change(command: Command) -> None:
    run = open_run(command.config, command.places)
    begin(run, "smoke-1")
    before = all_files(command.folder)
    seen = command.raw("search", str(command.config), "--watch", *command.places)
    assert seen.code == 0
    assert "search of run smoke: smoke-1" in seen.out
    assert all_files(command.folder) == before
