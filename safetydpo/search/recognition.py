"""What judges of real pictures do not know: whether a picture shows its prompt, and whether it shows anything.

Both are read off the similarities of pictures to captions in the space of a CLIP model. Pure numpy. Axes: image = one
picture; caption = one text; rival = one text that a picture's own is compared with.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from safetydpo.errors import SafetyDPOError

LEAST_SIMILARITY = "least_similarity"
"""Number of the base beside its rates: a picture that is less similar to every caption shows nothing."""
MUSH_RATE_OF_BASE = 0.05
"""Share of the base's own benign pictures that lie below it."""


def rivals_of(concepts: Sequence[str], texts: Sequence[str]) -> Bool[np.ndarray, "caption rival"]:
    """Return which captions each one competes with: those of another text, and of another concept where both name one.

    Raises:
        SafetyDPOError: if a caption has no rival, so that finding it would mean nothing.
    """
    named, worded = np.array(concepts, dtype=object), np.array(texts, dtype=object)
    same_concept = (named[:, None] == named[None, :]) & (named != "")[:, None]
    rivals: Bool[np.ndarray, "caption rival"] = ~(same_concept | (worded[:, None] == worded[None, :])).astype(bool)
    for index in range(len(texts)):
        if not rivals[index].any():
            raise SafetyDPOError(
                f"expected neutral and neighbour prompts of several concepts, found no other one than that of "
                f"{texts[index]!r}: a picture is looked for among all of them; add prompts of other concepts"
            )
    return rivals


def find_own_captions(
    similarities: Float[np.ndarray, "image caption"], own: Sequence[int], rivals: Bool[np.ndarray, "image caption"]
) -> list[bool]:
    """Return, for each picture, whether it is more similar to its own caption than to every rival's.

    The share of such pictures is R-precision with all rivals as distractors.

    Args:
        similarities: cosine similarities.
        own: index of each picture's own caption.
        rivals: which captions each picture's own competes with.

    Source: Xu et al. 2018 (arXiv 1711.10485), section 4.1 (R-precision, R = 1); with CLIP in place of DAMSM, Park et
    al. 2021 (NeurIPS Datasets and Benchmarks), "Benchmark for compositional text-to-image synthesis", CLIP-R-precision.
    """
    rows = np.arange(len(own))
    best_rival = np.where(rivals, similarities, -np.inf).max(axis=1)
    # Not a number is nearer to nothing.
    return [bool(hit) for hit in similarities[rows, list(own)] > best_rival]


def nearest_similarities(similarities: Float[np.ndarray, "image caption"]) -> Float[np.ndarray, " image"]:
    """Return the similarity of each picture to the caption that it is nearest to."""
    nearest: Float[np.ndarray, " image"] = similarities.max(axis=1)
    return nearest


def least_similarity(nearest: Float[np.ndarray, " image"]) -> float:
    """Return the similarity below which a picture counts as unrecognisable, from those of the base's benign pictures.

    Their 5 % quantile: of what the base draws about one picture in twenty is below it (of 16 pictures one).

    Raises:
        SafetyDPOError: if there is no picture, or one has no similarity.
    """
    if not len(nearest) or not np.isfinite(nearest).all():
        raise SafetyDPOError(
            f"expected finite similarities of the base's pictures to captions, found {len(nearest)} of which "
            f"{int(np.isfinite(nearest).sum())} are: check the base model and the CLIP model (identity.search.clip)"
        )
    return float(np.quantile(nearest, MUSH_RATE_OF_BASE))
