from __future__ import annotations

from dataclasses import replace

import pytest
import yaml

from safetydpo.artifacts.records import Record
from safetydpo.errors import UsageError
from safetydpo.pairs.dataset_card import (
    CardFacts,
    Group,
    PairCounts,
    card_facts,
    check_licence,
    render_card,
    size_category,
)
from safetydpo.pairs.export import Layout, describe_columns

COUNTS = PairCounts(
    kept=3,
    dropped=2,
    by_category=(Group("hate", 3, 2),),
    by_concept=(Group("a|b", 1, 2), Group("moss\nand more", 2, 0)),
    reasons=(("safe picture is not safe", 2),),
)
RECORD = Record(
    stage="pairs",
    name="tiny",
    hash="0123456789abcdef",
    recipe_version=1,
    identity={
        "seed": 7,
        "base": {"model": "owner/model", "revision": "abc"},
        "sampler": {"steps": 4},
        "pairs": {"unsafe_score_min": 0.5},
        "judge": "open_nsfw",
    },
    inputs={"base": "f00d", "judge": "beef"},
    fingerprint="cafe",
    failed_units=("x", "y"),
    versions={"torch": "2.9", "diffusers": "0.39"},
    started_at="2026-01-01T00:00:00+00:00",
)


def facts(**changes: object) -> CardFacts:
    """What a card of `RECORD` says."""
    arguments: dict[str, object] = {"name": "n", "licence": "mit", "with_pictures": True, "command": "safetydpo x"}
    return card_facts(RECORD, **{**arguments, **changes})  # type: ignore[arg-type]


def test_a_card_says_where_everything_comes_from():
    card = render_card(facts(), COUNTS, [("prompt", "the unsafe prompt")])
    for part in (
        "5 pairs were drawn, 3 kept, 2 dropped.",
        "2 pictures could not be drawn at all.",
        "| hate | 3 | 2 |",
        "| safe picture is not safe | 2 |",
        "| `prompt` | the unsafe prompt |",
        "`pairs/tiny-0123456789ab`",
        "`0123456789abcdef`",
        "`owner/model`, revision `abc`",
        "`f00d`",
        "| seed of the run | 7;",
        "open_nsfw, fingerprint `beef`",
        "diffusers 0.39, torch 2.9",
        "unsafe_score_min: 0.5",
        "steps: 4",
        "safetydpo x",
        "## Intended use",
        "## Out of scope",
        "`mit`, as stated by",
    ):
        assert part in card


def test_a_card_says_how_the_safe_pictures_were_made():
    """Settings at their default are left out of records: strength 0.6, away from the unsafe prompt."""
    same = render_card(facts(with_pictures=False), COUNTS, describe_columns(Layout.PREFERENCE, with_pictures=True))
    assert same.count("from the same noise") == 2
    assert "draw them again" in same
    assert "SDEdit" not in same

    def edited(**settings: object) -> str:
        record = replace(RECORD, identity={**RECORD.identity, "pairs": {"safe_picture": "sdedit", **settings}})
        found = card_facts(record, name="n", licence="mit", with_pictures=False, command="safetydpo x")
        assert found.edit is not None
        return render_card(found, COUNTS, describe_columns(Layout.PREFERENCE, with_pictures=True, is_edited=True))

    card = edited()
    for wrong in ("from the same noise", "drawn from the safe prompt", "draw them again"):
        assert wrong not in card
    assert (
        "the last 60 % of the sampling\nsteps were run anew under a safe rewrite of the prompt, away from the" in card
    )
    assert "make them again: the unsafe ones first, then the safe ones from those." in card
    assert (
        "| `chosen` | the safe picture: the unsafe one, noised and drawn anew under the safe prompt (SDEdit) |" in card
    )
    card = edited(sdedit_strength=0.25, sdedit_negative="empty")
    assert (
        "the last 25 % of the sampling\nsteps were run anew under a safe rewrite of the prompt (chosen; SDEdit)."
        in card
    )


def test_pairs_without_a_concept_have_a_row_of_their_own():
    counts = replace(COUNTS, by_concept=(Group("", 3, 2),))
    assert "| (none) | 3 | 2 |" in render_card(facts(), counts, [])


def test_names_do_not_break_their_table():
    card = render_card(facts(), COUNTS, [])
    assert r"| a\|b | 1 | 2 |" in card
    assert "| moss and more | 2 | 0 |" in card


def test_without_pictures_and_licence_it_says_so():
    card = render_card(facts(with_pictures=False, licence="unknown"), COUNTS, [])
    assert "**The pictures themselves are left out**" in card
    assert "None was stated." in card
    assert "prompts may be disturbing" in card


def test_a_name_cannot_add_keys_to_the_front_matter():
    card = render_card(facts(name="x\nlicense: mit\n---\n"), COUNTS, [])
    front = yaml.safe_load(card.removeprefix("---\n").split("\n---\n\n#")[0])
    assert front["license"] == "mit"
    assert front["pretty_name"] == "x\nlicense: mit\n---\n"


@pytest.mark.parametrize(
    ("rows", "name"),
    [(999, "n<1K"), (1000, "1K<n<10K"), (99_999, "10K<n<100K"), (100_000, "100K<n<1M"), (10**6, "1M<n<10M")],
)
def test_size_classes(rows: int, name: str):
    assert size_category(rows) == name


@pytest.mark.parametrize("licence", ["", "CC BY 4.0", "a\nb", "-x"])
def test_a_licence_is_one_word(licence: str):
    with pytest.raises(UsageError, match="expected --licence as the hub writes it, such as cc-by-4.0, openrail or"):
        check_licence(licence)
    check_licence("cc-by-sa-4.0")
