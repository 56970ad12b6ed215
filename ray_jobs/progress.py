"""Progress of work that runs elsewhere: workers count, the driver draws one bar with rate and time left."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any

import ray
from rich.progress import Progress

from ray_jobs.bar_columns import bar_columns
from ray_jobs.terminal import TextConsole

console = TextConsole(stderr=True)
POLL_SECONDS = 0.5


class ProgressBoard:
    """Counts finished units by label."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._parts: defaultdict[str, dict[str, int]] = defaultdict(dict)

    def reset(self, label: str) -> None:
        """Start counting a label anew."""
        self._counts[label] = 0
        self._parts[label] = {}

    def add(self, label: str, count: int) -> None:
        """Add finished units."""
        self._counts[label] += count

    def put(self, label: str, part: str, count: int) -> None:
        """Set the finished units of one part, which may have been begun again."""
        self._parts[label][part] = count

    def count(self, label: str) -> int:
        """Return the finished units so far."""
        return self._counts[label] + sum(self._parts[label].values())


@contextmanager
def progress_bar(label: str, *, total: int, done: int = 0) -> Iterator[Any]:
    """Show a bar while the block runs; yield the board's handle, which workers call `add.remote(label, n)` on."""
    board = _board(ray.get_runtime_context().get_node_id())
    board.reset.remote(label)
    stop = threading.Event()
    with Progress(*bar_columns(), console=console, disable=not console.is_terminal) as bars:
        task = bars.add_task(label, total=total, completed=done)

        def follow() -> None:
            while not stop.wait(POLL_SECONDS):
                # The count is for eyes only: a board that was lost with its node must not end the work.
                with suppress(ray.exceptions.RayActorError):
                    bars.update(task, completed=done + ray.get(board.count.remote(label)))

        follower = threading.Thread(target=follow, daemon=True)
        follower.start()
        try:
            yield board
            bars.update(task, completed=total)
        finally:
            stop.set()
            follower.join()


@lru_cache(maxsize=1)
def _board(_ray: str) -> Any:
    # One board for all bars of a connection: a process of its own costs seconds. It ends with the driver.
    return ray.remote(num_cpus=0, max_restarts=-1)(ProgressBoard).remote()
