"""Blends: weighted sums of the experts' changes, exact in factored form.

Axis legend: none; layers are added as factors (`algebra.concatenate`).
"""

from __future__ import annotations

from safetydpo.errors import UsageError
from safetydpo.merging.algebra import concatenate, max_rank, rank_of, truncate
from safetydpo.merging.method import LayerExperts, LayerMerge, MergeMethod

NOTHING = 1e-8
"""Sums of weights below this are a cancellation, not a number to divide by."""


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


def linear(experts: LayerExperts) -> LayerMerge:
    """Average the experts by their weights: delta = sum_e w_e delta_e / sum_e w_e.

    The one method whose weights are shares: multiplying all of them by a number changes nothing.

    Use it to give some experts more say than others without making the whole stronger.

    Raises:
        UsageError: if the weights add up to nothing.

    Source: Wortsman et al. 2022, "Model soups" (arXiv 2203.05482), section 2, with weights.
    """
    total = sum(experts.weights)
    if abs(total) < NOTHING:
        raise UsageError(
            f"expected weights that add up to a number other than 0 for merge method 'linear', found "
            f"{list(experts.weights)}: change them, or choose 'sum'"
        )
    return LayerMerge(concatenate(experts.layers, [weight / total for weight in experts.weights]))


def svd(experts: LayerExperts) -> LayerMerge:
    """Add the experts and keep the strongest directions: the nearest change of low rank to sum_e w_e delta_e.

    The rank is the output rank or, if there is none, the largest rank of an expert (at most min(d_in, d_out)).

    Use it when experts touch different things and the adapter must stay as small as one expert.

    Source: Eckart and Young 1936; as a merge, `svd` of PEFT's `add_weighted_adapter` and kohya's `svd_merge_lora`.
    """
    total = concatenate(experts.layers, experts.weights)
    rank = experts.output_rank or max(rank_of(layer) for layer in experts.layers)
    reduction = truncate(total, min(rank, max_rank(total)))
    return LayerMerge(reduction.layer, lost=(reduction.squared_error, reduction.squared_norm))


METHODS = (
    MergeMethod(
        "average",
        average,
        "Wortsman et al. 2022, Model soups, arXiv 2203.05482",
        "the cautious baseline: sum at a global scale of 1 / number of experts",
    ),
    MergeMethod(
        "linear",
        linear,
        "Wortsman et al. 2022, Model soups, arXiv 2203.05482",
        "an average in which some experts have more say; weights are shares",
        normalises_weights=True,
    ),
    MergeMethod(
        "sum",
        sum_deltas,
        "Ilharco et al. 2023, Task arithmetic, arXiv 2212.04089",
        "experts that touch different things; sweep the global scale",
    ),
    MergeMethod(
        "svd",
        svd,
        "Eckart and Young 1936, The approximation of one matrix by another of lower rank",
        "sum, when the adapter must stay as small as one expert",
    ),
)
