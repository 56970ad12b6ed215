from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from safetydpo.config.search import SearchConfig
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.search.space import (
    Candidate,
    SearchSpace,
    build_space,
    first_methods,
    is_inside,
    known_candidates,
    plain_candidates,
    suggest,
    to_parameters,
    weight_groups,
)

EXPERTS = ("violence", "hate")


def make_space(**settings: object) -> SearchSpace:
    return build_space(SearchConfig(**settings), EXPERTS, density_methods=("ties", "dare"))


def test_canonical_json_by_hand():
    candidate = Candidate("ties", 0.1, (("hate", 1.0), ("violence", 0.5)), 0.3)
    assert candidate.to_json() == (
        '{"density":0.3,"global_scale":0.1,"method":"ties","weights":{"hate":1.0,"violence":0.5}}'
    )
    assert candidate.hash == hashlib.sha256(candidate.to_json().encode()).hexdigest()


@given(scale=st.floats(1e-3, 1e3), weight=st.floats(-10, 10), density=st.none() | st.floats(0, 1))
def test_json_reads_back_the_same_candidate(scale, weight, density):
    candidate = Candidate("sum", scale, (("a", weight), ("b", 1.0)), density)
    assert Candidate.from_json(candidate.to_json()) == candidate
    assert Candidate.from_json(candidate.to_json()).hash == candidate.hash


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"method":"sum","global_scale":"x","weights":{},"density":null}'])
def test_damaged_candidates_are_refused(text):
    with pytest.raises(SafetyDPOError, match="expected a merge candidate in JSON, found"):
        Candidate.from_json(text)


def test_space_holds_the_config():
    space = make_space(methods=("sum", "ties"), scale_range=(0.2, 2.0))
    assert space.methods == ("sum", "ties")
    assert space.density_methods == ("ties",)
    assert space.groups == (("hate", ("hate",)), ("violence", ("violence",)))
    assert space.scale_range("ties") == (0.2, 2.0)
    assert space.experts == ("hate", "violence")


def test_density_is_asked_only_where_it_matters():
    space = make_space(methods=("sum", "ties"))
    for method, keys in (("sum", set()), ("ties", {"density"})):
        trial = optuna.trial.FixedTrial(
            {
                "method": method,
                f"global_scale:{method}": 1.5,
                "weight:hate": 0.5,
                "weight:violence": 1.25,
                "density": 0.2,
            }
        )
        candidate = suggest(trial, space)
        assert candidate == Candidate(
            method, 1.5, (("hate", 0.5), ("violence", 1.25)), 0.2 if method == "ties" else None
        )
        scale = f"global_scale:{method}"
        assert set(trial.distributions) == {"method", scale, "weight:hate", "weight:violence"} | keys
        assert trial.distributions[scale].log


def test_groups_share_one_weight():
    groups = {"g2": ["c"], "g1": ["b", "a"]}
    space = build_space(SearchConfig(), ["a", "b", "c"], density_methods=(), groups=groups)
    trial = optuna.trial.FixedTrial({"method": "sum", "global_scale:sum": 1.0, "weight:g1": 0.5, "weight:g2": 1.5})
    candidate = suggest(trial, space)
    assert candidate.weights == (("a", 0.5), ("b", 0.5), ("c", 1.5))
    assert to_parameters(candidate, space) == trial.params


def test_parameters_lead_back_to_the_candidate():
    space = make_space(plain_scales={"ties": (1.0, 2.0)})
    for candidate in plain_candidates(space):
        assert suggest(optuna.trial.FixedTrial(to_parameters(candidate, space)), space) == candidate


def test_plain_candidates_by_hand():
    """Three methods at scale 1 and, with two experts, the average: sum at 1 / 2."""
    ones = (("hate", 1.0), ("violence", 1.0))
    assert plain_candidates(make_space()) == [
        Candidate("sum", 1.0, ones),
        Candidate("ties", 1.0, ones, 0.3),
        Candidate("co_merge", 1.0, ones),
        Candidate("sum", 0.5, ones),
    ]


def test_plain_candidates_stay_inside_the_space():
    space = make_space(scale_range=(0.6, 1.0), density_range=(0.4, 0.5), weight_range=(1.1, 1.5))
    found = plain_candidates(space)
    assert [(c.method, c.global_scale, c.density) for c in found] == [
        ("sum", 1.0, None),
        ("ties", 1.0, 0.4),
        ("co_merge", 1.0, None),
    ]
    assert all(math.isclose(weight, 1.1) for c in found for _, weight in c.weights)


def test_plain_scales_by_hand():
    """`sum` at 0.4 and 0.8, the others at 1; the average (sum at 1 / 2) last."""
    space = make_space(plain_scales={"sum": (0.4, 0.8)}, scale_range=(0.1, 3.0))
    found = [(candidate.method, candidate.global_scale) for candidate in plain_candidates(space)]
    assert found == [("sum", 0.4), ("sum", 0.8), ("ties", 1.0), ("co_merge", 1.0), ("sum", 0.5)]


def test_a_method_may_have_a_range_of_its_own():
    """`ties` in [1, 1.5], the others in [0.6, 2]; a plain scale of 1 lies in both."""
    space = make_space(methods=("sum", "ties"), scale_range=(0.6, 2.0), scale_ranges={"ties": (1.0, 1.5)})
    assert (space.scale_range("sum"), space.scale_range("ties")) == ((0.6, 2.0), (1.0, 1.5))
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    found = [suggest(study.ask(), space) for _ in range(60)]
    for method, (low, high) in (("sum", (0.6, 2.0)), ("ties", (1.0, 1.5))):
        scales = [one.global_scale for one in found if one.method == method]
        assert low <= min(scales) < max(scales) <= high
        assert max(scales) - min(scales) > 0.5 * (high - low)


def test_senseless_spaces_are_refused():
    with pytest.raises(UsageError, match="at least one expert, each once, found none"):
        build_space(SearchConfig(), [], density_methods=())
    with pytest.raises(UsageError, match="at least one expert, each once, found a, a"):
        build_space(SearchConfig(), ["a", "a"], density_methods=())
    with pytest.raises(UsageError, match="at least one search method, each once, found none"):
        make_space(methods=())
    with pytest.raises(UsageError, match="groups that hold each of a, b once, found a"):
        build_space(SearchConfig(), ["a", "b"], density_methods=(), groups={"g": ["a"]})
    with pytest.raises(UsageError, match="at most 20 weights to search, found 21: give groups"):
        build_space(SearchConfig(), [f"e{i}" for i in range(21)], density_methods=())


def test_up_to_20_experts_have_a_coefficient_each_more_share_one_by_first_category():
    few = {f"e{number}": ("hate",) for number in range(20)}
    assert weight_groups(few) is None
    many = {**few, "x": ("violence", "hate")}
    groups = weight_groups(many)
    assert groups == {"hate": sorted(few), "violence": ["x"]}
    space = build_space(SearchConfig(), sorted(many), density_methods=(), groups=groups)
    assert [name for name, _ in space.groups] == ["hate", "violence"]
    with pytest.raises(SafetyDPOError, match="a category of each of 21 experts, .* found none of 'y': train it again"):
        weight_groups({**few, "y": ()})


def test_methods_without_weights_are_asked_for_a_scale_only():
    config = SearchConfig(methods=("sum", "distill"), plain_scales={"distill": (1.0, 1.2)}, weight_range=(0.5, 0.9))
    space = build_space(config, EXPERTS, density_methods=(), unweighted_methods=("distill", "other"))
    assert space.unweighted_methods == ("distill",)
    plain = [one for one in plain_candidates(space) if one.method == "distill"]
    assert [(one.global_scale, dict(one.weights)) for one in plain] == [
        (1.0, {"hate": 1.0, "violence": 1.0}),
        (1.2, {"hate": 1.0, "violence": 1.0}),
    ]
    assert to_parameters(plain[1], space) == {"method": "distill", "global_scale:distill": 1.2}
    trial = optuna.trial.FixedTrial({"method": "distill", "global_scale:distill": 1.2})
    assert suggest(trial, space) == plain[1]


def test_ranks_and_blocks_are_asked_only_where_they_are_searched():
    settings = {
        "methods": ("sum",),
        "output_ranks": (4, 8),
        "block_groups": {"up": ("up_blocks",), "down": ("down_blocks", "conv_in")},
        "block_weight_range": (0.8, 1.2),
    }
    space = make_space(**settings)
    plain = plain_candidates(space)[0]
    blocks = (("conv_in", 1.0), ("down_blocks", 1.0), ("up_blocks", 1.0))
    assert (plain.rank, plain.block_weights) == (4, blocks)
    parameters = {"method": "sum", "global_scale:sum": 1.5, "weight:hate": 0.5, "weight:violence": 1.25, "rank": 8}
    parameters |= {"block_weight:down": 0.9, "block_weight:up": 1.1}
    candidate = suggest(optuna.trial.FixedTrial(parameters), space)
    assert candidate.rank == 8
    assert dict(candidate.block_weights) == {"conv_in": 0.9, "down_blocks": 0.9, "up_blocks": 1.1}
    assert to_parameters(candidate, space) == parameters
    assert Candidate.from_json(candidate.to_json()) == candidate
    assert is_inside(candidate, space)
    assert not is_inside(replace(candidate, rank=None), space)
    assert not is_inside(replace(candidate, block_weights=()), space)
    assert not is_inside(replace(candidate, global_scale=9.0), space)
    assert not is_inside(replace(candidate, method="ties"), space)


def test_a_candidate_without_rank_and_blocks_has_the_text_it_always_had():
    candidate = Candidate("ties", 1.0, (("hate", 1.0),), 0.3)
    assert candidate.to_json() == '{"density":0.3,"global_scale":1.0,"method":"ties","weights":{"hate":1.0}}'


def test_nobody_has_a_coefficient_of_its_own_if_none_is_wanted():
    """`weights` none: only the scale is left to search, for any number of experts."""
    experts = [f"e{number}" for number in range(30)]
    space = build_space(SearchConfig(methods=("sum",), weights="none"), experts, density_methods=())
    candidate = suggest(optuna.trial.FixedTrial({"method": "sum", "global_scale:sum": 1.2}), space)
    assert set(dict(candidate.weights).values()) == {1.0}
    assert to_parameters(candidate, space) == {"method": "sum", "global_scale:sum": 1.2}


def test_who_shares_a_coefficient_can_be_chosen():
    few = {"a": ("hate",), "b": ("hate",), "c": ("violence",)}
    assert weight_groups(few, weights="category") == {"hate": ["a", "b"], "violence": ["c"]}
    assert weight_groups(few, weights="expert") is None
    many = {f"e{number}": ("hate",) for number in range(21)}
    assert weight_groups(many, weights="none") is None
    assert weight_groups(many, weights="expert") is None


def test_methods_of_the_known_first_trials_are_prepared_for():
    assert first_methods(SearchConfig(methods=("co_merge",))) == ("co_merge",)
    known = SearchConfig(methods=("co_merge",), first_trials="known")
    assert first_methods(known) == ("co_merge", "sum", "average", "ties")
    space = build_space(SearchConfig(methods=("sum",)), EXPERTS, density_methods=("ties",))
    assert "co_merge" not in [one.method for one in known_candidates(space, density_methods=("ties",))]
