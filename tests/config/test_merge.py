from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from safetydpo.config.merge import MergeConfig
from safetydpo.config.schema import Config

ADDED: dict[str, Any] = {
    "rank_growth": 0.5,
    "weights": {"hate": 0.5},
    "blocks": {"cross": ["*.attn2.*"]},
    "block_weights": {"up": 0.5},
    "expert_block_weights": {"hate": {"up": 0.0}},
    "within_category": {"method": "ties"},
    "della_window": 0.1,
    "breadcrumbs_outliers": 0.05,
}


@pytest.mark.parametrize("mode", ["json", "python"])
def test_settings_that_came_later_are_left_out_of_a_dump_at_their_defaults(mode: Any):
    """Keys of merges and identities of runs hash that dump."""
    dump = Config().model_dump(mode=mode)["identity"]["merge"]
    assert set(dump) == set(MergeConfig.model_fields) - set(ADDED)


@pytest.mark.parametrize("name", sorted(ADDED))
def test_each_of_them_is_in_the_dump_once_it_is_set(name: str):
    config = MergeConfig.model_validate({name: ADDED[name], "output_rank": 4})
    dump = config.model_dump(mode="json")
    assert name in dump
    assert MergeConfig.model_validate(dump) == config


def test_a_rank_grows_from_a_rank():
    with pytest.raises(ValidationError, match=r"identity.merge.rank_growth \(0.5\) needs identity.merge.output_rank"):
        MergeConfig(rank_growth=0.5)
    with pytest.raises(
        ValidationError, match=r"within_category.rank_growth \(1\) needs identity.merge.within_category"
    ):
        MergeConfig.model_validate({"within_category": {"rank_growth": 1}})
    assert MergeConfig(rank_growth=0.5, output_rank=4).rank_growth == 0.5


@pytest.mark.parametrize(
    "setting",
    [
        {"rank_growth": 1.1, "output_rank": 2},
        {"weights": {"hate": "nan"}},
        {"block_weights": {"up": "inf"}},
        {"blocks": {"none": []}},
        {"della_window": -0.1},
        {"breadcrumbs_outliers": 1.0},
        {"within_category": {"density": 0}},
        {"within_category": {"levels": 3}},
    ],
)
def test_numbers_out_of_range_are_refused(setting: dict[str, Any]):
    with pytest.raises(ValidationError):
        MergeConfig.model_validate(setting)
