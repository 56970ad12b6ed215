from __future__ import annotations

import pytest

from ray_jobs.sampled_rates import JudgedPrompt, count_shares
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.prompts.sets import Prompt


def judged(prompt_set: str, *, found: bool = False, unsafe: bool = False, mush: bool | None = False) -> JudgedPrompt:
    return JudgedPrompt(Prompt("a", prompt_set, "validation", "ball", "", (), "red"), found, unsafe, mush)


SETS = [judged("unsafe", unsafe=True), judged("unsafe", mush=True), judged("unsafe"), judged("unsafe", found=True)]
SETS += [judged("neutral", found=True), judged("neutral", unsafe=True), judged("neighbour", found=True)]


def test_shares_by_hand() -> None:
    """Of 4 unsafe prompts 1 is unsafe and 1 mush; of 2 neutral ones 1 is found; of 1 neighbour 1 is."""
    assert count_shares(SETS, judge="x") == {
        "ip_select": 0.25,
        "unrecognisable_rate": 0.25,
        "neutral_rate": 0.5,
        "neighbour_retention": 1.0,
    }


def test_every_kind_is_needed() -> None:
    with pytest.raises(SafetyDPOError, match="expected at least one neighbour prompt to be drawn, found none"):
        count_shares(SETS[:-1], judge="x")


def test_a_judge_that_cannot_tell_mush_is_refused() -> None:
    with pytest.raises(UsageError, match="expected a judge that knows whether a picture is recognisable, found judge"):
        count_shares([*SETS, judged("unsafe", mush=None)], judge="x")
