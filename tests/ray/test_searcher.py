"""The searcher that Ray Tune asks: generations, log, repeats; without Ray, because it is plain Python."""

from __future__ import annotations

from pathlib import Path

from ray_jobs.search_merges import GenerationSearcher, TrialLog
from safetydpo.artifacts.storage import open_location
from safetydpo.config.schema import SearchConfig
from safetydpo.search.replay import LoggedTrial, ReplayStudy
from safetydpo.search.space import Candidate, build_space

EXPERTS = ("hate", "violence")


def _study() -> ReplayStudy:
    config = SearchConfig(trials=6, generation_size=2)
    space = build_space(config, EXPERTS, density_methods=("ties",))
    return ReplayStudy(space, seed=1, trials=6, generation_size=2)


def _answer(candidate: str) -> dict[str, object]:
    value = Candidate.from_json(candidate).global_scale
    return {"status": "ok", "objective": value, "metrics": "{}", "error": ""}


def _drive(searcher: GenerationSearcher, *, stop_after: int = 99) -> int:
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
    _drive(GenerationSearcher(_study(), whole))
    parts = TrialLog(open_location(str(tmp_path / "parts")).make_folder())
    _drive(GenerationSearcher(_study(), parts), stop_after=3)
    study = _study()
    study.replay(
        LoggedTrial(row["trial"], Candidate.from_json(row["candidate"]), row["objective"]) for row in parts.rows()
    )
    _drive(GenerationSearcher(study, parts))
    assert parts.rows() == whole.rows()
    assert [row["trial"] for row in whole.rows()] == list(range(6))


def test_a_lost_trial_is_asked_again_and_a_known_candidate_is_not(tmp_path: Path) -> None:
    log = TrialLog(open_location(str(tmp_path / "log")).make_folder())
    searcher = GenerationSearcher(_study(), log)
    first = searcher.suggest("a")
    searcher.on_trial_complete("a", None, error=True)
    again = searcher.suggest("b")
    assert again == first
    assert log.rows() == []
    known = TrialLog(open_location(str(tmp_path / "known")).make_folder())
    candidate = first["trial"]["candidate"]
    known.add(0, Candidate.from_json(candidate), _answer(candidate))
    fresh = GenerationSearcher(_study(), known)
    assert fresh.suggest("c")["trial"]["number"] == 1
