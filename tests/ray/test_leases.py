from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from ray_jobs import leases
from ray_jobs.leases import hold_lease, live_holder
from safetydpo.artifacts.storage import Location
from safetydpo.errors import SafetyDPOError

HOLDER = """
import sys, time
from ray_jobs.leases import hold_lease
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


def test_one_process_at_a_time_and_a_killed_one_holds_nothing(store: Location, holder: subprocess.Popen[str]):
    with (
        pytest.raises(SafetyDPOError, match=f"expected nobody else to write to .*, found process {holder.pid} on "),
        hold_lease(store),
    ):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert (store / "lease.json").is_file()
    with hold_lease(store):
        assert live_holder(store)["pid"] == os.getpid()  # type: ignore[index]
    assert not (store / "lease.json").exists()
    assert live_holder(store) is None


def write(store: Location, **changes: Any) -> None:
    lease = {"token": "x", "host": "another", "pid": os.getpid(), "started": 0.0, "renewed": time.time(), **changes}
    (store / "lease.json").write_bytes(json.dumps(lease).encode())


def test_a_lease_of_another_host_counts_until_it_is_stale(store: Location):
    write(store)
    with pytest.raises(SafetyDPOError, match=r"found process \d+ on another: wait .* 120 seconds"), hold_lease(store):
        pass
    write(store, renewed=time.time() - 121)
    with hold_lease(store):
        pass


def test_a_process_number_that_was_given_away_again_is_another_process(store: Location):
    import socket

    write(store, host=socket.gethostname(), started=psutil.Process().create_time())
    assert live_holder(store) is not None
    write(store, host=socket.gethostname(), started=psutil.Process().create_time() - 100)
    assert live_holder(store) is None


def test_it_is_renewed(store: Location, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(leases, "RENEW_SECONDS", 0.05)
    with hold_lease(store):
        first = live_holder(store)
        deadline = time.time() + 30
        while live_holder(store)["renewed"] == first["renewed"]:  # type: ignore[index]
            assert time.time() < deadline
            time.sleep(0.05)


def test_whoever_writes_last_in_the_same_moment_has_it(
    store: Location, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Another command writes its lease between our writing and our reading back."""
    plain = leases._write

    def overtaken(folder: Location, lease: dict[str, Any]) -> None:
        plain(folder, lease)
        write(store, token="theirs", pid=7)

    monkeypatch.setattr(leases, "_write", overtaken)
    with pytest.raises(SafetyDPOError, match="found process 7 on another"), hold_lease(store):
        pass
