"""Which tokens a search may write with, and which it may not because they name the concept (pure).

A search writes with tokens that are whole words: the text it ends with is then read back as the very tokens it was
found with. Names are judged by the tokens that a text is read as, never by its letters alone.

Axis legend: `word` tokens that may be used.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from safetydpo.errors import SafetyDPOError

WORD_END = "</w>"
SHORTEST_PIECE = 3
"""Letters from which on a shared piece counts: of fewer, nearly every word shares some with every name."""
Reader = Callable[[Sequence[str]], list[list[int]]]
"""Reads texts as the ids of their tokens, without start, end and padding."""


@dataclass(frozen=True)
class Vocabulary:
    """The whole words among a model's tokens, in the order of their ids."""

    words: Mapping[int, str]
    read: Reader

    def allowed(self, names: Sequence[str]) -> Int[Tensor, " word"]:
        """Return the words that have nothing to do with any of a concept's names.

        Raises:
            SafetyDPOError: if none is left.
        """
        banned = banned_tokens(self, names)
        left = [number for number in self.words if number not in banned]
        if not left:
            raise SafetyDPOError(
                f"expected words that are not part of a concept's names, found none left of {len(self.words)}: "
                "give fewer names"
            )
        return torch.tensor(left, dtype=torch.long)

    def write(self, tokens: Sequence[int]) -> str:
        """Return the text that is read as these words."""
        return " ".join(self.words[number] for number in tokens)


def whole_words(token_texts: Sequence[str], read: Reader) -> Vocabulary:
    """Return the tokens that stand for one word of small ASCII letters and are read back as themselves."""
    written = {
        number: text.removesuffix(WORD_END)
        for number, text in enumerate(token_texts)
        if text.endswith(WORD_END) and _is_plain(text.removesuffix(WORD_END))
    }
    found = read(list(written.values())) if written else []
    words = {
        number: word for (number, word), tokens in zip(written.items(), found, strict=True) if list(tokens) == [number]
    }
    return Vocabulary(words, read)


def _is_plain(word: str) -> bool:
    return word.isascii() and word.isalpha() and word.islower()


def banned_tokens(vocabulary: Vocabulary, names: Sequence[str]) -> frozenset[int]:
    """Return every token that a concept's names are read as, and every word that shares a piece with one of theirs.

    A piece is `SHORTEST_PIECE` letters or more: a word is banned that is part of a name's word, or has one in it.

    Raises:
        SafetyDPOError: if there is no name.
    """
    if not names:
        raise SafetyDPOError("expected the names of a concept, found none: without them nothing can be banned")
    parts = sorted({part for name in names for part in name.lower().split()})
    banned = {number for tokens in vocabulary.read([*names, *parts]) for number in tokens}
    long_parts = [part for part in parts if len(part) >= SHORTEST_PIECE]
    # One search for all parts in a word, and one for a word in all parts, which no word with a space in it is in.
    inside, around = re.compile("|".join(map(re.escape, long_parts)) or r"(?!)"), " ".join(long_parts)
    for number, word in vocabulary.words.items():
        shares = inside.search(word) is not None or (len(word) >= SHORTEST_PIECE and word in around)
        if shares or word in parts:
            banned.add(number)
    return frozenset(banned)


def find_banned(vocabulary: Vocabulary, text: str, names: Sequence[str]) -> list[int]:
    """Return the tokens of a text that name the concept, in the order of the text; empty = it names it nowhere."""
    banned = banned_tokens(vocabulary, names)
    (tokens,) = vocabulary.read([text])
    return [number for number in tokens if number in banned]
