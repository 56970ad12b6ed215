from __future__ import annotations

import io
from collections import Counter
from dataclasses import replace

from rich.console import Console

from ray_jobs import concept_table as shown
from ray_jobs.concept_table import concept_table, concept_warnings, print_concepts, read_reasons
from safetydpo.artifacts.records import Record
from safetydpo.artifacts.schemas import MEMBERSHIPS, SELECTIONS
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import table_from_rows, write_table
from safetydpo.config.pairs import PairsConfig
from safetydpo.pairs.select import KEPT

RECORD = Record("pairs", "test", "hash", 1, {}, {}, "fingerprint")
COUNTS = {"axe": Counter({KEPT: 2, "safe picture is not safe": 1}), "bomb": Counter({"safe picture is not safe": 4})}
TOTALS = Counter({KEPT: 2, "safe picture is not safe": 5})


def lines(console: Console) -> list[list[str]]:
    return [line.split() for line in console.export_text().splitlines()]


def recorder() -> Console:
    return Console(record=True, width=100, file=io.StringIO())


def test_the_table_by_hand():
    console = recorder()
    console.print(concept_table(COUNTS, TOTALS))
    found = lines(console)
    assert ["bomb", "4", "0", "4"] in found
    assert ["axe", "3", "2", "1"] in found
    assert found.index(["bomb", "4", "0", "4"]) < found.index(["axe", "3", "2", "1"]), "fewest kept pairs first"
    assert ["all", "2", "concepts", "7", "2", "5"] in found


def test_a_long_table_says_what_it_leaves_out(monkeypatch):
    monkeypatch.setattr(shown, "MAX_ROWS", 1)
    console = recorder()
    console.print(concept_table(COUNTS, TOTALS))
    text = console.export_text()
    assert "axe" not in text
    assert "… 1 more concepts in per_concept.parquet" in " ".join(text.split())


def test_a_concept_with_too_few_pairs_is_listed():
    rules = PairsConfig(min_kept_per_concept=3)
    assert concept_warnings(COUNTS, RECORD, rules) == [
        "expected at least 3 kept pairs per concept (identity.pairs.min_kept_per_concept), found fewer for 2 of 2: "
        "bomb: 0, axe: 2; write more prompt pairs for them or loosen the rules of identity.pairs"
    ]
    # Without a minimum, those of which nothing is left.
    assert concept_warnings(COUNTS, RECORD, PairsConfig()) == [
        "expected at least 1 kept pairs per concept (identity.pairs.min_kept_per_concept), found fewer for 1 of 2: "
        "bomb: 0; write more prompt pairs for them or loosen the rules of identity.pairs"
    ]
    assert concept_warnings({"axe": COUNTS["axe"], "": COUNTS["bomb"]}, RECORD, PairsConfig()) == []


def test_a_rule_that_nobody_judged_is_named():
    record = replace(RECORD, details={"not_judged": ["unrecognisable_max"]})
    rules = PairsConfig(judges=("open_nsfw",))
    assert concept_warnings({"axe": COUNTS["axe"]}, record, rules) == [
        "no judge of open_nsfw could answer for identity.pairs.unrecognisable_max: it dropped no pair"
    ]


def test_an_artifact_of_the_first_version_is_shown_too(store: Location):
    """From the two tables that every version has; a pair of two categories counts once in its concept."""
    chosen = [("p", True, KEPT), ("q", False, "a picture is missing")]
    members = [("p", "hate"), ("p", "violence"), ("q", "hate")]
    write_table(
        store / "selections.parquet",
        table_from_rows([{"pair_id": p, "seed": 1, "kept": k, "reason": r} for p, k, r in chosen], SELECTIONS),
    )
    write_table(
        store / "memberships.parquet",
        table_from_rows(
            [{"pair_id": p, "category": c, "concept": "axe", "source": "test"} for p, c in members], MEMBERSHIPS
        ),
    )
    assert read_reasons(store) == (
        {"axe": Counter({KEPT: 1, "a picture is missing": 1})},
        Counter({KEPT: 1, "a picture is missing": 1}),
    )
    console = recorder()
    print_concepts(console, store, RECORD, PairsConfig(min_kept_per_concept=2), whole=False)
    text = console.export_text(clear=False)
    assert text.startswith("warning: expected at least 2 kept pairs per concept")
    assert "Pairs by concept" not in text
    print_concepts(console, store, RECORD, PairsConfig(), whole=True)
    assert "Pairs by concept" in console.export_text()


def test_names_are_never_read_as_markup_and_pairs_without_one_are_shown(store: Location):
    members = [("p", "[/raised]"), ("q", "[bold]"), ("r", "")]
    write_table(
        store / "selections.parquet",
        table_from_rows([{"pair_id": p, "seed": 1, "kept": True, "reason": KEPT} for p, _ in members], SELECTIONS),
    )
    write_table(
        store / "memberships.parquet",
        table_from_rows(
            [{"pair_id": p, "category": "hate", "concept": c, "source": "test"} for p, c in members], MEMBERSHIPS
        ),
    )
    console = recorder()
    print_concepts(console, store, RECORD, PairsConfig(min_kept_per_concept=2), whole=True)
    text = console.export_text()
    found = [line.split() for line in text.splitlines()]
    assert ["[/raised]", "1", "1"] in found
    assert ["[bold]", "1", "1"] in found
    assert ["(none)", "1", "1"] in found
    assert ["all", "2", "concepts", "3", "3"] in found
    assert "found fewer for 2 of 2: [/raised]: 1, [bold]: 1;" in text, "pairs without a concept are not one group"
