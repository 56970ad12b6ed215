"""Which words to try next, from the gradient at the input embeddings of a prompt (pure).

Axis legend: `place` words of the prompt, `word` words that may stand there, `width` features of an embedding,
`rank` best words of a place, `trial` prompts to be tried.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def swap_scores(
    gradient: Float[Tensor, "place width"],
    current: Float[Tensor, "place width"],
    table: Float[Tensor, "word width"],
) -> Float[Tensor, "place word"]:
    """Return how much the loss changes, to first order, if one place takes another word.

    `score[i, v] = (table[v] - current[i]) . gradient[i]`: the derivative along the straight line from one embedding
    to the other. Negative = the loss should fall.

    Source: Ebrahimi et al. 2018 (arXiv 1712.06751), equation 2; Zou et al. 2023 (arXiv 2307.15043), section 2.2.
    """
    return gradient @ table.T - (gradient * current).sum(dim=1, keepdim=True)


def project_to_words(
    embeddings: Float[Tensor, "place width"], table: Float[Tensor, "word width"]
) -> Int[Tensor, " place"]:
    """Return the word whose embedding is nearest (Euclidean) to each embedding; of equally near ones the first.

    Source: Wen et al. 2023 (arXiv 2302.03668), algorithm 1.
    """
    return torch.cdist(embeddings.double(), table.double(), compute_mode="donot_use_mm_for_euclid_dist").argmin(dim=1)


def best_words(scores: Float[Tensor, "place word"], *, count: int) -> Int[Tensor, "place rank"]:
    """Return the `count` words of each place with the lowest scores, best first; all of them if there are fewer."""
    return scores.argsort(dim=1, stable=True)[:, : min(count, scores.shape[1])]


def draw_trials(
    current: Int[Tensor, " place"], best: Int[Tensor, "place rank"], *, count: int, generator: torch.Generator
) -> Int[Tensor, "trial place"]:
    """Return `count` prompts that differ from `current` in one place each, no two with the same swap.

    Place and word are drawn evenly from `best`; there are fewer trials if `best` has fewer swaps.
    """
    places, ranks = best.shape
    drawn = torch.randperm(places * ranks, generator=generator)[:count]
    place, rank = drawn // ranks, drawn % ranks
    trials = current.repeat(len(drawn), 1)
    trials[torch.arange(len(drawn)), place] = best[place, rank]
    return trials
