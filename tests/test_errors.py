from __future__ import annotations

import pytest

from safetydpo.errors import SafetyDPOError, UsageError


def test_a_failure_ends_with_1_and_a_wrong_request_with_2():
    assert SafetyDPOError("the disk is full").exit_code == 1
    assert UsageError("no such method").exit_code == 2


def test_a_wrong_request_is_caught_as_one_of_our_errors():
    with pytest.raises(SafetyDPOError, match="^no such method$"):
        raise UsageError("no such method")
