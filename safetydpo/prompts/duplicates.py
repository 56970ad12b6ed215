"""Which prompts are the same, exactly, after normalisation or nearly (pure, exact, in the order given)."""

from __future__ import annotations

import math
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

NEAR = 0.8
"""Default Jaccard index of near duplicates: 18 of 20 words shared is near (18 / 22 = 0.82), 8 of 10 is not (8 / 12)."""
ARTICLES = frozenset(("a", "an", "the"))


class _Spaces(dict[int, int]):
    """A space for every character of punctuation, symbols, separators and controls; each is looked up once."""

    def __missing__(self, letter: int) -> int:
        self[letter] = ord(" ") if unicodedata.category(chr(letter))[0] in "PSZC" else letter
        return self[letter]


_SPACES = _Spaces()


def normalise(prompt: str) -> str:
    """Return a prompt without case, punctuation, compatibility forms and repeated spaces."""
    if prompt.isascii():
        folded = prompt.casefold()
    else:
        # Folding can part a letter from its mark; the second NFKC joins them again.
        folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", prompt).casefold())
    return " ".join(folded.translate(_SPACES).split())


def normalised_key(prompt: str) -> str:
    """Return a prompt as `normalise` does, or nothing if no letter or digit is left."""
    key = normalise(prompt)
    # Variation selectors of emoji are marks, and stay.
    return key if any(map(str.isalnum, key)) else ""


def word_set(prompt: str) -> frozenset[str]:
    """Return the words of a normalised prompt, each once, without articles; none if it consists of signs."""
    return frozenset(normalised_key(prompt).split()) - ARTICLES


@dataclass(frozen=True)
class NearPair:
    """Two texts, by their places in the two lists compared, whose word sets are nearly the same."""

    left: int
    right: int
    jaccard: float
    """Words shared / words in either, in [0, 1]."""


def find_near(left: Sequence[str], right: Sequence[str], *, near: float) -> Iterator[NearPair]:
    """Yield every (left, right) whose word sets have a Jaccard index of at least `near`, ordered by left, then right.

    Exact, by the prefix filter: with words sorted from rare to frequent, two sets of n and m words with
    J >= near share one of the first n - ceil(near n) + 1 words of the one and m - ceil(near m) + 1 of the other.
    A text without a word is near nothing.

    Raises:
        ValueError: if `near` is not in (0, 1].
    """
    if not 0.0 < near <= 1.0:
        raise ValueError(f"expected a Jaccard index in (0, 1], found {near}")
    left_sets, right_sets = [word_set(text) for text in left], [word_set(text) for text in right]
    frequency = Counter(word for words in (*left_sets, *right_sets) for word in words)

    def prefix(words: frozenset[str]) -> list[str]:
        ordered = sorted(words, key=lambda word: (frequency[word], word))
        # The small number keeps rounding of near * n from making the prefix one word too short.
        return ordered[: len(words) - math.ceil(near * len(words) - 1e-9) + 1] if words else []

    index: dict[str, list[int]] = defaultdict(list)
    for place, words in enumerate(right_sets):
        for word in prefix(words):
            index[word].append(place)
    for place, words in enumerate(left_sets):
        for other in sorted({found for word in prefix(words) for found in index.get(word, ())}):
            shared = len(words & right_sets[other])
            union = len(words) + len(right_sets[other]) - shared
            if shared >= near * union:
                yield NearPair(place, other, shared / union)


def group_texts(texts: Sequence[str], links: Iterable[tuple[int, int]], *, near: float) -> list[int]:
    """Return, for each text, the smallest place of its group.

    Two texts are in one group if they are equal after `normalise`, nearly the same (`find_near`), linked by
    `links`, or joined by a chain of such. Texts without a letter or digit are only equal if they are the same signs.
    """
    parent = list(range(len(texts)))

    def root(place: int) -> int:
        while parent[place] != place:
            parent[place] = parent[parent[place]]
            place = parent[place]
        return place

    def join(one: int, other: int) -> None:
        low, high = sorted((root(one), root(other)))
        parent[high] = low

    first: dict[str, int] = {}
    for place, text in enumerate(texts):
        join(place, first.setdefault(normalised_key(text) or text, place))
    for one, other in links:
        join(one, other)
    distinct = sorted(first.values())
    unique = [texts[place] for place in distinct]
    for pair in find_near(unique, unique, near=near):
        join(distinct[pair.left], distinct[pair.right])
    return [root(place) for place in range(len(texts))]
