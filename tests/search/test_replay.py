from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from safetydpo.config.search import SearchConfig
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.search.replay import LoggedTrial, ReplayStudy
from safetydpo.search.space import Candidate, build_space, plain_candidates

SPACE = build_space(SearchConfig(), ("hate", "sexual", "violence"), density_methods=("ties",))
TRIALS, SIZE = 14, 4


def make_study(**settings: object) -> ReplayStudy:
    return ReplayStudy(SPACE, **{"seed": 3, "trials": TRIALS, "generation_size": SIZE, **settings})


def score(candidate: Candidate) -> float:
    wanted = {"hate": 0.7, "sexual": 1.2, "violence": 1.0}
    misses = sum((weight - wanted[name]) ** 2 for name, weight in candidate.weights)
    return (math.log(candidate.global_scale) - 0.3) ** 2 + misses + (candidate.method != "co_merge") * 0.2


def run(study: ReplayStudy, *, order_seed: int | None = None, stop: int = TRIALS) -> list[LoggedTrial]:
    """Work like a pool of workers: take what is pending, end in a shuffled order."""
    rows: list[LoggedTrial] = []
    while len(rows) < stop and study.pending():
        generation = study.pending()
        if order_seed is not None:
            random.Random(order_seed + len(rows)).shuffle(generation)
        asked = [(trial, study.ask(trial)) for trial in generation]
        if order_seed is not None:
            random.Random(order_seed).shuffle(asked)
        for trial, candidate in asked:
            if len(rows) < stop:
                rows.append(LoggedTrial(trial, candidate, score(candidate)))
                study.tell(trial, rows[-1].value)
    return rows


def by_trial(rows: list[LoggedTrial]) -> list[LoggedTrial]:
    return sorted(rows, key=lambda row: row.trial)


@pytest.mark.parametrize("multivariate", [False, True])
def test_order_of_asking_and_ending_changes_nothing(multivariate):
    plain = run(make_study(multivariate=multivariate))
    assert [row.trial for row in plain] == list(range(TRIALS))
    for order_seed in range(4):
        assert by_trial(run(make_study(multivariate=multivariate), order_seed=order_seed)) == plain


def test_another_seed_or_answer_gives_other_candidates():
    plain = run(make_study())
    assert by_trial(run(make_study(seed=4))) != plain
    study = make_study()
    found = []
    for trial in range(TRIALS):
        found.append(study.ask(trial))
        study.tell(trial, -score(found[-1]))
    assert found[:SIZE] == [row.candidate for row in plain[:SIZE]]
    assert found != [row.candidate for row in plain]


def test_plain_candidates_come_first():
    plain = plain_candidates(SPACE)
    study = make_study()
    assert [study.ask(trial) for trial in range(len(plain))] == plain
    other = [replace(plain[1], global_scale=2.5)]
    assert make_study(plain=other).ask(0) == other[0]


def test_candidates_lie_in_the_space():
    for row in run(make_study(trials=30, startup_trials=4), stop=30):
        assert row.candidate.method in SPACE.methods
        assert 0.1 <= row.candidate.global_scale <= 3.0
        assert (row.candidate.density is not None) == (row.candidate.method == "ties")
        assert all(0.5 <= weight <= 1.5 for _, weight in row.candidate.weights)


@pytest.mark.parametrize("stop", [0, 1, 4, 6, 8, 13, 14])
@pytest.mark.parametrize("order_seed", [None, 1])
def test_a_search_that_was_cut_off_goes_on_as_if_undisturbed(stop, order_seed):
    whole = run(make_study())
    rows = run(make_study(), order_seed=order_seed, stop=stop)
    # The log goes through JSON and may hold its rows in any order.
    rows = [LoggedTrial(r.trial, Candidate.from_json(r.candidate.to_json()), r.value) for r in reversed(rows)]
    study = make_study()
    assert study.replay(rows) == len(rows)
    assert all(study.is_answered(row.trial) for row in rows)
    again = run(study)
    assert {row.trial for row in again}.isdisjoint(row.trial for row in rows)
    assert by_trial([*rows, *again]) == whole
    assert study.pending() == []
    assert study.num_told == study.num_trials == TRIALS


def test_generations_wait_for_each_other():
    study = make_study()
    assert study.pending() == [0, 1, 2, 3]
    assert study.is_ready(3)
    assert not study.is_ready(4)
    with pytest.raises(SafetyDPOError, match="trials 0 … 3 to be answered before trial 4, found 0 told"):
        study.ask(4)
    for trial in (3, 1, 0):
        study.ask(trial)
        study.tell(trial, 1.0)
    assert study.pending() == [2]
    study.tell(2, 1.0)
    assert study.pending() == [4, 5, 6, 7]
    assert study.ask(1) == make_study().ask(1)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"method": "other"}, r"trial 5 of the log .* in 'method': expected 'other' \(logged\), found"),
        ({"global_scale": 0.9}, "trial 5 of the log .* in 'global_scale': expected 0.9"),
        ({"density": 0.11}, "trial 5 of the log .* in 'density': expected 0.11"),
        ({"weights": (("hate", 1.0),)}, r"trial 5 of the log .* in 'weights.hate': expected 1.0"),
    ],
)
def test_a_log_of_another_search_is_refused_by_trial_and_field(change, text):
    rows = run(make_study())
    rows[5] = replace(rows[5], candidate=replace(rows[5].candidate, **change))
    with pytest.raises(SafetyDPOError, match=text):
        make_study().replay(rows)


def test_a_log_with_a_hole_or_two_values_is_refused():
    rows = run(make_study())
    with pytest.raises(SafetyDPOError, match="trials 0 … 3 to be answered before trial 4, found 0 told"):
        make_study().replay([row for row in rows if row.trial != 2])
    with pytest.raises(SafetyDPOError, match="expected one value of trial 3, found"):
        make_study().replay([*rows[:4], replace(rows[3], value=99.0)])


def test_senseless_calls_are_refused():
    with pytest.raises(UsageError, match="one trial and one per generation, found 0 and 4"):
        make_study(trials=0)
    study = make_study()
    with pytest.raises(SafetyDPOError, match=r"expected a trial in 0 … 13, found 14"):
        study.ask(14)
    with pytest.raises(SafetyDPOError, match="a trial that was asked, found one of trial 0"):
        study.tell(0, 1.0)
    study.ask(0)
    with pytest.raises(SafetyDPOError, match="finite objective of trial 0, found nan: log failed trials"):
        study.tell(0, math.nan)
