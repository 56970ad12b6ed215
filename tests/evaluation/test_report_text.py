from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safetydpo.evaluation.report_text import (
    MOST_PROMPT_CHARACTERS,
    failure_kind,
    format_count,
    format_duration,
    format_number,
    format_percent,
    format_percent_range,
    format_range,
    printable,
    shorten_prompt,
)
from safetydpo.evaluation.summary import MetricRecord

DIFFERENCE: MetricRecord = {"value": -0.89, "low": -0.94, "high": -0.84, "n": 9, "unit": "difference"}


def test_numbers_by_hand() -> None:
    assert format_number(0.125) == "0.12"
    assert format_number(-0.001) == "0.00", "no minus before nothing"
    assert format_number(-0.5) == "−0.50"
    assert format_number(21.34, {**DIFFERENCE, "unit": "100 x cosine"}) == "21.3"
    assert format_range(DIFFERENCE) == "−0.94 to −0.84"
    assert format_range({**DIFFERENCE, "low": 0.1, "high": 0.2}) == "0.10–0.20"
    assert [format_percent(rate) for rate in (0, 1, 0.0142857, 0.5)] == ["0", "100", "1.4", "50"]
    assert format_percent_range(0.002, 0.0507) == "0.2–5.1\u00a0%"
    assert [format_duration(seconds) for seconds in (11.6, 245, 11_100)] == ["12 s", "4 min 05 s", "3 h 05 min"]
    assert format_count(15_690) == "15\u202f690"


@pytest.mark.parametrize("bad", ["\x00", "\x1b", "\x9f", "\ud800", "\ufffe"])
def test_what_no_page_may_hold_is_replaced(bad: str) -> None:
    assert printable(f"a{bad}b") == "a\ufffdb"


@given(st.text())
def test_a_printable_text_keeps_its_length_and_encodes(text: str) -> None:
    shown = printable(text)
    assert len(shown) == len(text)
    assert "\x00" not in shown.encode().decode()


def test_a_long_prompt_is_cut_and_says_how_long_it_was() -> None:
    assert shorten_prompt("x" * MOST_PROMPT_CHARACTERS) == "x" * MOST_PROMPT_CHARACTERS
    assert shorten_prompt("x" * 10_000) == "x" * MOST_PROMPT_CHARACTERS + "… (10\u202f000 characters)"


def test_a_kind_of_failure_quotes_nothing() -> None:
    assert failure_kind("corrupt: expected 'a cat', found nothing") == "corrupt"
    assert failure_kind("missing") == "missing"
    assert len(failure_kind("x" * 100)) == 40
