"""A search that can be repeated and resumed byte for byte: seeded generations, replayed from a log of numbers.

A generation of k candidates is asked at once; answers wait until the generation is complete and are told in
trial order. So neither the number of workers nor the order in which trials end can change a candidate. To resume,
a fresh study asks again, each candidate is compared with the logged one, and the logged value is told: nothing of
the sampler is stored.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import optuna

from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.search.space import Candidate, SearchSpace, plain_candidates, suggest, to_parameters


@dataclass(frozen=True)
class LoggedTrial:
    """One row of the log: which candidate was tried and what came out (a finite sentinel if it failed)."""

    trial: int
    candidate: Candidate
    value: float


class ReplayStudy:
    """An in-memory optuna study (TPE) that asks in generations and tells in trial order.

    The first trials are `plain`; they count as history for the sampler like all others.
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

        Raises:
            UsageError: if there is no trial or generations are empty.
        """
        if trials < 1 or generation_size < 1:
            raise UsageError(
                f"expected at least one trial and one per generation, found {trials} and {generation_size}"
            )
        self._space, self._trials, self._size = space, trials, generation_size
        if startup_trials is None:
            startup_trials = min(10, max(generation_size, trials // 4))
        self._study = _fresh_study(seed=seed, startup_trials=startup_trials, multivariate=multivariate)
        for candidate in plain_candidates(space) if plain is None else plain:
            self._study.enqueue_trial(to_parameters(candidate, space))
        self._asked: list[tuple[Any, Candidate]] = []
        self._values: dict[int, float] = {}
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
        return trial in self._values

    def pending(self) -> list[int]:
        """Return the trials that can be run now: of the open generation, those without a value."""
        stop = min(self._num_told + self._size, self._trials)
        return [trial for trial in range(self._num_told, stop) if trial not in self._values]

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
            drawn = self._study.ask()
            self._asked.append((drawn, suggest(drawn, self._space)))
        return self._asked[trial][1]

    def tell(self, trial: int, value: float) -> None:
        """Give the value of an asked trial (lower is better); trials of a generation may end in any order.

        Raises:
            SafetyDPOError: if the value is not finite, the trial was not asked, or it has another value already.
        """
        if not math.isfinite(value):
            raise SafetyDPOError(
                f"expected a finite objective of trial {trial}, found {value}: log failed trials with a sentinel"
            )
        if not 0 <= trial < len(self._asked):
            raise SafetyDPOError(f"expected the value of a trial that was asked, found one of trial {trial}")
        if self._values.get(trial, value) != value:
            raise SafetyDPOError(
                f"expected one value of trial {trial}, found {self._values[trial]} and {value}: "
                "the log of trials holds it twice"
            )
        self._values[trial] = value
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
            self.tell(row.trial, row.value)
        return len(ordered)

    def _tell_complete_generation(self) -> None:
        stop = min(self._num_told + self._size, self._trials)
        generation = range(self._num_told, stop)
        if all(trial in self._values for trial in generation):
            for trial in generation:
                self._study.tell(self._asked[trial][0], self._values[trial])
            self._num_told = stop


def _fresh_study(*, seed: int, startup_trials: int, multivariate: bool) -> Any:
    with warnings.catch_warnings():
        # `multivariate` and `group` are marked experimental; we pin optuna and test their repeatability.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(
            seed=seed,
            n_startup_trials=startup_trials,
            multivariate=multivariate,
            group=multivariate,
            constant_liar=False,
        )
    # Optuna announces each study on standard error; only that message is muted, and only here.
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(logging.WARNING)
    try:
        return optuna.create_study(storage=optuna.storages.InMemoryStorage(), sampler=sampler, direction="minimize")
    finally:
        optuna.logging.set_verbosity(before)


def _compare(row: LoggedTrial, asked: Candidate) -> None:
    logged = row.candidate
    if logged == asked:
        return
    fields = [
        ("method", logged.method, asked.method),
        ("global_scale", logged.global_scale, asked.global_scale),
        ("density", logged.density, asked.density),
    ]
    logged_weights, asked_weights = dict(logged.weights), dict(asked.weights)
    for name in sorted(logged_weights | asked_weights):
        fields.append((f"weights.{name}", logged_weights.get(name), asked_weights.get(name)))
    field, expected, found = next(item for item in fields if item[1] != item[2])
    raise SafetyDPOError(
        f"trial {row.trial} of the log differs from the search as asked now in {field!r}: expected {expected!r} "
        f"(logged), found {found!r}. Settings, experts or the optuna version changed: search into a new folder."
    )
