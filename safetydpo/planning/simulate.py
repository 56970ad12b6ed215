"""Lanes in simulated time: the scheduling of real ones against durations, failures and nodes that are taken away.

Only time is simulated. Which expert a lane takes, when a lane is started and where, when an expert is given up: all of
it is decided by the code of `schedule.py` and `artifacts/attempts.py` that decides it for real lanes.
"""

from __future__ import annotations

import heapq
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice

from safetydpo.artifacts.attempts import Standing, is_out_of_attempts
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.planning.schedule import (
    LOOK_SECONDS,
    Accidents,
    OpenTasks,
    WaitingTasks,
    choose_node,
    count_lanes_to_start,
    longest_first,
)

HEAD = "head"
"""Name of the launcher's node, on which no lane runs."""
HOUR_SECONDS = 3600.0


@dataclass(frozen=True)
class Machines:
    """What lanes run on: equal nodes."""

    nodes: int
    lanes_per_node: int
    lane_start_seconds: float = 0.0
    """From the launcher's decision to the first expert: Ray Train's start and the loading of the base model."""
    look_seconds: float = 0.0
    """Of a lane's question to the ledger about one expert; it asks for one after another until one is free."""

    @property
    def lanes(self) -> int:
        """How many lanes fit."""
        return self.nodes * self.lanes_per_node


@dataclass(frozen=True)
class Faults:
    """What goes wrong, by chance."""

    preemption_rate: float = 0.0
    """Probability that a node is taken away within an hour, in [0, 1)."""
    failure_rate: float = 0.0
    """Probability that an attempt takes its lane along, at a random moment, in [0, 1]."""
    checkpoint_seconds: float = 0.0
    """Work between two checkpoints; what was done since the last one is done again. 0 = nothing is."""
    detection_seconds: float = 0.0
    """From the loss of a node until Ray says so; its experts wait so long."""
    replacement_seconds: float = 0.0
    """From the loss of a node until another one stands in its place."""


@dataclass(frozen=True)
class Simulated:
    """How a simulated training of all experts went."""

    makespan_seconds: float
    bound_seconds: float
    """max(total work / lanes, longest expert): no schedule is shorter."""
    work_seconds: float
    """Of all experts that were finished, each once, in seconds of a lane."""
    utilisation: float
    """Work over the time of all lanes that fit, in [0, 1]."""
    closed: int
    given_up: int
    attempts: int
    preemptions: int
    lanes_started: int
    launcher_looks: int
    """Questions of the launcher to the ledger."""
    lane_looks: int
    """Questions of all lanes."""
    driver_seconds: float
    """Real time that the scheduling code of the launcher took, without its questions to the ledger."""

    @property
    def over_bound(self) -> float:
        """Makespan over its bound."""
        return self.makespan_seconds / self.bound_seconds if self.bound_seconds else 1.0


def bound_seconds(durations: Sequence[float], num_lanes: int) -> float:
    """Return max(total work / lanes, longest expert).

    Raises:
        UsageError: if there is no lane.
    """
    if num_lanes < 1:
        raise UsageError(
            f"expected room for at least one lane, found {num_lanes}: simulate more nodes, more GPUs per node or fewer "
            "workers per expert"
        )
    return max(math.fsum(durations) / num_lanes, max(durations, default=0.0))


def simulate_lanes(
    durations: Sequence[float],
    machines: Machines,
    faults: Faults = Faults(),
    *,
    num_lanes: int | None = None,
    max_attempts: int = 3,
    seed: int = 0,
) -> Simulated:
    """Simulate the training of one expert per duration (seconds of a lane); equal arguments give equal numbers.

    Args:
        durations: seconds that a lane works on each expert, all of it: reading, training, writing.
        machines: nodes, and lanes that fit on them.
        faults: what goes wrong.
        num_lanes: lanes that are wanted; None = as many as fit, but no more than experts.
        max_attempts: failures of an expert after which it is given up.
        seed: of everything that happens by chance.

    Raises:
        UsageError: if no lane fits.
        SafetyDPOError: if lanes end so often that the launcher would give up.
    """
    bound = bound_seconds(durations, machines.lanes)
    wanted = min(machines.lanes, len(durations)) if num_lanes is None else num_lanes
    simulation = _Simulation(durations, machines, faults, max(1, wanted), max_attempts, random.Random(seed))
    simulation.run()
    closed = [index for index, standing in enumerate(simulation.standing) if standing is Standing.CLOSED]
    work, lane_time = math.fsum(durations[index] for index in closed), machines.lanes * simulation.now
    return Simulated(
        makespan_seconds=simulation.now,
        bound_seconds=bound,
        work_seconds=work,
        utilisation=work / lane_time if lane_time else 0.0,
        closed=len(closed),
        given_up=len(durations) - len(closed),
        attempts=simulation.attempts,
        preemptions=simulation.preemptions,
        lanes_started=simulation.lanes_started,
        launcher_looks=simulation.launcher_looks,
        lane_looks=simulation.lane_looks,
        driver_seconds=simulation.driver_seconds,
    )


@dataclass(eq=False)
class _Lane:
    node: str
    began: float
    waiting: WaitingTasks
    held: int | None = None
    took: float = 0.0
    """When it took what it holds."""
    is_gone: bool = False


@dataclass
class _Simulation:
    durations: Sequence[float]
    machines: Machines
    faults: Faults
    num_lanes: int
    max_attempts: int
    chance: random.Random
    now: float = 0.0
    attempts: int = 0
    preemptions: int = 0
    lanes_started: int = 0
    launcher_looks: int = 0
    lane_looks: int = 0
    driver_seconds: float = 0.0
    standing: list[Standing] = field(default_factory=list)

    def __post_init__(self) -> None:
        total = len(self.durations)
        names = [f"{index:08d}" for index in range(total)]
        self.standing = [Standing.FREE] * total
        self._left = list(self.durations)
        self._failures = [0] * total
        self._open = OpenTasks(longest_first(self.durations, names))
        self._accidents = Accidents(num_lanes=self.num_lanes, num_open=total)
        self._running: list[_Lane] = []
        self._nodes: set[str] = set()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = count()
        self._next_look = -1

    def run(self) -> None:
        for _ in range(self.machines.nodes):
            self._join()
        self._look_and_start()
        while self._open or self._running:
            self.now, _, happen = heapq.heappop(self._events)
            happen()

    def _after(self, seconds: float, happen: Callable[[], None]) -> int:
        number = next(self._number)
        heapq.heappush(self._events, (self.now + seconds, number, happen))
        return number

    # ---- the launcher

    def _look_and_start(self) -> None:
        """Do as `ray_jobs/lanes.py` does after each end of a lane, and now and then while too few run."""
        started = time.perf_counter()
        if len(self._running) < self.num_lanes:
            free = list(islice(self._open.free(self._look), self.num_lanes))
            ages = [self.now - lane.began for lane in self._running]
            wanted = count_lanes_to_start(self.num_lanes, ages, num_free=len(free), is_isolated=False)
            for _ in range(wanted):
                room = dict.fromkeys(self._nodes, self.machines.lanes_per_node)
                node = choose_node(room, [lane.node for lane in self._running], own=HEAD, leaving=())
                if node is None:
                    break
                self._start(node)
            self._look_later()
        self.driver_seconds += time.perf_counter() - started

    def _look(self, index: int) -> Standing:
        self.launcher_looks += 1
        return self.standing[index]

    def _look_later(self) -> None:
        def look() -> None:
            # Every end of a lane makes the launcher look, and its wait begin anew.
            if number == self._next_look:
                self._look_and_start()

        number = self._next_look = self._after(LOOK_SECONDS, look)

    def _start(self, node: str) -> None:
        lane = _Lane(node, self.now, WaitingTasks(self._open.indices()))
        self.lanes_started += 1
        self._running.append(lane)
        self._after(self.machines.lane_start_seconds, lambda: self._work(lane))

    def _settle(self, lane: _Lane, *, is_accident: bool, is_lost: bool = False) -> None:
        started = time.perf_counter()
        self._running.remove(lane)
        if is_accident:
            list(self._open.free(self._look))
            if self._accidents.is_one_too_many(is_lost=is_lost, num_open=len(self._open)):
                raise SafetyDPOError(
                    f"expected lanes that get on, found so many that end early after {self.now:.0f} simulated seconds "
                    "that the command would give up: lower failure_rate or preemption_rate"
                )
        self.driver_seconds += time.perf_counter() - started
        self._look_and_start()

    # ---- a lane

    def _work(self, lane: _Lane) -> None:
        if lane.is_gone:
            return
        before = self.lane_looks
        found = lane.waiting.take(self._lease)
        asked = (self.lane_looks - before) * self.machines.look_seconds
        if found is None:
            self._after(asked, lambda: self._end(lane))
            return
        index, left = found
        lane.held, lane.took = index, self.now
        self.attempts += 1
        left += asked
        if self.chance.random() < self.faults.failure_rate:
            self._after(left * self.chance.random(), lambda: self._fail(lane, index))
        else:
            self._after(left, lambda: self._finish(lane, index))

    def _end(self, lane: _Lane) -> None:
        if not lane.is_gone:
            self._settle(lane, is_accident=False)

    def _lease(self, index: int) -> tuple[Standing, float | None]:
        self.lane_looks += 1
        if self.standing[index] is not Standing.FREE:
            return self.standing[index], None
        self.standing[index] = Standing.HELD
        return Standing.FREE, self._left[index]

    def _finish(self, lane: _Lane, index: int) -> None:
        if not lane.is_gone:
            self.standing[index], lane.held = Standing.CLOSED, None
            self._work(lane)

    def _fail(self, lane: _Lane, index: int) -> None:
        if lane.is_gone:
            return
        self._keep_checkpoint(lane, index)
        self._failures[index] += 1
        is_over = is_out_of_attempts(self._failures[index], self.max_attempts)
        self.standing[index] = Standing.FAILED if is_over else Standing.FREE
        self._settle(lane, is_accident=True)

    def _keep_checkpoint(self, lane: _Lane, index: int) -> None:
        done, every = min(self.now - lane.took, self._left[index]), self.faults.checkpoint_seconds
        self._left[index] -= done if every == 0 else math.floor(done / every) * every

    # ---- nodes

    def _join(self) -> None:
        node = f"node-{next(self._number):08d}"
        self._nodes.add(node)
        if self.faults.preemption_rate:
            # Memoryless: within an hour with the given probability, whatever the node's age.
            hazard = -math.log1p(-self.faults.preemption_rate) / HOUR_SECONDS
            self._after(self.chance.expovariate(hazard), lambda: self._preempt(node))

    def _preempt(self, node: str) -> None:
        self.preemptions += 1
        self._nodes.remove(node)
        for lane in self._running:
            if lane.node == node and not lane.is_gone:
                lane.is_gone = True
                if lane.held is not None:
                    self._keep_checkpoint(lane, lane.held)
                self._after(self.faults.detection_seconds, partial(self._lose, lane))
        self._after(self.faults.replacement_seconds, self._join)

    def _lose(self, lane: _Lane) -> None:
        if lane.held is not None:
            self.standing[lane.held] = Standing.FREE
        self._settle(lane, is_accident=True, is_lost=True)
