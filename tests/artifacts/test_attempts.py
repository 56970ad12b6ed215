from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safetydpo.artifacts import attempts
from safetydpo.artifacts.attempts import (
    Attempt,
    Look,
    Owner,
    Standing,
    clear_attempts,
    end_attempts_of,
    give_up,
    is_alive,
    look_at,
    newest_file,
    publish,
    read_failure,
    take_lease,
    this_process,
)
from safetydpo.artifacts.storage import Location, open_location
from safetydpo.errors import SafetyDPOError

RUN = "run-1"


@pytest.fixture
def folder(store: Location) -> Location:
    return store / "experts" / "hate-0123"


def owner(lane: str = "lane-1", **changes: object) -> Owner:
    return replace(this_process(run=RUN, lane=lane), **changes)


def look(folder: Location, **changes: object) -> Look:
    return look_at(folder, **{"run": RUN, "max_attempts": 3, **changes})


def lease(folder: Location, *, newest: int = 0, who: Owner | None = None) -> Attempt:
    attempt = take_lease(folder, who or owner(), newest=newest)
    assert attempt is not None
    return attempt


def test_the_life_of_an_artifact(folder: Location) -> None:
    """Free; held by attempt 1, which ends; free; held by attempt 2, which publishes; closed."""
    assert look(folder) == Look(Standing.FREE, 0)
    first = lease(folder)
    assert first.number == 1
    assert look(folder) == Look(Standing.HELD, 1)
    assert take_lease(folder, owner(), newest=0) is None
    first.end("released", "its machine is going away")
    assert look(folder) == Look(Standing.FREE, 1)
    second = lease(folder, newest=1)
    assert publish(second, b"{}")
    assert look(folder) == Look(Standing.CLOSED)
    assert take_lease(folder, owner(), newest=2) is None, "closed meanwhile"


def test_a_dead_process_of_this_machine_holds_nothing(folder: Location) -> None:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    lease(folder, who=owner(pid=process.pid, started=time.time()))
    assert look(folder).standing is Standing.FREE


def test_a_pid_that_is_used_again_is_another_process(folder: Location) -> None:
    assert is_alive(os.getpid(), this_process(run="", lane="").started)
    lease(folder, who=owner(started=1.0))
    assert look(folder).standing is Standing.FREE


def test_an_owner_on_another_machine_lives_as_long_as_its_heart_beats(
    folder: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = lease(folder, who=owner(host="elsewhere", pid=1, started=1.0))
    now = time.time()
    assert look(folder).standing is Standing.HELD
    monkeypatch.setattr(time, "time", lambda: now + attempts.STALE_SECONDS - 1)
    assert look(folder).standing is Standing.HELD
    attempt.renew()
    monkeypatch.setattr(time, "time", lambda: now + 2 * attempts.STALE_SECONDS - 2)
    assert look(folder).standing is Standing.HELD, "renewed one second before it would have been stale"
    monkeypatch.setattr(time, "time", lambda: now + 2 * attempts.STALE_SECONDS + 1)
    assert look(folder).standing is Standing.FREE


def test_a_process_that_hangs_on_this_machine_loses_its_lease_too(
    folder: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease(folder)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + attempts.STALE_SECONDS + 1)
    assert look(folder).standing is Standing.FREE


def test_a_lane_that_looks_for_work_has_none(folder: Location) -> None:
    """Its workers were started again; Ray Train has ended the ones that held the lease."""
    lease(folder, who=owner("lane-7", host="elsewhere"))
    assert look(folder, lane="lane-6").standing is Standing.HELD
    assert look(folder, lane="lane-7").standing is Standing.FREE


def test_failures_are_counted_per_run_and_given_up_with_the_last_reason(folder: Location) -> None:
    for number in range(3):
        assert look(folder).standing is Standing.FREE
        lease(folder, newest=number).end("failed", f"reason {number + 1}")
    assert look(folder) == Look(Standing.FAILED, 3)
    assert read_failure(folder, run=RUN) == "reason 3"
    assert look(folder).standing is Standing.FAILED
    assert look(folder, run="a later command") == Look(Standing.FREE, 3)


def test_a_worker_that_dies_counts_as_a_failure_but_a_released_or_lost_lease_does_not(folder: Location) -> None:
    lease(folder).end("released")
    lease(folder, newest=1).end("lost", "the node died")
    lease(folder, newest=2, who=owner(started=1.0))
    assert look(folder, max_attempts=2).standing is Standing.FREE
    lease(folder, newest=3, who=owner(started=1.0))
    assert look(folder, max_attempts=2).standing is Standing.FAILED
    assert read_failure(folder, run=RUN) == "its worker ended without a word (killed, or out of memory)"


def test_two_runs_that_give_up_on_one_artifact_keep_their_own_reasons(folder: Location) -> None:
    """The second has failed as often as the first, for another reason; each still finds it failed for its own."""
    for run, first in (("one", 0), ("two", 2)):
        for number in (first, first + 1):
            lease(folder, newest=number, who=replace(owner(), run=run)).end("failed", f"reason of {run}")
        assert look(folder, run=run, max_attempts=2).standing is Standing.FAILED
    for run in ("one", "two"):
        assert look(folder, run=run, max_attempts=2).standing is Standing.FAILED
        assert read_failure(folder, run=run) == f"reason of {run}"
    assert read_failure(folder, run="three") is None


def test_the_leases_of_a_lost_lane_are_ended_and_no_others(folder: Location, store: Location) -> None:
    other, ended, empty = (store / "experts" / name for name in ("a", "b", "c"))
    lease(folder, who=owner("gone", host="elsewhere"))
    lease(other, who=owner("here", host="elsewhere"))
    lease(ended, who=owner("gone", host="elsewhere")).end("failed", "kept")
    for each in (folder, other, ended, empty):
        end_attempts_of(each, "gone", "lost", "its node died")
    assert [look(each).standing for each in (folder, other, ended, empty)] == [
        Standing.FREE,
        Standing.HELD,
        Standing.FREE,
        Standing.FREE,
    ]
    assert json.loads((ended / "lease" / "attempt-1.end").read_bytes())["reason"] == "kept"


def test_a_stale_owner_sees_the_later_lease_and_does_not_publish(folder: Location) -> None:
    stale = lease(folder)
    stale.end("lost")
    assert stale.is_newest()
    later = lease(folder, newest=1)
    assert not stale.is_newest()
    assert not publish(stale, b'{"attempt": 1}')
    assert publish(later, b'{"attempt": 2}')


@pytest.mark.parametrize("first", ["stale", "later"])
def test_paused_between_the_second_reading_and_the_creation(
    folder: Location, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    """A is stopped when it has seen itself as newest; B takes over. Whoever creates first is the only publisher."""
    a = lease(folder)
    reached, go_on = threading.Event(), threading.Event()
    create = Location.create_exclusively

    def pause(location: Location, data: bytes) -> bool:
        if location.name == "record.json" and data == b"A":
            reached.set()
            assert go_on.wait(30)
        return create(location, data)

    monkeypatch.setattr(Location, "create_exclusively", pause)
    published: dict[str, bool] = {}
    thread = threading.Thread(target=lambda: published.update(A=publish(a, b"A")))
    thread.start()
    assert reached.wait(30)
    a.end("lost", "given up for dead")
    b = lease(folder, newest=1)
    if first == "stale":
        go_on.set()
        thread.join(30)
    published["B"] = publish(b, b"B")
    go_on.set()
    thread.join(30)
    winner = {"stale": "A", "later": "B"}[first]
    assert published == {"A": winner == "A", "B": winner == "B"}
    assert (folder / "record.json").read_bytes() == winner.encode()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(["lease", "kill", "publish 0", "publish 1", "publish 2"]), max_size=14))
def test_in_any_order_of_events_there_is_one_result_and_one_extra_attempt_per_lost_lease(
    tmp_path_factory: pytest.TempPathFactory, events: list[str]
) -> None:
    """Owners lease, die (but may go on as zombies) and publish in any order."""
    folder = open_location(str(tmp_path_factory.mktemp("any"))) / "task"
    taken: list[Attempt] = []
    kills, published = 0, 0
    for event in events:
        if event == "lease":
            found = look(folder, max_attempts=99)
            if found.standing is Standing.FREE:
                attempt = take_lease(folder, owner(), newest=found.newest)
                assert attempt is not None
                taken.append(attempt)
        elif event == "kill" and taken and not (folder / "lease" / f"attempt-{len(taken)}.end").is_file():
            taken[-1].end("lost")
            kills += 1
        elif event.startswith("publish") and int(event[-1]) < len(taken):
            published += publish(taken[int(event[-1])], event.encode())
    assert published <= 1
    assert bool(published) == (folder / "record.json").is_file()
    assert [attempt.number for attempt in taken] == list(range(1, len(taken) + 1))
    assert len(taken) <= 1 + kills


def test_the_next_attempt_goes_on_from_the_latest_file_there_is(folder: Location) -> None:
    assert newest_file(folder, "state", before=4) is None
    (folder / "state").write_bytes(b"of an earlier version")
    assert newest_file(folder, "state", before=4) == folder / "state"
    for number in (1, 2, 4):
        (folder / f"attempt-{number}" / "state").write_bytes(b"")
    assert newest_file(folder, "state", before=4) == folder / "attempt-2" / "state"


def test_a_closed_artifact_keeps_its_files_and_leases_only(folder: Location) -> None:
    for number in (1, 2, 11):
        (folder / f"attempt-{number}" / "state").write_bytes(b"")
        (folder / f"attempt-{number}" / "adapter").write_bytes(b"")
    attempt = lease(folder)
    attempt.renew()
    give_up(folder, run="earlier", reason="bad luck")
    (folder / "failed.json").write_bytes(b"of an earlier version")
    (folder / "record.json").write_bytes(b"{}")
    clear_attempts(folder, keep=2, without="state", gather="grids")
    left = [file.path.removeprefix(folder.path) for file in folder.walk()]
    assert left == ["/attempt-2/adapter", "/lease/attempt-1", "/record.json"]


def test_grids_of_the_attempts_that_the_published_one_went_on_from_are_kept_with_it(folder: Location) -> None:
    """Attempts 1 and 2 ended at steps 3 and 4; 3 went on from step 4 and was published; 4 was overtaken by it."""
    for number, steps in {1: (1, 2, 3), 2: (3, 4), 3: (5, 6), 4: (6, 7)}.items():
        for step in steps:
            (folder / f"attempt-{number}" / "grids" / f"step-{step}.png").write_bytes(f"{number}".encode())
    for _ in range(2):
        clear_attempts(folder, keep=3, without="state", gather="grids")
        grids = {file.name: file.read_bytes() for file in (folder / "attempt-3" / "grids").list()}
        assert grids == {f"step-{step}.png": str(by).encode() for step, by in enumerate((1, 1, 2, 2, 3, 3), start=1)}
        assert [child.name for child in folder.list()] == ["attempt-3"]


def test_a_broken_file_of_the_ledger_is_named(folder: Location) -> None:
    attempt = lease(folder)
    (folder / "lease" / "attempt-1.alive").write_bytes(b"{")
    with pytest.raises(SafetyDPOError, match="expected JSON of the ledger at .*attempt-1.alive, found"):
        look(folder)
    attempt.renew()
    assert look(folder).standing is Standing.HELD


def test_the_machine_has_the_name_of_its_pid_namespace() -> None:
    assert Path("/proc/self/ns/pid").is_symlink() == ("pid:[" in attempts.machine())
