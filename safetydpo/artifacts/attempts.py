"""Attempts at one artifact: who works on it, in which order they came, and who may publish it.

Below the artifact's folder:

- `lease/attempt-N`: created exclusively by the owner of attempt N, whom it names. N is the fencing token: everything
  that the owner writes lies below `attempt-N/`, so that an owner who was given up for dead and wakes up again touches
  nothing of his successor's.
- `lease/attempt-N.alive`: the owner's heartbeat, a time.
- `lease/attempt-N.end`: how the attempt ended without a result: `failed`, `released` by its owner, or `lost` with the
  machine it ran on.
- `failed/RUN.json`: why the command RUN gave up on this artifact; each command has a file of its own.
- `record.json`: the result, created exclusively; it names its attempt.

Whoever finds the newest attempt ended or dead may create the next one. Clocks only decide how soon that is: two owners
at the same time waste work, but the one with the older number stops before it publishes, or loses the creation of the
record, or is the only one who publishes.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import psutil

from safetydpo.artifacts.json_text import JsonError, parse_object
from safetydpo.artifacts.layout import RECORD_FILE, attempt_folder
from safetydpo.artifacts.storage import Location
from safetydpo.errors import SafetyDPOError

LEASE_FOLDER = "lease"
FAILED_FOLDER = "failed"
OLD_FAILED_FILE = "failed.json"
"""One for all runs, of an earlier version."""
RENEW_SECONDS = 20.0
MAX_PID, MAX_TIME = 2**31, 2**40
"""Beyond them a number in a lease is damage."""
STALE_SECONDS = 300.0
"""Well above a renewal that waits for its store (about 100 s) on top of the interval."""
Ending = Literal["failed", "released", "lost"]


@dataclass(frozen=True)
class Owner:
    """One process that works on attempts, as its leases tell it."""

    run: str
    """The command it works for; a name that no other command ever has."""
    lane: str
    """The worker group within the run; a group that starts again keeps it."""
    host: str
    pid: int
    started: float
    """When the process began, Unix time in seconds: a pid is used again."""
    token: str = field(default_factory=lambda: uuid.uuid4().hex)


def this_process(*, run: str, lane: str) -> Owner:
    """Return this process as an owner."""
    return Owner(run, lane, machine(), os.getpid(), psutil.Process().create_time())


def machine() -> str:
    """Return a name of what pids count on: the host, and on Linux the pid namespace, of which containers may have more.

    Two containers that share their host's name must not take each other's processes for dead.
    """
    namespace = Path("/proc/self/ns/pid")
    return socket.gethostname() + (f" {os.readlink(namespace)}" if namespace.is_symlink() else "")


def is_alive(pid: int, started: float) -> bool:
    """Return whether the process `pid` of this machine that began at `started` still runs."""
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - started) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


@dataclass(frozen=True)
class Attempt:
    """A lease that this process holds, or held: whether it is the newest, only storage knows."""

    folder: Location
    """The artifact's."""
    number: int
    owner: Owner

    @property
    def files(self) -> Location:
        """Where everything lies that this attempt writes."""
        return attempt_folder(self.folder, self.number)

    def is_newest(self) -> bool:
        """Read the leases again; return whether nobody has begun a later attempt."""
        return max(_numbers(self.folder), default=0) == self.number

    def renew(self) -> None:
        """Tell that the owner lives."""
        lease_file(self.folder, f"{self.number}.alive").write_bytes(_encode({"renewed": time.time()}))

    def end(self, how: Ending, reason: str = "") -> None:
        """Let go of the lease without a result."""
        end_attempt(self.folder, self.number, how, reason)


class Standing(Enum):
    """How far an artifact is, for somebody who looks for work."""

    CLOSED = "closed"
    FAILED = "failed"
    """Given up by this run."""
    HELD = "held"
    """Somebody works on it."""
    FREE = "free"


@dataclass(frozen=True)
class Look:
    """What storage says about an artifact at one moment."""

    standing: Standing
    newest: int = 0
    """Number of the newest attempt; 0 = none."""


def look_at(folder: Location, *, run: str, lane: str = "", max_attempts: int) -> Look:
    """Return whether there is work to do; give up on the artifact if this run has failed `max_attempts` times.

    An attempt of `lane` itself is over: a worker group that looks for work has none.

    Raises:
        SafetyDPOError: if a file of the ledger does not parse.
    """
    if (folder / RECORD_FILE).is_file():
        return Look(Standing.CLOSED)
    numbers = _numbers(folder)
    newest = numbers[-1] if numbers else 0
    if read_failure(folder, run=run) is not None:
        return Look(Standing.FAILED, newest)
    if newest and _is_held(folder, newest, lane):
        return Look(Standing.HELD, newest)
    reasons = [reason for number in numbers if (reason := _failure_of(folder, number, run)) is not None]
    if is_out_of_attempts(len(reasons), max_attempts):
        give_up(folder, run=run, reason=reasons[-1])
        return Look(Standing.FAILED, newest)
    return Look(Standing.FREE, newest)


def is_out_of_attempts(num_failures: int, max_attempts: int) -> bool:
    """Return whether a run that has failed so often gives up."""
    return num_failures >= max_attempts


def take_lease(folder: Location, owner: Owner, *, newest: int) -> Attempt | None:
    """Begin the attempt after `newest`; None if somebody else did, or published meanwhile.

    Raises:
        SafetyDPOError: if storage fails.
    """
    if not lease_file(folder, str(newest + 1)).create_exclusively(_encode({**asdict(owner), "renewed": time.time()})):
        return None
    attempt = Attempt(folder, newest + 1, owner)
    # Published between the look and the lease, by an attempt whose lease is gone already.
    return None if (folder / RECORD_FILE).is_file() else attempt


def publish(attempt: Attempt, record: bytes) -> bool:
    """Create the artifact's record if this attempt is still the newest; return whether it is the published one."""
    return attempt.is_newest() and (attempt.folder / RECORD_FILE).create_exclusively(record)


def end_attempt(folder: Location, number: int, how: Ending, reason: str = "") -> None:
    """Write how an attempt ended without a result; of several reasons the first stands."""
    lease_file(folder, f"{number}.end").create_exclusively(_encode({"how": how, "reason": reason}))


def end_attempts_of(folder: Location, lane: str, how: Ending, reason: str) -> None:
    """End the newest attempt if it belongs to a lane that is known to be gone."""
    numbers = _numbers(folder)
    if numbers and not lease_file(folder, f"{numbers[-1]}.end").is_file():
        lease = read_ledger(lease_file(folder, str(numbers[-1])))
        if lease["lane"] == lane:
            end_attempt(folder, numbers[-1], how, reason)


def give_up(folder: Location, *, run: str, reason: str) -> None:
    """Mark the artifact as failed for this run; a later one tries again."""
    _failure_file(folder, run).write_bytes(_encode({"run": run, "reason": reason}))


def read_failure(folder: Location, *, run: str) -> str | None:
    """Return why this run gave up on the artifact, None if it did not."""
    location = _failure_file(folder, run)
    return str(read_ledger(location)["reason"]) if location.is_file() else None


def _failure_file(folder: Location, run: str) -> Location:
    return folder / FAILED_FOLDER / f"{run}.json"


def newest_file(folder: Location, name: str, *, before: int) -> Location | None:
    """Return the file `name` of the latest attempt before `before` that has one, or the artifact's own.

    The latter is from before there were attempts.
    """
    places = [*(attempt_folder(folder, number) for number in range(before - 1, 0, -1)), folder]
    return next((place / name for place in places if (place / name).is_file()), None)


def clear_attempts(folder: Location, *, keep: int, without: str, gather: str) -> None:
    """Remove what a closed artifact no longer needs: heartbeats, and of every attempt but `keep` the files.

    `without` is a file of the published attempt that goes too. `gather` is a folder of attempts that is kept whole:
    what earlier ones have there and the published one lacks, because it went on from their state, goes to it. Leases
    stay: they say how often it was tried.
    """
    kept = attempt_folder(folder, keep)
    numbers = [int(child.name.removeprefix("attempt-")) for child in folder.list() if _is_attempt(child)]
    for number in sorted(numbers, reverse=True):
        if number != keep:
            other = attempt_folder(folder, number)
            # A later attempt was overtaken by the published one: nothing of it is part of the result.
            if number < keep:
                _move_missing(other / gather, kept / gather)
            other.delete()
    for name in (FAILED_FOLDER, OLD_FAILED_FILE):
        (folder / name).delete()
    for lease in (folder / LEASE_FOLDER).list():
        if lease.name.endswith(".alive"):
            lease.delete()
    (kept / without).delete()


def _is_attempt(child: Location) -> bool:
    return child.name.startswith("attempt-") and child.name.removeprefix("attempt-").isdecimal()


def _move_missing(source: Location, target: Location) -> None:
    there = {file.name for file in target.list()}
    for file in source.list():
        if file.name not in there:
            (target / file.name).write_bytes(file.read_bytes())


def newest_owner(folder: Location) -> tuple[int, dict[str, Any] | None]:
    """Return the number of the newest attempt (0 = none), and its lease if its owner still works on it."""
    while True:
        numbers = _numbers(folder)
        newest = numbers[-1] if numbers else 0
        try:
            if not newest or not _is_held(folder, newest, lane=""):
                return newest, None
            return newest, read_ledger(lease_file(folder, str(newest)))
        except SafetyDPOError:
            # Its owner let go of it, or a later one cleared it away, between the listing and the reading.
            if _numbers(folder) == numbers:
                raise


def forget_before(attempt: Attempt) -> None:
    """Remove the leases before this one, of owners that have ended or were given up for dead."""
    for file in (attempt.folder / LEASE_FOLDER).list():
        number = file.name.removeprefix("attempt-").partition(".")[0]
        if number.isdecimal() and int(number) < attempt.number:
            file.delete()


def lease_file(folder: Location, what: str) -> Location:
    """Return the file of an attempt's lease: `what` is its number, or that with `.alive` or `.end`."""
    return folder / LEASE_FOLDER / f"attempt-{what}"


def _numbers(folder: Location) -> list[int]:
    names = [lease.name.removeprefix("attempt-") for lease in (folder / LEASE_FOLDER).list()]
    return sorted(int(name) for name in names if name.isdecimal())


def _is_held(folder: Location, number: int, lane: str) -> bool:
    if lease_file(folder, f"{number}.end").is_file():
        return False
    lease = read_ledger(lease_file(folder, str(number)))
    if lease["lane"] == lane:
        return False
    if lease["host"] == machine() and not is_alive(lease["pid"], lease["started"]):
        return False
    heartbeat = lease_file(folder, f"{number}.alive")
    renewed = read_ledger(heartbeat)["renewed"] if heartbeat.is_file() else lease["renewed"]
    return bool(time.time() - renewed <= STALE_SECONDS)


def _failure_of(folder: Location, number: int, run: str) -> str | None:
    """Return why an attempt of this run failed; None if it did not, or is another run's."""
    if read_ledger(lease_file(folder, str(number)))["run"] != run:
        return None
    end = lease_file(folder, f"{number}.end")
    if not end.is_file():
        return "its worker ended without a word (killed, or out of memory)"
    ending = read_ledger(end)
    return str(ending["reason"]) if ending["how"] == "failed" else None


def _encode(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True).encode() + b"\n"


def read_ledger(location: Location) -> dict[str, Any]:
    """Return one small file of the ledger: a lease, a heartbeat, an end or a failure.

    Raises:
        SafetyDPOError: if it is damaged.
    """
    try:
        content = parse_object(location.read_bytes())
        wrong = [name for name, is_good in _FIELDS.items() if name in content and not is_good(content[name])]
        missing = [name for name in _fields_of(location) if name not in content]
        if wrong or missing:
            raise JsonError(f"no {(wrong or missing)[0]!r}, or another kind of it")
    except ValueError as error:
        raise SafetyDPOError(
            f"expected JSON of the ledger at {location}, found: {error}; delete that file, then run the same command "
            "again"
        ) from error
    return content


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value < MAX_TIME


def _is_pid(value: Any) -> bool:
    return isinstance(value, int) and 0 < value < MAX_PID


_FIELDS: Mapping[str, Callable[[Any], bool]] = {
    "pid": _is_pid,
    "started": _is_time,
    "renewed": _is_time,
    **dict.fromkeys(("host", "token", "run", "lane", "how", "reason"), _is_text),
}


def _fields_of(location: Location) -> tuple[str, ...]:
    """Return what the readers of a file of the ledger ask for; a failure's holds its reason."""
    if location.parent.name != LEASE_FOLDER:
        return ("reason",)
    if location.name.endswith(".alive"):
        return ("renewed",)
    return ("how",) if location.name.endswith(".end") else ("pid", "started", "host", "token", "run", "lane", "renewed")
