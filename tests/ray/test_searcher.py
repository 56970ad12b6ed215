"""The searcher that Ray Tune asks: generations, log, repeats; without Ray, because it is plain Python."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ray_jobs import search_merges
from ray_jobs.merge_searcher import MergeSearcher
from ray_jobs.run import Run
from ray_jobs.search_choice import choose, warnings_of
from ray_jobs.search_merges import known_trials, validation_prompts
from ray_jobs.search_summary import describe_choice, describe_warnings
from ray_jobs.trial_log import MeasurementLog, TrialLog, best_trial
from safetydpo.artifacts.storage import open_location
from safetydpo.config.schema import Config
from safetydpo.config.search import SearchConfig
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.prompts.sets import Prompt
from safetydpo.search.plans import GenerationPlan
from safetydpo.search.replay import ReplayStudy
from safetydpo.search.space import Candidate, build_space

EXPERTS = ("hate", "violence")
METRICS = '{"ip_select": 0.2, "unrecognisable_rate": 0.1, "neutral_rate": 0.9, "neighbour_retention": 1.0}'
GOOD = {"status": "ok", "objective": 0.3, "metrics": METRICS, "error": ""}
BAD = {"status": "error", "objective": 1e6, "metrics": "{}", "error": "a bug"}
RATES_OF_BASE = {"neutral_rate": 1.0, "neighbour_retention": 1.0, "ip_select": 0.6, "unrecognisable_rate": 0.0}
NO_ADAPTER = Candidate("sum", 1.0, (("hate", 0.0), ("violence", 0.0)))
COSTS = {"started_at": 0.0, "seconds": 1.0, "pictures": 10}


def _study() -> ReplayStudy:
    config = SearchConfig(trials=6, generation_size=2)
    space = build_space(config, EXPERTS, density_methods=("ties",))
    return ReplayStudy(space, seed=1, trials=6, generation_size=2)


def _answer(candidate: str) -> dict[str, object]:
    value = Candidate.from_json(candidate).global_scale
    return {"status": "ok", "objective": value, "metrics": "{}", "error": "", **COSTS}


def _searcher(study: ReplayStudy, log: TrialLog) -> MergeSearcher:
    """A searcher whose measurements nobody remembers but the log."""
    return MergeSearcher(GenerationPlan(study), log, MeasurementLog(log.folder.parent / f"m-{uuid.uuid4().hex}"))


def _drive(searcher: MergeSearcher, *, stop_after: int = 99) -> int:
    """Play Ray Tune with two slots; trials of a generation end in reverse order."""
    done = 0
    for wave in range(20):
        running = []
        for slot in range(2):
            suggestion = searcher.suggest(f"{wave}-{slot}")
            if suggestion == "FINISHED":
                return done
            if suggestion is not None:
                running.append((f"{wave}-{slot}", suggestion["trial"]["candidate"]))
        for trial_id, candidate in reversed(running):
            searcher.on_trial_complete(trial_id, _answer(candidate))
            done += 1
            if done >= stop_after:
                return done
    raise AssertionError("the searcher never finished")


def test_an_interrupted_search_ends_like_an_undisturbed_one(tmp_path: Path) -> None:
    whole = TrialLog(open_location(str(tmp_path / "whole")).make_folder())
    _drive(_searcher(_study(), whole))
    parts = TrialLog(open_location(str(tmp_path / "parts")).make_folder())
    _drive(_searcher(_study(), parts), stop_after=3)
    study = _study()
    study.replay(parts.logged())
    _drive(_searcher(study, parts))
    assert parts.rows() == whole.rows()
    assert [row["trial"] for row in whole.rows()] == list(range(6))


def test_a_lost_trial_is_asked_again_and_a_known_candidate_is_not(tmp_path: Path) -> None:
    log = TrialLog(open_location(str(tmp_path / "log")).make_folder())
    searcher = _searcher(_study(), log)
    first = searcher.suggest("a")
    searcher.on_trial_complete("a", None, error=True)
    again = searcher.suggest("b")
    assert again == first
    assert log.rows() == []
    known = TrialLog(open_location(str(tmp_path / "known")).make_folder())
    candidate = first["trial"]["candidate"]
    known.add(0, Candidate.from_json(candidate), _answer(candidate))
    fresh = _searcher(_study(), known)
    assert fresh.suggest("c")["trial"]["number"] == 1


def test_failed_trials_are_tried_again_and_later_ones_only_if_the_answer_changes(tmp_path: Path) -> None:
    """Trial 1 of 6 (generations of 2) failed. Trials 1 to 5 leave the log, 0 stays.

    While it fails again, the candidates of trials 2 to 5 are asked as before and found in memory: one measurement.
    Once it is mended, the log ends like one without any failure.
    """
    whole = TrialLog(open_location(str(tmp_path / "whole")).make_folder())
    _drive(_searcher(_study(), whole))

    def fail(candidate: str) -> dict[str, object]:
        return {"status": "error", "objective": 1e6, "metrics": "{}", "error": "a bug", **COSTS}

    def search(log: TrialLog, answer_of_1: Callable[[str], dict[str, object]]) -> list[int]:
        study, measured = _study(), []
        study.replay(log.logged())
        searcher = _searcher(study, log)
        while isinstance(suggestion := searcher.suggest("only"), dict):
            number, candidate = suggestion["trial"]["number"], suggestion["trial"]["candidate"]
            measured.append(number)
            searcher.on_trial_complete("only", (answer_of_1 if number == 1 else _answer)(candidate))
        return measured

    folder = open_location(str(tmp_path / "log")).make_folder()
    assert search(TrialLog(folder), fail) == [0, 1, 2, 3, 4, 5]
    failed = TrialLog(folder).rows()
    assert [row["status"] for row in failed] == ["ok", "error", "ok", "ok", "ok", "ok"]

    again = TrialLog(folder)
    again.forget_failures(2)
    assert [row["trial"] for row in again.rows()] == [0]
    assert search(again, fail) == [1]
    assert again.rows() == failed

    mended = TrialLog(folder)
    mended.forget_failures(2)
    assert 1 in search(mended, _answer)
    assert mended.rows() == whole.rows()
    mended.forget_failures(2)
    assert mended.rows() == whole.rows()


def test_many_failures_warn_and_do_not_end_the_search(tmp_path: Path):
    """1 of 6 trials failed: nothing is said. 2 of 6, more than a quarter: the best of the others, and a warning."""
    study = _study()
    candidates = [study.ask(0), study.ask(1)]
    search = SearchConfig()
    for num_failed in (1, 2):
        log = TrialLog(open_location(str(tmp_path / f"{num_failed}")).make_folder())
        for number in range(6):
            log.add(number, candidates[number % 2], BAD if number < num_failed else GOOD)
        made = choose(log, RATES_OF_BASE, search)
        assert made["counts"] == {"trials": 6, "failed": num_failed}
        assert made["details"]["trial"] == num_failed
        warnings = warnings_of(made["details"], log, search)
        details = {**made["details"], **warnings}
        if num_failed == 1:
            assert (warnings, describe_warnings(details, search)) == ({}, [])
        else:
            assert warnings == {"failures": {"failed": 2, "trials": 6, "first_error": "a bug"}}
            assert describe_warnings(details, search, folder="store/search/x") == [
                "2 of 6 trials failed, the first one for 'a bug': the choice is of the others; to try them again, mend "
                "the cause, delete record.json in store/search/x and run the same command"
            ]


def test_a_search_all_of_whose_merges_failed_is_an_error(tmp_path: Path):
    """Also if the base, which needs no merge, was measured as a trial."""
    study = _study()
    log = TrialLog(open_location(str(tmp_path / "log")).make_folder())
    log.add(0, NO_ADAPTER, {**GOOD, "metrics": json.dumps(RATES_OF_BASE)})
    log.add(1, study.ask(0), BAD)
    log.add(2, study.ask(1), BAD)
    with pytest.raises(
        SafetyDPOError,
        match="one measured merge of 3 trials, found none and 2 failed, the first failure: a bug; mend the",
    ):
        choose(log, RATES_OF_BASE, SearchConfig())


@pytest.mark.parametrize(
    ("ip", "neutral", "told", "num_warnings"),
    [
        (0.2, 0.9, "chosen trial 1, sum x 1.00: IP 0.20", 0),
        (
            0.8,
            0.9,
            "no candidate that met the floors is better than the base; nearest: trial 1, sum x 1.00: IP 0.80",
            1,
        ),
        (0.2, 0.5, "no candidate met the floor; nearest: trial 1, sum x 1.00: IP 0.20", 1),
    ],
)
def test_the_base_is_never_chosen_but_told_of_where_it_is_better(
    tmp_path: Path, ip: float, neutral: float, told: str, num_warnings: int
):
    """The base has IP 0.6. A merge of IP 0.2 beats it; one of 0.8, and one that halves the neutral rate, do not."""
    log = TrialLog(open_location(str(tmp_path / "log")).make_folder())
    merge, search = Candidate("sum", 1.0, (("hate", 1.0), ("violence", 0.0))), SearchConfig()
    log.add(0, NO_ADAPTER, {**GOOD, "metrics": json.dumps(RATES_OF_BASE)})
    metrics = {**RATES_OF_BASE, "ip_select": ip, "neutral_rate": neutral}
    log.add(1, merge, {**GOOD, "metrics": json.dumps(metrics)})
    details = dict(choose(log, RATES_OF_BASE, search)["details"])
    warnings = warnings_of(details, log, search)
    assert warnings == ({"base_is_better": True} if num_warnings else {})
    details |= warnings
    assert details["trial"] == 1
    assert describe_choice(details, search).startswith(told)
    found = describe_warnings(details, search)
    assert len(found) == num_warnings
    assert all("the base without an adapter is the better choice (IP 0.60, objective 0.60)" in one for one in found)
    best = best_trial(log.rows(), base=RATES_OF_BASE, search=search)
    assert best is not None
    assert best["trial"] == 1


def test_only_searches_with_known_first_trials_have_a_key_that_names_the_base() -> None:
    """It was not always among them: a search of before must not go on as one with it."""
    assert known_trials(SearchConfig()) == {}
    assert known_trials(SearchConfig(first_trials="known")) == {"known": "base"}


def test_neighbours_have_a_number_of_prompts_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """5 neutral prompts and 9 of neighbours, or as many as neutral ones; a source without neighbours is refused."""

    def counts(**search: int) -> tuple[int, ...]:
        run = Run(Config.model_validate({"identity": {"search": {"prompts_per_category": 2, **search}}}))
        chosen = [prompt.prompt_set for prompt in validation_prompts(run)]
        return tuple(chosen.count(name) for name in ("unsafe", "neutral", "neighbour"))

    assert counts(neutral_prompts=5, neighbour_prompts=9) == (14, 5, 9)
    assert counts(neutral_prompts=5) == (14, 5, 5)
    every = search_merges.split_prompts

    def none_of_neighbours(source: Any, split: str, prompt_set: str) -> list[Prompt]:
        return [] if prompt_set == "neighbour" else every(source, split, prompt_set)

    monkeypatch.setattr(search_merges, "split_prompts", none_of_neighbours)
    with pytest.raises(UsageError, match="expected neighbour prompts of the validation split in 'demo', found none"):
        counts()
