"""The rules by which lanes share out experts: pure, so that real lanes and simulated ones follow the same.

A command wants so many lanes; each takes the longest expert that nobody holds, again and again; a lane that ends is
followed by another while there is work; an expert that failed too often is given up.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from safetydpo.artifacts.attempts import Standing

LOOK_SECONDS = 5.0
"""Between two looks at the ledger while fewer lanes run than are wanted."""
START_SECONDS = 60.0
"""A lane that is younger is taken to be about to take a task."""
LANE_DEATHS, LANE_LOSSES = 3, 10
"""Deaths, and losses with a node, per wanted lane without a task settled in between, after which the launcher ends."""
SETTLED = (Standing.CLOSED, Standing.FAILED)
Look = Callable[[int], Standing]
Lease = TypeVar("Lease")


def longest_first(lengths: Sequence[float], names: Sequence[str]) -> list[int]:
    """Return the tasks by their index, the longest first; of equal ones in the order of their names."""
    return sorted(range(len(lengths)), key=lambda index: (-lengths[index], names[index]))


class WaitingTasks:
    """What one lane has not seen settled yet, in the order in which it asks for it."""

    def __init__(self, indices: Iterable[int]) -> None:
        """Begin with tasks in the launcher's order."""
        self._waiting = deque(indices)

    def take(self, lease: Callable[[int], tuple[Standing, Lease | None]]) -> tuple[int, Lease] | None:
        """Return the first task that could be leased, and its lease; None if none is free.

        Args:
            lease: looks at a task and, if it is free, tries to lease it. A task that is held by somebody else, or was
                leased by another lane in between, is asked for again after all others.
        """
        for _ in range(len(self._waiting)):
            index = self._waiting.popleft()
            standing, held = lease(index)
            if standing in SETTLED:
                continue
            self._waiting.append(index)
            if held is not None:
                return index, held
        return None


class OpenTasks:
    """What the launcher of lanes has not seen settled yet."""

    def __init__(self, indices: Iterable[int]) -> None:
        """Begin with all tasks, the longest first."""
        self._open = list(indices)

    def __len__(self) -> int:
        return len(self._open)

    def indices(self) -> list[int]:
        """Return them in order."""
        return list(self._open)

    def free(self, look: Look, *, taken: Container[int] = ()) -> Iterator[int]:
        """Yield tasks that nobody holds and that are not `taken`, after a look at each; forget those settled."""
        for index in self.indices():
            standing = look(index)
            if standing in SETTLED:
                self._open.remove(index)
            elif standing is Standing.FREE and index not in taken:
                yield index


def count_lanes_to_start(num_wanted: int, ages_seconds: Iterable[float], *, num_free: int, is_isolated: bool) -> int:
    """Return how many lanes to start: at most what is missing, and none for a task that a young lane will take.

    num_wanted - running, and of shared lanes at most free - young, where young lanes run for under START_SECONDS.

    Args:
        num_wanted: lanes that shall run.
        ages_seconds: how long each running lane has run.
        num_free: tasks that nobody holds.
        is_isolated: each lane has a task of its own, so that the free ones are nobody else's.
    """
    ages = list(ages_seconds)
    missing = num_wanted - len(ages)
    unclaimed = num_free if is_isolated else num_free - sum(age < START_SECONDS for age in ages)
    return max(0, min(missing, unclaimed))


def choose_node(room: Mapping[str, int], running: Iterable[str], *, own: str, leaving: Container[str]) -> str | None:
    """Return the node with room for most lanes beside those that run there; None if none has room.

    Of equal ones rather another than the launcher's own, then the last by name.

    Args:
        room: lanes that fit on each empty node.
        running: the node of each lane that runs.
        own: the launcher's node.
        leaving: nodes that are about to be taken away.
    """
    used = Counter(running)
    free = [(fits - used[node], node != own, node) for node, fits in room.items() if node not in leaving]
    most, _, node = max(free, default=(0, False, ""))
    return node if most > 0 else None


class Accidents:
    """Counts ends of lanes that nobody wanted, until there are so many that no lane will ever do better."""

    def __init__(self, *, num_lanes: int, num_open: int) -> None:
        """Begin with `num_open` open tasks."""
        self._num_lanes, self._open_before = num_lanes, num_open
        self._deaths = self._losses = 0

    def is_one_too_many(self, *, is_lost: bool, num_open: int) -> bool:
        """Count one; every task that was settled since the last one makes the count begin again.

        Args:
            is_lost: the lane went with its node, rather than that its process failed.
            num_open: tasks that are open now.
        """
        if num_open != self._open_before:
            self._deaths = self._losses = 0
        self._open_before = num_open
        self._deaths, self._losses = self._deaths + (not is_lost), self._losses + is_lost
        return self._deaths >= LANE_DEATHS * self._num_lanes or self._losses >= LANE_LOSSES * self._num_lanes
