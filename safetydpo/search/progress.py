"""How far a search is, from what its logs say. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from safetydpo.search.budget import Span, Spend, spend_of


@dataclass(frozen=True)
class Progress:
    """What somebody who watches a search sees.

    Attributes:
        ended: trials that have ended, stopped and failed ones too.
        trials: in all.
        seconds_left: until the last trial, at the pace so far; None = not known yet.
        spend: so far.
    """

    ended: int
    trials: int
    seconds_left: float | None
    spend: Spend


def progress_of(*, ended: int, trials: int, spans: Sequence[Span], price_per_second: float) -> Progress:
    """Return how far a search is.

    `seconds_left = busy seconds so far / trials that ended * trials left`: what it waited between two commands does
    not count, and however many ran side by side are taken to go on doing so.
    """
    spend = spend_of(spans, price_per_second=price_per_second)
    left = spend.busy_seconds / ended * (trials - ended) if ended else None
    return Progress(ended, trials, left, spend)
