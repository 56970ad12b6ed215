"""What a reader may do with a file: return, or raise one line of ours, within seconds and a few gigabytes."""

from __future__ import annotations

import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from ray_jobs.failures import explain
from safetydpo.errors import SafetyDPOError
from tests.security.reader import Reader

SECONDS = 20
"""For one file of a few kilobytes, on a busy machine."""
MORE_BYTES = 3 << 30


@contextmanager
def bounded() -> Iterator[None]:
    """Let this process have a few gigabytes of addresses more than it has, and no more."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + MORE_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


class _TookTooLongError(BaseException):
    """No `except Exception` may take it for an answer."""


def _stop(*_: object) -> None:
    raise _TookTooLongError


def assert_clean(reader: Reader, folder: Path, data: bytes, *, may_fail: bool = True) -> None:
    """Read the bytes under the reader's name; anything but a result or one line is an error of this test."""
    path = folder / reader.file
    shutil.rmtree(folder, ignore_errors=True)
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    before = signal.signal(signal.SIGALRM, _stop)
    signal.alarm(SECONDS)
    told: SafetyDPOError | None = None
    try:
        reader.read(path)
    except SafetyDPOError as error:
        told = error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert may_fail or told is None, told
    line = "" if told is None else str(explain(told))
    assert "\n" not in line
    assert len(line) < 1000
