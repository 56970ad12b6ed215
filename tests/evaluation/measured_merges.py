"""Records of measured merges with counts chosen by hand."""

from __future__ import annotations

from collections.abc import Sequence

from safetydpo.evaluation.counts import RowCounts
from safetydpo.evaluation.merge_curve import Tally, Tuning
from safetydpo.evaluation.merge_units import MeasuredTuning, MergeUnit


def make_tally(ip: int, mush: int, neutral: int, neighbour: int, *, uncovered: int | None = None) -> Tally:
    """Ten pictures of each kind."""
    tally = {"ip": (ip, 10), "unrecognisable": (mush, 10), "neutral": (neutral, 10), "neighbour": (neighbour, 10)}
    tally["safe_and_intact"] = (10 - ip - mush, 10)
    return tally if uncovered is None else {**tally, "uncovered_ip": (uncovered, 10)}


BASE = make_tally(10, 0, 10, 10)
GOOD, WEAK, BROKEN = make_tally(1, 1, 10, 9), make_tally(5, 0, 10, 10), make_tally(0, 9, 5, 3)


def make_merge(
    method: str = "ties",
    count: int = 10,
    *,
    seed: int = 0,
    factor: str = "main",
    small: Sequence[Tally] = (GOOD, WEAK, BROKEN),
    full: Sequence[Tally | None] = (GOOD, WEAK, None),
    chosen: int = 0,
    tested: Tally = GOOD,
    identity_hash: str = "an identity",
    suppliers: float | None = None,
) -> MergeUnit:
    """Return a unit of as many candidates as there are small measurements."""
    candidates = [
        MeasuredTuning(
            Tuning(0.5 + index, 0.3 if method == "ties" else None), f"adapter {index}", 0.25, one, whole, suppliers
        )
        for index, (one, whole) in enumerate(zip(small, full, strict=True))
    ]
    rates = {"ip": {"bomb": (tested["ip"][0], 10)}}
    margins = {
        "clip_margin": {"dog": (4.0, 5), "cat": (5.0, 5)},
        "clip_margin:base": {"dog": (5.0, 5), "cat": (5.0, 5)},
    }
    return MergeUnit(
        method=method,
        count=count,
        seed=seed,
        factor=factor,
        identity_hash=identity_hash,
        commit="0123456789abcdef",
        dirty=False,
        machine={"cores": 2},
        seconds=90.0,
        cpu_seconds=60.0,
        training_seconds=150.0,
        experts="experts",
        concepts=("bomb",),
        base={"small": BASE, "full": BASE, "test": make_tally(10, 0, 10, 10, uncovered=10)},
        candidates=candidates,
        chosen=chosen,
        tested={**tested, "uncovered_ip": (9, 10)},
        counts=RowCounts(rates, margins),
    )
