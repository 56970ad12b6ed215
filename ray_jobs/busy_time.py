"""How long the workers of pools were at work, so that a stage can say how much of the GPUs it held it used."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Any

import ray

_lock = threading.Lock()
_worker_seconds = 0.0


class BusyTime:
    """Seconds in which at least one call of this process was under way; calls may come from several threads."""

    def __init__(self) -> None:
        """Nothing is under way."""
        self._lock = threading.Lock()
        self._running = 0
        self._since = self._seconds = 0.0

    def __enter__(self) -> BusyTime:
        """A call begins."""
        with self._lock:
            if self._running == 0:
                self._since = time.monotonic()
            self._running += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """A call ends; an error passes."""
        with self._lock:
            self._running -= 1
            if self._running == 0:
                self._seconds += time.monotonic() - self._since

    def take(self) -> float:
        """Return the seconds since the last time that this was asked."""
        with self._lock:
            now = time.monotonic()
            seconds, self._seconds = self._seconds, 0.0
            if self._running:
                seconds, self._since = seconds + now - self._since, now
            return seconds


def note_worker_seconds(seconds: float) -> None:
    """Add to what the workers of this command's pools were busy."""
    global _worker_seconds
    with _lock:
        _worker_seconds += seconds


def worker_seconds() -> float:
    """Return what workers of this command's pools were busy so far."""
    return _worker_seconds


def note_board(board: Any, label: str) -> None:
    """Add what the workers under a label have told a progress board.

    One that was lost with its node, and begun again, knows only what came after: the sum is then too low.
    """
    try:
        note_worker_seconds(ray.get(board.busy.remote(label)))
    except ray.exceptions.RayActorError:
        return
