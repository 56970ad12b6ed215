"""What `safetydpo watch` shows of files that the jobs' own writers wrote; no Ray."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ray_jobs import run_progress
from ray_jobs.run import Run, run_id
from ray_jobs.run_progress import ProgressFile, ToldExpert, read_progress, telling, told_progress
from ray_jobs.watch import RunReader, WorkState, pace, run_folder
from ray_jobs.watch_command import fact_lines
from safetydpo.artifacts.attempts import give_up, take_lease, this_process
from safetydpo.artifacts.layout import RECORD_FILE, progress_file, report_record
from safetydpo.artifacts.records import ArtifactKey
from safetydpo.artifacts.storage import Location
from safetydpo.errors import SafetyDPOError
from tests.ray.closed_artifacts import open_run
from tests.ray.commands import Command
from tests.ray.smoke_place import ROOT, SMOKE

WATCH = """
import sys
from ray_jobs.cli import app
try:
    app(["watch", sys.argv[1], "--once"])
except SystemExit as stop:
    assert not stop.code
print(sorted({"ray", "torch"} & set(sys.modules)))
"""


def close_pairs(run: Run) -> None:
    counts = {"pairs": 16, "kept": 12}
    run.build("pairs", ArtifactKey("pairs", "smoke", {}, {}, 1), lambda _: {"fingerprint": "x", "counts": counts})


def fail() -> None:
    """As a stage does that has begun its work."""
    told = told_progress()
    assert told is not None
    told.begin("expert steps", total=1, done=0)
    raise SafetyDPOError("expected light, found none:\nswitch it on")


@pytest.fixture(params=["disk", "s3"])
def run(request: pytest.FixtureRequest) -> Run:
    """A run that was started, in a store of either kind."""
    place: Location = request.getfixturevalue({"disk": "store", "s3": "s3_store"}[request.param])
    uri = str(place) if place.is_local else f"s3://{place.path}"
    started = open_run(SMOKE, [f"store={uri}", f"run_dir={uri}/run"])
    started.open()
    return started


def test_rate_and_time_left_by_hand():
    """30 of 100 when it began 20 s ago, 50 now: 1 a second, and 50 s for the other 50."""
    told = {"label": "pictures", "done": 50, "total": 100, "done_before": 30, "began": 1000.0, "ended": None}
    assert pace(told, updated=1020.0) == WorkState("pictures", 50, 100, 1.0, 50.0)
    assert pace({**told, "done": 30}, updated=1020.0) == WorkState("pictures", 30, 100, None, None)
    assert pace({**told, "done": 100, "ended": 1035.0}, updated=2000.0) == WorkState("pictures", 100, 100, 2.0, None)


def test_every_stage_is_shown_from_its_files(run: Run):
    """Pairs closed; of five experts one is done, two are held by two lanes, one failed, one is open."""
    close_pairs(run)
    pairs = ProgressFile(run, "pairs")
    work = pairs.begin("pictures", total=16, done=4)
    work.done, work.ended = 16, work.began + 6.0
    pairs.end("done")
    names = ["a", "b", "c", "d", "e"]
    folders = {name: run.store / f"experts/{name}-123" for name in names}
    (folders["a"] / RECORD_FILE).write_bytes(b"{}")
    for number, name in enumerate(("b", "c")):
        assert take_lease(folders[name], this_process(run="x", lane=f"smoke-1-x-{number}"), newest=0) is not None
    give_up(folders["d"], run="x", reason="no light")
    train = ProgressFile(run, "train")
    train.list_experts([ToldExpert(name, f"experts/{name}-123", 5) for name in names])
    train.begin("expert steps", total=25, done=0)
    run.add_cost("pairs", {"cpu_seconds": 3600.0, "gpu_seconds": 0.0})
    run.add_seconds("pairs", 1800.0)
    state = RunReader(run.run_dir).read()
    assert (state.run, state.run_id) == ("smoke", run_id(run.config))
    assert {stage.stage: stage.standing for stage in state.stages} == {
        "pairs": "done",
        "train": "running",
        "merge": "waiting",
        "search": "waiting",
        "evaluate": "waiting",
        "report": "waiting",
    }
    assert state.stages[0].work == (WorkState("pictures", 16, 16, 2.0, None),)
    assert state.stages[1].work == (WorkState("expert steps", 0, 25, None, None),)
    assert fact_lines(state) == [
        ("pairs", "12 kept of 16"),
        ("experts", "1 done, 2 running, 1 failed, 1 open"),
        ("  lane 0", "b"),
        ("  lane 1", "c"),
        ("spent", "0.50 h, 1.00 CPU h by what has ended"),
    ]
    assert not state.is_over
    assert RunReader(run.run_dir).read().stages[1].standing == "running"
    train.end("done")
    report_record(run.run_dir).write_bytes(b"{}")
    assert RunReader(run.run_dir).read().is_over


def test_prices_of_the_config_make_a_cost(tmp_path: Path):
    """2 CPU hours at 0.5: 1.00; GPU hours that were not measured cost what nobody knows, unless they are free."""
    settings = [f"store={tmp_path}/store", f"run_dir={tmp_path}/run", "execution.search={price_per_cpu_hour: 0.5}"]
    run = open_run(SMOKE, settings)
    run.open()
    run.add_cost("pairs", {"cpu_seconds": 7200.0, "gpu_seconds": None})
    ProgressFile(run, "pairs").begin("pictures", total=1, done=0)
    assert RunReader(run.run_dir).read().spend["cost"] == 1.0


def test_a_command_without_a_word_for_long_is_silent_and_one_that_fails_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = open_run(SMOKE, [f"store={tmp_path}/store", f"run_dir={tmp_path}/run"])
    run.open()
    ProgressFile(run, "pairs").begin("pictures", total=1, done=0)
    monkeypatch.setattr("ray_jobs.watch.SILENT_SECONDS", -1.0)
    assert RunReader(run.run_dir).read().stages[0].standing == "silent"
    with pytest.raises(SafetyDPOError, match="expected light"), telling(run, "train"):
        fail()
    failed = RunReader(run.run_dir).read().stages[1]
    assert (failed.standing, failed.error) == ("failed", "expected light, found none: switch it on")
    with pytest.raises(KeyboardInterrupt), telling(run, "merge"):
        raise KeyboardInterrupt
    # It had nothing to do, so that nothing was written.
    assert read_progress(run.run_dir, "merge") is None
    assert told_progress() is None


def test_what_a_stage_tells_is_written_again_while_it_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(run_progress.WRITE_SECONDS, "local", 0.05)
    run = open_run(SMOKE, [f"store={tmp_path}/store", f"run_dir={tmp_path}/run"])
    from tests.ray.smoke_place import wait_for

    def done() -> int:
        content = read_progress(run.run_dir, "pairs")
        return -1 if content is None else int(content["work"][0]["done"])

    with telling(run, "pairs"):
        told = told_progress()
        assert told is not None
        work = told.begin("pictures", total=9, done=0)
        assert done() == 0
        work.done = 7
        assert wait_for(lambda: done() == 7, seconds=5)


def test_a_store_that_is_gone_does_not_end_the_work(tmp_path: Path):
    """The run folder has become a file."""
    run = open_run(SMOKE, [f"store={tmp_path}/store", f"run_dir={tmp_path}/run"])
    (tmp_path / "run").write_text("x")
    ProgressFile(run, "pairs").begin("pictures", total=9, done=0)
    assert (tmp_path / "run").read_text() == "x"


def test_the_command_shows_and_prints_without_ray(tmp_path: Path, command: Command):
    run = open_run(SMOKE, command.places)
    run.open()
    close_pairs(run)
    ProgressFile(run, "train").begin("expert steps", total=1000, done=0)
    shown = command.raw("watch", str(tmp_path / "run"), "--once")
    assert shown.code == 0
    for part in (f"run {run_id(run.config)}", f"{tmp_path}/run", "train", "running", "expert steps", "0/1,000"):
        assert part in shown.out
    by_config = command.raw("watch", str(SMOKE), *command.places, "--json")
    found = json.loads(by_config.out)
    assert found["stages"][1]["work"][0]["total"] == 1000
    assert found["pairs"]["kept"] == 12
    done = subprocess.run(
        [sys.executable, "-c", WATCH, str(tmp_path / "run")], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stdout


def test_what_is_no_run_is_refused(tmp_path: Path, command: Command):
    command.raw("watch", str(tmp_path)).assert_one_line("the folder of a run that was started at", code=1)
    run = open_run(SMOKE, command.places)
    run.open()
    progress_file(run.run_dir, "pairs").write_bytes(b"no JSON")
    command.raw("watch", str(tmp_path / "run")).assert_one_line("progress as JSON at", "delete that file", code=1)
    assert run_folder(str(SMOKE), command.places).path == f"{tmp_path}/run"
