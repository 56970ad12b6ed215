from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import psutil
import pyarrow.fs as pafs
import pytest

from safetydpo.artifacts import attempts, leases
from safetydpo.artifacts.attempts import machine, this_process
from safetydpo.artifacts.leases import LeaseTaken, hold_lease, live_holder
from safetydpo.artifacts.storage import Location
from safetydpo.errors import SafetyDPOError
from tests.artifacts.racers import race

HOLDER = """
import sys, time
from safetydpo.artifacts.leases import hold_lease
from safetydpo.artifacts.storage import open_location
with hold_lease(open_location(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(store: Location) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lease of the store."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, store.path], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def files(folder: Location) -> list[str]:
    return [file.path.removeprefix(f"{folder.path}/") for file in folder.walk()]


def test_one_process_at_a_time_and_a_killed_one_holds_nothing(store: Location, holder: subprocess.Popen[str]):
    with (
        pytest.raises(LeaseTaken, match=f"expected nobody else to write to .*, found process {holder.pid} on "),
        hold_lease(store),
    ):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert files(store) == ["lease/attempt-1"]
    with hold_lease(store):
        assert live_holder(store)["pid"] == os.getpid()  # type: ignore[index]
        assert files(store) == ["lease/attempt-2"]
    assert files(store) == []
    assert live_holder(store) is None


def test_of_two_processes_one_at_a_time_holds_it(place: Location):
    """On a disk and on S3: neither ever meets the other, and both get all their turns."""
    assert race("hold", place, 8) == {"a": list(range(8)), "b": list(range(8))}
    assert not live_holder(place / "folder")


def write(store: Location, number: int = 1, **changes: Any) -> None:
    owner = replace(this_process(run="theirs", lane="theirs"), **{"host": "another", "started": 0.0, **changes})
    lease = store / "lease" / f"attempt-{number}"
    assert lease.create_exclusively(json.dumps({**asdict(owner), "renewed": time.time()}).encode())


def test_a_lease_of_another_host_counts_until_it_is_stale(store: Location, monkeypatch: pytest.MonkeyPatch):
    write(store)
    with pytest.raises(SafetyDPOError, match=r"found process \d+ on another: wait .* 300 seconds"), hold_lease(store):
        pass
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + attempts.STALE_SECONDS + 1)
    with hold_lease(store):
        pass


def test_a_process_number_that_was_given_away_again_is_another_process(store: Location):
    write(store, host=machine(), started=psutil.Process().create_time())
    assert live_holder(store) is not None
    write(store, 2, host=machine(), started=psutil.Process().create_time() - 100)
    assert live_holder(store) is None


def test_it_is_renewed(store: Location, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attempts, "RENEW_SECONDS", 0.05)
    with hold_lease(store):
        deadline = time.time() + 30
        while "lease/attempt-1.alive" not in files(store):
            assert time.time() < deadline
            time.sleep(0.05)


def test_patience_waits_for_the_other(store: Location):
    entered, order = threading.Event(), []

    def other() -> None:
        with hold_lease(store):
            entered.set()
            time.sleep(0.3)
            order.append("other")

    thread = threading.Thread(target=other)
    thread.start()
    assert entered.wait(30)
    with hold_lease(store, patience_seconds=30):
        order.append("this")
    thread.join()
    assert order == ["other", "this"]


def test_a_closed_folder_is_nobodys(store: Location):
    (store / "record.json").write_bytes(b"{}")
    with pytest.raises(LeaseTaken, match="expected .* open to write to, found it closed by another"), hold_lease(store):
        pass


def test_an_owner_given_up_for_dead_takes_no_successors_lease_away(store: Location):
    """He wakes up when the number of his lease has come round again."""
    with hold_lease(store):
        (store / "lease" / "attempt-1").delete()
        write(store)
    assert files(store) == ["lease/attempt-1"]
    assert live_holder(store)["run"] == "theirs"  # type: ignore[index]


def without_exclusive_creation() -> Location:
    place = Location(pafs._MockFileSystem(), "store")
    place.filesystem.create_dir("store/lease")
    return place


def test_a_store_without_exclusive_creation_is_warned_of_and_written_to(caplog: pytest.LogCaptureFixture):
    leases._warn.cache_clear()
    place = without_exclusive_creation()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with hold_lease(place), pytest.raises(LeaseTaken, match=f"found process {os.getpid()}"), hold_lease(place):
                pass
    assert live_holder(place) is None
    assert [record.message for record in caplog.records] == [
        "leases of this store are not exclusive, let one command at a time write to it: expected a local disk or S3 "
        "for exclusive creation, found mock://store/lease/attempt-1: choose another execution.store"
    ]


def test_there_whoever_writes_last_in_the_same_moment_has_it(monkeypatch: pytest.MonkeyPatch):
    """Another command writes its lease between our writing and our reading back."""
    place, plain = without_exclusive_creation(), Location.write_bytes

    def overtaken(location: Location, data: bytes) -> None:
        plain(location, data)
        plain(location, json.dumps({**json.loads(data), "token": "theirs", "pid": 7, "host": "another"}).encode())

    monkeypatch.setattr(Location, "write_bytes", overtaken)
    with pytest.raises(LeaseTaken, match="found process 7 on another"), hold_lease(place):
        pass
