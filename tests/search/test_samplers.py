from __future__ import annotations

import pytest

from safetydpo.config.search import SearchConfig
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.search import samplers
from safetydpo.search.replay import Answer, LoggedTrial, ReplayStudy, tell_study
from safetydpo.search.samplers import fresh_study, num_dimensions
from safetydpo.search.space import build_space

EXPERTS = ("hate", "violence")
SPACE = build_space(SearchConfig(methods=("sum",)), EXPERTS, density_methods=("ties",))
NAMES = ["tpe", "nsga2", "random", "cmaes"]


def run(sampler: str, *, stop: int = 24, log: list[LoggedTrial] | None = None) -> list[LoggedTrial]:
    study = ReplayStudy(SPACE, seed=2, trials=24, generation_size=6, sampler=sampler)
    rows = list(log or [])
    study.replay(rows)
    while len(rows) < stop:
        trial = study.pending()[0]
        candidate = study.ask(trial)
        value = abs(candidate.global_scale - 0.9) + sum(abs(weight - 0.8) for _, weight in candidate.weights)
        rows.append(
            LoggedTrial(trial, candidate, value, (value, candidate.global_scale, dict(candidate.weights)["hate"]))
        )
        study.tell(trial, value, values=rows[-1].values)
    return rows


@pytest.mark.parametrize("sampler", NAMES)
def test_every_sampler_repeats_and_resumes_byte_for_byte(sampler):
    if sampler == "cmaes":
        pytest.importorskip("cmaes")
    whole = run(sampler)
    assert run(sampler) == whole
    for stop in (3, 6, 17):
        assert run(sampler, log=run(sampler, stop=stop)) == whole


def test_samplers_differ_and_those_that_learn_end_nearer():
    ends = {name: sum(row.value for row in run(name)[12:]) / 12 for name in ("tpe", "random")}
    assert ends["tpe"] < ends["random"]
    assert run("nsga2")[8:] != run("random")[8:]


def test_stopped_trials_are_told_as_pruned_and_tpe_ranks_them_below_complete_ones():
    study = fresh_study("tpe", SPACE, seed=0, startup_trials=1)
    trials = [study.ask() for _ in range(2)]
    tell_study(study, trials[0], Answer(0.5))
    tell_study(study, trials[1], Answer(-9.0, stopped_at=0))
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "PRUNED"]
    assert study.trials[1].intermediate_values == {0: -9.0}
    assert study.best_trial.number == 0
    several = fresh_study("nsga2", SPACE, seed=0, startup_trials=1)
    tell_study(several, several.ask(), Answer(1.0, stopped_at=0), is_multi_objective=True)
    tell_study(several, several.ask(), Answer(1.0, (0.1, 0.9, 0.8)), is_multi_objective=True)
    assert several.best_trials[0].values == [0.1, 0.9, 0.8]
    with pytest.raises(SafetyDPOError, match="expected 3 objectives of each trial, found None"):
        tell_study(several, several.ask(), Answer(1.0), is_multi_objective=True)


def test_unknown_samplers_and_spaces_of_one_number_are_refused():
    with pytest.raises(UsageError, match="expected a sampler of tpe, nsga2, cmaes, random, found 'x'"):
        fresh_study("x", SPACE, seed=0, startup_trials=1)
    small = build_space(SearchConfig(methods=("sum",), weights="none"), EXPERTS, density_methods=())
    assert (num_dimensions(SPACE), num_dimensions(small)) == (3, 1)
    with pytest.raises(UsageError, match=r"at least 2 settings to search .*'cmaes', found 1 of .*methods \[sum\]"):
        fresh_study("cmaes", small, seed=0, startup_trials=1)


def test_cmaes_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(samplers, "find_spec", lambda _name: None)
    with pytest.raises(UsageError, match=r"expected the package cmaes .* found none: pip install 'safetydpo\[cmaes\]'"):
        fresh_study("cmaes", SPACE, seed=0, startup_trials=1)
