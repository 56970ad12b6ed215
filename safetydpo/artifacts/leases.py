"""Who writes to a folder: one process at a time, whichever command or machine it belongs to.

Ray Data's checkpoint deletes what looks like the unfinished work of an earlier run, so two commands that make the same
batch would delete each other's rows; two that change one file would lose each other's changes. A lease is that of the
attempts (`attempts.py`): `lease/attempt-N`, created exclusively, with a heartbeat beside it; one whose process is gone
(same machine) or whose heart has not beaten for five minutes (any machine) is nobody's.

Where a store has no exclusive creation, the lease is written and read back, and a warning says so: two commands that
start within the same moment on different machines may then both win. Batches are verified before they are closed, so
that this ends in an error, not in a wrong table.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import lru_cache
from typing import Any

from safetydpo.artifacts import attempts
from safetydpo.artifacts.attempts import (
    Attempt,
    Owner,
    forget_before,
    lease_file,
    newest_owner,
    read_ledger,
    take_lease,
    this_process,
)
from safetydpo.artifacts.exclusive_create import NoExclusiveCreation
from safetydpo.artifacts.layout import RECORD_FILE
from safetydpo.artifacts.storage import Location
from safetydpo.errors import SafetyDPOError

logger = logging.getLogger(__name__)
POLL_SECONDS = 0.05


class LeaseTaken(SafetyDPOError):  # noqa: N818 (says what happened)
    """Somebody else writes to the folder, or has closed it meanwhile."""


@contextmanager
def hold_lease(folder: Location, *, patience_seconds: float = 0.0) -> Iterator[None]:
    """Be the only writer of an open `folder` while the block runs, after waiting `patience_seconds` at most.

    Raises:
        LeaseTaken: if somebody else still is, or the folder has been closed.
        SafetyDPOError: if storage fails.
    """
    attempt = _wait_and_take(folder, patience_seconds)
    stop = threading.Event()

    def renew() -> None:
        while not stop.wait(attempts.RENEW_SECONDS):
            # One renewal that fails is made up for by the next; a store that is gone for good ends the work itself.
            with suppress(SafetyDPOError):
                attempt.renew()

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        # It may be waiting for a store that is gone.
        thread.join(timeout=2)
        with suppress(SafetyDPOError, OSError):
            _release(attempt)


def live_holder(folder: Location) -> dict[str, Any] | None:
    """Return the lease of a folder if its owner still works, else None."""
    return newest_owner(folder)[1]


def _wait_and_take(folder: Location, patience_seconds: float) -> Attempt:
    deadline = time.monotonic() + patience_seconds
    # Nobody else's run or lane: what `attempts` knows of those must not make this lease anybody's own.
    name = uuid.uuid4().hex
    owner = this_process(run=name, lane=name)
    while True:
        newest, holder = newest_owner(folder)
        attempt = _take(folder, owner, newest) if holder is None else None
        if attempt is not None:
            forget_before(attempt)
            return attempt
        if (folder / RECORD_FILE).is_file():
            raise LeaseTaken(f"expected {folder} open to write to, found it closed by another command: run this again")
        if time.monotonic() >= deadline:
            raise _taken(folder, holder or live_holder(folder))
        time.sleep(POLL_SECONDS)


def _take(folder: Location, owner: Owner, newest: int) -> Attempt | None:
    try:
        return take_lease(folder, owner, newest=newest)
    except NoExclusiveCreation as error:
        _warn(str(error))
    if (folder / RECORD_FILE).is_file():
        return None
    file = lease_file(folder, str(newest + 1))
    file.write_bytes(json.dumps({**asdict(owner), "renewed": time.time()}).encode())
    is_ours = read_ledger(file)["token"] == owner.token
    return Attempt(folder, newest + 1, owner) if is_ours else None


@lru_cache(maxsize=16)
def _warn(said: str) -> None:
    logger.warning("leases of this store are not exclusive, let one command at a time write to it: %s", said)


def _release(attempt: Attempt) -> None:
    """Take the lease away, unless this owner was given up for dead and a later one has done so."""
    file = lease_file(attempt.folder, str(attempt.number))
    if file.is_file() and read_ledger(file)["token"] == attempt.owner.token:
        # The lease first: who reads in between looks again when its number is gone.
        file.delete()
        lease_file(attempt.folder, f"{attempt.number}.alive").delete()


def _taken(folder: Location, lease: dict[str, Any] | None) -> LeaseTaken:
    who = f"process {lease['pid']} on {lease['host']}" if lease else "another process"
    return LeaseTaken(
        f"expected nobody else to write to {folder}, found {who}: wait until it has ended (if its machine is gone, "
        f"{attempts.STALE_SECONDS:.0f} seconds), then run the same command again"
    )
