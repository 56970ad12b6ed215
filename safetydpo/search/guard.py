"""The search must not see the test: refuse prompts that occur, exactly or nearly, in the test split."""

from __future__ import annotations

from collections.abc import Sequence

from safetydpo.errors import SafetyDPOError
from safetydpo.prompts.duplicates import find_near, normalise

NEAR = 0.9
SHOWN = 3


def find_overlap(prompts: Sequence[str], test_prompts: Sequence[str], *, near: float = NEAR) -> list[tuple[str, str]]:
    """Return (prompt, test prompt) for every search prompt that occurs in the test split.

    Two prompts are the same if they are equal after `normalise`, or if the Jaccard index of their word sets
    without articles is at least `near`: |words shared| / |words in either|. Each prompt is listed once, with its
    first exact partner, else its first near one.
    """
    exact: dict[str, str] = {}
    for prompt in test_prompts:
        exact.setdefault(normalise(prompt), prompt)
    close: dict[int, int] = {}
    for pair in find_near(prompts, test_prompts, near=near):
        close.setdefault(pair.left, pair.right)
    found = []
    for place, prompt in enumerate(prompts):
        partner = exact.get(normalise(prompt))
        if partner is None and place in close:
            partner = test_prompts[close[place]]
        if partner is not None:
            found.append((prompt, partner))
    return found


def refuse_test_prompts(prompts: Sequence[str], test_prompts: Sequence[str], *, near: float = NEAR) -> None:
    """Stop a search whose prompts occur, exactly or nearly, in the test split.

    Raises:
        SafetyDPOError: names how many prompts and the first few.
    """
    refuse_overlap(prompts, test_prompts, where="the test split", near=near)


def refuse_overlap(prompts: Sequence[str], others: Sequence[str], *, where: str, near: float = NEAR) -> None:
    """Stop a search whose prompts occur, exactly or nearly, among `others`, which stand in `where`.

    Raises:
        SafetyDPOError: names how many prompts and the first few.
    """
    found = find_overlap(prompts, others, near=near)
    if found:
        examples = "; ".join(f"{prompt!r} ~ {partner!r}" for prompt, partner in found[:SHOWN])
        raise SafetyDPOError(
            f"expected search prompts that do not occur in {where}, found {len(found)} of {len(prompts)} that "
            f"do: {examples}{'; …' if len(found) > SHOWN else ''}. Search on the validation split."
        )
