from __future__ import annotations

import pytest
from pydantic import ValidationError

from safetydpo.config.rungs import FewStepsRung, HeldOutRung
from safetydpo.config.schema import Config
from safetydpo.config.search import SearchConfig, SearchLimits

BEFORE = {
    "trials",
    "generation_size",
    "methods",
    "plain_scales",
    "scale_range",
    "scale_ranges",
    "weight_range",
    "density_range",
    "prompts_per_category",
    "neutral_prompts",
    "neighbour_prompts",
    "neutral_floor",
    "neighbour_floor",
    "unrecognisable_weight",
}


def test_later_settings_leave_the_identity_of_earlier_searches_alone():
    assert set(SearchConfig().model_dump(mode="json")) == BEFORE
    changed = SearchConfig(ladder=[{"kind": "held_out"}], finalists=3)
    assert set(changed.model_dump(mode="json")) == {*BEFORE, "ladder", "finalists"}


def test_a_ladder_is_read_back_as_it_was():
    config = SearchConfig(ladder=[{"kind": "held_out", "keep": 0.3}, {"kind": "few_steps", "steps": 2}])
    assert [type(rung) for rung in config.ladder] == [HeldOutRung, FewStepsRung]
    assert SearchConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"sampler": "cmaes"},
            r"identity\.search\.sampler 'cmaes' .* found 3 choices in identity\.search\.methods \['sum', 'ties', ",
        ),
        (
            {"sampler": "cmaes", "methods": ["sum"], "output_ranks": [4, 8]},
            r"identity\.search\.sampler 'cmaes' .* found 2 choices in identity\.search\.output_ranks \[4, 8\]: fix one",
        ),
        (
            {"sampler": "nsga2", "suggest": "async"},
            r"identity\.search\.suggest 'async' needs identity\.search\.sampler 'tpe', found 'nsga2'",
        ),
        (
            {"sampler": "nsga2", "generation_size": 1},
            r"'nsga2' needs identity\.search\.generation_size of at least 2 .* found 1",
        ),
        ({"block_groups": {"up": []}}, r"search\.block_groups\.up: expected at least one block, found none"),
        ({"block_groups": {"a": ["up"], "b": ["up"]}}, r"expected each block in one group, found 'up' in several"),
        ({"block_weight_range": [2.0, 1.0]}, r"search\.block_weight_range: expected 0 < low <= high, found \[2"),
        ({"ladder": [{"kind": "guess"}]}, "does not match any of the expected tags: 'held_out', 'few_steps'"),
        ({"ladder": [{"kind": "held_out", "keep": 0.0}]}, "greater than 0"),
        (
            {"ladder": [{"kind": "held_out", "timestep_range": [9, 1]}]},
            r"low <= high in timestep_range, found \[9",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused_naming_both(values, message):
    with pytest.raises(ValidationError, match=message):
        SearchConfig.model_validate(values)


def test_cmaes_takes_one_method_and_numbers():
    assert SearchConfig(sampler="cmaes", methods=["ties"], output_ranks=[8]).sampler == "cmaes"


def test_limits_that_mean_nothing_are_refused():
    assert SearchLimits(cost_budget=3.0, price_per_cpu_hour=0.05).cost_budget == 3.0
    with pytest.raises(ValidationError, match=r"cost_budget \(3\) needs execution\.search\.price_per_cpu_hour or"):
        SearchLimits(cost_budget=3.0)
    with pytest.raises(ValidationError, match=r"max_gpus \(0\.5\) must not be below execution\.gpus_per_worker \(1\)"):
        Config.model_validate({"execution": {"gpus_per_worker": 1, "search": {"max_gpus": 0.5}}})
