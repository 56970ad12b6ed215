"""Progress of work that runs elsewhere: workers count, the driver draws one bar with rate and time left."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any

import ray
from rich.progress import Progress

from ray_jobs.bar_columns import bar_columns
from ray_jobs.metrics import set_gauge
from ray_jobs.run_progress import told_progress
from ray_jobs.terminal import TextConsole

console = TextConsole(stderr=True)
POLL_SECONDS = 0.5


class ProgressBoard:
    """Counts finished units by label, and what was begun and not ended."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._busy: defaultdict[str, float] = defaultdict(float)
        self._parts: defaultdict[str, dict[str, int]] = defaultdict(dict)
        self._begun: defaultdict[str, Counter[str]] = defaultdict(Counter)

    def reset(self, label: str) -> None:
        """Start counting a label anew."""
        self._counts[label] = 0
        self._busy[label] = 0.0
        self._parts[label] = {}

    def add(self, label: str, count: int, busy_seconds: float = 0.0) -> None:
        """Add finished units, and the seconds that their worker was busy with them."""
        self._counts[label] += count
        self._busy[label] += busy_seconds

    def put(self, label: str, part: str, count: int) -> None:
        """Set the finished units of one part, which may have been begun again."""
        self._parts[label][part] = count

    def begin(self, label: str, what: str) -> int:
        """Note that something is begun; return how often it was before without having ended."""
        self._begun[label][what] += 1
        return self._begun[label][what] - 1

    def end(self, label: str, what: str) -> None:
        """Forget something that has ended."""
        del self._begun[label][what]

    def busy(self, label: str) -> float:
        """Return the seconds that workers were busy so far."""
        return self._busy[label]

    def count(self, label: str) -> int:
        """Return the finished units so far."""
        return self._counts[label] + sum(self._parts[label].values())


@contextmanager
def progress_bar(label: str, *, total: int, done: int = 0, beside: Mapping[str, int] | None = None) -> Iterator[Any]:
    """Show a bar while the block runs; yield the board's handle, which workers call `add.remote(label, n)` on.

    What is counted is told to whoever watches the run from elsewhere, too; so is that of `beside`, {label: total},
    which has no bar.
    """
    context = ray.get_runtime_context()
    # The node tells one local Ray of this process from the next: the first job of each has the same number.
    board = _board(f"{context.namespace}-progress-{context.get_job_id()}-{context.get_node_id()}")
    told = _Told({label: (total, done), **{other: (count, 0) for other, count in (beside or {}).items()}})
    for each in told.labels:
        board.reset.remote(each)
    stop = threading.Event()
    with Progress(*bar_columns(), console=console, disable=not console.is_terminal) as bars:
        task = bars.add_task(label, total=total, completed=done)

        def follow() -> None:
            while not stop.wait(POLL_SECONDS):
                # The count is for eyes only: a board that was lost with its node must not end the work.
                with suppress(ray.exceptions.RayActorError):
                    bars.update(task, completed=told.take(ray.get([board.count.remote(each) for each in told.labels])))

        follower = threading.Thread(target=follow, daemon=True)
        follower.start()
        try:
            yield board
            bars.update(task, completed=total)
            told.end()
        finally:
            stop.set()
            follower.join()


class _Told:
    """What is counted under a bar, as it is told to the run's progress file and to Prometheus."""

    def __init__(self, labels: Mapping[str, tuple[int, int]]) -> None:
        self.labels = list(labels)
        file = told_progress()
        self._totals, self._before = [total for total, _ in labels.values()], [done for _, done in labels.values()]
        self._works = [
            None if file is None else file.begin(label, total=total, done=done)
            for label, (total, done) in labels.items()
        ]
        self._tell(self._before)

    def take(self, counts: Sequence[int]) -> int:
        """Tell the counts of the labels; return how much of the first is done."""
        done = [before + count for before, count in zip(self._before, counts, strict=True)]
        self._tell(done)
        return done[0]

    def end(self) -> None:
        """Tell that everything is done."""
        self._tell(self._totals)
        for work in self._works:
            if work is not None:
                work.ended = time.time()

    def _tell(self, done: Sequence[int]) -> None:
        for label, total, number, work in zip(self.labels, self._totals, done, self._works, strict=True):
            set_gauge("safetydpo_done", number, work=label)
            set_gauge("safetydpo_wanted", total, work=label)
            if work is not None:
                work.done = number


@lru_cache(maxsize=1)
def _board(name: str) -> Any:
    # One board for all bars of a connection: a process of its own costs seconds. It ends with the driver.
    kind = ray.remote(num_cpus=0, max_restarts=-1)(ProgressBoard)
    return kind.options(name=name, get_if_exists=True).remote()
