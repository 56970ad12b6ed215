from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from safetydpo.attacks.typos import misspell_name, misspell_word


def test_every_slip_of_a_short_word_by_hand() -> None:
    """axe: exchanged xae aea->`aex`, missing xe ae ax, doubled aaxe axxe axee."""
    assert misspell_word("axe") == ["xae", "aex", "xe", "ae", "ax", "aaxe", "axxe", "axee"]


def test_short_words_and_what_is_no_word_stay() -> None:
    assert misspell_word("of") == []
    assert misspell_word("t-shirt") == []


def test_one_slip_in_one_word_and_no_known_name() -> None:
    slips = misspell_name("lit axe", known=["lit axee", "axe"])
    assert "lit axee" not in slips
    assert {"ilt axe", "lit ax"} <= set(slips)
    assert all(len(set(slip.split()) & {"lit", "axe"}) == 1 for slip in slips)


@given(st.text(alphabet="abcdefgh", min_size=3, max_size=9))
def test_slips_are_other_words_of_nearly_the_same_letters(word: str) -> None:
    slips = misspell_word(word)
    assert word not in slips
    assert len(slips) == len(set(slips))
    for slip in slips:
        assert abs(len(slip) - len(word)) <= 1
        assert set(slip) <= set(word)
