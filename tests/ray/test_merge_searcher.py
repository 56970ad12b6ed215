"""The searcher with rungs, budgets and without generations; without Ray, because it is plain Python."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ray_jobs.merge_searcher import (
    MergeSearcher,
    budget_of,
    concurrent_trials,
    known_of_base,
    value_at,
    values_of,
    why_not,
)
from ray_jobs.run import Run
from ray_jobs.search_merges import make_plan
from ray_jobs.search_summary import describe_choice, describe_ladder
from ray_jobs.trial_log import MeasurementLog, TrialLog
from safetydpo.artifacts.storage import open_location
from safetydpo.config.schema import Config, ExecutionConfig
from safetydpo.config.search import SearchConfig
from safetydpo.errors import SafetyDPOError
from safetydpo.search.budget import Budget
from safetydpo.search.objective import FAILED_OBJECTIVE
from safetydpo.search.space import Candidate, build_space

LADDER = [{"kind": "held_out", "keep": 0.5, "pairs": "all"}, {"kind": "few_steps", "keep": 0.5}]
BASE = {"neutral_rate": 0.8, "neighbour_retention": 1.0, "ip_select": 0.9, "unrecognisable_rate": 0.0}


class Place:
    """A log of a search and the searchers on it; the clock is how many measurements there were."""

    def __init__(self, folder: Path, **search: Any) -> None:
        settings = {"trials": 8, "generation_size": 4, "methods": ["sum"], **search}
        self.run = Run(Config.model_validate({"identity": {"search": settings}}))
        self.log_folder = open_location(str(folder / "trials")).make_folder()
        self.measured_folder = open_location(str(folder / "measurements")).make_folder()
        self.measured: list[tuple[int, int]] = []

    @property
    def log(self) -> TrialLog:
        return TrialLog(self.log_folder)

    @property
    def measurements(self) -> MeasurementLog:
        return MeasurementLog(self.measured_folder)

    def searcher(self, **settings: Any) -> MergeSearcher:
        search = self.run.config.identity.search
        log, measurements = self.log, self.measurements
        log.forget_failures(search.generation_size if search.suggest == "batch" else None)
        space = build_space(search, ("hate", "violence"), density_methods=())
        plan = make_plan(self.run, space, log, measurements, base=BASE)
        if "budget" in settings:
            budget = settings.pop("budget")
            settings["why_not"] = lambda task, since: why_not(measurements, budget, task.rung, [])
        return MergeSearcher(
            plan,
            log,
            measurements,
            num_rungs=len(search.ladder),
            values=lambda metrics: values_of(metrics, base=BASE, search=search),
            **settings,
        )

    def drive(
        self, searcher: MergeSearcher, *, stop: int = 1000, fail: frozenset[int] = frozenset(), slots: int = 2
    ) -> None:
        """Two slots, of which the later one ends first; each measurement takes a second."""
        running: list[tuple[str, dict[str, Any]]] = []
        while len(self.measured) < stop:
            while len(running) < slots:
                found = searcher.suggest(f"t{len(self.measured)}-{len(running)}")
                if not isinstance(found, dict):
                    break
                running.append((f"t{len(self.measured)}-{len(running)}", found["trial"]))
            if not running:
                return
            name, trial = running.pop()
            self.measured.append((trial["number"], trial["rung"]))
            searcher.on_trial_complete(name, self.answer(trial, fail))

    def answer(self, trial: dict[str, Any], fail: frozenset[int]) -> dict[str, Any]:
        candidate = Candidate.from_json(trial["candidate"])
        value = abs(candidate.global_scale - 1.1)
        costs = {"started_at": float(len(self.measured)), "seconds": 1.0, "pictures": 10 * trial["rung"]}
        if trial["number"] in fail:
            return {"status": "error", "objective": 6.0, "metrics": "{}", "error": "a bug", **costs}
        metrics = json.dumps({**BASE, "ip_select": value})
        return {"status": "ok", "objective": value, "metrics": metrics, "error": "", **costs}


def test_a_ladder_measures_few_in_full_and_logs_who_was_stopped(tmp_path: Path) -> None:
    """Two generations of 4: 4, 2 and 1 measurements each."""
    place = Place(tmp_path, ladder=LADDER)
    ended: list[int] = []
    place.drive(place.searcher(on_ended=ended.append))
    assert sorted(rung for _, rung in place.measured) == [0] * 8 + [1] * 4 + [2] * 2
    rows = place.log.rows()
    assert [row["status"] for row in rows].count("stopped") == 6
    assert [row["status"] for row in rows].count("ok") == 2
    assert {json.loads(row["metrics"])["stopped_at"] for row in rows if row["status"] == "stopped"} == {0, 1}
    assert sum(ended) == 8
    found = describe_ladder(place.run, place.log, place.measurements, num_prompts=30)
    assert (found["pictures"], found["pictures_of_full_evaluation"]) == (4 * 10 + 2 * 20, 8 * 30)
    assert [(rung["measured"], rung["went_on"], rung["next"]["n"]) for rung in found["rungs"]] == [(8, 4, 4), (4, 2, 2)]
    assert found["rungs"][0]["next"]["spearman"] == pytest.approx(1.0)


@pytest.mark.parametrize("ladder", [[], LADDER])
@pytest.mark.parametrize("suggest", ["batch", "async"])
def test_the_base_is_a_known_first_trial_that_takes_nobodys_place(
    tmp_path: Path, suggest: str, ladder: list[Any]
) -> None:
    """Its rates were measured before the first trial, so it costs at most a rung that draws nothing."""
    place = Place(tmp_path, suggest=suggest, first_trials="known", trials=9, generation_size=9, ladder=ladder)
    search, base = place.run.config.identity.search, {1: BASE, 2: BASE} if ladder else {0: BASE}
    place.drive(place.searcher(known=partial(known_of_base, base=base, search=search)))
    rows = place.log.rows()
    (own,) = [row for row in rows if Candidate.from_json(row["candidate"]).is_base]
    assert (own["trial"], own["status"], json.loads(own["metrics"])) == (0, "ok", BASE)
    # Nothing but its IP of 0.9: it keeps both floors by definition.
    assert own["objective"] == pytest.approx(0.9)
    assert [rung for trial, rung in place.measured if trial == 0] == ([0] if ladder else [])
    assert len(rows) == 9
    merges = [trial for trial, rung in place.measured if rung == len(ladder) and trial != 0]
    assert merges
    if ladder and suggest == "batch":
        # Of 8 merges half goes on, and half of those.
        assert sorted(rung for trial, rung in place.measured if trial) == [0] * 8 + [1] * 4 + [2] * 2
        found = describe_ladder(place.run, place.log, place.measurements, num_prompts=30)
        assert [(rung["measured"], rung["went_on"]) for rung in found["rungs"]] == [(8, 4), (4, 2)]
    again = Place(tmp_path, suggest=suggest, first_trials="known", trials=9, generation_size=9, ladder=ladder)
    again.drive(again.searcher(known=partial(known_of_base, base=base, search=search)))
    assert again.measured == []
    assert again.log.rows() == rows


@pytest.mark.parametrize("cause", ["RuntimeError: out of memory", None])
@pytest.mark.parametrize("suggest", ["batch", "async"])
def test_a_trial_whose_process_dies_three_times_fails_and_says_why(
    tmp_path: Path, suggest: str, cause: str | None
) -> None:
    """It is handed out three times; the others are measured once each, and the search ends."""
    place = Place(tmp_path, suggest=suggest, trials=4)
    searcher, attempts, others = place.searcher(), 0, []
    while isinstance(found := searcher.suggest(f"t{attempts}-{len(others)}"), dict):
        name, trial = f"t{attempts}-{len(others)}", found["trial"]
        if trial["number"] != 1:
            others.append(trial["number"])
            searcher.on_trial_complete(name, place.answer(trial, frozenset()))
            continue
        attempts += 1
        # What Tune says of such a trial, then, to callbacks, why.
        searcher.on_trial_complete(name, None, error=True)
        if cause is not None:
            searcher.tell_cause(name, cause)
    assert found == "FINISHED"
    assert (attempts, sorted(others)) == (3, [0, 2, 3])
    rows = place.log.rows()
    assert [row["status"] for row in rows] == ["ok", "error", "ok", "ok"]
    told = "it said nothing" if cause is None else cause
    assert rows[1]["error"] == f"the trial's process ended without an answer 3 times: {told}"
    assert rows[1]["objective"] == FAILED_OBJECTIVE


@pytest.mark.parametrize("settings", [{}, {"ladder": LADDER}, {"sampler": "nsga2"}, {"sampler": "random"}])
def test_an_interrupted_search_ends_like_an_undisturbed_one(tmp_path: Path, settings: dict[str, Any]) -> None:
    whole = Place(tmp_path / "whole", **settings)
    whole.drive(whole.searcher())
    for stop in (1, 5, 7):
        place = Place(tmp_path / f"{stop}", **settings)
        place.drive(place.searcher(), stop=stop)
        place.drive(place.searcher())
        assert place.log.rows() == whole.log.rows()
        # A measurement that had not ended when the search was cut off is the only one that is made again.
        assert len(place.measured) == len(whole.measured)


@pytest.mark.parametrize("ladder", [[], LADDER])
def test_async_runs_no_finished_trial_again(tmp_path: Path, ladder: list[Any]) -> None:
    place = Place(tmp_path, suggest="async", trials=12, ladder=ladder)
    place.drive(place.searcher(), stop=9)
    before = place.log.rows()
    place.drive(place.searcher())
    assert before
    assert [row for row in place.log.rows() if row in before] == before
    assert len(place.log.rows()) == 12
    full = [trial for trial, rung in place.measured if rung == len(ladder)]
    assert len(full) == len(set(full))
    measured = [(row["candidate_hash"], row["rung"]) for row in place.measurements.rows()]
    assert len(measured) == len(set(measured))


def test_async_tries_failed_trials_again_and_no_others(tmp_path: Path) -> None:
    place = Place(tmp_path, suggest="async", trials=6)
    place.drive(place.searcher(), fail=frozenset((2,)))
    assert [row["status"] for row in place.log.rows()] == ["ok", "ok", "error", "ok", "ok", "ok"]
    place.measured.clear()
    place.drive(place.searcher())
    assert place.measured == [(2, 0)]
    assert {row["status"] for row in place.log.rows()} == {"ok"}


def test_a_log_of_another_search_is_refused(tmp_path: Path) -> None:
    place = Place(tmp_path, ladder=LADDER)
    place.drive(place.searcher())
    row = place.log.rows()[0]
    changed = Candidate.from_json(row["candidate"])
    place.log.add(0, Candidate(changed.method, 1.234, changed.weights), {**row, "status": "stopped"})
    with pytest.raises(SafetyDPOError, match="trial 0 of the log differs from the search as asked now"):
        place.drive(place.searcher())


@pytest.mark.parametrize("settings", [{}, {"ladder": LADDER}, {"suggest": "async"}])
def test_a_budget_ends_the_search_and_a_larger_one_goes_on(tmp_path: Path, settings: dict[str, Any]) -> None:
    """5 s of measurements of 1 s, one after another: 5 of them, no more; later all of the others."""
    place = Place(tmp_path, **settings)
    stopped = place.searcher(budget=Budget(seconds=5.0))
    place.drive(stopped, slots=1)
    assert stopped.stopped_by == "time budget of 5 s"
    assert len(place.measured) == 5
    again = place.searcher(budget=Budget(seconds=5.0))
    before = len(place.measured)
    place.drive(again, slots=1)
    assert (again.stopped_by, len(place.measured)) == ("time budget of 5 s", before)
    place.drive(place.searcher(budget=Budget(seconds=1000.0)))
    assert len(place.log.rows()) == 8
    assert len(place.measured) == len(set(place.measured))


def test_costs_are_counted_over_all_commands(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.drive(place.searcher(), stop=3)
    stopped = place.searcher(budget=Budget(cost=0.4, price_per_second=0.1))
    place.drive(stopped, slots=1)
    assert (stopped.stopped_by, len(place.measured)) == ("cost budget of 0.4", 4)


def test_limits_of_a_shared_cluster() -> None:
    """8 workers: 3 trials at a time by one limit, 0.9 GPUs of 0.3 each by the other; work for one worker gets one."""

    def trials(tasks: int = 100, **search: Any) -> int:
        execution = {"num_workers": 8, "gpus_per_worker": 0.3, "search": search}
        return concurrent_trials(ExecutionConfig.model_validate(execution), tasks=tasks, passes_per_task=64)

    assert trials() == 8
    assert trials(max_concurrent_trials=3) == 3
    assert trials(max_gpus=0.9) == 3
    assert trials(max_gpus=0.35, max_concurrent_trials=4) == 1
    assert trials(tasks=1) == 1
    execution = ExecutionConfig.model_validate(
        {
            "cpus_per_worker": 2,
            "search": {"price_per_cpu_hour": 1.8, "cost_budget": 5.0, "time_budget_s": 60.0},
        }
    )
    assert budget_of(execution) == Budget(60.0, 5.0, pytest.approx(0.001))


def test_what_is_minimised_at_each_rung() -> None:
    """The proxy; then IP plus the price of a floor missed at that rung's own base: 0.9 - 0.4 / 0.5 = 0.1, twice."""
    search = SearchConfig(ladder=LADDER)
    numbers = {"redirection": 0.4} | dict.fromkeys(
        ("safe_rise", "benign_rise", "neutral_shift", "neighbour_shift"), 0.0
    )
    assert value_at(0, numbers, base={}, search=search) == -0.4
    rates = {"ip_select": 0.3, "unrecognisable_rate": 0.0, "neutral_rate": 0.4, "neighbour_retention": 1.0}
    base = {1: {**BASE, "neutral_rate": 0.5}, 2: {**BASE, "neutral_rate": 0.4}}
    assert value_at(1, rates, base=base, search=search) == pytest.approx(0.3 + 0.2)
    assert value_at(2, rates, base=base, search=search) == pytest.approx(0.3)


def test_an_unreachable_floor_is_a_clear_result() -> None:
    details = {
        "trial": 3,
        "candidate": Candidate("ties", 1.25, (("hate", 1.0),), 0.3).to_json(),
        "metrics": {**BASE, "ip_select": 0.25, "neutral_rate": 0.6},
        "base": BASE,
        "feasible": False,
    }
    assert describe_choice(details, SearchConfig()) == (
        "no candidate met the floor; nearest: trial 3, ties x 1.25: IP 0.25, neutral rate 0.75 of the base's "
        "(floor 0.9), neighbour retention 1.00 of the base's (floor 0.8)"
    )
    reached = {**details, "metrics": {**BASE, "ip_select": 0.25}, "feasible": True}
    assert describe_choice(reached, SearchConfig()).startswith("chosen trial 3, ties x 1.25: IP")
