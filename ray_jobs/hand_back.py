"""What an actor of a pool does when its machine is about to be taken away: it hands back what it cannot finish.

Ray Data sends no new task to a node that drains, but its actor there holds two: one at work and one that waits. A task
counts only when it has ended, and of a large model one takes minutes, more than any notice gives. An actor that sees
that it cannot end its task in time ends its process between two batches; Ray starts it on another node and runs both
tasks there, as it would after the machine is gone, only sooner. Nothing of an unfinished task was written, so that no
row comes twice.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from dataclasses import dataclass

from ray_jobs.looks import LOOK_SECONDS

logger = logging.getLogger(__name__)


@dataclass
class Pace:
    """How far the task in hand is, and what a batch takes."""

    batches_per_task: int
    """Of a whole one; the last of a pool may have fewer, which is not known here."""
    task: str | None = None
    done: int = 0
    """Batches of this task."""
    batch_seconds: float | None = None
    """Of the latest batch; None before there was one."""

    def begin(self, task: str | None) -> None:
        """Note that a batch of a task begins."""
        if task != self.task:
            self.task, self.done = task, 0

    def end(self, seconds: float) -> None:
        """Note that it has ended."""
        self.done += 1
        self.batch_seconds = seconds

    def fits(self, seconds_left: float) -> bool:
        """Return whether the rest of the task can be made in that time; of the first batch nobody knows, so yes."""
        rest = max(1, self.batches_per_task - self.done)
        return self.batch_seconds is None or rest * self.batch_seconds <= seconds_left


class HandBack(threading.local):
    """Ends the actor's process before a batch if its node drains and the task would not end in time.

    Each thread of an actor works at a task of its own, at its own pace.
    """

    def __init__(self, batches_per_task: int) -> None:
        import ray

        self._pace = Pace(batches_per_task)
        self._node = ray.get_runtime_context().get_node_id()
        self._looked = self._began = time.monotonic()

    def before_batch(self) -> None:
        """Return, or never."""
        import ray

        self._began = time.monotonic()
        self._pace.begin(ray.get_runtime_context().get_task_id())
        if self._began - self._looked < LOOK_SECONDS:
            return
        self._looked = self._began
        ends_at = _drains_at(self._node)
        if ends_at is None or self._pace.fits(ends_at - time.time()):
            return
        logger.warning("this machine is taken back in %.0f s: its rows are handed back", ends_at - time.time())
        sys.stdout.flush()
        sys.stderr.flush()
        # No exception of Python's: Ray Data would count that as a failure of the rows. A process that is gone is
        # started again, without end.
        os._exit(1)

    def after_batch(self) -> None:
        """Note how long the batch took."""
        self._pace.end(time.monotonic() - self._began)


def _drains_at(node: str) -> float | None:
    """Return when a node that drains will be gone, Unix time in seconds; None if it does not drain, or at no time.

    Written against a private part of Ray 2.60, which pyproject.toml pins.
    """
    from ray._private.state import state

    deadline: int | None = state.get_draining_nodes().get(node)
    return deadline / 1000 if deadline else None
