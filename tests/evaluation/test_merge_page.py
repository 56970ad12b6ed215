"""Tables and plots of synthetic records."""

from __future__ import annotations

import struct

from safetydpo.evaluation.merge_page import Measured, merge_page, merge_short_page
from safetydpo.evaluation.merge_plots import draw_plots
from tests.evaluation.measured_merges import BROKEN, GOOD, WEAK, make_merge, make_tally


def measured(units: list, **changes: object) -> Measured:
    settings = {
        "num_planned": 30,
        "retention": 0.9,
        "screen_count": 10,
        "counts": (1, 10),
        "factor_counts": (7,),
        "methods": ("ties", "sum"),
        "first_seed": 0,
    }
    return Measured(units=units, **{**settings, **changes})


LOST = make_tally(0, 2, 8, 8)
"""Retention 0.8: halfway to the base (1, 1) at 0.9, so IP 0.5 and failed 0.6."""
UNITS = [
    make_merge("sum", full=(LOST, None, None), tested=LOST),
    make_merge("ties"),
    make_merge("ties", seed=1, tested=WEAK),
    make_merge("ties", 1),
    make_merge("ties", 7, factor="rank_2r"),
    make_merge("all_single", 7, factor="rank_sum", tested=BROKEN),
]


def test_the_screen_is_sorted_by_validation() -> None:
    page = merge_page(measured(UNITS))
    assert page.startswith("6 of 30 units are measured, at commit 0123456; 6 minutes of one core.")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert rows[0] == (
        "| `ties` | 0.5, 0.3 | 0.10 | 0.20 | 0.10 [0.00, 0.45] | 0.10 | 0.80 | 0.95 | 1.00 | 0.90 | 0.90 | 0.90 | 0.25 "
        "| 60 |"
    )
    assert rows[1].startswith("| `sum` | 0.5 | 0.50 | 0.60 | 0.00 [0.00, 0.31] | 0.20 | 0.80 | 0.80 |")
    assert "n = 10 unsafe, 10 neutral, 10 neighbour prompts" in page


def test_the_grid_pools_seeds() -> None:
    """`ties`: seeds with IP 1 and 5 of 10: mean 0.3; failed 0.2 and 0.5; 6 of 20 pooled."""
    page = merge_page(measured(UNITS))
    assert "| `ties` | 0.10 / 0.20 | 0.30 / 0.35 (0.20 to 0.50) |" in page
    assert "0.30 [0.12, 0.54], 0.97 (n = 20)" in page or "0.30 [0.12, 0.54], 0.98 (n = 20)" in page
    assert "| `sum` | – | 0.50 / 0.60 |" in page


def test_factors_name_what_was_changed() -> None:
    page = merge_page(measured(UNITS), images=[("images/x.png", "a plot")])
    assert "| `ties` | output rank 2r | 0.10 / 0.20; 0.10 [0.00, 0.45], 0.95 |" in page
    assert "| `all_single` | rank: the sum |" in page
    assert "![a plot](images/x.png)" in page


def test_suppliers_over_numbers_of_experts_are_shown_where_records_say_them() -> None:
    """Seeds with 2.5 and 3.5 suppliers a layer: 3.0 on average; a blend has none, and a factor is another matter."""
    known = [
        make_merge("co_merge", 1, suppliers=1.0),
        make_merge("co_merge", suppliers=2.5),
        make_merge("co_merge", seed=1, suppliers=3.5),
        make_merge("element", suppliers=9.25),
        make_merge("co_merge", factor="independent", suppliers=7.0),
    ]
    page = merge_page(measured([*UNITS, *known]))
    assert (
        "| method | 1 expert | 10 experts |\n|---|---|---|\n| `co_merge` | 1.0 | 3.0 |\n| `element` | – | 9.2 |\n"
    ) in page
    assert "Distinct suppliers" not in merge_page(measured(UNITS))


def test_what_is_not_measured_is_left_out() -> None:
    page = merge_page(measured([make_merge("ties", 1)]))
    assert "Screen" not in page
    assert "One factor" not in page


def test_the_short_page_names_the_best() -> None:
    text = merge_short_page(measured(UNITS), link="docs/merging.md")
    assert "best `ties` 0.20, `sum` 0.60" in text
    assert "at retention 0.9, over numbers of experts, seeds 0, 1 (mean, least to most)" in text
    assert "| `ties` | 0.10 / 0.20 | 0.30 / 0.35 (0.20 to 0.50) |" in text
    assert text.rstrip().endswith("[docs/merging.md](docs/merging.md).")


def test_the_short_page_tells_what_one_training_on_everything_reaches() -> None:
    """`all_single` of 7 with IP 0 and 9 of 10 unrecognisable keeps 0.4: mixed with the base (1, 1) a sixth of the way
    to 0.9, IP 1 - 1/6 = 0.83 and failed 1 - 0.1/6 = 0.98; the good one keeps 0.95."""
    text = merge_short_page(measured([*UNITS, make_merge("all_single", 7)]))
    told = "7 concepts 0.10 / 0.20 at the rank of an expert, 0.83 / 0.98 at the sum of their ranks and a rate"
    assert f"as the experts together (`all_single`, seed 0): {told} as many times smaller." in text
    assert "Without any merge" not in merge_short_page(measured(UNITS[:4]))


def test_plots_are_pictures_and_equal_ones_each_time() -> None:
    drawn = draw_plots(measured(UNITS))
    assert set(drawn) == {"merging-screen.png", "merging-experts.png"}
    for data, description in drawn.values():
        assert data.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", data[16:24])
        assert width > 600 < height * 4
        assert "0.9" in description or "retention" in description
    assert draw_plots(measured(UNITS)) == drawn
    assert draw_plots(measured([make_merge("ties", 5, tested=GOOD)])) == {}
