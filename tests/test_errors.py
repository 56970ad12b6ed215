from __future__ import annotations

import pytest

from safetydpo.errors import SafetyDPOError, UsageError, shown_name


def test_a_failure_ends_with_1_and_a_wrong_request_with_2():
    assert SafetyDPOError("the disk is full").exit_code == 1
    assert UsageError("no such method").exit_code == 2


def test_a_wrong_request_is_caught_as_one_of_our_errors():
    with pytest.raises(SafetyDPOError, match="^no such method$"):
        raise UsageError("no such method")


def test_names_in_a_list_are_plain_or_quoted_and_short():
    assert shown_name("angry devil") == "angry devil"
    assert shown_name("a\nerror: b") == "'a\\nerror: b'"
    long = shown_name("x" * 10_000)
    assert len(long) < 300
    assert long.endswith(" …")
