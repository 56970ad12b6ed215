"""What a search measures next: in generations, or one candidate after another as workers get free; rung by rung.

A task is one measurement of one candidate. Rungs come first, in order, then the full evaluation. The base goes on at
every rung and takes no merge's place there. A plan knows nothing of workers and files: whoever runs the tasks asks for
the next one and records what came out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import optuna

from safetydpo.config.rungs import RungConfig
from safetydpo.search.ladder import is_trusted, promote, rank_correlation
from safetydpo.search.replay import Answer, LoggedTrial, ReplayStudy, check_known, tell_study
from safetydpo.search.samplers import fresh_study
from safetydpo.search.space import Candidate, SearchSpace, is_inside, plain_candidates, suggest, to_parameters
from safetydpo.seeding import derive_seed

OK, FAILED, STOPPED = "ok", "error", "stopped"


@dataclass(frozen=True)
class Task:
    """One measurement of one candidate; `rung` is the number of rungs for the full evaluation."""

    trial: int
    rung: int
    candidate: Candidate = field(compare=False)


@dataclass(frozen=True)
class Outcome:
    """What came out of a task: a finite value to be minimised, or a failure with its sentinel.

    `values` are those of `replay.Answer`.
    """

    value: float
    is_failure: bool = False
    values: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Ended:
    """A trial that will not be measured any further: `ok` in full, `error`, or `stopped` by a rung."""

    trial: int
    candidate: Candidate
    status: str
    value: float
    rung: int


class Plan(Protocol):
    """What both ways of planning have in common."""

    @property
    def is_over(self) -> bool:
        """Return whether every trial has ended."""
        ...

    def next_task(self, running: Collection[Task], /) -> Task | None:
        """Return a task that can be run now beside those that run; None = wait for one of them, or it is over."""
        ...

    def give_back(self, task: Task) -> None:
        """Take back a task that was lost without an outcome, so that it is given out again."""
        ...

    def record(self, task: Task, outcome: Outcome) -> list[Ended]:
        """Take the outcome of a task; return the trials that ended by it."""
        ...


class _RungValues:
    """Values of the candidates at every rung and in full, by trial."""

    def __init__(self, rungs: Sequence[RungConfig]) -> None:
        self._rungs = rungs
        self.values: list[dict[int, float]] = [{} for _ in range(len(rungs) + 1)]

    def is_trusted(self, rung: int) -> bool:
        full = self.values[-1]
        both = [(value, full[trial]) for trial, value in self.values[rung].items() if trial in full]
        found = rank_correlation([one for one, _ in both], [other for _, other in both])
        return is_trusted(found, least=self._rungs[rung].least_correlation)

    def promoted(self, rung: int, values: Mapping[int, float]) -> list[int]:
        rule = self._rungs[rung]
        if not self.is_trusted(rung):
            return sorted(values)
        return promote(values, keep=rule.keep, always=range(rule.calibrate))


class GenerationPlan:
    """Generations of a `ReplayStudy`; all candidates of one climb a rung together, so workers cannot matter."""

    def __init__(self, study: ReplayStudy, rungs: Sequence[RungConfig] = ()) -> None:
        self._study, self._num_rungs = study, len(rungs)
        self._rungs = _RungValues(rungs)
        self._level, self._first = 0, study.num_told

    @property
    def is_over(self) -> bool:
        """Return whether every trial has ended."""
        return self._study.num_told >= self._study.num_trials

    def open_tasks(self) -> list[Task]:
        """Return all tasks that can be run now."""
        values = self._rungs.values[self._level] if self._level < self._num_rungs else {}
        return [
            Task(trial, self._level, self._study.ask(trial)) for trial in self._study.pending() if trial not in values
        ]

    def next_task(self, running: Collection[Task], /) -> Task | None:
        """Return the first open task that does not run."""
        return next((task for task in self.open_tasks() if task not in running), None)

    def give_back(self, task: Task) -> None:
        """Nothing: a task without an outcome is open."""

    def record(self, task: Task, outcome: Outcome) -> list[Ended]:
        """Take the outcome of a task; a rung decides once all of its generation are measured there."""
        ended = []
        if outcome.is_failure or task.rung == self._num_rungs:
            if not outcome.is_failure and not task.candidate.is_base:
                self._rungs.values[-1][task.trial] = outcome.value
            status = FAILED if outcome.is_failure else OK
            ended.append(Ended(task.trial, task.candidate, status, outcome.value, task.rung))
            self._study.tell(task.trial, outcome.value, values=outcome.values)
        else:
            self._rungs.values[task.rung][task.trial] = outcome.value
        return ended + self._climb()

    def _climb(self) -> list[Ended]:
        ended = []
        while self._study.num_told == self._first and self._level < self._num_rungs:
            members, values = self._study.pending(), self._rungs.values[self._level]
            if not all(trial in values for trial in members):
                break
            merges = {trial: candidate for trial in members if not (candidate := self._study.ask(trial)).is_base}
            going_on = self._rungs.promoted(self._level, {trial: values[trial] for trial in merges})
            for trial, candidate in merges.items():
                if trial not in going_on:
                    ended.append(Ended(trial, candidate, STOPPED, values[trial], self._level))
                    self._study.tell(trial, values[trial], stopped_at=self._level)
            self._level += 1
        if self._study.num_told != self._first:
            self._level, self._first = 0, self._study.num_told
        return ended


class AsyncPlan:
    """A new candidate whenever one is asked for; resumes by adding what is finished to a fresh TPE study.

    A rung lets a candidate go on if it is among the best share of all that were measured there so far.

    Source: Li et al. 2020, "A system for massively parallel hyperparameter tuning" (ASHA), with a decision at once.
    """

    def __init__(
        self,
        space: SearchSpace,
        *,
        seed: int,
        trials: int,
        rungs: Sequence[RungConfig] = (),
        known: Sequence[Candidate] = (),
        finished: Iterable[LoggedTrial] = (),
        begun: Sequence[Candidate] = (),
        rung_values: Sequence[Sequence[float]] = (),
    ) -> None:
        """Make a fresh study and add what is finished.

        Args:
            space: what may be chosen.
            seed: seed of the search; the sampler's follows from it and the number of finished trials, or a resumed
                search would draw again what it drew before.
            trials: candidates in all.
            rungs: settings of the rungs.
            known: trials before the plain ones, inside the space or not.
            finished: trials that have ended.
            begun: candidates that were measured at a rung and have not ended; they come first.
            rung_values: values of candidates that no trial of this plan will be, at each rung.

        Raises:
            UsageError: if there are more known candidates than trials.
        """
        check_known(known, trials=trials)
        self._space, self._trials, self._num_rungs = space, trials, len(rungs)
        self._rungs = _RungValues(rungs)
        rows = list(finished)
        self._study = fresh_study(
            "tpe",
            space,
            seed=derive_seed(seed, "search_async", str(len(rows))) % 2**31,
            startup_trials=min(10, max(1, trials // 4)),
            is_async=True,
        )
        for row in rows:
            self._add(row)
        self._seen: list[list[float]] = [list(values) for values in rung_values] or [[] for _ in rungs]
        done = {row.candidate for row in rows}
        first = dict.fromkeys([*begun, *known, *plain_candidates(space)])
        self._first = deque(candidate for candidate in first if candidate not in done)
        used = {row.trial for row in rows}
        self._numbers = deque(number for number in range(trials) if number not in used)
        self._waiting: deque[Task] = deque()
        self._drawn: dict[int, Any] = {}
        self._num_ended = len(rows)

    @property
    def is_over(self) -> bool:
        """Return whether every trial has ended."""
        return self._num_ended >= self._trials

    def next_task(self, _running: Collection[Task], /) -> Task | None:
        """Return a task that waits, else the first one of a new candidate."""
        if self._waiting:
            return self._waiting.popleft()
        if not self._numbers:
            return None
        number = self._numbers.popleft()
        if self._first and not is_inside(self._first[0], self._space):
            return Task(number, 0, self._first.popleft())
        if self._first:
            self._study.enqueue_trial(to_parameters(self._first.popleft(), self._space))
        drawn = self._study.ask()
        self._drawn[number] = drawn
        return Task(number, 0, suggest(drawn, self._space))

    def give_back(self, task: Task) -> None:
        """Give a lost task out again, before anything else."""
        self._waiting.appendleft(task)

    def record(self, task: Task, outcome: Outcome) -> list[Ended]:
        """Take the outcome of a task and decide at once."""
        is_merge = not task.candidate.is_base
        if outcome.is_failure or task.rung == self._num_rungs:
            if not outcome.is_failure and is_merge:
                self._rungs.values[-1][task.trial] = outcome.value
            status = FAILED if outcome.is_failure else OK
            return [self._end(task, status, outcome.value, Answer(outcome.value))]
        if is_merge:
            self._rungs.values[task.rung][task.trial] = outcome.value
        if not is_merge or self._goes_on(task):
            self._waiting.append(Task(task.trial, task.rung + 1, task.candidate))
            return []
        return [self._end(task, STOPPED, outcome.value, Answer(outcome.value, stopped_at=task.rung))]

    def _goes_on(self, task: Task) -> bool:
        # Trials of before have no number here; of equal values theirs are the older ones.
        earlier = {-1 - place: one for place, one in enumerate(self._seen[task.rung])}
        return task.trial in self._rungs.promoted(task.rung, {**earlier, **self._rungs.values[task.rung]})

    def _end(self, task: Task, status: str, value: float, answer: Answer) -> Ended:
        drawn = self._drawn.pop(task.trial, None)
        if drawn is not None:
            tell_study(self._study, drawn, answer)
        self._num_ended += 1
        return Ended(task.trial, task.candidate, status, value, task.rung)

    def _add(self, row: LoggedTrial) -> None:
        if not is_inside(row.candidate, self._space):
            return
        trial = optuna.trial.FixedTrial(to_parameters(row.candidate, self._space))
        suggest(trial, self._space)
        common: dict[str, Any] = {"params": trial.params, "distributions": trial.distributions}
        if row.stopped_at is None:
            self._study.add_trial(optuna.trial.create_trial(value=row.value, **common))
            return
        self._study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.PRUNED, intermediate_values={row.stopped_at: row.value}, **common
            )
        )
