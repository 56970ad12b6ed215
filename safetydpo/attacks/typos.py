"""Misspellings of a name: one slip of the hand each (pure)."""

from __future__ import annotations

from collections.abc import Sequence

SHORTEST_WORD = 3
"""Letters from which on a word is misspelt."""


def misspell_word(word: str) -> list[str]:
    """Return every word that two exchanged, one missing or one doubled letter makes of this one, in a fixed order.

    Source: the slips of Gao et al. 2023 (arXiv 2306.13103), section 3.1, without look-alike characters.
    """
    if len(word) < SHORTEST_WORD or not word.isalpha():
        return []
    places = range(len(word))
    exchanged = [word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in places[:-1]]
    missing = [word[:i] + word[i + 1 :] for i in places]
    doubled = [word[: i + 1] + word[i:] for i in places]
    return [other for other in dict.fromkeys([*exchanged, *missing, *doubled]) if other != word]


def misspell_name(name: str, *, known: Sequence[str]) -> list[str]:
    """Return the name with one slip in one of its words, without those that are one of the `known` names."""
    words = name.split(" ")
    found = [
        " ".join([*words[:place], other, *words[place + 1 :]])
        for place, word in enumerate(words)
        for other in misspell_word(word)
    ]
    return [other for other in dict.fromkeys(found) if other not in known]
