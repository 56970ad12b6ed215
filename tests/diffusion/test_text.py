from __future__ import annotations

import logging

import pytest
import torch
from transformers import CLIPTextModel

from safetydpo.diffusion.text import PromptTokens, TextTower, joint_ids, joint_table, split_embeddings
from tests.diffusion.tiny_models import _clip, _t5, build_t5_tokenizer
from tests.tiny import MAX_TOKENS, build_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def towers() -> list[TextTower]:
    torch.manual_seed(0)
    clip = TextTower(_clip(CLIPTextModel, 16).eval(), build_tokenizer(), device=CPU)
    t5 = TextTower(_t5().eval(), build_t5_tokenizer(), device=CPU, max_tokens=12)
    return [clip, t5]


def test_the_shortest_limit_counts_and_cut_prompts_are_counted(towers, caplog: pytest.LogCaptureFixture):
    assert [tower.num_tokens for tower in towers] == [MAX_TOKENS, 12]
    with caplog.at_level(logging.WARNING):
        assert towers[1].tokenize(["a red ball", "a red ball " * 9]).ids.shape == (2, 12)
    assert "1 of 2 prompts were cut to the model's 12 tokens" in caplog.text


def test_joint_ids_count_on_where_the_vocabulary_before_ends(towers):
    ids, vocabulary = joint_ids(towers, ["a red ball"]), towers[0].table.shape[0]
    assert torch.equal(ids[:, :MAX_TOKENS], towers[0].tokenize(["a red ball"]).ids)
    assert torch.equal(ids[:, MAX_TOKENS:] - vocabulary, towers[1].tokenize(["a red ball"]).ids)
    table = joint_table(towers)
    assert table.shape == (vocabulary + towers[1].table.shape[0], towers[1].table.shape[1])
    assert torch.equal(table[:vocabulary, :16], towers[0].table)
    assert not table[:vocabulary, 16:].any()
    assert torch.equal(table[vocabulary:], towers[1].table)
    assert joint_table(towers[:1]) is towers[0].table


def test_embeddings_in_place_of_the_lookup_give_the_same_states(towers):
    """And the lookup is itself again afterwards."""
    ids = joint_ids(towers, ["a red ball", "a dagger"])
    for tower, tokens in zip(towers, split_embeddings(towers, joint_table(towers)[ids], ids), strict=True):
        wanted = tower.run(tower.tokenize(["a red ball", "a dagger"]))[0]
        assert torch.equal(tower.run(tokens)[0], wanted)
        zeros = PromptTokens(tokens.ids, embeddings=torch.zeros_like(tokens.embeddings))
        assert not torch.equal(tower.run(zeros)[0], wanted)
        assert torch.equal(tower.run(tower.tokenize(["a red ball", "a dagger"]))[0], wanted)
