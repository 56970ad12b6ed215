"""What processes take while a block runs: how many they are, their memory, their CPU time."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import psutil


@dataclass
class Taken:
    """What was seen; memory is proportional set size, in bytes."""

    processes: int = 0
    """The most at one moment."""
    bytes_of: Counter[str] = field(default_factory=Counter)
    """Memory of each kind of process at the moment when all together held the most."""
    number_of: Counter[str] = field(default_factory=Counter)
    """How many of each kind there were then."""
    cpu_seconds_of: dict[int, float] = field(default_factory=dict)
    """By process id."""

    @property
    def memory_bytes(self) -> int:
        """The most memory at one moment."""
        return self.bytes_of.total()

    @property
    def cpu_seconds(self) -> float:
        """CPU time of all processes that were seen, in seconds."""
        return sum(self.cpu_seconds_of.values())


@contextmanager
def watched(processes: Callable[[], Iterable[psutil.Process]], *, every_seconds: float = 1.0) -> Iterator[Taken]:
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


def _look(taken: Taken, processes: Iterable[psutil.Process]) -> None:
    held: Counter[str] = Counter()
    number: Counter[str] = Counter()
    for process in processes:
        # One that has ended since has no numbers any more; its last ones stand.
        with suppress(psutil.Error):
            times = process.cpu_times()
            taken.cpu_seconds_of[process.pid] = times.user + times.system
            kind = process.name().split("(")[0]
            held[kind] += process.memory_full_info().pss
            number[kind] += 1
    taken.processes = max(taken.processes, number.total())
    if held.total() > taken.memory_bytes:
        taken.bytes_of, taken.number_of = held, number
