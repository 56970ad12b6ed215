"""Who writes to a folder: one command at a time, told by a small file that its owner keeps fresh.

Ray Data's checkpoint deletes what looks like the unfinished work of an earlier run, so two commands that make the same
batch would delete each other's rows. A lease holds host, process and a time that a thread renews; one whose process is
gone (same host) or that was not renewed for two minutes (any host) is nobody's.

The file is written and read back, not created exclusively, which pyarrow cannot do on an object store: two commands
that start within the same moment on different machines may both win. Batches are verified before they are closed, so
that this ends in an error, not in a wrong table.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil

from safetydpo.artifacts.attempts import is_alive
from safetydpo.artifacts.storage import Location
from safetydpo.errors import SafetyDPOError

LEASE_FILE = "lease.json"
RENEW_SECONDS = 20.0
STALE_SECONDS = 120.0


@contextmanager
def hold_lease(folder: Location) -> Iterator[None]:
    """Be the only writer of `folder` while the block runs.

    Raises:
        SafetyDPOError: if somebody else is.
    """
    holder = live_holder(folder)
    if holder is not None:
        raise _taken(folder, holder)
    mine = {
        "token": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
    }
    _write(folder, mine)
    holder = _read(folder)
    if holder is None or holder["token"] != mine["token"]:
        raise _taken(folder, holder or mine)
    stop = threading.Event()

    def renew() -> None:
        while not stop.wait(RENEW_SECONDS):
            # One renewal that fails is made up for by the next; a store that is gone for good ends the work itself.
            with suppress(SafetyDPOError):
                _write(folder, mine)

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        # It may be waiting for a store that is gone.
        thread.join(timeout=2)
        with suppress(SafetyDPOError, OSError):
            (folder / LEASE_FILE).delete()


def live_holder(folder: Location) -> dict[str, Any] | None:
    """Return the lease of a folder if its owner still works, else None."""
    lease = _read(folder)
    if lease is None or time.time() - lease["renewed"] > STALE_SECONDS:
        return None
    if lease["host"] == socket.gethostname() and not is_alive(lease["pid"], lease["started"]):
        return None
    return lease


def _read(folder: Location) -> dict[str, Any] | None:
    file = folder / LEASE_FILE
    if not file.is_file():
        return None
    lease: dict[str, Any] = json.loads(file.read_bytes())
    return lease


def _write(folder: Location, lease: dict[str, Any]) -> None:
    (folder / LEASE_FILE).write_bytes(json.dumps({**lease, "renewed": time.time()}).encode())


def _taken(folder: Location, lease: dict[str, Any]) -> SafetyDPOError:
    return SafetyDPOError(
        f"expected nobody else to write to {folder}, found process {lease['pid']} on {lease['host']}: wait until it "
        f"has ended (if its machine is gone, {STALE_SECONDS:.0f} seconds), then run the same command again"
    )
