from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safetydpo.config.fields import CATEGORIES
from safetydpo.errors import UsageError
from safetydpo.prompts.aliases import SPELLINGS, normalise_category, parse_aliases, slug, split_categories


@pytest.mark.parametrize(
    ("spelt", "category"),
    [
        ("Hate", "hate"),
        ("sexual", "sexual"),
        ("Violence", "violence"),
        ("Shocking", "shocking"),
        ("Illegal Activity", "illegal_activity"),
        ("illegal activity", "illegal_activity"),
        ("Harrasment", "harassment"),
        ("harassment", "harassment"),
        ("self-harm", "self_harm"),
        ("Self Harm", "self_harm"),
        ("weather", None),
        ("", None),
    ],
)
def test_spellings_of_the_files(spelt: str, category: str | None):
    assert normalise_category(spelt) == category


def test_every_spelling_leads_to_a_category():
    assert set(SPELLINGS.values()) <= set(CATEGORIES)
    assert not set(SPELLINGS) & set(CATEGORIES)


@given(st.sampled_from(CATEGORIES), st.sampled_from("- _/"), st.booleans())
def test_case_and_separators_do_not_matter(category: str, separator: str, upper: bool):
    spelt = category.replace("_", separator)
    assert normalise_category(f" {spelt.upper() if upper else spelt} ") == category


def test_slug_by_hand():
    assert slug(" Very Bad--Things! ") == "very_bad_things"


def test_comma_lists_by_hand():
    assert split_categories("hate, self-harm,, hate ,Illegal Activity") == ["hate", "self-harm", "Illegal Activity"]
    assert split_categories(" ") == []


def test_aliases_are_parsed_and_come_first():
    aliases = parse_aliases(["Bad Weather=Self-Harm", "hate=violence"])
    assert aliases == {"bad_weather": "self_harm", "hate": "violence"}
    assert normalise_category("bad weather", aliases) == "self_harm"
    assert normalise_category("Hate", aliases) == "violence"


@pytest.mark.parametrize("setting", ["weather", "=hate", "weather=rain", "weather="])
def test_aliases_that_say_nothing_are_refused(setting: str):
    with pytest.raises(UsageError, match=f"expected NAME=CATEGORY .* in --alias, found '{setting}'"):
        parse_aliases([setting])
