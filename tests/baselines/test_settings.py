from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safetydpo.baselines.registry import COMPARATORS, find_comparator
from safetydpo.baselines.settings import Choice, Range, Space
from safetydpo.errors import UsageError

SPACE = Space(
    settings={"scale": Range(1.0, 100.0, log=True), "kind": Choice(("x", "u")), "steps": Range(1, 9, whole=True)},
    first=({"scale": 2.0, "kind": "u", "steps": 3},),
    drawn={"scale": Range(10.0, 100.0, log=True), "kind": Choice(("x", "u"))},
)


def test_known_settings_come_first_and_what_is_not_drawn_keeps_its_value():
    found = SPACE.candidates(6, run_seed=0, name="any")
    assert found[0] == SPACE.first[0]
    assert {one["steps"] for one in found} == {3}
    assert all(10.0 <= float(one["scale"]) <= 100.0 for one in found[1:])
    assert len({one["scale"] for one in found[1:]}) == 5
    assert SPACE.candidates(1, run_seed=0, name="any") == found[:1]


@given(st.integers(1, 12), st.integers(0, 5))
def test_more_candidates_leave_the_first_ones_as_they_were(count: int, seed: int):
    assert SPACE.candidates(12, run_seed=seed, name="any")[:count] == SPACE.candidates(count, run_seed=seed, name="any")


@pytest.mark.parametrize("name", COMPARATORS)
def test_every_candidate_is_one_that_the_comparator_takes(name: str):
    comparator = find_comparator(name)
    assert comparator.paper
    for settings in comparator.space.candidates(40, run_seed=0, name=name):
        comparator.space.check(settings, name=name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"more": 1.0}, "expected settings scale, kind, steps of comparator 'any', found 'more': take it out"),
        ({"kind": "y"}, "expected one of x, u for setting 'kind' of comparator 'any', found 'y'"),
        ({"scale": 0.5}, r"expected a number in \[1, 100\] for setting 'scale' of comparator 'any', found 0.5"),
        ({"scale": "x"}, "for setting 'scale' of comparator 'any', found 'x'"),
        ({"steps": 2.5}, r"expected a whole number in \[1, 9\] for setting 'steps' of comparator 'any', found 2.5"),
    ],
)
def test_wrong_settings_are_refused(change: dict[str, float | str], message: str):
    with pytest.raises(UsageError, match=message):
        SPACE.check({**SPACE.first[0], **change}, name="any")


def test_missing_settings_are_refused():
    with pytest.raises(UsageError, match="expected a setting 'scale' of comparator 'any', found none"):
        SPACE.check({"kind": "x", "steps": 1}, name="any")


def test_an_unknown_comparator_is_refused():
    with pytest.raises(UsageError, match="expected a comparator of negative_prompt, sld, uce, esd, found 'ucd'"):
        find_comparator("ucd")
