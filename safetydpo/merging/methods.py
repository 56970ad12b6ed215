"""Merge methods: each is one pure function from the experts' changes of one layer to the merged change.

Every method is defined on deltas and follows one rule for weights: *a weight w is an expert whose delta is
multiplied by w*. So merging with weights equals merging scaled experts without weights, in every method. The
global scale multiplies the result and is applied by the caller (`merge.py`), as is the canonical order of the
experts (rising hash), to which all ties go.

Axis legend: `expert` experts, `input` inputs that vote (a prompt at a timestep), `rank` LoRA components,
`d_in d_out` features of the linear layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from safetydpo.artifacts.adapters import LoraLayer
from safetydpo.errors import SafetyDPOError
from safetydpo.merging.algebra import concatenate, delta, exact_factors
from safetydpo.merging.votes import NeuronScores, vote
from safetydpo.seeding import derive_numpy

RIDGE = 1e-2
"""Ridge of `regmean` relative to the mean diagonal entry of the summed moments: chosen among 1e-4, 1e-3 and 1e-2 on the
demo's validation prompts, because the larger it is the better neutral concepts were kept."""


@dataclass(frozen=True)
class LayerExperts:
    """All that a method may use of one layer.

    Attributes:
        name: module name of the layer.
        layers: one change per expert, in rising order of expert hash.
        weights: one coefficient per expert.
        density: share of entries kept by methods that trim, in (0, 1].
        scores: activations per expert; empty unless the method asks for inputs.
        seed: seed of methods that draw.
        moments: second moment of the layer's inputs per expert; empty unless the method asks for moments.
        benign_moment: the same on benign prompts; None unless the method asks for moments.
        distilled: this layer of the adapter that was fitted to the experts; None unless the method asks for it.
    """

    name: str
    layers: Sequence[LoraLayer]
    weights: Sequence[float]
    density: float = 1.0
    scores: Sequence[NeuronScores] = ()
    seed: int = 0
    moments: Sequence[Tensor] = ()
    benign_moment: Tensor | None = None
    distilled: LoraLayer | None = None


@dataclass(frozen=True)
class LayerMerge:
    """The merged change of one layer and, for methods that select, how many units each expert supplies."""

    layer: LoraLayer
    suppliers: tuple[int, ...] | None = None


def sum_deltas(experts: LayerExperts) -> LayerMerge:
    """Add the experts: delta = sum_e w_e delta_e.

    Use it when experts touch different things; its strength grows with their number, so sweep the scale.

    Source: Ilharco et al. 2023, "Editing Models with Task Arithmetic" (arXiv 2212.04089), section 2.
    """
    return LayerMerge(concatenate(experts.layers, experts.weights))


def average(experts: LayerExperts) -> LayerMerge:
    """Average the experts: delta = (1 / E) sum_e w_e delta_e, with E the number of experts (not of weights).

    Use it as the cautious baseline; it is `sum` at a global scale of 1 / E.

    Source: Wortsman et al. 2022, "Model soups" (arXiv 2203.05482), section 2 (uniform soup).
    """
    count = len(experts.layers)
    return LayerMerge(concatenate(experts.layers, [weight / count for weight in experts.weights]))


def ties(experts: LayerExperts) -> LayerMerge:
    """Trim, elect signs, and average the entries that agree with the elected sign.

    Trim: keep the int(density * size) (at least one) entries of largest magnitude of each expert's delta.
    Elect: sign of sum_e w_e t_e (0 counts as +). Merge: mean of the w_e t_e whose sign is the elected one.
    Entries equal to the smallest kept magnitude are all kept. Memory does not grow with the number of experts.

    Use it when experts pull the same weights in opposite directions; the result has full rank.

    Raises:
        SafetyDPOError: if the density is outside (0, 1].

    Source: Yadav et al. 2023, "TIES-Merging" (arXiv 2306.01708), algorithm 1.
    """
    if not 0 < experts.density <= 1:
        raise SafetyDPOError(f"expected a TIES density in (0, 1], found {experts.density}")
    first = experts.layers[0]
    shape = (first.up.shape[0], first.down.shape[1])
    positive, negative, num_positive, num_negative = (torch.zeros(shape, dtype=first.up.dtype) for _ in range(4))
    for layer, weight in zip(experts.layers, experts.weights, strict=True):
        trimmed = trim(delta(layer), experts.density).mul_(weight)
        positive += trimmed.clamp(min=0)
        negative += trimmed.clamp(max=0)
        num_positive += trimmed > 0
        num_negative += trimmed < 0
    elected = positive + negative >= 0
    merged = torch.where(elected, positive / num_positive.clamp(min=1), negative / num_negative.clamp(min=1))
    return LayerMerge(exact_factors(merged))


def trim(dense: Float[Tensor, "d_out d_in"], density: float) -> Float[Tensor, "d_out d_in"]:
    """Return a copy in which all but the int(density * size) entries of largest magnitude are 0.

    At least one entry is kept; entries as large as the smallest kept one are kept too, so that the result does
    not depend on how a sort breaks ties.

    Source: Yadav et al. 2023, "TIES-Merging" (arXiv 2306.01708), algorithm 1, step 1.
    """
    if density >= 1:
        return dense.clone()
    magnitude = dense.abs()
    kept = max(1, int(density * dense.numel()))
    threshold = magnitude.flatten().kthvalue(dense.numel() - kept + 1).values
    return torch.where(magnitude >= threshold, dense, 0.0)


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
    present = _present(experts)
    weights = torch.tensor([abs(experts.weights[index]) for index in present])
    down_winner = vote(torch.stack([experts.scores[index].down for index in present]))
    up_scores = torch.stack([experts.scores[index].up for index in present])
    up_winner = vote(up_scores * weights[:, None, None])
    return take_rows(experts, torch.tensor(present)[down_winner], torch.tensor(present)[up_winner])


def delta_neuron(experts: LayerExperts) -> LayerMerge:
    """Let every input vote for the expert of each output neuron of the delta, and take that row of it exactly.

    Row i of the merged delta is row i of w_e B_e A_e of the winner, by the same scores as the rows of B in
    `co_merge`. A and B are never mixed, so it needs no shared basis; the ranks add up.

    Use it in place of `co_merge` when experts have independent initialisations.

    Source: Liu et al. 2024, "SafetyDPO / AlignGuard" (arXiv 2412.10493), Co-Merge read on output neurons.
    """
    _expect_scores(experts)
    present = _present(experts)
    weights = torch.tensor([abs(experts.weights[index]) for index in present])
    scores = torch.stack([experts.scores[index].up for index in present])
    winner = torch.tensor(present)[vote(scores * weights[:, None, None])]
    masked = [
        LoraLayer(layer.down, layer.up * (winner == index)[:, None]) for index, layer in enumerate(experts.layers)
    ]
    counts = torch.bincount(winner, minlength=len(experts.layers))
    return LayerMerge(concatenate(masked, experts.weights), suppliers=tuple(counts.tolist()))


def regmean(experts: LayerExperts) -> LayerMerge:
    """Regress: give each expert's inputs that expert's change, and benign inputs no change, as well as one map can.

    delta = argmin_W sum_e |(W - w_e delta_e) h|^2 over inputs h of expert e + |W h|^2 over benign inputs
          = (sum_e w_e delta_e G_e) (sum_e G_e + G_benign + RIDGE m I)^-1,
    with G second moments and m the mean of the diagonal of their sum. The benign inputs are an expert that changes
    nothing. Its column space is that of the experts, so the result is exact at the sum of their ranks.

    Use it when experts must act on their own prompts only; it needs the prompts of each expert.

    Raises:
        SafetyDPOError: if there are no moments.

    Source: Jin et al. 2023, "Dataless Knowledge Fusion by Merging Weights of Language Models" (RegMean, arXiv
    2212.09849), eq. 2; the ridge in place of its scaling of off-diagonal entries, and the benign term, are ours.
    """
    if len(experts.moments) != len(experts.layers) or experts.benign_moment is None:
        raise SafetyDPOError(
            f"expected second moments of the inputs of {len(experts.layers)} experts and of benign prompts for "
            f"{experts.name!r}, found {len(experts.moments)}: collect the layer inputs of the base model first"
        )
    moments = [moment.to(torch.float64) for moment in experts.moments]
    total = torch.stack([*moments, experts.benign_moment.to(torch.float64)]).sum(dim=0)
    total.diagonal().add_(RIDGE * total.diagonal().mean())
    factors = torch.linalg.lu_factor(total)
    layers = []
    for layer, moment in zip(experts.layers, moments, strict=True):
        # A G T^-1 = (T^-1 G A')' because both moments are symmetric.
        weighted = torch.linalg.lu_solve(*factors, moment @ layer.down.to(torch.float64).T).T
        layers.append(LoraLayer(down=weighted.to(layer.down.dtype).contiguous(), up=layer.up))
    return LayerMerge(concatenate(layers, experts.weights))


def distill(experts: LayerExperts) -> LayerMerge:
    """Take the adapter that was fitted, all layers together, to answer each expert's prompts as that expert does.

    The fit is a short training (see `safetydpo.dpo.distillation`), made once per set of experts; only the global scale
    is left to choose. Layer-wise methods see one linear map at a time, and what makes an expert act on its own
    prompts only is spread over many; a fit of the whole network's predictions keeps that.

    Use it when layer-wise merges lose either safety or the concepts that no expert should touch.

    Raises:
        SafetyDPOError: if there is no fitted adapter.

    Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531), section 2.
    """
    if experts.distilled is None:
        raise SafetyDPOError(
            f"expected a distilled adapter of these experts for {experts.name!r}, found none: distil them first"
        )
    return LayerMerge(experts.distilled)


def max_magnitude(experts: LayerExperts) -> LayerMerge:
    """Take each row of A and of B from the expert in which its norm is largest (w_e scales rows of B).

    A control for `co_merge`: selection without data. Experts of weight 0 take no part.

    Source: control of this project; the largest row wins, without inputs.
    """
    present = _present(experts)
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
    present, first = torch.tensor(_present(experts)), experts.layers[0]
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
    counts = torch.bincount(torch.cat([down_winner, up_winner]), minlength=len(experts.layers))
    return LayerMerge(merged, suppliers=tuple(counts.tolist()))


def _present(experts: LayerExperts) -> list[int]:
    """Return the positions of the experts that take part in a selection: those whose weight is not 0."""
    return [index for index, weight in enumerate(experts.weights) if weight != 0]


def _expect_scores(experts: LayerExperts) -> None:
    if len(experts.scores) != len(experts.layers):
        raise SafetyDPOError(
            f"expected activation scores of {len(experts.layers)} experts for {experts.name!r}, found "
            f"{len(experts.scores)}: collect the layer inputs of the base model first"
        )
