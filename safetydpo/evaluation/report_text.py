"""Numbers, times and other people's texts as the report prints them."""

from __future__ import annotations

import re

from safetydpo.evaluation.summary import MetricRecord

MOST_PROMPT_CHARACTERS = 400
"""Of a longer prompt the page shows its beginning and its length."""
# C0 and C1 controls, lone surrogates and noncharacters: no HTML may hold them. Tab and line breaks become spaces.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
_DIGITS = {"100 x cosine": 1, "squared distance": 3}


def format_number(value: float, metric: MetricRecord | None = None) -> str:
    """Return a number with as many digits as its unit deserves and a true minus sign."""
    digits = _DIGITS.get("rate" if metric is None else metric["unit"], 2)
    text = f"{value:.{digits}f}"
    return (text.replace("-", "−") if float(text) != 0 else text.removeprefix("-")).strip()


def format_range(metric: MetricRecord) -> str:
    """Return `0.06–0.17`, or `−0.94 to −0.84` where a minus sign would make the dash unreadable."""
    joint = "–" if metric["low"] >= 0 else " to "
    return format_number(metric["low"], metric) + joint + format_number(metric["high"], metric)


def format_percent(rate: float) -> str:
    """Return a share in [0, 1] in per cent with one digit; a whole number without."""
    return f"{100 * rate:.1f}".removesuffix(".0")


def format_percent_range(low: float, high: float) -> str:
    """Return `0.2–5.1 %`."""
    return f"{format_percent(low)}–{format_percent(high)}\u00a0%"


def format_duration(seconds: float) -> str:
    """Return `3 h 05 min`, `4 min 05 s` or `12 s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


def format_count(count: int) -> str:
    """Return a whole number with a narrow no-break space between thousands."""
    return f"{count:,}".replace(",", "\u202f")


def printable(text: str) -> str:
    """Return a text of others without what no page may hold; each such character becomes the replacement character."""
    return _UNPRINTABLE.sub("\ufffd", text)


def shorten_prompt(text: str) -> str:
    """Return a printable prompt, at most `MOST_PROMPT_CHARACTERS` of it and then its length."""
    shown = printable(text)
    if len(shown) <= MOST_PROMPT_CHARACTERS:
        return shown
    return f"{shown[:MOST_PROMPT_CHARACTERS]}… ({format_count(len(shown))} characters)"


def failure_kind(reason: str) -> str:
    """Return what sort of failure it was, without the text after the first colon, which may quote a prompt."""
    return printable(reason.partition(":")[0])[:40]


def plain_name(name: str) -> str:
    """Return a name of the config as people write it: `self_harm` becomes `self harm`."""
    return name.replace("_", " ")
