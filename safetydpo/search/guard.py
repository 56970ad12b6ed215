"""The search must not see the test: refuse prompts that occur, exactly or nearly, in the test split."""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence

from safetydpo.errors import SafetyDPOError

ARTICLES = frozenset(("a", "an", "the"))
NEAR = 0.9
SHOWN = 3


def normalise(prompt: str) -> str:
    """Return a prompt without case, punctuation, compatibility forms and repeated spaces."""
    text = unicodedata.normalize("NFKC", prompt).casefold()
    kept = (" " if unicodedata.category(letter)[0] in "PSZC" else letter for letter in text)
    return " ".join("".join(kept).split())


def find_overlap(prompts: Sequence[str], test_prompts: Sequence[str], *, near: float = NEAR) -> list[tuple[str, str]]:
    """Return (prompt, test prompt) for every search prompt that occurs in the test split.

    Two prompts are the same if they are equal after `normalise`, or if the Jaccard index of their word sets
    without articles is at least `near`: |words shared| / |words in either|. Each prompt is listed once, with its
    first exact partner, else its first near one.
    """
    exact: dict[str, str] = {}
    by_word: dict[str, list[int]] = defaultdict(list)
    sets = [_words(prompt) for prompt in test_prompts]
    for index, prompt in enumerate(test_prompts):
        exact.setdefault(normalise(prompt), prompt)
        for word in sets[index]:
            by_word[word].append(index)
    found = []
    for prompt in prompts:
        partner = exact.get(normalise(prompt))
        if partner is None:
            words = _words(prompt)
            shared = Counter(index for word in words for index in by_word.get(word, ()))
            close = [i for i, count in shared.items() if count >= near * (len(words) + len(sets[i]) - count)]
            partner = test_prompts[min(close)] if close else None
        if partner is not None:
            found.append((prompt, partner))
    return found


def refuse_test_prompts(prompts: Sequence[str], test_prompts: Sequence[str], *, near: float = NEAR) -> None:
    """Stop a search whose prompts occur, exactly or nearly, in the test split.

    Raises:
        SafetyDPOError: names how many prompts and the first few.
    """
    found = find_overlap(prompts, test_prompts, near=near)
    if found:
        examples = "; ".join(f"{prompt!r} ~ {partner!r}" for prompt, partner in found[:SHOWN])
        raise SafetyDPOError(
            f"expected search prompts that do not occur in the test split, found {len(found)} of {len(prompts)} that "
            f"do: {examples}{'; …' if len(found) > SHOWN else ''}. Search on the validation split."
        )


def _words(prompt: str) -> frozenset[str]:
    return frozenset(normalise(prompt).split()) - ARTICLES
