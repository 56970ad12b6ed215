"""What a command's processes take while it runs: how many they are, their memory, their CPU time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import psutil


@dataclass
class Taken:
    """The highest numbers seen, and CPU time by process; memory is proportional set size, in bytes."""

    processes: int = 0
    memory_bytes: int = 0
    driver_bytes: int = 0
    cpu_seconds_of: dict[int, float] = field(default_factory=dict)

    @property
    def cpu_seconds(self) -> float:
        """CPU time of all processes that were seen, in seconds."""
        return sum(self.cpu_seconds_of.values())


@contextmanager
def watched(processes: Callable[[], list[psutil.Process]], *, every_seconds: float = 1.0) -> Iterator[Taken]:
    """Look at the processes again and again until the block ends."""
    taken, ended = Taken(), threading.Event()

    def watch() -> None:
        while not ended.wait(every_seconds):
            _look(taken, processes())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield taken
    finally:
        ended.set()
        thread.join()


def _look(taken: Taken, processes: list[psutil.Process]) -> None:
    memory = 0
    for process in processes:
        # One that has ended since has no numbers any more; its last ones stand.
        with suppress(psutil.Error):
            times = process.cpu_times()
            taken.cpu_seconds_of[process.pid] = times.user + times.system
            used = process.memory_full_info().pss
            memory += used
            if "ray_jobs.cli" in process.cmdline():
                taken.driver_bytes = max(taken.driver_bytes, used)
    taken.processes = max(taken.processes, len(processes))
    taken.memory_bytes = max(taken.memory_bytes, memory)
