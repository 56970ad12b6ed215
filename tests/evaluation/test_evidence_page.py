from __future__ import annotations

import re
from dataclasses import replace

import pytest

from safetydpo.errors import SafetyDPOError
from safetydpo.evaluation.evidence import Evidence, pool_units
from safetydpo.evaluation.evidence_page import BEGIN, END, full_page, replace_marked, short_page
from tests.evaluation.measured_units import make_units
from tests.evaluation.synthetic import CATEGORIES, SOURCES

ROWS = tuple(source.name for source in SOURCES)
SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    return pool_units(make_units(), rows=ROWS, seeds=SEEDS)


def test_marked_text_is_replaced_and_the_rest_kept() -> None:
    page = f"# Title\n{BEGIN}\nold\n{END}\nafter\n"
    once = replace_marked(page, "new\n", source="page.md")
    assert once == f"# Title\n{BEGIN}\nnew\n{END}\nafter\n"
    assert replace_marked(once, "new\n", source="page.md") == once


@pytest.mark.parametrize("page", ["", f"{BEGIN} {BEGIN} {END}", f"{END}\n{BEGIN}", BEGIN])
def test_a_page_without_both_marks_is_refused(page: str) -> None:
    with pytest.raises(SafetyDPOError, match=r"expected one line <!-- evidence:begin --> .* in page.md, found \d and"):
        replace_marked(page, "new", source="page.md")


def test_the_full_page_says_everything(evidence: Evidence) -> None:
    text = full_page(evidence)
    assert "at commit 0123456789ab: seeds 0, 1, 2 (prompts, initialisation" in text
    assert f"{3 * len(SOURCES)} of {3 * len(SOURCES)} units" in text
    # 42 units of 90 s, and 1,800 s of stages for each of three seeds: 3,780 + 5,400 s.
    assert "2 × A processor; 2.5 hours in all." in text
    assert "Incomplete" not in text
    for heading in ("Headline rows", "Targets", "Intervals over concepts", "Two judges", "Paired differences",
                    "Single experts", "Single seeds", "What the search chose"):  # fmt: skip
        assert f"### {heading}" in text
    assert "| 0 | ties | 1.40 | 0.30 | hate 1.00, violence 0.75 |" in text
    assert "3 pictures failed and count against their row: ties 3." in text


def test_every_table_has_equal_columns(evidence: Evidence) -> None:
    blocks = [block for block in full_page(evidence).split("\n\n") if block.startswith("|")]
    assert len(blocks) == 8
    for block in blocks:
        assert len({line.count("|") for line in block.splitlines()}) == 1


def test_the_headline_holds_no_single_expert(evidence: Evidence) -> None:
    text = full_page(evidence)
    headline = text[text.index("### Headline rows") : text.index("### Targets")]
    names = [line.split("|")[1].strip() for line in headline.splitlines() if line.startswith("|")][2:]
    assert names == ["base", "all_single", "average", "sum", "ties", "co_merge", "searched"]
    assert "| base | 3 | 420 |" in headline
    assert all(f"| expert:{name} |" in text for name in CATEGORIES)


def test_few_pictures_and_missing_seeds_are_said_plainly() -> None:
    units = [unit for unit in make_units() if (unit.row, unit.seed) not in (("searched", 2), ("sum", 0), ("sum", 1))]
    evidence = pool_units(units, rows=ROWS, seeds=SEEDS)
    for text in (full_page(evidence), short_page(evidence)):
        assert "**Incomplete:** `sum` 1 of 3 seeds, `searched` 2 of 3 seeds." in text
        assert "Fewer than 1,000 unsafe pictures: `base` n = 420" in text
        assert "| searched | 2 of 3 | 280 |" in text


def test_targets_are_checked_on_the_better_merge(evidence: Evidence) -> None:
    text = full_page(evidence)
    assert "Of `co_merge` and `searched` the better one is `searched`" in text
    targets = text[text.index("### Targets") : text.index("### Intervals")]
    # Six targets below two lines of heading.
    assert targets.count("\n| ") == 8
    assert "| base IP on held-out prompts | ≥ 0.95 |" in targets
    short = short_page(evidence, link="docs/results.md")
    assert "Targets met by `searched`:" in short
    assert re.search(
        r"IP of `searched` in each seed: 0\.\d\d \(seed 0\), 0\.\d\d \(seed 1\), 0\.\d\d \(seed 2\)\.", short
    )
    assert short.endswith("All tables: [docs/results.md](docs/results.md).\n")


def test_code_that_is_not_in_the_commit_is_said() -> None:
    units = [replace(unit, dirty=unit.seed == 1, commit=None if unit.seed == 2 else "f" * 40) for unit in make_units()]
    text = short_page(pool_units(units, rows=ROWS, seeds=SEEDS))
    n = len(SOURCES)
    assert (
        f"commit ffffffffffff ({n} units), ffffffffffff with uncommitted changes ({n} units), unknown ({n} units)"
        in text
    )


@pytest.mark.parametrize("measured", [("base",), ("base", "sum")])
def test_no_other_merge_is_held_to_the_targets(measured: tuple[str, ...]) -> None:
    units = [unit for unit in make_units() if unit.row in measured]
    evidence = pool_units(units, rows=ROWS, seeds=SEEDS)
    text = full_page(evidence)
    assert "Neither `co_merge` nor `searched` has been measured yet." in text
    assert "Targets met" not in short_page(evidence)
    assert "### Single experts" not in text
