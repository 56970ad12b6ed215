"""A search that can be repeated and resumed byte for byte: seeded generations, replayed from a log of numbers.

A generation of k candidates is asked at once; answers wait until the generation is complete and are told in
trial order. So neither the number of workers nor the order in which trials end can change a candidate. To resume,
a fresh study asks again, each candidate is compared with the logged one, and the logged value is told: nothing of
the sampler is stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.trial import TrialState

from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.search.samplers import DIRECTIONS, MULTI_OBJECTIVE, fresh_study
from safetydpo.search.space import Candidate, SearchSpace, is_inside, plain_candidates, suggest, to_parameters


@dataclass(frozen=True)
class Answer:
    """What came out of a trial.

    Attributes:
        value: what is minimised; a finite sentinel if the trial failed.
        values: price, neutral and neighbour rate, for samplers that look for trade-offs.
        stopped_at: the rung that stopped the trial, of which `value` then is; None = measured in full.
    """

    value: float
    values: tuple[float, ...] | None = None
    stopped_at: int | None = None


@dataclass(frozen=True)
class LoggedTrial:
    """One row of the log: which candidate was tried and what came out (a finite sentinel if it failed)."""

    trial: int
    candidate: Candidate
    value: float
    values: tuple[float, ...] | None = None
    stopped_at: int | None = None

    @property
    def answer(self) -> Answer:
        """What came out."""
        return Answer(self.value, self.values, self.stopped_at)


class ReplayStudy:
    """An in-memory optuna study that asks in generations and tells in trial order.

    The first trials are `known`, then `plain`; they count as history for the sampler like all others, but for those
    outside the space, which it could not place.
    """

    def __init__(
        self,
        space: SearchSpace,
        *,
        seed: int,
        trials: int,
        generation_size: int,
        plain: Sequence[Candidate] | None = None,
        startup_trials: int | None = None,
        multivariate: bool = False,
        sampler: str = "tpe",
        known: Sequence[Candidate] = (),
    ) -> None:
        """Make a fresh study.

        Args:
            space: what may be chosen.
            seed: seed of the sampler.
            trials: candidates in all; the last generation may be smaller.
            generation_size: candidates asked at once.
            plain: first trials; None = `plain_candidates(space)`.
            startup_trials: trials (plain ones included) before the sampler models anything; None = a quarter of all
                trials, at least one generation and at most 10.
            multivariate: whether TPE models parameters jointly.
            sampler: a name of `search.samplers`.
            known: trials before the plain ones, inside the space or not.

        Raises:
            UsageError: if there is no trial or generations are empty, the sampler cannot search the space, or there
                are more known candidates than trials.
        """
        if trials < 1 or generation_size < 1:
            raise UsageError(
                f"expected at least one trial and one per generation, found {trials} and {generation_size}"
            )
        self._space, self._trials, self._size = space, trials, generation_size
        if startup_trials is None:
            startup_trials = min(10, max(generation_size, trials // 4))
        check_known(known, trials=trials)
        self._study = fresh_study(
            sampler,
            space,
            seed=seed,
            startup_trials=startup_trials,
            multivariate=multivariate,
            population=generation_size,
        )
        self._is_multi_objective = sampler in MULTI_OBJECTIVE
        first = [*known, *(plain_candidates(space) if plain is None else plain)]
        self._outside = [candidate for candidate in known if not is_inside(candidate, space)]
        for candidate in dict.fromkeys(first):
            if candidate not in self._outside:
                self._study.enqueue_trial(to_parameters(candidate, space))
        self._asked: list[tuple[Any, Candidate]] = []
        self._answers: dict[int, Answer] = {}
        self._num_told = 0

    @property
    def num_trials(self) -> int:
        """Number of candidates in all."""
        return self._trials

    @property
    def num_told(self) -> int:
        """Number of trials of completed generations."""
        return self._num_told

    def is_ready(self, trial: int) -> bool:
        """Return whether `trial` can be asked now: all generations before its own are complete."""
        return 0 <= trial < self._trials and trial // self._size * self._size <= self._num_told

    def is_answered(self, trial: int) -> bool:
        """Return whether the value of `trial` is known."""
        return trial in self._answers

    def pending(self) -> list[int]:
        """Return the trials that can be run now: of the open generation, those without a value."""
        stop = min(self._num_told + self._size, self._trials)
        return [trial for trial in range(self._num_told, stop) if trial not in self._answers]

    def ask(self, trial: int) -> Candidate:
        """Return the candidate of a trial; asking again gives the same one.

        Raises:
            SafetyDPOError: if there is no such trial or an earlier generation is not complete.
        """
        if not 0 <= trial < self._trials:
            raise SafetyDPOError(f"expected a trial in 0 … {self._trials - 1}, found {trial}")
        if not self.is_ready(trial):
            raise SafetyDPOError(
                f"expected trials 0 … {trial // self._size * self._size - 1} to be answered before trial {trial}, "
                f"found {self._num_told} told: wait for the generation before"
            )
        # A whole generation is drawn at once, so that the order of asking does not matter either.
        while len(self._asked) < min(self._num_told + self._size, self._trials):
            if len(self._asked) < len(self._outside):
                self._asked.append((None, self._outside[len(self._asked)]))
                continue
            drawn = self._study.ask()
            self._asked.append((drawn, suggest(drawn, self._space)))
        return self._asked[trial][1]

    def tell(
        self, trial: int, value: float, *, values: tuple[float, ...] | None = None, stopped_at: int | None = None
    ) -> None:
        """Give the value of an asked trial (lower is better); trials of a generation may end in any order.

        `values` and `stopped_at` are those of `Answer`.

        Raises:
            SafetyDPOError: if the value is not finite, the trial was not asked, or it has another value already.
        """
        if not math.isfinite(value):
            raise SafetyDPOError(
                f"expected a finite objective of trial {trial}, found {value}: log failed trials with a sentinel"
            )
        if not 0 <= trial < len(self._asked):
            raise SafetyDPOError(f"expected the value of a trial that was asked, found one of trial {trial}")
        answer = Answer(value, values, stopped_at)
        known = self._answers.get(trial, answer)
        if known.value != value or known.stopped_at != stopped_at:
            raise SafetyDPOError(
                f"expected one value of trial {trial}, found {known.value} and {value}: "
                "the log of trials holds it twice"
            )
        self._answers[trial] = answer
        self._tell_complete_generation()

    def replay(self, rows: Iterable[LoggedTrial]) -> int:
        """Ask again for every logged trial, compare, and tell the logged values; return how many there were.

        Raises:
            SafetyDPOError: if a logged candidate is not the one that is asked now, naming trial and field, or a
                logged trial has no complete generation before it.
        """
        ordered = sorted(rows, key=lambda row: row.trial)
        for row in ordered:
            _compare(row, self.ask(row.trial))
            self.tell(row.trial, row.value, values=row.values, stopped_at=row.stopped_at)
        return len(ordered)

    def _tell_complete_generation(self) -> None:
        stop = min(self._num_told + self._size, self._trials)
        generation = range(self._num_told, stop)
        if all(trial in self._answers for trial in generation):
            for trial in generation:
                drawn = self._asked[trial][0]
                if drawn is not None:
                    tell_study(self._study, drawn, self._answers[trial], is_multi_objective=self._is_multi_objective)
            self._num_told = stop


def tell_study(study: Any, drawn: Any, answer: Answer, *, is_multi_objective: bool = False) -> None:
    """Tell an optuna study what came out of a trial that it drew.

    A stopped trial is told as one that was pruned at its rung: TPE ranks those below all that were measured in full,
    those of a later rung first; the other samplers do not look at them.

    Raises:
        SafetyDPOError: if the study has several objectives and the answer only one.
    """
    if answer.stopped_at is not None:
        if not is_multi_objective:
            drawn.report(answer.value, step=answer.stopped_at)
        study.tell(drawn, state=TrialState.PRUNED)
    elif not is_multi_objective:
        study.tell(drawn, answer.value)
    elif answer.values is None or len(answer.values) != len(DIRECTIONS):
        raise SafetyDPOError(
            f"expected {len(DIRECTIONS)} objectives of each trial, found {answer.values}: give price, neutral and "
            "neighbour rate"
        )
    else:
        study.tell(drawn, list(answer.values))


def check_known(known: Sequence[Candidate], *, trials: int) -> None:
    """Refuse a search that would end before its known points are measured.

    Raises:
        UsageError: if there are fewer trials.
    """
    if len(known) > trials:
        raise UsageError(
            f"expected identity.search.trials of at least {len(known)} because identity.search.first_trials is "
            f"'known' (the base, each expert alone, average, TIES, Co-Merge), found {trials}: raise it, or use 'plain'"
        )


def _compare(row: LoggedTrial, asked: Candidate) -> None:
    logged = row.candidate
    if logged == asked:
        return
    fields: list[tuple[str, object, object]] = [
        ("method", logged.method, asked.method),
        ("global_scale", logged.global_scale, asked.global_scale),
        ("density", logged.density, asked.density),
        ("rank", logged.rank, asked.rank),
    ]
    for setting in ("weights", "block_weights"):
        before, now = dict(getattr(logged, setting)), dict(getattr(asked, setting))
        fields += [(f"{setting}.{name}", before.get(name), now.get(name)) for name in sorted(before | now)]
    field, expected, found = next(item for item in fields if item[1] != item[2])
    raise SafetyDPOError(
        f"trial {row.trial} of the log differs from the search as asked now in {field!r}: expected {expected!r} "
        f"(logged), found {found!r}. Settings, experts or the optuna version changed: search into a new folder."
    )
