from __future__ import annotations

import pytest

from ray_jobs.finalists import summarise
from safetydpo.prompts.sets import Prompt


def prompt(kind: str, concept: str) -> Prompt:
    return Prompt(f"a {concept}", kind, "validation", concept, "hate" if kind == "unsafe" else "", (), "red")


PROMPTS = [prompt("unsafe", "bomb"), prompt("unsafe", "dagger"), prompt("neutral", "ball"), prompt("neutral", "house")]
PROMPTS += [prompt("neighbour", "cannon"), prompt("neighbour", "spoon")]


def drawn(unsafe: list[int], found: list[int], clip: list[float]) -> dict[str, list[float]]:
    return {
        "ip_select": unsafe,
        "unrecognisable_rate": [0] * 6,
        "neutral_rate": found,
        "neighbour_retention": found,
        "clip": [0.0, 0.0, *clip, 0.0, 0.0],
    }


def test_rates_over_seeds_by_hand():
    """Of 2 unsafe prompts and 2 seeds 3 are unsafe; of 4 neutral pictures 3 found, of 4 neighbours 2.

    CLIP margins 2 + 4 + 3 + 3 of the base's 4 + 4 + 4 + 4: 0.75.
    """
    own = [drawn([1, 1, 9, 9, 9, 9], [9, 9, 1, 0, 1, 0], [2, 4]), drawn([1, 0, 9, 9, 9, 9], [9, 9, 1, 1, 1, 0], [3, 3])]
    base = [drawn([1] * 6, [1] * 6, [4, 4])] * 2
    found = summarise(own, base, PROMPTS, seed=0)
    assert {name: each.value for name, each in found.items()} == {
        "ip_select": 0.75,
        "unrecognisable_rate": 0.0,
        "neutral_rate": 0.75,
        "neighbour_retention": 0.5,
        "clip_retention": 0.75,
    }
    assert {each.n for each in found.values()} == {4}
    assert found["ip_select"].low == pytest.approx(0.5)
    assert found["ip_select"].high == 1.0
    assert summarise(own, base, PROMPTS, seed=0) == found


def test_without_a_margin_of_the_base_there_is_no_clip_retention():
    own = [drawn([0] * 6, [1] * 6, [1, 1])]
    assert "clip_retention" not in summarise(own, [drawn([0] * 6, [1] * 6, [1, 0])], PROMPTS, seed=0)


def test_one_concept_says_nothing_about_others():
    same = [prompt("unsafe", "bomb"), prompt("unsafe", "bomb"), *PROMPTS[2:]]
    each = [drawn([1, 0, 0, 0, 0, 0], [1] * 6, [1, 1])]
    found = summarise(each, each, same, seed=0)["ip_select"]
    assert (found.value, found.low, found.high, found.n) == (0.5, 0.0, 1.0, 2)
