from __future__ import annotations

import math
import random
from collections import Counter

import pytest

from safetydpo.config.rungs import FewStepsRung, HeldOutRung
from safetydpo.config.search import SearchConfig
from safetydpo.errors import UsageError
from safetydpo.search.plans import AsyncPlan, GenerationPlan, Outcome, Plan, Task
from safetydpo.search.replay import LoggedTrial, ReplayStudy
from safetydpo.search.space import Candidate, build_space, known_candidates

SPACE = build_space(SearchConfig(), ("hate", "violence"), density_methods=("ties",))
RUNGS = (HeldOutRung(keep=0.5), FewStepsRung(keep=0.5))


def score(candidate: Candidate) -> float:
    wanted = {"hate": 0.7, "violence": 1.2}
    return abs(math.log(candidate.global_scale)) + sum(abs(w - wanted[name]) for name, w in candidate.weights)


def answer(task: Task) -> Outcome:
    """Rungs are the full evaluation in coarse: they rank alike."""
    return Outcome(round(score(task.candidate), 3 - task.rung))


def generations(trials: int = 12, size: int = 4, rungs=RUNGS, **settings) -> GenerationPlan:
    return GenerationPlan(ReplayStudy(SPACE, seed=1, trials=trials, generation_size=size, **settings), rungs)


def drive(plan: Plan, *, workers: int, order_seed: int = 0, stop: int = 10_000, fail: frozenset[int] = frozenset()):
    """Run a plan on some workers whose tasks end in random order; return the tasks and the trials that ended."""
    rng, running, tasks, ended = random.Random(order_seed), [], [], []
    while len(tasks) < stop:
        while len(running) < workers and (task := plan.next_task(running)) is not None:
            running.append(task)
        if not running:
            break
        task = running.pop(rng.randrange(len(running)))
        tasks.append(task)
        outcome = Outcome(6.0, is_failure=True) if task.trial in fail else answer(task)
        ended += plan.record(task, outcome)
    return tasks, ended


def test_a_generation_climbs_together():
    """Of 4 candidates all are on rung 0, 2 on rung 1, 1 in full; 3 generations: 12, 6 and 3 measurements."""
    plan = generations()
    tasks, ended = drive(plan, workers=3)
    assert plan.is_over
    assert Counter(task.rung for task in tasks) == {0: 12, 1: 6, 2: 3}
    assert Counter(one.status for one in ended) == {"stopped": 9, "ok": 3}
    assert sorted(one.trial for one in ended) == list(range(12))
    first = sorted((score(task.candidate), task.trial) for task in tasks if task.rung == 0 and task.trial < 4)
    assert next(one.trial for one in ended if one.status == "ok") == first[0][1]


def test_workers_and_their_order_change_nothing():
    whole = drive(generations(), workers=1)
    for workers, seed in ((2, 1), (4, 2), (9, 3)):
        tasks, ended = drive(generations(), workers=workers, order_seed=seed)
        assert {(task.trial, task.rung): task.candidate for task in tasks} == {
            (task.trial, task.rung): task.candidate for task in whole[0]
        }
        assert sorted(ended, key=lambda one: one.trial) == sorted(whole[1], key=lambda one: one.trial)


def test_an_interrupted_ladder_ends_like_an_undisturbed_one():
    """Answers that are known are recorded again, nothing is measured twice."""
    whole, ended = drive(generations(), workers=2)
    for stop in (1, 3, 6, 9, 14, 20):
        done, _ = drive(generations(), workers=2, stop=stop)
        known = {(task.candidate.hash, task.rung) for task in done}
        plan, measured, found = generations(), [], []
        while (task := plan.next_task([])) is not None:
            if (task.candidate.hash, task.rung) not in known:
                measured.append(task)
            found += plan.record(task, answer(task))
        assert len(measured) == len(whole) - stop
        assert sorted(found, key=lambda one: one.trial) == sorted(ended, key=lambda one: one.trial)


def test_without_rungs_every_candidate_is_measured_in_full():
    tasks, ended = drive(generations(rungs=()), workers=2)
    assert [task.rung for task in tasks] == [0] * 12
    assert {one.status for one in ended} == {"ok"}


def test_a_failure_ends_its_trial_and_not_the_search():
    plan = generations()
    _, ended = drive(plan, workers=2, fail=frozenset((0, 5)))
    assert plan.is_over
    assert {one.trial: (one.value, one.rung) for one in ended if one.status == "error"} == {0: (6.0, 0), 5: (6.0, 0)}
    assert len(ended) == 12


def test_first_trials_calibrate_and_a_rung_that_ranks_badly_stops_nobody():
    """The first 8 go on whatever the rung says. It ranks upside down, so that it stops nobody of the last 4 either."""
    rung = HeldOutRung(keep=0.25, calibrate=8, least_correlation=0.0)

    def run(sign: float) -> Counter[int]:
        plan, counts = generations(rungs=(rung,)), Counter()
        while (task := plan.next_task([])) is not None:
            counts[task.rung] += 1
            plan.record(task, Outcome(score(task.candidate) * (1.0 if task.rung else sign)))
        return counts

    assert run(-1.0) == {0: 12, 1: 12}
    assert run(1.0) == {0: 12, 1: 9}


@pytest.mark.parametrize("rungs", [(HeldOutRung(keep=0.5),), (FewStepsRung(keep=0.5),)])
def test_by_default_a_rung_that_ranks_upside_down_stops_nobody_once_that_is_measured(
    rungs: tuple[HeldOutRung | FewStepsRung, ...],
):
    """Generations of 4 of 12: half of the first two, 4 candidates, are too few to tell by; of the third there is more.

    Sent on are 2, 2 and 2 as long as less than 5 were measured by both. With 16 trials it is 6 by then: the last go on.
    """

    def run(sign: float, **rule: float) -> Counter[int]:
        chosen = tuple(one.model_copy(update=rule) for one in rungs)
        plan, counts = generations(trials=16, rungs=chosen), Counter()
        while (task := plan.next_task([])) is not None:
            counts[task.rung] += 1
            plan.record(task, Outcome(score(task.candidate) * (1.0 if task.rung else sign)))
        return counts

    assert run(1.0) == {0: 16, 1: 8}
    assert run(-1.0) == {0: 16, 1: 2 + 2 + 2 + 4}
    assert run(-1.0, least_correlation=-1.0) == {0: 16, 1: 8}


def asynchronous(trials: int = 20, **settings) -> AsyncPlan:
    return AsyncPlan(SPACE, seed=1, trials=trials, **settings)


def logged(ended) -> list[LoggedTrial]:
    return [
        LoggedTrial(one.trial, one.candidate, one.value, stopped_at=one.rung if one.status == "stopped" else None)
        for one in ended
    ]


def test_async_hands_out_the_next_candidate_without_waiting():
    plan = asynchronous()
    running = [plan.next_task([]) for _ in range(7)]
    assert [task.trial for task in running] == list(range(7))
    plan.record(running[5], answer(running[5]))
    assert plan.next_task([]).trial == 7


@pytest.mark.parametrize("rungs", [(), RUNGS])
def test_async_resumes_from_finished_trials_and_runs_none_again(rungs):
    tasks, ended = drive(asynchronous(rungs=rungs), workers=3, stop=11)
    done = {one.trial for one in ended}
    values = [[answer(t).value for t in tasks if t.rung == rung and t.trial in done] for rung in range(len(rungs))]
    begun = [task.candidate for task in tasks if task.trial not in done]
    plan = asynchronous(rungs=rungs, finished=logged(ended), begun=begun, rung_values=values)
    more, later = drive(plan, workers=3)
    assert plan.is_over
    assert not {task.trial for task in more} & done
    assert not {task.candidate for task in more} & {one.candidate for one in ended}
    assert sorted([*done, *(one.trial for one in later)]) == list(range(20))
    # What was begun comes first.
    again = asynchronous(rungs=rungs, finished=logged(ended), begun=begun, rung_values=values)
    begun = list(dict.fromkeys(begun))
    assert [again.next_task([]).candidate for _ in begun] == begun


def test_async_gives_out_a_lost_task_again_before_anything_else():
    plan = asynchronous()
    first, second = plan.next_task([]), plan.next_task([])
    plan.give_back(first)
    assert plan.next_task([second]) == first


def test_async_promotes_the_best_share_of_all_so_far():
    plan = asynchronous(rungs=(HeldOutRung(keep=0.5),))
    tasks = [plan.next_task([]) for _ in range(4)]
    # Alone it is the best; 0.4 of two: only the better half; 0.05 beats both; 0.3 is third of four.
    found = [plan.record(task, Outcome(value)) for task, value in zip(tasks, (0.1, 0.4, 0.05, 0.3), strict=True)]
    assert [[one.status for one in each] for each in found] == [[], ["stopped"], [], ["stopped"]]
    assert [(plan.next_task([]).trial, plan.next_task([]).trial)] == [(0, 2)]


def test_known_points_come_first_whether_a_sampler_could_place_them_or_not():
    """Of the base all coefficients are 0, of each expert alone the others, outside of the space; so is `average`."""
    known = known_candidates(SPACE, density_methods=("ties",))
    assert [(one.method, dict(one.weights)) for one in known] == [
        ("sum", {"hate": 0.0, "violence": 0.0}),
        ("sum", {"hate": 1.0, "violence": 0.0}),
        ("sum", {"hate": 0.0, "violence": 1.0}),
        ("average", {"hate": 1.0, "violence": 1.0}),
        ("ties", {"hate": 1.0, "violence": 1.0}),
        ("co_merge", {"hate": 1.0, "violence": 1.0}),
    ]
    for plan in (generations(rungs=(), known=known), asynchronous(trials=12, known=known)):
        tasks, _ = drive(plan, workers=1)
        assert {task.candidate for task in tasks[:6]} == set(known)
        assert len({task.candidate for task in tasks}) == 12
    with pytest.raises(UsageError, match=r"trials of at least 6 because identity\.search\.first_trials is 'known'"):
        generations(trials=4, known=known)
    with pytest.raises(UsageError, match="found 4: raise it, or use 'plain'"):
        asynchronous(trials=4, known=known)
