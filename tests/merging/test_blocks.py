from __future__ import annotations

import pytest
import torch

from safetydpo.artifacts.adapters import AdapterMetadata, LoraLayer, adapter_hash
from safetydpo.errors import UsageError
from safetydpo.merging.algebra import delta
from safetydpo.merging.blocks import BLOCKS, assign_blocks
from safetydpo.merging.merge import Expert, MergeSettings, merge_prepared, merge_with, prepare_experts

NAMES = ("down_blocks.0.attn1.to_q", "mid_block.attn2.to_q", "up_blocks.1.attn1.to_q", "proj")


def make_expert(name: str, value: float) -> Expert:
    """Every layer of the expert is the 1 x 1 change `value`."""
    layers = {key: LoraLayer(torch.ones(1, 1), torch.full((1, 1), value)) for key in NAMES}
    return Expert(name, adapter_hash(layers), layers, AdapterMetadata("base"))


def merged(**settings: object) -> list[float]:
    """The change of each layer of the merge of 1 and 10."""
    prepared = prepare_experts([make_expert("a", 1.0), make_expert("b", 10.0)])
    chosen = {"method": "sum", **settings}
    layers = merge_with(prepared, MergeSettings(**chosen)).layers  # type: ignore[arg-type]
    return [float(delta(layers[name])) for name in NAMES]


def test_blocks_of_unets_and_transformers():
    names = [*NAMES, "transformer_blocks.3.attn.to_q", "single_transformer_blocks.0.attn.to_k"]
    blocks = assign_blocks(names, BLOCKS)
    assert [blocks.get(name) for name in names] == ["down", "mid", "up", None, "joint", "single"]
    assert assign_blocks(NAMES, ["mid"]) == {NAMES[1]: "mid"}


def test_blocks_by_patterns_and_by_first_parts():
    cross = {"cross": ("*.attn2.*",), "rest": ("*.attn1.*", "pro?")}
    found = assign_blocks(NAMES, cross, cross)
    assert [found[name] for name in NAMES] == ["rest", "cross", "rest", "rest"]
    assert assign_blocks(NAMES, ["down_blocks", "up_blocks.1", "proj"]) == {
        NAMES[0]: "down_blocks",
        NAMES[2]: "up_blocks.1",
        "proj": "proj",
    }


def test_a_layer_of_two_blocks_is_refused():
    blocks = {"x": ("mid*",), "y": ("*attn2*",)}
    with pytest.raises(UsageError, match=r"at most one block, found 'mid_block.attn2.to_q' in 'x' and 'y': change"):
        assign_blocks(NAMES, blocks, blocks)
    with pytest.raises(UsageError, match=r"in 'down' and 'down_blocks': change"):
        assign_blocks(NAMES, ["down", "down_blocks"])


def test_block_weights_by_hand():
    """1 + 10 = 11, times the global scale 2, times 0.5 in the up blocks and 0 in the middle; `proj` is in no block."""
    found = merged(global_scale=2.0, block_weights={"up": 0.5, "mid": 0.0})
    assert found == [22.0, 0.0, 11.0, 22.0]


def test_expert_block_weights_by_hand():
    """b has weight 3, and 0.5 of it in the down blocks, none in the middle: 1 + 15, 1 + 0, 1 + 30, 1 + 30."""
    found = merged(weights={"a": 1.0, "b": 3.0}, expert_block_weights={"b": {"down": 0.5, "mid": 0.0}})
    assert found == [16.0, 1.0, 31.0, 31.0]


@pytest.mark.parametrize("method", ["sum", "max_magnitude", "ties", "tsv", "linear"])
def test_a_block_in_which_no_expert_acts_is_left_alone(method):
    none = {name: {"mid": 0.0} for name in "ab"}
    found = merged(method=method, expert_block_weights=none, density=1.0)
    assert found[1] == 0.0
    assert all(value != 0.0 for index, value in enumerate(found) if index != 1)


def test_blocks_of_ones_own():
    found = merged(blocks={"first": ("down*", "mid*")}, block_weights={"first": 3.0})
    assert found == [33.0, 33.0, 11.0, 11.0]


def test_blocks_of_a_prepared_merge_may_be_first_parts_of_names():
    prepared = prepare_experts([make_expert("a", 1.0)])
    layers = merge_prepared(prepared, method="sum", block_weights={"down_blocks": 0.5, "up_blocks": 2.0}).layers
    assert [float(delta(layers[name])) for name in NAMES] == [0.5, 1.0, 2.0, 1.0]


def test_recipe_states_blocks_only_where_they_are_asked_for():
    prepared = prepare_experts([make_expert("a", 1.0)])
    assert "blocks" not in merge_with(prepared, MergeSettings("sum")).recipe
    recipe = merge_with(prepared, MergeSettings("sum", block_weights={"up": 0.5})).recipe
    assert recipe["blocks"] == recipe["expert_block_weights"] == {}
    assert recipe["block_weights"] == {"up": 0.5}


def test_blocks_that_are_not_there_are_refused():
    with pytest.raises(UsageError, match=r"that hold layers of the adapter \(down, .*\), found 'middle', which hol"):
        merged(block_weights={"middle": 1.0})
    with pytest.raises(UsageError, match=r"found 'x', which holds none: correct its name or its patterns"):
        merged(expert_block_weights={"a": {"x": 1.0}})
    with pytest.raises(UsageError, match=r"block weights of a, b, found some of 'c': correct its name"):
        merged(expert_block_weights={"c": {"up": 1.0}})
    with pytest.raises(UsageError, match=r"finite factors of blocks, found \{'up': inf\}"):
        merged(block_weights={"up": float("inf")})
    with pytest.raises(UsageError, match="a block in which an expert has a weight other than 0, found none: nothing"):
        merged(blocks={"all": ("*",)}, block_weights={"all": 0.0})
