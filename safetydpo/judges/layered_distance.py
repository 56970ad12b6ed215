"""The distance of LPIPS between what the layers of a network say of two pictures (pure).

Axis legend: `n` pairs of pictures, `c` channels, `p` positions of a layer; `_` either of them, where layers differ.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from safetydpo.errors import SafetyDPOError

EPSILON = 1e-10
"""Added to the length of a vector, as LPIPS does: where a layer says nothing, it says 0."""


def layered_distance(
    features: Sequence[Float[Tensor, "n _ _"]],
    others: Sequence[Float[Tensor, "n _ _"]],
    *,
    weights: Sequence[Float[Tensor, " _"]] | None = None,
) -> Float[Tensor, " n"]:
    """Return `sum over layers of mean over positions of sum over channels of w_lc (x_lc - y_lc)^2`.

    x and y are divided by their length over the channels, `|x| + 1e-10`. Without weights each layer counts equally,
    `w_lc = 1 / l`, and the distance lies in [0, 4]: twice one minus the cosine.

    Raises:
        SafetyDPOError: if the two sides, or the weights, do not have the same layers.

    Source: Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric"
        (arXiv 1801.03924), equation 1.
    """
    shapes, other_shapes = ([tuple(layer.shape) for layer in side] for side in (features, others))
    heads = [(shape[1],) for shape in shapes] if weights is None else [tuple(head.shape) for head in weights]
    if not shapes or shapes != other_shapes or heads != [(shape[1],) for shape in shapes]:
        raise SafetyDPOError(
            f"expected the same layers of both pictures and a weight per channel, found shapes {shapes}, "
            f"{other_shapes} and weights {heads}: compare pictures of one size with one network"
        )
    total = torch.zeros(shapes[0][0], dtype=features[0].dtype, device=features[0].device)
    for index, (own, other) in enumerate(zip(features, others, strict=True)):
        squares = (_unit(own) - _unit(other)).square()
        weighted = (
            squares.sum(dim=1) / len(shapes) if weights is None else torch.einsum("ncp,c->np", squares, weights[index])
        )
        total = total + weighted.mean(dim=1)
    return total


def _unit(layer: Float[Tensor, "n c p"]) -> Float[Tensor, "n c p"]:
    return layer / (layer.norm(dim=1, keepdim=True) + EPSILON)
