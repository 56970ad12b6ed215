from __future__ import annotations

from pathlib import Path

import pytest

from safetydpo.config.experts import ExpertsConfig, GroupQuery
from safetydpo.config.load import load_config
from safetydpo.errors import UsageError

SMOKE = Path(__file__).resolve().parents[2] / "configs" / "smoke.yaml"


def test_what_came_later_is_left_out_of_a_dump_at_its_default():
    """Keys of runs hash the dump: it is what it was before there were groups."""
    assert ExpertsConfig().model_dump(mode="json") == {
        "group_by": "category",
        "all_single": True,
        "all_single_step_factor": 2.0,
    }
    assert load_config(SMOKE).identity.prompts.model_dump(mode="json").keys() == {
        "source",
        "categories",
        "pairs_per_category",
        "retention_prompts",
    }


def test_groups_stand_in_a_file_or_an_override():
    setting = "identity.experts.groups={sharp-things: {concept: [axe, dagger], text: ['on red']}}"
    experts = load_config(SMOKE, ["identity.experts.group_by=none", setting]).identity.experts
    assert experts.groups == {"sharp-things": GroupQuery(concept=("axe", "dagger"), text=("on red",))}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["groups={all_single: {concept: [axe]}}"], "expected another name than 'all_single', which is the adapter"),
        (
            ["groups={hate: {concept: [axe]}}"],
            "expected each name once, found 'hate', which is also the expert of that",
        ),
        (["groups={axes: {}}"], "groups.axes: expected at least one of category, concept, source and text, found none"),
        (["groups={axes: {concept: []}}"], "expected at least one of category, concept, source and text, found none"),
        (["groups={Axes!: {concept: [axe]}}"], "expected a text that matches"),
        (["groups={axes: {colour: [red]}}"], "expected known keys only, found 'identity.experts.groups.axes.colour'"),
        (["groups={axes: {concept: [axe, axe]}}"], "expected each value once, found 'axe' 2 times"),
        (["groups={axes: {text: ['  ']}}"], "at least 1 character"),
        (
            ["group_by=none", "all_single=false"],
            "expected an expert to train, found group_by 'none', no groups and all",
        ),
        (["group_by=colour"], "expected 'category', 'concept' or 'none'"),
        (["min_pairs=0"], "identity.experts.min_pairs: expected greater than or equal to 1"),
    ],
)
def test_what_is_no_group_is_refused_by_name(settings: list[str], message: str):
    with pytest.raises(UsageError) as caught:
        load_config(SMOKE, [f"identity.experts.{setting}" for setting in settings])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_experts_per_category_a_group_may_bear_a_categorys_name():
    setting = "identity.experts.groups={hate: {category: [hate]}}"
    assert "hate" in load_config(SMOKE, ["identity.experts.group_by=none", setting]).identity.experts.groups
