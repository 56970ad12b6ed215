from __future__ import annotations

import copy
from typing import Any

import pytest

from safetydpo.evaluation.report import render_report
from safetydpo.evaluation.results import (
    check_targets,
    expert_matrix,
    format_metric,
    headline_row,
    results_markdown,
    results_table,
    seeds_table,
)
from safetydpo.evaluation.rows import RowSource
from safetydpo.evaluation.summary import dump_summary, parse_summary
from tests.evaluation.synthetic import CATEGORIES, SOURCES, make_summary


@pytest.fixture(scope="module")
def summary() -> Any:
    return make_summary()


def set_value(summary: Any, name: str, metric: str, value: float) -> None:
    for row in summary["rows"]:
        if row["name"] == name:
            row["metrics"][metric] = {"value": value, "low": value, "high": value, "n": 140, "unit": "rate"}


def test_a_metric_as_text_by_hand() -> None:
    assert format_metric({"value": 0.125, "low": 0.0811, "high": 0.2, "n": 9, "unit": "rate"}) == "0.12 [0.08, 0.20]"
    assert format_metric({"value": 21.34, "low": 20, "high": 22, "n": 9, "unit": "100 x cosine"}) == "21.3 [20.0, 22.0]"
    assert format_metric(None) == "–"


def test_table_has_one_row_per_model(summary: Any) -> None:
    table = results_table(summary)
    assert [row[0] for row in table.rows] == [source.name for source in SOURCES]
    assert {len(row) for row in table.rows} == {len(table.header)}
    assert table.rows[0][1] == "140"
    expert = table.rows[1]
    assert expert[table.header.index("neutral found\u00a0↑")] == "–"
    assert seeds_table(summary).rows == ()


def test_the_matrix_says_which_cells_are_an_experts_own() -> None:
    """An expert of its name's category says no more; one of another group carries its categories."""
    knives = RowSource("expert:knives-1", "expert", "9" * 64, 8, 1.0, categories=("violence", "self_harm"))
    plain = RowSource("expert:hate", "expert", "8" * 64, 8, 1.0, categories=("hate",))
    summary = make_summary(sources=(SOURCES[0], plain, knives))
    rows = {row["name"]: row for row in summary["rows"]}
    assert "categories" not in rows["expert:hate"]
    assert rows["expert:knives-1"].get("categories") == ["violence", "self_harm"]
    assert parse_summary(dump_summary(summary)) == summary
    matrix = expert_matrix(summary)
    assert matrix is not None
    assert matrix.own == ((), ("hate",), ("violence", "self_harm"))
    page = render_report(summary)
    row = page[page.index('<th scope="row">knives-1</th>') :].split("</tr>")[0]
    assert [" own" in cell for cell in row.split("<td")[1:]] == [
        name in ("violence", "self_harm") for name in matrix.categories
    ]


def test_seeds_are_pooled_in_the_table_and_listed_below() -> None:
    two = make_summary(seeds=(0, 1), sources=(SOURCES[0], SOURCES[-1]))
    assert [row[1] for row in results_table(two).rows] == ["280", "280"]
    assert [row[1] for row in seeds_table(two).rows][:2] == ["0", "1"]
    assert "Single seeds:" in results_markdown(two)


def test_markdown_has_equal_columns_and_names_failures(summary: Any) -> None:
    text = results_markdown(summary)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert len(lines) == len(SOURCES) + 2
    assert "1 pictures failed and count against their row: ties / unsafe-3 / seed 0 (corrupt: not a PNG)" in text
    hostile = copy.deepcopy(summary)
    hostile["failed_images"][0]["reason"] = "<script>|x"
    assert "&lt;script>\\|x" in results_markdown(hostile)


def test_matrix_starts_with_base_and_keeps_the_category_order(summary: Any) -> None:
    matrix = expert_matrix(summary)
    assert matrix is not None
    assert matrix.categories == CATEGORIES
    assert [name for name, _ in matrix.rows] == ["base", *(f"expert:{name}" for name in CATEGORIES)]
    own = [cells[index] for index, (_, cells) in enumerate(matrix.rows[1:])]
    assert all(metric is not None and metric["value"] < 0.5 for metric in own)
    without = {**summary, "rows": [row for row in summary["rows"] if row["kind"] != "expert"]}
    assert expert_matrix(without) is None


def test_matrix_shows_what_experts_do_to_what_they_should_leave_alone(summary: Any) -> None:
    assert expert_matrix(summary).retained == ()  # type: ignore[union-attr]
    assert "was not measured" in render_report(summary)
    measured = make_summary(sources=SOURCES[:3], expert_retention=True)
    matrix = expert_matrix(measured)
    assert matrix is not None
    assert [[metric["n"] for metric in row if metric] for row in matrix.retained] == [[56, 70]] * 3
    page = render_report(measured)
    assert "neighbours kept ↑" in page
    assert "was not measured" not in page


def test_more_experts_than_rows_are_means_per_category_by_hand(summary: Any) -> None:
    """Sixteen experts of hate at 0.2 and sixteen at 0.4 (mean 0.3, from 0.2 to 0.4), one of violence."""
    template = next(row for row in summary["rows"] if row["name"] == "expert:hate")
    many = [copy.deepcopy(template) for _ in range(33)]
    for number, row in enumerate(many):
        row["name"] = f"expert:e{number:02d}"
        row["categories"] = ["violence"] if number == 32 else ["hate", "sexual"]
        set_metric(row, "ip:hate", 0.2 if number % 2 else 0.4)
    matrix = expert_matrix({**summary, "rows": [summary["rows"][0], *many]})
    assert matrix is not None
    assert [name for name, _ in matrix.rows] == ["base", "expert:hate (32)", "expert:violence (1)"]
    assert matrix.num_grouped == 33
    assert matrix.own == ((), ("hate",), ("violence",))
    mean = matrix.rows[1][1][matrix.categories.index("hate")]
    assert mean is not None
    assert (mean["value"], mean["low"], mean["high"]) == (pytest.approx(0.3), 0.2, 0.4)
    assert mean["n"] == 32 * template["metrics"]["ip:hate"]["n"]
    assert expert_matrix({**summary, "rows": many[:30]}).num_grouped is None  # type: ignore[union-attr]
    assert "There are 33 experts: each row is the mean" in render_report(
        {**summary, "rows": [summary["rows"][0], *many]}
    )


def set_metric(row: Any, name: str, value: float) -> None:
    row["metrics"][name] |= {"value": value, "low": value, "high": value}


def test_headline_is_the_better_of_the_two_named_merges(summary: Any) -> None:
    assert headline_row(summary)["name"] == "searched"  # type: ignore[index]
    other = copy.deepcopy(summary)
    # `sum` is safer still, yet not one of the two; co_merge wins once it meets as many targets with less IP.
    set_value(other, "searched", "ip", 0.5)
    for metric, value in (("ip", 0.1), ("safe_and_intact_rate", 0.9), ("clip_retention", 1.0), ("neutral_rate", 1.0)):
        set_value(other, "co_merge", metric, value)
    assert headline_row(other)["name"] == "co_merge"  # type: ignore[index]
    only_base = {**summary, "rows": summary["rows"][:1]}
    assert headline_row(only_base) is None


def test_targets_by_hand(summary: Any) -> None:
    """Base mush 0.02 allows 0.07; base neutral 0.80 asks 0.72; an unmeasured retention is neither met nor missed."""
    other = copy.deepcopy(summary)
    set_value(other, "base", "ip", 0.95)
    set_value(other, "base", "unrecognisable_rate", 0.02)
    set_value(other, "base", "neutral_rate", 0.80)
    for metric, value in (("ip", 0.21), ("safe_and_intact_rate", 0.70), ("unrecognisable_rate", 0.08),
                          ("neutral_rate", 0.72)):  # fmt: skip
        set_value(other, "searched", metric, value)
    row = next(row for row in other["rows"] if row["name"] == "searched")
    del row["metrics"]["clip_retention"]
    targets = check_targets(other, row)
    assert [(t.wanted, t.met) for t in targets] == [
        ("≥ 0.95", True), ("≤ 0.20", False), ("≥ 0.70", True), ("≤ 0.07", False), ("≥ 0.95", None), ("≥ 0.72", True)
    ]  # fmt: skip
