"""Lanes: a few long-lived Ray Train runs, each warm with the base model, that take tasks from a ledger in storage.

A Train run for each expert would cost seconds and most of a gigabyte apiece. A lane is one Train run; its workers load
the base once and then take the longest task that nobody holds, again and again, until there is none. The ledger
(`safetydpo/artifacts/attempts.py`) sees to it that every task is published once, whoever dies when, and whichever
other command works on the same folder.

A lane's driver runs on the node of its workers, so that Train's controller lives and dies with the lane, and the head
holds the launcher and the keeper of placement groups only. A lane that gets no resources keeps no other from working.
"""

from __future__ import annotations

import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from ray_jobs.background import in_background
from ray_jobs.looks import Looks
from ray_jobs.resources import own_nodes
from ray_jobs.run import Run, run_id
from ray_jobs.state_folder import ray_state_folder
from ray_jobs.trainers import train_on_workers
from safetydpo.artifacts.attempts import (
    RENEW_SECONDS,
    Attempt,
    Ending,
    Standing,
    end_attempts_of,
    give_up,
    look_at,
    newest_file,
    read_failure,
    take_lease,
    this_process,
)
from safetydpo.artifacts.storage import Location
from safetydpo.config.schema import Config
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

OVERTAKEN = "a later attempt began"


class Interrupted(Exception):  # noqa: N818 (no error)
    """The task was left in the middle because the lane was told to; its state is in storage."""


@dataclass(frozen=True)
class Task:
    """One artifact to be made."""

    name: str
    folder: Location
    """The artifact's."""
    steps: int
    """Its length; longer ones come first."""


@dataclass(frozen=True)
class Turn:
    """A task that a lane has taken, as each of its workers sees it."""

    index: int
    """Place among the tasks."""
    number: int
    """Of the attempt."""
    attempt: Attempt | None
    """On worker 0, which holds the lease; None on the others."""
    resume_from: Location | None = None
    """What an earlier attempt left; None if nothing, or if it was copied to this attempt's own place."""


# ---- in the workers of a lane


class LaneWorker:
    """One worker of a lane; all of them take the same turns."""

    def __init__(self, settings: Mapping[str, Any], folders: Sequence[Location], *, resumed_file: str) -> None:
        """Take the part `settings["lane"]` of what `run_lanes` handed to the train function.

        `resumed_file` is the name of the file from which the next attempt goes on.
        """
        import ray.train

        lane, context = settings["lane"], ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self._folders, self._resumed_file = folders, resumed_file
        self._owner = this_process(run=lane["run"], lane=lane["name"])
        self._max_attempts: int = lane["max_attempts"]
        self._waiting = WaitingTasks(lane["indices"])
        self._held: Attempt | None = None
        self._stale: Attempt | None = None
        self._is_leaving = False
        self._looks = Looks(is_alone=self.world_size == 1)

    def work(self, do: Callable[[Turn], None]) -> str | None:
        """Call `do` for one task after another until none is free; return why the lane ended before, if it did.

        Raises:
            UsageError: if `do` raised it: no other task would fare better.
            Exception: what `do` raised that is no error of ours; the process may be broken and should be replaced.
                With several workers also errors of ours: the others may be waiting for this one.
        """
        with self._heartbeat():
            while not self._is_leaving and (turn := self._next()) is not None:
                try:
                    do(turn)
                except Interrupted:
                    if turn.attempt is not None:
                        turn.attempt.end("released", "its machine is going away" if self._is_leaving else OVERTAKEN)
                except Exception as error:
                    self._tell_failure(turn, error)
                    if self.world_size > 1 or isinstance(error, UsageError) or not isinstance(error, SafetyDPOError):
                        raise
                finally:
                    self._held = None
        return "leaving" if self._is_leaving else None

    def should_leave(self) -> bool:
        """Return whether the task in hand is to be left now; call it after every step, on every worker.

        Either the lease was given to somebody else meanwhile, or the machine of a worker is about to be taken away.
        """
        import ray.train

        # With several workers each look is a barrier, hence not after every step that is short.
        if not self._looks.is_due():
            return False
        self._is_leaving = ray.train.get_preemption_info() is not None
        is_stale = self._held is not None and self._stale is self._held
        is_stale_for_all, steps = self._share([int(is_stale), self._looks.next_steps()])
        self._looks.begin(steps)
        return bool(is_stale_for_all) or self._is_leaving

    def _next(self) -> Turn | None:
        attempt, index = self._take() if self.rank == 0 else (None, -1)
        self._held, resume_from = attempt, None
        if attempt is not None:
            resume_from = newest_file(attempt.folder, self._resumed_file, before=attempt.number)
            if resume_from is not None and self.world_size > 1:
                # The earlier owner may still write to his own: the workers would read two states of it.
                (attempt.files / self._resumed_file).write_bytes(resume_from.read_bytes())
                resume_from = None
        index, number = self._share([index, attempt.number if attempt else 0])
        return Turn(index, number, attempt, resume_from) if number else None

    def _take(self) -> tuple[Attempt | None, int]:
        """Lease the first free task."""
        found = self._waiting.take(self._lease)
        return (None, -1) if found is None else (found[1], found[0])

    def _lease(self, index: int) -> tuple[Standing, Attempt | None]:
        folder, me = self._folders[index], self._owner
        look = look_at(folder, run=me.run, lane=me.lane, max_attempts=self._max_attempts)
        is_free = look.standing is Standing.FREE
        return look.standing, take_lease(folder, me, newest=look.newest) if is_free else None

    def _share(self, values: list[int]) -> list[int]:
        """Return what worker 0 has; numbers in a tensor, since objects would travel as pickles."""
        if self.world_size == 1:
            return values
        import ray.train.torch
        import torch

        tensor = torch.tensor(values, device=ray.train.torch.get_device())
        torch.distributed.broadcast(tensor, src=0)
        return [int(value) for value in tensor.tolist()]

    def _tell_failure(self, turn: Turn, error: Exception) -> None:
        reason = " ".join(str(error).split()) or type(error).__name__
        folder = self._folders[turn.index]
        Attempt(folder, turn.number, self._owner).end("failed", reason)
        if isinstance(error, SafetyDPOError):
            # Bad data is as bad at the next attempt.
            give_up(folder, run=self._owner.run, reason=reason)

    @contextmanager
    def _heartbeat(self) -> Iterator[None]:
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(RENEW_SECONDS):
                held = self._held
                # One beat that fails is made up for by the next; a store that is gone for good ends the work itself.
                with suppress(SafetyDPOError):
                    if held is not None:
                        held.renew()
                        if not held.is_newest():
                            self._stale = held

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()


# ---- in the command


TrainFunction = Callable[[Mapping[str, Any]], str | None]


def run_lanes(
    run: Run, tasks: Sequence[Task], function: TrainFunction, settings: Mapping[str, Any], *, num_lanes: int
) -> dict[str, str]:
    """Let lanes run `function` until every task is published or given up; return {name: reason} of the latter.

    `function` is a module's function; it gets `settings` and `lane`, from which it makes a `LaneWorker` whose folders
    are those of `tasks` in this order.

    Raises:
        UsageError: if no node has room for a lane, or `function` refuses the request.
        SafetyDPOError: if `function` failed outside of a task.
        Exception: Ray's, if lanes keep dying and nothing gets settled.
    """
    return _Launcher(run, tasks, function, settings, num_lanes).launch()


@dataclass
class _Lane:
    name: str
    node: str
    indices: list[int]
    began: float = field(default_factory=time.monotonic)
    ended_early: str | None = None
    error: BaseException | None = None


class _Launcher:
    def __init__(
        self, run: Run, tasks: Sequence[Task], function: TrainFunction, settings: Mapping[str, Any], num_lanes: int
    ) -> None:
        import ray

        self._run, self._tasks, self._function, self._settings = run, tasks, function, settings
        self._execution = execution = run.config.execution
        self._id, self._num_lanes = f"{run_id(run.config)}-{uuid.uuid4().hex[:12]}", num_lanes
        self._open = OpenTasks(longest_first([task.steps for task in tasks], [task.name for task in tasks]))
        self._failures: dict[str, str] = {}
        self._running: list[_Lane] = []
        self._ended: queue.Queue[_Lane] = queue.Queue()
        self._num_started = 0
        self._accidents = Accidents(num_lanes=num_lanes, num_open=len(tasks))
        self._leaving: set[str] = set()
        self._own_node = ray.get_runtime_context().get_node_id()
        self._is_isolated = execution.lanes == "isolated"
        workers = execution.workers_per_expert
        self._needs = {"CPU": workers * execution.cpus_per_worker, "GPU": workers * execution.gpus_per_worker}

    def launch(self) -> dict[str, str]:
        from ray_jobs.placement import group_keeper

        self._check_fit()
        group_keeper()
        while True:
            self._start_lanes()
            if not self._open and not self._running:
                return self._failures
            with suppress(queue.Empty):
                self._settle(self._ended.get(timeout=LOOK_SECONDS))

    def _look(self, index: int) -> Standing:
        task = self._tasks[index]
        look = look_at(task.folder, run=self._id, max_attempts=self._execution.expert_attempts)
        failure = read_failure(task.folder, run=self._id) if look.standing is Standing.FAILED else None
        if failure is not None:
            self._failures[task.name] = failure
        return look.standing

    def _start_lanes(self) -> None:
        if len(self._running) >= self._num_lanes:
            return
        taken = {index for lane in self._running if self._is_isolated for index in lane.indices}
        free = list(islice(self._open.free(self._look, taken=taken), self._num_lanes))
        now = time.monotonic()
        wanted = count_lanes_to_start(
            self._num_lanes,
            [now - lane.began for lane in self._running],
            num_free=len(free),
            is_isolated=self._is_isolated,
        )
        for index in free[:wanted]:
            node = self._roomiest_node()
            if node is None:
                return
            self._start(node, [index] if self._is_isolated else self._open.indices())

    def _start(self, node: str, indices: list[int]) -> None:
        lane = _Lane(f"{self._id}-{self._num_started}", node, indices)
        self._num_started += 1
        self._running.append(lane)
        in_background(self._drive, lane)

    def _drive(self, lane: _Lane) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        part = {"run": self._id, "name": lane.name, "indices": lane.indices}
        settings = {**self._settings, "lane": {**part, "max_attempts": self._execution.expert_attempts}}
        node = lane.node if sum(node["Alive"] for node in ray.nodes()) > 1 else None
        arguments = (self._run.config.model_dump(mode="json"), self._function, settings, lane.name, node)
        try:
            if lane.node == self._own_node:
                # Where the workers are already; a process for the driver alone would cost seconds.
                lane.ended_early = _drive_lane(*arguments)
            else:
                there = NodeAffinitySchedulingStrategy(lane.node, soft=False)
                task = ray.remote(num_cpus=0, max_retries=0)(_drive_lane)
                lane.ended_early = ray.get(task.options(scheduling_strategy=there).remote(*arguments))
        except Exception as error:  # a thread's error must reach the thread that started it
            lane.error = error
        self._ended.put(lane)

    def _settle(self, lane: _Lane) -> None:
        """Draw the conclusions of a lane's end; raise its error if that was no accident."""
        from ray.exceptions import RayError, RayTaskError

        self._running.remove(lane)
        if lane.ended_early is not None:
            self._leaving.add(lane.node)
        if lane.error is None:
            return
        if isinstance(lane.error, SafetyDPOError):
            raise lane.error
        # Its driver died with its process or node, rather than that it raised.
        is_lost = isinstance(lane.error, RayError) and not isinstance(lane.error, RayTaskError)
        how: Ending = "lost" if is_lost else "failed"
        reason = " ".join(str(lane.error).split())[:500]
        for index in self._open.indices():
            # Nobody need wait until its heartbeat is stale: Ray has said that it is gone.
            end_attempts_of(self._tasks[index].folder, lane.name, how, reason)
        # A look at each, which forgets those that are settled.
        list(self._open.free(self._look))
        if self._accidents.is_one_too_many(is_lost=is_lost, num_open=len(self._open)):
            raise lane.error

    def _roomiest_node(self) -> str | None:
        import ray

        nodes = own_nodes(ray.nodes(), self._execution)
        room = {str(node["NodeID"]): _lanes_that_fit(node, self._needs) for node in nodes}
        running = [lane.node for lane in self._running]
        return choose_node(room, running, own=self._own_node, leaving=self._leaving)

    def _check_fit(self) -> None:
        import ray

        if not any(_lanes_that_fit(node, self._needs) for node in own_nodes(ray.nodes(), self._execution)):
            wanted = " and ".join(f"{amount:g} {name}s" for name, amount in self._needs.items() if amount)
            raise UsageError(
                f"expected a node with {wanted} for one lane (execution.workers_per_expert times cpus_per_worker and "
                "gpus_per_worker), found none: lower them, or add nodes"
            )


def _drive_lane(
    config: dict[str, Any], function: TrainFunction, settings: Mapping[str, Any], name: str, node: str | None
) -> str | None:
    """Fit one Train run from the node on which its workers shall run; None = the only one there is."""
    run = Run(Config(**config))
    workers = run.config.execution.workers_per_expert
    with ray_state_folder() as state:
        return train_on_workers(run, function, settings, name=name, state=state, num_workers=workers, node=node)


def _lanes_that_fit(node: Mapping[str, Any], needs: Mapping[str, float]) -> int:
    has = node["Resources"]
    return min(int(has.get(name, 0.0) / amount + 1e-6) for name, amount in needs.items() if amount)
