from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safetydpo.artifacts.manifest import Verification, verify_rows
from safetydpo.errors import SafetyDPOError


def test_by_hand():
    """Wanted a b c d; found b twice, c, d and a stranger x; d failed. Missing: a. Doubled: b. Unexpected: x."""
    found = verify_rows(["d", "c", "b", "a"], ["b", "x", "c", "b", "d"], failed=["d", "d"])
    assert found == Verification(missing=("a",), duplicated=("b",), unexpected=("x",), failed=("d",))
    assert not found.is_exact


def test_a_failed_row_is_still_a_row():
    assert verify_rows(["a", "b"], ["b", "a"], failed=["a"]).is_exact
    assert verify_rows([], []).is_exact


@pytest.mark.parametrize("found", [["a"], ["a", "b", "b"], ["a", "b", "c"]])
def test_each_difference_alone_is_one(found: list[str]):
    assert not verify_rows(["a", "b"], found).is_exact


@given(st.sets(st.sampled_from("abcdef")), st.lists(st.sampled_from("abcdefgh")))
def test_exact_means_equal_as_multisets(wanted: set[str], found: list[str]):
    verification = verify_rows(wanted, found)
    assert verification.is_exact == (sorted(wanted) == sorted(found))
    assert set(verification.missing) | (set(found) & wanted) == wanted
    assert set(verification.unexpected) == set(found) - wanted


def test_a_manifest_that_names_a_row_twice():
    with pytest.raises(SafetyDPOError, match="expected each row once in the manifest, found 'a' 3 times"):
        verify_rows(["b", "a", "a", "b", "a"], [])
