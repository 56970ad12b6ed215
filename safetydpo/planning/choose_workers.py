"""How many workers should train an expert: each number of a speed-up table is simulated, and the shortest wins."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import Field

from safetydpo.config.fields import Frozen, Rate
from safetydpo.errors import UsageError
from safetydpo.planning.costs import LaneCosts, SpeedUp
from safetydpo.planning.simulate import Faults, Machines, Simulated, simulate_lanes

ONE_WORKER = (SpeedUp(workers=1, times=1.0, source="measured"),)


class SimulationSettings(Frozen):
    """What `safetydpo plan CONFIG --simulate` is asked: `name=value` after the config."""

    nodes: int = Field(ge=1)
    """Nodes of the cluster."""
    gpus_per_node: int = Field(8, ge=1)
    """GPUs (or CPU cores, where the config asks for none) of each."""
    concepts: int | None = Field(None, ge=1)
    """Experts, all of `identity.dpo.steps`; None = those of the config, with their own steps."""
    expert_seconds: float | None = Field(None, gt=0)
    """Of an expert of `identity.dpo.steps` on one GPU; None = from a former run, or the price table's speeds."""
    spread: float = Field(0.0, ge=0, lt=1)
    """Experts take from 1 - spread to 1 + spread of that, at random."""
    workers: int | None = Field(None, ge=1)
    """Workers per expert; None = each number of the speed-up table, of which the shortest is chosen."""
    failure_rate: Rate = 0.0
    """Probability that an attempt at an expert takes its lane along."""
    preemption_rate: float | None = Field(None, ge=0, lt=1)
    """Probability that a node is taken away within an hour; None = that of the price table."""
    checkpoint_seconds: float | None = Field(None, ge=0)
    """Between two checkpoints; None = those of `identity.dpo.checkpoint_every`."""
    detection_seconds: float = Field(30.0, ge=0)
    """From the loss of a node until Ray says so."""
    replacement_seconds: float = Field(300.0, ge=0)
    """From the loss of a node until another one is there."""
    repeats: int = Field(5, ge=1, le=1000)
    """Simulations with other chances, of which means are told."""


@dataclass(frozen=True)
class Choice:
    """One number of workers per expert, simulated several times."""

    speed_up: SpeedUp
    lanes: int
    """That fit."""
    gpus: int
    one_worker_seconds: float
    """Work of all experts if one worker trained each."""
    runs: tuple[Simulated, ...]

    @property
    def makespan_seconds(self) -> float:
        """Mean of all simulations."""
        return statistics.fmean(run.makespan_seconds for run in self.runs)

    @property
    def bound_seconds(self) -> float:
        """max(total work / lanes, longest expert), at this number of workers."""
        return self.runs[0].bound_seconds

    @property
    def over_bound(self) -> float:
        """Mean makespan over the bound."""
        return self.makespan_seconds / self.bound_seconds

    @property
    def worst_over_bound(self) -> float:
        """Longest makespan over the bound."""
        return max(run.over_bound for run in self.runs)

    @property
    def utilisation(self) -> float:
        """GPU time spent on experts that were finished, over all GPU time, in [0, 1]; mean."""
        share = self.lanes * self.speed_up.workers / self.gpus
        return share * statistics.fmean(run.utilisation for run in self.runs)

    @property
    def efficiency(self) -> float:
        """What one worker per expert would need in GPU time, over all GPU time: utilisation less imperfect speed-up."""
        return self.one_worker_seconds / (self.gpus * self.makespan_seconds)


def expert_durations(steps: Sequence[int], *, step_seconds: float, spread: float, seed: int) -> list[float]:
    """Return seconds of one worker per expert: steps x seconds of a step, times 1 - spread to 1 + spread at random."""
    chance = random.Random(seed)
    return [count * step_seconds * (1 + spread * (2 * chance.random() - 1)) for count in steps]


def simulate_choices(
    durations: Sequence[float],
    settings: SimulationSettings,
    *,
    speed_ups: Sequence[SpeedUp],
    lanes: LaneCosts,
    faults: Faults,
    max_attempts: int,
    seed: int,
) -> list[Choice]:
    """Simulate each number of workers that fits on a node.

    An expert of d seconds of one worker takes d / speed-up + the lane's seconds per expert.

    Args:
        durations: seconds of one worker, per expert.
        settings: the cluster, and how often to repeat.
        speed_ups: what to try.
        lanes: what lanes cost beside steps.
        faults: what goes wrong.
        max_attempts: failures after which an expert is given up.
        seed: of the first simulation.

    Raises:
        UsageError: if the wanted number of workers has no speed-up, or none fits.
    """
    fitting = [one for one in speed_ups if one.workers <= settings.gpus_per_node]
    if settings.workers is not None:
        fitting = [one for one in fitting if one.workers == settings.workers]
    if not fitting:
        known = ", ".join(str(one.workers) for one in speed_ups)
        raise UsageError(
            f"expected workers of the speed-up table ({known}) of which one expert's fit on a node of "
            f"{settings.gpus_per_node}, found workers={settings.workers}: name another, or add it to the table"
        )
    choices = []
    for one in fitting:
        machines = Machines(
            settings.nodes,
            settings.gpus_per_node // one.workers,
            lane_start_seconds=lanes.start_seconds,
            look_seconds=lanes.look_seconds,
        )
        times = [duration / one.times + lanes.expert_seconds for duration in durations]
        runs = [
            simulate_lanes(times, machines, faults, max_attempts=max_attempts, seed=seed + number)
            for number in range(settings.repeats)
        ]
        gpus = settings.nodes * settings.gpus_per_node
        choices.append(Choice(one, machines.lanes, gpus, sum(durations), tuple(runs)))
    return choices


def best_choice(choices: Sequence[Choice]) -> Choice:
    """Return the shortest; of equal ones that with fewer workers."""
    return min(choices, key=lambda choice: (choice.makespan_seconds, choice.speed_up.workers))


def head_bytes(lanes: int, costs: LaneCosts) -> float:
    """Return the memory of so many lanes and their keeper on the head node, as one of each was measured to take."""
    return (costs.keeper_mb + lanes * costs.head_mb) * 2**20
