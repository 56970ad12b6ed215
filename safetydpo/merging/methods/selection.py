"""Selections: each unit of the merged layer comes whole from one expert.

The four readings of Co-Merge differ in the unit: rows of A and of B (`co_merge`), matrix elements (`element`), output
rows of the delta (`delta_neuron`), rank components (`component`). All of them vote with the same scores per expert, so
that any subset of the experts is merged without another pass over the inputs.

Axis legend: `expert` experts, `input` inputs that vote (a prompt at a timestep), `rank` LoRA components,
`d_in d_out` features of the linear layer.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from safetydpo.artifacts.adapters import LoraLayer
from safetydpo.errors import SafetyDPOError
from safetydpo.merging.algebra import concatenate, rank_of
from safetydpo.merging.method import LayerExperts, LayerMerge, MergeMethod, present_experts
from safetydpo.merging.votes import vote
from safetydpo.seeding import derive_numpy


def co_merge(experts: LayerExperts) -> LayerMerge:
    """Let every input vote, unit by unit, for the most active expert, and take each unit from its winner whole.

    Units are neurons: row k of A (score: mean over tokens of |A_e h|, row k) and row i of B (score: mean over
    tokens of |w_e s_e B_e A_e h|, row i; s is folded into B). Per unit each input votes for the expert with
    the largest score and most votes win. A and B choose independently, so a row of B may meet rows of A of
    another expert: meaningful only if all experts start from the same draw of A. The winner's weight goes
    with its rows of B. Experts of weight 0 take no part. The rank stays that of one expert.

    Use it when experts conflict and the adapter must stay small.

    Source: Liu et al. 2024, "SafetyDPO / AlignGuard" (arXiv 2412.10493), Co-Merge; units, inputs
    and tie rule are our reading (`neuron`), because the paper leaves them open.
    """
    _expect_scores(experts)
    present = present_experts(experts)
    weights = torch.tensor([abs(experts.weights[index]) for index in present])
    down_winner = vote([experts.scores[index].down for index in present])
    up_winner = vote([experts.scores[index].up for index in present], weights)
    return take_rows(experts, torch.tensor(present)[down_winner], torch.tensor(present)[up_winner])


def delta_neuron(experts: LayerExperts) -> LayerMerge:
    """Let every input vote for the expert of each output neuron of the delta, and take that row of it exactly.

    Row i of the merged delta is row i of w_e B_e A_e of the winner, by the same scores as the rows of B in
    `co_merge`. A and B are never mixed, so it needs no shared basis; the ranks add up.

    Use it in place of `co_merge` when experts have independent initialisations.

    Source: Liu et al. 2024, "SafetyDPO / AlignGuard" (arXiv 2412.10493), Co-Merge read on output neurons.
    """
    _expect_scores(experts)
    present = present_experts(experts)
    weights = torch.tensor([abs(experts.weights[index]) for index in present])
    winner = torch.tensor(present)[vote([experts.scores[index].up for index in present], weights)]
    masked = [
        LoraLayer(layer.down, layer.up * (winner == index)[:, None]) for index, layer in enumerate(experts.layers)
    ]
    counts = torch.bincount(winner, minlength=len(experts.layers))
    return LayerMerge(concatenate(masked, experts.weights), suppliers=tuple(counts.tolist()))


def element(experts: LayerExperts) -> LayerMerge:
    """Let every input vote, matrix element by matrix element of A and of B, for the most active expert.

    Score of element (k, j) of A: |A_e[k, j]| |h_j|. |h_j| is the same for all experts, so every input in which feature
    j is not 0 votes for the expert of the largest |A_e[k, j]|; one in which it is 0 abstains. Score of element (i, k)
    of B: |w_e B_e[i, k]| mean over tokens of |A_e h|, row k. The winner's weight goes with its elements of B.
    Experts of weight 0 take no part. The rank stays that of one expert; like `co_merge` it needs a shared draw of A.

    Use it in place of `co_merge` to keep more experts in a layer: its rows may have many suppliers.

    Raises:
        SafetyDPOError: if there are no scores.

    Source: Liu et al. 2024, "SafetyDPO / AlignGuard" (arXiv 2412.10493), Co-Merge read on matrix elements.
    """
    _expect_scores(experts)
    present = present_experts(experts)
    positions = torch.tensor(present)
    downs = torch.stack([experts.layers[index].down for index in present])
    ups = torch.stack([experts.layers[index].up * experts.weights[index] for index in present])
    hidden = torch.stack([experts.scores[index].down for index in present])
    down_winner = downs.abs().argmax(dim=0)
    columns = [
        vote(ups[:, :, component, None].abs() * hidden[:, component, None, :]) for component in range(ups.shape[2])
    ]
    up_winner = torch.stack(columns, dim=1)
    merged = LoraLayer(
        down=downs.gather(0, down_winner[None])[0].contiguous(), up=ups.gather(0, up_winner[None])[0].contiguous()
    )
    winners = positions[torch.cat([down_winner.flatten(), up_winner.flatten()])]
    return LayerMerge(merged, suppliers=_count(winners, experts))


def component(experts: LayerExperts) -> LayerMerge:
    """Let every input vote for the expert of each rank component: row k of A together with column k of B.

    Score of component k: |w_e| |B_e[:, k]| mean over tokens of |A_e h|, row k; the scale is folded into B. A component
    is a change of rank 1 and stays whole, so no expert's B meets another's A. Ranks may differ: component k is
    contested by the experts that have one. Experts of weight 0 take no part. The rank is the largest of an expert.

    Use it in place of `co_merge` when initialisations or ranks differ and the adapter must stay small.

    Raises:
        SafetyDPOError: if there are no scores.

    Source: Liu et al. 2024, "SafetyDPO / AlignGuard" (arXiv 2412.10493), Co-Merge read on rank components.
    """
    _expect_scores(experts)
    present = present_experts(experts)
    winners: list[int] = []
    downs: list[Tensor] = []
    ups: list[Tensor] = []
    for k in range(max(rank_of(experts.layers[index]) for index in present)):
        able = [index for index in present if rank_of(experts.layers[index]) > k]
        strengths = [abs(experts.weights[index]) * experts.layers[index].up[:, k].norm() for index in able]
        scores = [strength * experts.scores[index].down[k] for index, strength in zip(able, strengths, strict=True)]
        winner = able[int(vote(torch.stack(scores)[:, None, :]))]
        winners.append(winner)
        downs.append(experts.layers[winner].down[k])
        ups.append(experts.layers[winner].up[:, k] * experts.weights[winner])
    merged = LoraLayer(down=torch.stack(downs), up=torch.stack(ups, dim=1))
    return LayerMerge(merged, suppliers=_count(torch.tensor(winners), experts))


def max_magnitude(experts: LayerExperts) -> LayerMerge:
    """Take each row of A and of B from the expert in which its norm is largest (w_e scales rows of B).

    A control for `co_merge`: selection without data. Experts of weight 0 take no part.

    Source: control of this project; the largest row wins, without inputs.
    """
    present = present_experts(experts)
    weights = torch.tensor([abs(experts.weights[index]) for index in present])
    down = torch.stack([experts.layers[index].down.norm(dim=1) for index in present])
    up = torch.stack([experts.layers[index].up.norm(dim=1) for index in present]) * weights[:, None]
    return take_rows(experts, torch.tensor(present)[down.argmax(dim=0)], torch.tensor(present)[up.argmax(dim=0)])


def random_winner(experts: LayerExperts) -> LayerMerge:
    """Take each row of A and of B from an expert drawn at random (seed and layer name decide).

    A control for `co_merge`: selection without any reason. Experts of weight 0 take no part.

    Source: control of this project.
    """
    generator = derive_numpy(experts.seed, "merging.random_winner", experts.name)
    present, first = torch.tensor(present_experts(experts)), experts.layers[0]
    down = torch.from_numpy(generator.integers(len(present), size=first.down.shape[0]))
    up = torch.from_numpy(generator.integers(len(present), size=first.up.shape[0]))
    return take_rows(experts, present[down], present[up])


def take_rows(experts: LayerExperts, down_winner: Int[Tensor, " rank"], up_winner: Int[Tensor, " d_out"]) -> LayerMerge:
    """Return the layer whose row k of A is that of expert `down_winner[k]` and row i of B that of `up_winner[i]`.

    Rows of B carry the weight of their expert.
    """
    downs = torch.stack([layer.down for layer in experts.layers])
    ups = torch.stack([layer.up * weight for layer, weight in zip(experts.layers, experts.weights, strict=True)])
    merged = LoraLayer(
        down=downs[down_winner, torch.arange(downs.shape[1])], up=ups[up_winner, torch.arange(ups.shape[1])]
    )
    return LayerMerge(merged, suppliers=_count(torch.cat([down_winner, up_winner]), experts))


def _count(winners: Int[Tensor, " unit"], experts: LayerExperts) -> tuple[int, ...]:
    return tuple(torch.bincount(winners, minlength=len(experts.layers)).tolist())


def _expect_scores(experts: LayerExperts) -> None:
    if len(experts.scores) != len(experts.layers):
        raise SafetyDPOError(
            f"expected activation scores of {len(experts.layers)} experts for {experts.name!r}, found "
            f"{len(experts.scores)}: collect the layer inputs of the base model first"
        )


_SAFETYDPO = "Liu et al. 2024, SafetyDPO / AlignGuard, arXiv 2412.10493"

METHODS = (
    MergeMethod(
        "co_merge",
        co_merge,
        _SAFETYDPO,
        "experts that conflict, when the adapter must keep the rank of one expert",
        needs_inputs=True,
        selects=True,
        row_aligned=True,
    ),
    MergeMethod(
        "element",
        element,
        _SAFETYDPO,
        "as co_merge, element by element: more experts per layer, less of each",
        needs_inputs=True,
        selects=True,
        row_aligned=True,
    ),
    MergeMethod(
        "delta_neuron",
        delta_neuron,
        _SAFETYDPO,
        "as co_merge, for experts with independent initialisations; ranks add up",
        needs_inputs=True,
        selects=True,
    ),
    MergeMethod(
        "component",
        component,
        _SAFETYDPO,
        "as co_merge, for experts of independent initialisations or different ranks, at the rank of one",
        needs_inputs=True,
        selects=True,
    ),
    MergeMethod(
        "max_magnitude",
        max_magnitude,
        "control of this project",
        "a control for co_merge: selection without data",
        selects=True,
        row_aligned=True,
    ),
    MergeMethod(
        "random_winner",
        random_winner,
        "control of this project",
        "a control for co_merge: selection without any reason",
        selects=True,
        row_aligned=True,
        draws=True,
    ),
)
