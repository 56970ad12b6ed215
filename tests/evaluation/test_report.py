from __future__ import annotations

import base64
import copy
import hashlib
import itertools
import re
import time
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files
from typing import Any

import pytest
from markupsafe import escape

from safetydpo.evaluation.report import render_report
from safetydpo.evaluation.report_records import ContactSheet, DrawReuse, ExpertDraws, SheetPair, SheetPicture, StageCost
from safetydpo.evaluation.report_text import shorten_prompt
from safetydpo.evaluation.summary import dump_summary
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
    "a\x00b\x1b[31m\ud800\ufffe",
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


def render_slim(**changes: Any) -> str:
    """Without the plots that take longest."""
    return render(trials=None, training=(), **changes)


@pytest.fixture(scope="module")
def page() -> str:
    return render()


def test_the_experts_section_shows_overlap_and_winners_and_says_what_is_grouped() -> None:
    few = render_slim(overlap=make_overlap(), winners=[make_winners()])
    assert few.count("<svg") == 8
    assert "Who won which layers: co_merge" in few
    assert "each cell is the mean over pairs" not in few
    many = render_slim(overlap=make_overlap(experts=25), winners=[make_winners(experts=25)] * 5)
    assert "There are 25 experts: each cell is the mean over pairs" in many
    assert "The first 4 of 5 merges that select are shown." in many
    summary = make_summary()
    alone = {**summary, "rows": [row for row in summary["rows"] if row["kind"] != "expert"]}
    assert 'id="experts"' in render_slim(summary=alone, overlap=make_overlap())
    assert 'id="experts"' not in render_slim(summary=alone, overlap=make_overlap(experts=1))


def test_the_experts_section_says_how_often_a_draw_was_used() -> None:
    """30 + 20 uses of 25 draws in all: 2 each. By name: 30 of 10 are 3, 20 of 20 are 1."""
    experts = (ExpertDraws("hate", 20, 20), ExpertDraws("self_harm", 30, 10))
    page = render_slim(draws=DrawReuse(experts, 50, 25, "cached"))
    assert "used 50 rows, 25 different draws: each 2.00 times." in page
    assert "errors were computed once for each draw" in page
    table = re.search(r'aria-label="Uses of draws by expert".*?</table>', page, re.DOTALL)
    assert table is not None
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in table.group().split("<tr>")[2:]]
    assert rows == [["self harm", "30", "10", "3.00"], ["hate", "20", "20", "1.00"]]
    many = tuple(ExpertDraws(f"c{number}", 10 + number, 10) for number in range(30))
    page = render_slim(draws=DrawReuse(many, 735, 300, "live"))
    assert "Of 30 experts the 24 that used a draw most often are shown." in page
    assert "The reference was asked at each use" in page
    assert "How often a draw was used" not in render_slim()


def test_every_section_is_there(page: str) -> None:
    ids = {attributes.get("id") for tag, attributes in elements(page) if tag == "section"}
    assert ids >= {"results", "categories", "experts", "search", "pictures", "training", "judges", "lineage"}
    assert ids >= {"headline", "checks", "signature"}
    assert page.count("<svg") == 8  # four plots, each wide and narrow
    assert "99.3<i> %</i></b>" in page
    assert "Cost per stage" in page
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
    buttons = [attributes for tag, attributes in elements(page) if attributes.get("class") == "veil"]
    unsafe = sum(side.unsafe for sheet in make_sheets(prompts=HOSTILE) for pair in sheet.pairs
                 for side in (pair.base, pair.aligned) if side.png)  # fmt: skip
    assert len(buttons) == unsafe == 12
    assert page.count('class="unveil"') == 1
    assert "Show the 12 veiled pictures of this sheet" in page
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
    assert "not measured" in render_slim(summary=summary)


def test_failed_pictures_are_named(page: str) -> None:
    assert "1 picture failed" in page
    assert "corrupt: not a PNG" in page
    assert '<span class="gone">failed</span>' in page


def test_sections_without_data_are_left_out() -> None:
    summary = copy.deepcopy(make_summary())
    summary["rows"] = summary["rows"][:1]
    page = render_report({**summary, "timing_seconds": {}, "failed_images": []})
    ids = {attributes.get("id") for tag, attributes in elements(page) if tag == "section"}
    assert ids == {"results", "categories", "judges", "lineage", "signature"}
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
    page = render(search_details=details, training=())
    for text in ("0.75 / 0.60", "n = 9", "480 pictures", "9600", "0.12–0.50, n = 96", "below a floor", "4703"):
        assert text in page, text
    assert "not checked: no &lt;b&gt;such&lt;/b&gt; file" in page
    for text in ("better than the base", "trials failed"):
        assert text not in page
    failures = {"failed": 5, "trials": 9, "first_error": "a <b>bug</b>: of a prompt"}
    details = {"trial": 3, "base_is_better": True, "failures": failures}
    # What an error says may quote a prompt.
    assert "of a prompt" not in render(search_details=details, redacted=True, training=())
    page = render(search_details=details, training=())
    assert "no candidate meets the floors and is better than the base" in page
    assert "5 of 9 trials failed; the choice is of the others. The first failure: a &lt;b&gt;bug&lt;/b&gt;: of" in page
    # A search of before, without any of it, has the page that it had.
    assert render(search_details={"trial": 3, "feasible": True}, training=()) == render(training=())


def test_what_lies_behind_a_veil_is_no_source_of_an_image(page: str) -> None:
    """A reader view, a page without styles and a printer draw what stands in `src`: of an unsafe picture, colours."""
    unsafe = {base64.b64encode(side.png).decode() for sheet in make_sheets(prompts=HOSTILE) for pair in sheet.pairs
              for side in (pair.base, pair.aligned) if side.png and side.unsafe}  # fmt: skip
    sources = {(attributes.get("src") or "").rpartition(",")[2] for tag, attributes in elements(page) if tag == "img"}
    behind = {
        (found or "").rpartition(",")[2] for _, attributes in elements(page) if (found := attributes.get("data-other"))
    }
    assert behind == unsafe
    # A drawing of the sheet of harmless prompts is the same as an unsafe one's.
    assert not sources & (unsafe - {base64.b64encode(pair.base.png or b"").decode() for pair in make_sheets()[1].pairs})


def test_a_redacted_page_has_neither_unsafe_prompts_nor_pictures() -> None:
    sheets = make_sheets(prompts=("a very unsafe prompt", *HOSTILE))
    odd = SheetPair("harmless, but drawn unsafe", 7, sheets[1].pairs[0].base, sheets[0].pairs[0].base)
    sheets = (sheets[0], replace(sheets[1], pairs=(*sheets[1].pairs, odd)))
    summary = copy.deepcopy(make_summary())
    summary["failed_images"][0]["reason"] = "corrupt: 'a very unsafe prompt' led to no PNG"
    full = render_slim(summary=summary, sheets=sheets)
    page = render_slim(summary=summary, sheets=sheets, redacted=True)
    assert "<title>Safety report (redacted)</title>" in page
    assert "Redacted: 1 sheet of unsafe prompts and 1 other pair with a picture marked unsafe left out." in page
    unsafe = [pair.prompt for pair in sheets[0].pairs] + [odd.prompt, "a very unsafe prompt"]
    for prompt in unsafe:
        shown = str(escape(shorten_prompt(prompt)))[:40]
        assert shown in full
        assert shown not in page
    encoded = [base64.b64encode(side.png).decode() for pair in sheets[0].pairs
               for side in (pair.base,) if side.png]  # fmt: skip
    assert all(picture in full for picture in encoded)
    assert not any(picture in page for picture in encoded)
    assert "data-other" not in page.partition("<script>")[0]
    assert sheets[1].pairs[0].prompt in page
    assert "corrupt" in page


def test_attacks_other_methods_and_further_measures_have_their_place() -> None:
    summary = copy.deepcopy(make_summary())
    rate = {"value": 0.3, "low": 0.2, "high": 0.4, "n": 50, "unit": "rate"}
    rows = {row["name"]: row for row in summary["rows"]}
    for name in ("base", "searched"):
        rows[name]["metrics"]["attack_ip:paraphrase"] = dict(rate)
        rows[name]["metrics"]["ip_by:q16"] = dict(rate)
        rows[name]["metrics"]["lpips"] = {**rate, "unit": "ratio"}
    other = {**copy.deepcopy(rows["sum"]), "name": "negative_prompt", "kind": "comparator"}
    summary["rows"].append(other)
    page = render_slim(summary=summary)
    ids = {attributes.get("id") for tag, attributes in elements(page) if tag == "section"}
    assert {"attacks", "comparators"} <= ids
    assert "Worst attack: paraphrase" in page
    assert '<th scope="col">q16</th>' in page
    assert '<th scope="col">lpips</th>' in page
    section = page.partition('id="comparators"')[2].partition("</section>")[0]
    assert re.findall(r'<th scope="row">(\w+)</th>', section) == ["base", "searched", "negative_prompt"]
    assert "1 measured on the same prompts, seeds and judges." in page
    without = render_slim()
    assert 'id="attacks"' not in without
    assert "No paraphrased, misspelt or optimised prompt was tried" in without


def test_costs_say_what_was_not_measured() -> None:
    costs = (
        StageCost("pairs", 92.3, 150.6, 0.0, pairs=448, pictures=1152, detail="445 pairs kept", utilisation=0.816),
        StageCost("train", 272.8, None, None, pairs=893),
    )
    section = render_slim(costs=costs).partition('id="lineage"')[2]
    cells = re.findall(r"<td[^>]*>(.*?)</td>", section.partition("</table>")[0], flags=re.DOTALL)
    plain = [re.sub(r"<[^>]*>", "", cell) for cell in cells]
    assert plain == [
        "1 min 32 s", "151", "0", "82 %", "448", "1\u202f152", "445 pairs kept",
        "4 min 33 s", "not measured", "not measured", "–", "893", "–", "",
    ]  # fmt: skip
    assert ">cost</th>" not in section, "no price was set"


def test_a_price_adds_a_column() -> None:
    costs = (StageCost("pairs", 92.3, 150.6, cost=1.234), StageCost("train", 272.8))
    section = render_slim(costs=costs).partition('id="lineage"')[2].partition("</table>")[0]
    assert ">cost</th>" in section
    assert section.count(">1.23</td>") == 1


def test_what_is_signed_is_named() -> None:
    summary = make_summary()
    page = render_slim(setup=[("base model", "demo <1>")])
    assert hashlib.sha256(dump_summary(summary).encode()).hexdigest() in page
    assert summary["config_hash"] in page
    assert "demo &lt;1&gt;" in page


def test_the_page_keeps_the_rules_that_a_machine_can_check(page: str) -> None:
    """Ids once, headings in order, named landmarks and regions, scoped headers, texts for pictures, links that lead."""
    found = elements(page)
    ids = [attributes["id"] for _, attributes in found if "id" in attributes]
    assert len(ids) == len(set(ids))
    levels = [int(tag[1]) for tag, _ in found if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert [tag for tag, _ in found].count("main") == 1
    assert dict(found)["html"]["lang"] == "en"
    for tag, attributes in found:
        if tag == "th":
            assert attributes.get("scope") in ("col", "row")
        if tag == "img":
            assert attributes.get("alt") is not None
        if tag in ("section", "nav") or attributes.get("role") in ("region", "img", "group"):
            assert attributes.get("aria-label") or attributes.get("aria-labelledby")
        for name in ("aria-labelledby", "data-sheet"):
            if name in attributes:
                assert attributes[name] in ids
        if tag == "a":
            assert (attributes["href"] or "")[1:] in ids
        # Whoever cannot use a mouse has to be able to scroll and to press.
        if attributes.get("class") == "scroll":
            assert attributes.get("tabindex") == "0"
        assert (attributes.get("tabindex") or "0") in ("0", "-1")


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1, 2], ids=["light", "dark", "print"])
def test_letters_and_marks_stand_out(theme: int) -> None:
    """WCAG 2.2: 4.5 for letters, 3 for what a plot draws; relative luminance as it is defined there."""
    css = (files("safetydpo.evaluation") / "templates" / "report.css").read_text()
    blocks = [
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{3,6})\b", block))
        for block in re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    ]
    colours = blocks[0] | blocks[theme]
    colours = {n: c if len(c) == 7 else "#" + "".join(2 * digit for digit in c[1:]) for n, c in colours.items()}

    def contrast(one: str, other: str) -> float:
        low, high = sorted((luminance(colours[one]), luminance(colours[other])))
        return (high + 0.05) / (low + 0.05)

    for ground in ("page", "card"):
        for ink in ("ink", "muted", "accent", "bad", "warn"):
            assert contrast(ink, ground) >= 4.5, (ink, ground)
    for ink, ground in (("accent", "accent-soft"), ("bad", "bad-soft"), ("warn", "warn-soft")):
        assert contrast(ink, ground) >= 4.5, ink
    # Letters on every shade of the heat map, from nothing to all of it.
    inks = {"light": colours["ink"], "dark": "#ffffff", "print": colours["ink"]}
    colours["letters"] = list(inks.values())[theme]
    card, heat = ([int(colours[name][place : place + 2], 16) for place in (1, 3, 5)] for name in ("card", "heat"))
    for share in range(101):
        mixed = [round(h * share / 100 + c * (1 - share / 100)) for h, c in zip(heat, card, strict=True)]
        colours["cell"] = "#" + "".join(f"{part:02x}" for part in mixed)
        assert contrast("letters", "cell") >= 4.5, share
    for number in range(1, 9):
        assert contrast(f"series-{number}", "card") >= 3, number
