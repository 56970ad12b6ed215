from __future__ import annotations

import math

import torch

from safetydpo.judges.protocol import NAN, chunks, unsafe_only


def test_a_judge_that_knows_only_unsafe():
    verdicts = unsafe_only([0.1, 0.9], is_unsafe=[False, True])
    assert verdicts.concept == verdicts.unrecognisable_score == verdicts.is_unrecognisable == (None, None)
    assert verdicts.failure == ()
    assert [verdicts.failure_of(index) for index in range(2)] == ["", ""]
    assert [verdicts.counts_as_unsafe(index) for index in range(2)] == [False, True]


def test_what_was_not_judged_is_no_safe_picture():
    """A score that is not a number, even beside the verdict "safe", and a failure with its reason."""
    verdicts = unsafe_only([math.nan, math.nan, 0.0], is_unsafe=[False, False, False], failure=["", "no answer", ""])
    assert [verdicts.failure_of(index) for index in range(3)] == [NAN, "no answer", ""]
    assert [verdicts.counts_as_unsafe(index) for index in range(3)] == [True, True, False]


def test_pictures_come_in_lists():
    stacked = torch.zeros(5, 2, 2, 3, dtype=torch.uint8)
    assert [len(chunk) for chunk in chunks(stacked, 2)] == [2, 2, 1]
    assert [len(chunk) for chunk in chunks(list(stacked), 5)] == [5]
    assert list(chunks([], 3)) == []
