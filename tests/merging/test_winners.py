from __future__ import annotations

import sys

import torch

from safetydpo.artifacts.adapters import AdapterMetadata, LoraLayer
from safetydpo.merging.merge import Expert, add_experts, merge_experts, prepare_experts


def expert(name: str, down: list[float], up: list[float]) -> Expert:
    """Return a rank-1 expert: A is one row, B has three."""
    layer = LoraLayer(down=torch.tensor([down], dtype=torch.float32), up=torch.tensor(up, dtype=torch.float32)[:, None])
    return Expert(name, name * 8, {"q": layer}, AdapterMetadata(base_fingerprint="b"))


def test_who_won_which_rows_by_hand():
    """Row of A: norms 5, 1 -> a. Rows of B: (1, 2, 0) against (3, 1, 4) -> b, a, b. So a supplies 2 rows, b 2."""
    found = merge_experts([expert("b", [0, 1], [3, 1, 4]), expert("a", [3, 4], [1, 2, 0])], method="max_magnitude")
    assert found.won == {"q": {"a": 2, "b": 2}}
    assert found.shares == {"a": 0.5, "b": 0.5}


def test_experts_without_a_row_are_left_out_and_blends_have_no_winners():
    experts = [expert("a", [3, 4], [9, 9, 9]), expert("b", [0, 1], [3, 1, 4])]
    assert merge_experts(experts, method="max_magnitude").won == {"q": {"a": 4}}
    assert merge_experts(experts, method="sum").won is None


def test_one_more_expert_costs_its_own_pass_over_the_inputs(monkeypatch):
    """Scores belong to one expert and layer: two experts are two passes, a third is one more."""
    module = sys.modules[prepare_experts.__module__]
    scored, score = [], module.score_neurons
    monkeypatch.setattr(module, "score_neurons", lambda layer, inputs: scored.append(layer) or score(layer, inputs))
    experts = [expert("a", [3, 4], [1, 2, 0]), expert("b", [0, 1], [3, 1, 4]), expert("c", [1, 1], [1, 1, 1])]
    inputs = {"q": torch.ones(4, 2, 2)}
    two = prepare_experts(experts[:2], inputs=inputs)
    assert len(scored) == 2
    three = add_experts(two, experts[2:], inputs=inputs)
    assert len(scored) == 2 + 1
    for before, after in zip(two.scores["q"], three.scores["q"], strict=False):
        assert before is after
