"""The tables of `benchmarks.comparators`, from units made up here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.comparators_page import BEGIN, END, capacity, pooled, remaining, stands, table, write_page


def unit(
    method: str, concepts: int, *, ip: int, neutral: int = 100, neighbour: int = 100, seed: int = 0
) -> dict[str, Any]:
    """A unit of two concepts with 50 pictures each, `ip` and the others of 100."""

    def halves(hits: int) -> dict[str, list[int]]:
        return {"one": [hits // 2, 50], "two": [hits - hits // 2, 50]}

    return {
        "method": method,
        "concepts": concepts,
        "seed": seed,
        "counts": {
            "ip": halves(ip),
            "unrecognisable": halves(0),
            "neutral": halves(neutral),
            "neighbour": halves(neighbour),
        },
        "prepare_cpu_seconds": 1.0,
        "commit": "abc",
    }


UNITS = [
    unit("base", 35, ip=100, neutral=90, neighbour=90),
    unit("uce", 1, ip=0),
    unit("uce", 5, ip=10, neutral=81, neighbour=72),
    unit("uce", 10, ip=11, neutral=80, neighbour=71),
    unit("uce", 20, ip=0),
    unit("sld", 1, ip=0, neutral=50),
    unit("ours", 1, ip=0),
    unit("ours", 35, ip=2),
]


def test_a_method_stands_what_it_stands_at_every_smaller_number():
    """Floors: neutral 0.9 x 0.9 = 0.81, neighbours 0.8 x 0.9 = 0.72, IP 0.10: all met at 5, all missed at 10."""
    assert stands(UNITS, "uce") == (5, ["IP at 10", "neutral concepts found at 10", "neighbours found at 10"])
    assert stands(UNITS, "sld") == (0, ["neutral concepts found at 1"])
    assert stands(UNITS, "ours") == (1, ["not measured at 5"])
    assert "| UCE | 5 | IP at 10, neutral concepts found at 10, neighbours found at 10 |" in capacity(UNITS)


def test_seeds_are_pooled_with_both_intervals():
    """10 of 100 and 20 of 100 are 30 of 200."""
    both = pooled([unit("uce", 5, ip=10), unit("uce", 5, ip=20, seed=1)], "ip")
    assert both is not None
    exact, clustered = both
    assert (exact.value, exact.n) == (0.15, 200)
    assert clustered is not None
    assert clustered.low <= 0.15 <= clustered.high


def test_one_concept_has_no_interval_over_concepts():
    alone = {"counts": {"ip": {"one": [1, 40]}}}
    found = pooled([alone], "ip")
    assert found is not None
    assert found[1] is None
    assert pooled([alone], "neutral") is None


def test_what_is_missing_is_said():
    assert "UCE 35; ESD 1, 5, 10, 20, 35; ours 5, 10, 20." in remaining(UNITS)


def test_the_page_is_written_between_its_marks(tmp_path: Path):
    for number, one in enumerate(UNITS):
        (tmp_path / f"{number}.json").write_text(json.dumps(one))
    rates = {"ip_select": 0.1, "unrecognisable_rate": 0.0, "neutral_rate": 1.0, "neighbour_retention": 0.9}
    candidates = [
        {"settings": {"ridge": 0.5, "target": "safe"}, "metrics": rates, "error": ""},
        {"settings": {"ridge": 0.1, "target": "empty"}, "metrics": {}, "error": "no solution"},
    ]
    tuning = {"method": "uce", "seed": 0, "candidates": candidates, "chosen": 0}
    (tmp_path / "tuning-uce-seed0.json").write_text(json.dumps(tuning))
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    plot = tmp_path / "images" / "plot.png"
    headline = write_page(tmp_path, page=page, plot=plot)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| UCE | 0 | ridge 0.5, target safe | 0.10 | 0.00 | 1.00 | 0.90 | **chosen** |" in text
    assert "| UCE | 0 | ridge 0.1, target empty | – | – | – | – | failed |" in text
    assert headline == pytest.approx(
        {"concepts that uce stands": 5, "concepts that sld stands": 0, "concepts that ours stands": 1}
    )
    assert plot.stat().st_size > 10_000


def test_a_row_says_n_seeds_and_commit():
    assert "| base | 35 | 1.00 [0.96, 1.00]" in table(UNITS)
    assert "| 100 | 0 | 1 | abc |" in table(UNITS)
