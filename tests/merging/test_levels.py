from __future__ import annotations

import itertools

import pytest
import torch

from safetydpo.artifacts.adapters import AdapterMetadata, LoraLayer, adapter_hash
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.merging.algebra import delta, rank_of
from safetydpo.merging.levels import Level, category_groups, merge_in_levels
from safetydpo.merging.merge import Expert, MergeSettings, merge_with, output_rank, prepare_experts
from safetydpo.merging.registry import METHODS

SHAPES = {"a.to_q": (16, 12), "b.to_k": (14, 18)}
CATEGORIES = {"guns": "violence", "knives": "violence", "slurs": "hate", "bombs": "violence", "flags": "hate"}
GROUPS = {"violence": ["bombs", "guns", "knives"], "hate": ["flags", "slurs"]}


def make_expert(name: str, seed: int, *, rank: int = 2) -> Expert:
    generator = torch.Generator().manual_seed(seed)
    layers = {
        key: LoraLayer(torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator))
        for key, (d_in, d_out) in SHAPES.items()
    }
    return Expert(name, adapter_hash(layers), layers, AdapterMetadata("base", categories=(CATEGORIES[name],)))


@pytest.fixture(scope="module")
def experts() -> list[Expert]:
    return [make_expert(name, seed) for seed, name in enumerate(CATEGORIES)]


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(99)
    return {key: torch.randn(9, 3, d_in, generator=generator).half() for key, (d_in, _) in SHAPES.items()}


def test_categories_are_groups(experts):
    assert category_groups(experts) == GROUPS
    nameless = Expert("x", "h", experts[0].layers, AdapterMetadata("base"))
    with pytest.raises(UsageError, match="a category of each expert, .* found none of 'x': train it again"):
        category_groups([nameless])


def test_sums_of_sums_are_sums(experts):
    """2 (3 (bombs + guns + knives) + 3 (flags + slurs)) is 6 times the sum of all, at ranks 6 and 4 in between."""
    level = Level(GROUPS, MergeSettings("sum", global_scale=3.0))
    merged = merge_in_levels(experts, [level], MergeSettings("sum", global_scale=2.0))
    for key in SHAPES:
        expected = 6.0 * sum(delta(expert.layers[key]) for expert in experts)
        torch.testing.assert_close(delta(merged.result.layers[key]), expected, rtol=1e-4, atol=1e-4)
    assert {rank_of(layer) for layer in merged.parts[0, "violence"].layers.values()} == {6}
    assert [expert.num_merged for expert in sorted(merged.prepared.experts, key=lambda e: e.name)] == [2, 3]


def test_three_levels_by_hand():
    """1 x 1 changes 1 2 3 4: averages 1.5 and 3.5 in pairs, their sum 5, and one more level of one group, doubled."""
    names = ("guns", "knives", "slurs", "bombs")
    experts = []
    for value, name in enumerate(names, start=1):
        layers = {"q": LoraLayer(torch.ones(1, 1), torch.full((1, 1), float(value)))}
        experts.append(Expert(name, adapter_hash(layers), layers, AdapterMetadata("base")))
    levels = [
        Level({"one": names[:2], "two": names[2:]}, MergeSettings("average")),
        Level({"all": ["one", "two"]}, MergeSettings("sum")),
    ]
    merged = merge_in_levels(experts, levels, MergeSettings("sum", global_scale=2.0))
    assert float(delta(merged.result.layers["q"])) == 10.0
    assert set(merged.parts) == {(0, "one"), (0, "two"), (1, "all")}


def test_weights_name_the_experts_of_their_level(experts):
    weights = {name: float(index) for index, name in enumerate(sorted(CATEGORIES), start=1)}
    level = Level(GROUPS, MergeSettings("sum", weights=weights))
    merged = merge_in_levels(experts, [level], MergeSettings("sum", weights={"hate": 2.0, "violence": 1.0}))
    for key in SHAPES:
        expected = sum(
            weights[e.name] * (2.0 if e.name in GROUPS["hate"] else 1.0) * delta(e.layers[key]) for e in experts
        )
        torch.testing.assert_close(delta(merged.result.layers[key]), expected, rtol=1e-4, atol=1e-4)


def test_a_group_without_any_weight_is_left_out(experts):
    """As an expert of weight 0 is; a weight that names the group above is left out with it."""
    weights = {name: 0.0 if name in GROUPS["hate"] else 1.0 for name in CATEGORIES}
    level = Level(GROUPS, MergeSettings("ties", weights=weights, density=0.5))
    above = dict.fromkeys(GROUPS, 2.0)
    merged = merge_in_levels(experts, [level], MergeSettings("sum", weights=above))
    assert [expert.name for expert in merged.prepared.experts] == sorted(GROUPS.keys() - {"hate"})
    none = Level(GROUPS, MergeSettings("sum", weights=dict.fromkeys(CATEGORIES, 0.0)))
    with pytest.raises(UsageError, match="at least one expert with a weight other than 0, found none"):
        merge_in_levels(experts, [none], MergeSettings("sum"))


@pytest.mark.parametrize("below", sorted(METHODS.keys() - {"distill", "regmean"}))
def test_any_method_at_any_level_whatever_the_order(experts, inputs, below):
    """Selections by rows take category merges of one rank only; the others take what comes."""
    found = set()
    above = "co_merge" if METHODS[below].row_aligned else "ties"
    for order in itertools.islice(itertools.permutations(experts), 0, 120, 17):
        level = Level(GROUPS, MergeSettings(below, density=0.5))
        merged = merge_in_levels(order, [level], MergeSettings(above, density=0.5, output_rank=2), inputs=inputs)
        found.add(adapter_hash(merged.result.layers))
        assert {rank_of(layer) for layer in merged.result.layers.values()} == {2}
    assert len(found) == 1


def test_two_levels_keep_more_suppliers_than_one(experts, inputs):
    """What levels are for is measured elsewhere; here: each level states who supplies."""
    level = Level(GROUPS, MergeSettings("co_merge"))
    merged = merge_in_levels(experts, [level], MergeSettings("co_merge"), inputs=inputs)
    assert merged.result.shares is not None
    assert set(merged.result.shares) == {"hate", "violence"}
    shares = merged.parts[0, "violence"].shares
    assert shares is not None
    assert set(shares) == set(GROUPS["violence"])


def test_the_recipe_holds_those_of_the_categories(experts):
    level = Level(GROUPS, MergeSettings("ties", density=0.25))
    merged = merge_in_levels(experts, [level], MergeSettings("sum"))
    rows = {row["name"]: row for row in merged.result.recipe["experts"]}
    assert rows["hate"]["recipe"]["method"] == "ties"
    assert rows["hate"]["recipe"]["density"] == 0.25
    assert [row["name"] for row in rows["violence"]["recipe"]["experts"]] == GROUPS["violence"]
    assert merged.result.metadata(merged.prepared).categories == ("hate", "violence")


@pytest.mark.parametrize(("growth", "rank"), [(0.0, 4), (0.5, 9), (1.0, 20), (2 / 3, 12)])
def test_output_rank_grows_with_the_experts(experts, growth, rank):
    """4 * 5^(1/2) = 8.94, 4 * 5^(2/3) = 11.7, rounded up; a layer never gets more than it can use."""
    settings = MergeSettings("sum", output_rank=4, rank_growth=growth)
    prepared = prepare_experts(experts)
    assert output_rank(prepared, settings) == rank
    merged = merge_with(prepared, settings)
    assert {rank_of(layer) for layer in merged.layers.values()} == {min(rank, 10)}
    assert ("rank_growth" in merged.recipe) == (growth > 0)


def test_powers_are_not_rounded_up_by_their_rounding(experts):
    eight = [Expert(f"e{i}", f"h{i}", experts[0].layers, experts[0].metadata) for i in range(8)]
    assert output_rank(prepare_experts(eight), MergeSettings("sum", output_rank=4, rank_growth=2 / 3)) == 16


def test_output_rank_counts_the_experts_below(experts):
    """Growth 1 at rank 1: 3 and 2 components for the categories, 5 for all."""
    settings = MergeSettings("sum", output_rank=1, rank_growth=1.0)
    merged = merge_in_levels(experts, [Level(GROUPS, settings)], settings)
    assert {rank_of(layer) for layer in merged.parts[0, "violence"].layers.values()} == {3}
    assert {rank_of(layer) for layer in merged.result.layers.values()} == {5}


def test_what_makes_no_sense_is_refused(experts, inputs):
    total = MergeSettings("sum")
    with pytest.raises(UsageError, match="that work on any experts in levels, found 'distill', which is fitted"):
        merge_in_levels(experts, [Level(GROUPS, MergeSettings("distill"))], total)
    with pytest.raises(UsageError, match="groups that hold each of bombs, .* once, found bombs, guns, knives: correct"):
        merge_in_levels(experts, [Level({"violence": GROUPS["violence"]}, total)], total)
    with pytest.raises(UsageError, match="groups that hold each of"):
        merge_in_levels(experts, [Level({**GROUPS, "empty": []}, total)], total)
    with pytest.raises(UsageError, match="a weight for experts of this level, found one of 'hate': correct it"):
        merge_in_levels(experts, [Level(GROUPS, MergeSettings("sum", weights={"hate": 1.0}))], total)
    with pytest.raises(UsageError, match="a block weight for experts of this level, found one of 'hate'"):
        merge_in_levels(experts, [Level(GROUPS, MergeSettings("sum", expert_block_weights={"hate": {}}))], total)
    with pytest.raises(UsageError, match=r"rank growth in \[0, 1\], found 1.5"):
        merge_with(prepare_experts(experts), MergeSettings("sum", output_rank=2, rank_growth=1.5))
    with pytest.raises(UsageError, match="found rank_growth 0.5 and no output_rank: set both or neither"):
        merge_with(prepare_experts(experts), MergeSettings("sum", rank_growth=0.5))
    with pytest.raises(SafetyDPOError, match="experts disagree on LoRA rank"):
        merge_in_levels(experts, [Level(GROUPS, total)], MergeSettings("max_magnitude"))
    with pytest.raises(SafetyDPOError, match="layer inputs of the base model for merge method 'co_merge'"):
        merge_in_levels(experts, [Level(GROUPS, MergeSettings("co_merge"))], total)
