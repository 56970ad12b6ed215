"""Scores and votes of Co-Merge: how active each unit of each expert is on each input, and who wins it.

Scores belong to one expert and do not depend on the others, so any subset of experts merges without another
pass over the inputs; votes are an argmax over the set and cannot be had from the votes of another set.

Axis legend: `expert` experts, `input` inputs that vote, `token` tokens of an input, `unit` rows of A or of B,
`rank` LoRA components, `d_in d_out` features of the linear layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from safetydpo.artifacts.adapters import LoraLayer
from safetydpo.errors import SafetyDPOError


@dataclass(frozen=True)
class NeuronScores:
    """Mean activation over tokens of one expert in one layer.

    Attributes:
        down: mean |A h| per row of A and input.
        up: mean |B A h| per row of B and input, with the scale folded into B.
    """

    down: Float[Tensor, "rank input"]
    up: Float[Tensor, "d_out input"]


def score_neurons(layer: LoraLayer, inputs: Float[Tensor, "input token d_in"]) -> NeuronScores:
    """Return how active each row of A and of B is on each input, averaged over the input's tokens.

    `down[k, n] = mean_t |A h_nt|_k`, `up[i, n] = mean_t |B A h_nt|_i`.

    Raises:
        SafetyDPOError: if the inputs do not fit the layer.

    Source: Liu et al. 2024 (arXiv 2412.10493), Co-Merge, neuron reading.
    """
    if inputs.ndim != 3 or inputs.shape[0] == 0 or inputs.shape[2] != layer.down.shape[1]:
        raise SafetyDPOError(
            f"expected layer inputs [input, token, {layer.down.shape[1]}], found {list(inputs.shape)}: "
            "collect them on the base model of these experts"
        )
    hidden = inputs.to(layer.down.dtype) @ layer.down.T
    output = hidden @ layer.up.T
    return NeuronScores(down=hidden.abs_().mean(dim=1).T.contiguous(), up=output.abs_().mean(dim=1).T.contiguous())


def vote(
    scores: Float[Tensor, "expert unit input"] | Sequence[Float[Tensor, "unit input"]],
    weights: Float[Tensor, " expert"] | None = None,
) -> Int[Tensor, " unit"]:
    """Return for each unit the expert that wins the most inputs.

    Every input votes for the expert with the largest score, times its weight if there are weights. Ties, of scores and
    of votes, go to the expert that comes first; experts come in rising order of their hash.

    Raises:
        SafetyDPOError: if there is no expert or no input.

    Source: Liu et al. 2024 (arXiv 2412.10493), Co-Merge.
    """
    num = len(scores)
    if num == 0 or scores[0].shape[1] == 0:
        found = list(scores.shape) if isinstance(scores, Tensor) else [num, *(scores[0].shape if num else ())]
        raise SafetyDPOError(f"expected scores of at least one expert and input, found {found}")
    best = scores[0].clone() if weights is None else scores[0] * weights[0]
    # An argmax over the first axis says the same and takes ten times as long; a table of who is ahead, in which a later
    # expert has the larger number, does without a mask. A byte is enough for most sets.
    ahead = torch.zeros(best.shape, dtype=torch.uint8 if num <= 256 else torch.int32)
    weighted, wins = torch.empty_like(best), torch.empty_like(best, dtype=torch.bool)
    for index in range(1, num):
        score = scores[index] if weights is None else torch.mul(scores[index], weights[index], out=weighted)
        torch.gt(score, best, out=wins)
        torch.maximum(ahead, wins.to(ahead.dtype).mul_(index), out=ahead)
        torch.maximum(best, score, out=best)
    num_units = best.shape[0]
    ballots = ahead.to(torch.int64) + num * torch.arange(num_units)[:, None]
    return torch.bincount(ballots.flatten(), minlength=num * num_units).view(num_units, num).argmax(dim=1)
