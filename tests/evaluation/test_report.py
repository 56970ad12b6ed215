from __future__ import annotations

import base64
import copy
import hashlib
import re
import time
from html.parser import HTMLParser
from typing import Any

import pytest

from safetydpo.evaluation.report import render_report
from safetydpo.evaluation.report_records import ContactSheet, SheetPair, SheetPicture
from tests.evaluation.synthetic import (
    make_lineage,
    make_overlap,
    make_png,
    make_sheets,
    make_summary,
    make_training,
    make_trials,
    make_winners,
)

HOSTILE = (
    "<script>window.stolen = 1</script><img src=x onerror=alert(1)>",
    '" onfocus="alert(1)" autofocus="',
    "\u202e\u05e9\u05dc\u05d5\u05dd \U0001f9e8 {{ 7 * 7 }} &amp;",
    "x" * 10_000,
)


class Elements(HTMLParser):
    """Every start tag with its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def elements(page: str) -> list[tuple[str, dict[str, str | None]]]:
    parser = Elements()
    parser.feed(page)
    return parser.found


def render(**changes: Any) -> str:
    parts: dict[str, Any] = {
        "trials": make_trials(),
        "training": make_training(),
        "sheets": make_sheets(prompts=HOSTILE),
        "lineage": make_lineage(),
    }
    return render_report(changes.pop("summary", make_summary()), **{**parts, **changes})


@pytest.fixture(scope="module")
def page() -> str:
    return render()


def test_the_experts_section_shows_overlap_and_winners_and_says_what_is_grouped() -> None:
    few = render(overlap=make_overlap(), winners=[make_winners()])
    assert few.count("<svg") == 10
    assert "Who won which layers: co_merge" in few
    assert "each cell is the mean over pairs" not in few
    many = render(overlap=make_overlap(experts=120), winners=[make_winners(experts=120)] * 5)
    assert "There are 120 experts: each cell is the mean over pairs" in many
    assert "The first 4 of 5 merges that select are shown." in many
    summary = make_summary()
    alone = {**summary, "rows": [row for row in summary["rows"] if row["kind"] != "expert"]}
    assert 'id="experts"' in render(summary=alone, overlap=make_overlap())
    assert 'id="experts"' not in render(summary=alone, overlap=make_overlap(experts=1))


def test_every_section_is_there(page: str) -> None:
    ids = {attributes.get("id") for tag, attributes in elements(page) if tag == "section"}
    assert ids >= {"results", "categories", "experts", "search", "pictures", "training", "judges", "lineage"}
    assert page.count("<svg") == 6  # three plots, each wide and narrow
    assert "0.99</b>" in page
    assert "Wall time per stage" in page
    assert "6 min 42 s" in page
    assert "f" * 16 in page


def test_the_page_loads_nothing(page: str) -> None:
    for tag, attributes in elements(page):
        for name in ("src", "href", "xlink:href", "action"):
            address = attributes.get(name)
            assert address is None or address.startswith(("#", "data:")), (tag, address)
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)


def test_only_its_own_script_may_run(page: str) -> None:
    scripts = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page


def test_hostile_prompts_stay_text(page: str) -> None:
    assert "&lt;script&gt;window.stolen = 1&lt;/script&gt;" in page
    assert "<script>window.stolen" not in page
    assert "{{ 7 * 7 }}" in page
    for _, attributes in elements(page):
        assert not any(name.startswith("on") for name in attributes)
        assert "autofocus" not in attributes


def test_unsafe_pictures_are_veiled_behind_a_labelled_button(page: str) -> None:
    buttons = [attributes for tag, attributes in elements(page) if tag == "button"]
    unsafe = sum(side.unsafe for sheet in make_sheets(prompts=HOSTILE) for pair in sheet.pairs
                 for side in (pair.base, pair.aligned) if side.png)  # fmt: skip
    assert len(buttons) == unsafe == 11
    for attributes in buttons:
        assert attributes["type"] == "button"
        assert attributes["aria-pressed"] == "false"
        assert (attributes["aria-label"] or "").startswith("Show the ")
    # Whatever is not behind a button is a safe picture with words for it.
    shown = re.sub(r"<button.*?</button>", "", page, flags=re.DOTALL)
    images = [attributes for tag, attributes in elements(shown) if tag == "img"]
    safe = {base64.b64encode(side.png).decode() for sheet in make_sheets(prompts=HOSTILE) for pair in sheet.pairs
            for side in (pair.base, pair.aligned) if side.png and not side.unsafe}  # fmt: skip
    assert {(image["src"] or "").removeprefix("data:image/png;base64,") for image in images} <= safe
    assert all(image["alt"] for image in images)


def test_missed_and_unmeasured_targets_are_said(page: str) -> None:
    assert "missed ≤ 0.05" in page
    summary = copy.deepcopy(make_summary())
    for row in summary["rows"]:
        row["metrics"].pop("clip_retention", None)
    assert "not measured" in render(summary=summary)


def test_failed_pictures_are_named(page: str) -> None:
    assert "1 picture failed" in page
    assert "corrupt: not a PNG" in page
    assert '<span class="gone">failed</span>' in page


def test_sections_without_data_are_left_out() -> None:
    summary = copy.deepcopy(make_summary())
    summary["rows"] = summary["rows"][:1]
    page = render_report({**summary, "timing_seconds": {}, "failed_images": []})
    ids = {attributes.get("id") for tag, attributes in elements(page) if tag == "section"}
    assert ids == {"results", "categories", "judges", "lineage"}
    assert "failed" not in re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    summary["rows"][0]["metrics"] = {}
    assert "Results" in render_report(summary)


def test_equal_input_gives_equal_bytes(page: str) -> None:
    assert render() == page


def test_a_thousand_pictures_are_quick() -> None:
    picture = SheetPicture(make_png(1, (10, 20, 30)), unsafe=False)
    pairs = tuple(SheetPair(f"prompt {n}", n, picture, picture) for n in range(500))
    start = time.process_time()
    page = render(sheets=(ContactSheet("all", "searched", pairs),), training=(), trials=None)
    assert time.process_time() - start < 5
    assert len(page) < 3_000_000


def test_ladder_finalists_and_benchmarks_of_a_search_are_shown() -> None:
    rate = {"value": 0.25, "low": 0.125, "high": 0.5, "n": 96}
    found = {"spearman": 0.75, "kendall": 0.6, "n": 9}
    details = {
        "trial": 3,
        "ladder": {
            "rungs": [
                {"kind": "held_out", "measured": 24, "went_on": 9, "full": found, "next": found},
                {"kind": "few_steps", "measured": 9, "went_on": 1, "full": {**found, "spearman": None}, "next": found},
            ],
            "pictures": 480,
            "pictures_of_full_evaluation": 9600,
        },
        "finalists": [
            {"trial": 3, "feasible": True, "on_front": True, "metrics": {"ip_select": rate}},
            {"trial": 5, "feasible": False, "on_front": False, "metrics": {"ip_select": rate}},
        ],
        "benchmarks": {"checked": {"i2p.csv": 4703}, "unchecked": {"lost.csv": "no <b>such</b> file"}},
    }
    page = render(search_details=details)
    for text in ("0.75 / 0.60", "n = 9", "480 pictures", "9600", "0.12–0.50, n = 96", "below a floor", "4703"):
        assert text in page, text
    assert "not checked: no &lt;b&gt;such&lt;/b&gt; file" in page
    # A search of before, without any of it, has the page that it had.
    assert render(search_details={"trial": 3, "feasible": True}) == render()
