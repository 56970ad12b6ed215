"""Element-wise merges: entries are dropped, signs elected; the result has full rank unless it is truncated.

One dense expert at a time, so that memory does not grow with their number. What is drawn for an expert comes from
(seed, layer, hash of the expert): neither order nor number of the others matters.

Axis legend: `d_in d_out` features of the linear layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from safetydpo.errors import SafetyDPOError
from safetydpo.merging.algebra import delta, exact_factors
from safetydpo.merging.method import LayerExperts, LayerMerge, MergeMethod, check_density
from safetydpo.seeding import derive_torch


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
    check_density(experts, method="TIES")
    return LayerMerge(exact_factors(elect_and_average(_scaled(experts, trimmed(experts)))))


def magnitude(experts: LayerExperts) -> LayerMerge:
    """Trim and add: delta = sum_e w_e t_e, with t_e the largest entries of each expert as in `ties`.

    Use it when experts are noisy but do not contradict each other; the result has full rank.

    Raises:
        SafetyDPOError: if the density is outside (0, 1].

    Source: Yadav et al. 2023, "TIES-Merging" (arXiv 2306.01708), section 3 (trimming alone keeps an expert's strength).
    """
    check_density(experts, method="magnitude")
    return LayerMerge(exact_factors(_total(_scaled(experts, trimmed(experts)))))


def dare(experts: LayerExperts) -> LayerMerge:
    """Drop entries at random, rescale the others, and add: delta = sum_e w_e (m_e / density) delta_e.

    m_e is 1 with probability `density`, else 0, independently for each entry; the expectation is the sum.

    Use it when experts are many and redundant: each keeps some entries, and fewer collide. Full rank.

    Raises:
        SafetyDPOError: if the density is outside (0, 1], or the experts' hashes are missing.

    Source: Yu et al. 2024, "Language Models are Super Mario" (DARE, arXiv 2311.03099), section 3.2.
    """
    check_density(experts, method="DARE")
    return LayerMerge(exact_factors(_total(_scaled(experts, _dropped(experts)))))


def dare_ties(experts: LayerExperts) -> LayerMerge:
    """Drop entries at random and rescale as `dare`, then elect signs and average as `ties`.

    Use it when experts are redundant and pull the same weights in opposite directions. Full rank.

    Raises:
        SafetyDPOError: if the density is outside (0, 1], or the experts' hashes are missing.

    Source: Yu et al. 2024, "Language Models are Super Mario" (DARE, arXiv 2311.03099), section 4.2 (with TIES).
    """
    check_density(experts, method="DARE")
    return LayerMerge(exact_factors(elect_and_average(_scaled(experts, _dropped(experts)))))


def della(experts: LayerExperts) -> LayerMerge:
    """Drop small entries more often than large ones, rescale, elect signs and average the agreeing entries.

    Entry j of a row is kept with probability p_j = density - window / 2 + window * rank_j / (d_in - 1), rank 0 being
    the smallest magnitude of the row, and divided by p_j. The window is narrowed to at most density and
    2 (1 - density), so that 0 < p_j <= 1 and the expectation before the election is the expert.

    Use it in place of `dare_ties` when large entries matter: it drops fewer of them. Full rank.

    Raises:
        SafetyDPOError: if the density is outside (0, 1], or the experts' hashes are missing.

    Source: Deep et al. 2024, "DELLA-Merging" (arXiv 2406.11617), section 3 (MagPrune, elect, fuse).
    """
    check_density(experts, method="DELLA")

    def pruned() -> Iterator[Tensor]:
        for index, layer in enumerate(experts.layers):
            dense = delta(layer)
            kept = keep_probabilities(dense, experts.density, window=experts.options.della_window)
            yield torch.where(_draws(experts, index, dense) < kept, dense / kept, 0.0)

    return LayerMerge(exact_factors(elect_and_average(_scaled(experts, pruned()))))


def breadcrumbs(experts: LayerExperts) -> LayerMerge:
    """Drop the largest and the smallest entries of each expert and add the rest.

    Of n entries the int(outliers * n) largest go first, then int(density * n) (at least one) are kept; fewer
    outliers go where density + outliers is above 1. Entries equal to the limits are kept.

    Use it when a few huge entries of an expert spoil the merge. Full rank.

    Raises:
        SafetyDPOError: if the density is outside (0, 1].

    Source: Davari and Belilovsky 2024, "Model Breadcrumbs" (arXiv 2312.06795), section 3.
    """
    check_density(experts, method="breadcrumbs")
    outliers = experts.options.breadcrumbs_outliers
    kept = (trim_both(delta(layer), experts.density, outliers=outliers) for layer in experts.layers)
    return LayerMerge(exact_factors(_total(_scaled(experts, kept))))


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
    threshold = _kth_smallest(magnitude.flatten(), dense.numel() - kept + 1)
    return torch.where(magnitude >= threshold, dense, 0.0)


def trim_both(dense: Float[Tensor, "d_out d_in"], density: float, *, outliers: float) -> Float[Tensor, "d_out d_in"]:
    """Return a copy without the int(outliers * size) largest entries and with the int(density * size) next ones only.

    At least one entry is kept; entries equal to the smallest or largest kept one are kept too.

    Source: Davari and Belilovsky 2024, "Model Breadcrumbs" (arXiv 2312.06795), section 3.
    """
    size = dense.numel()
    kept = max(1, int(density * size))
    dropped = min(int(outliers * size), size - kept)
    magnitudes = dense.abs()
    flat = magnitudes.flatten()
    highest = _kth_smallest(flat, size - dropped)
    lowest = _kth_smallest(flat, size - dropped - kept + 1)
    return torch.where((magnitudes >= lowest) & (magnitudes <= highest), dense, 0.0)


def keep_probabilities(
    dense: Float[Tensor, "d_out d_in"], density: float, *, window: float
) -> Float[Tensor, "d_out d_in"]:
    """Return the probability with which `della` keeps each entry: rising with its rank among its row's magnitudes.

    Source: Deep et al. 2024, "DELLA-Merging" (arXiv 2406.11617), section 3.1.
    """
    window = min(window, density, 2 * (1 - density))
    columns = dense.shape[1]
    if columns == 1:
        return torch.full_like(dense, density)
    order = dense.abs().argsort(dim=1, stable=True)
    ranks = torch.empty_like(dense).scatter_(1, order, torch.arange(columns, dtype=dense.dtype).expand_as(dense))
    return density - window / 2 + window * ranks / (columns - 1)


def trimmed(experts: LayerExperts) -> Iterator[Float[Tensor, "d_out d_in"]]:
    """Yield the dense change of each expert, trimmed to the density, without its weight."""
    return (trim(delta(layer), experts.density) for layer in experts.layers)


def elect_and_average(changes: Iterable[Float[Tensor, "d_out d_in"]]) -> Float[Tensor, "d_out d_in"]:
    """Return per entry the mean of the changes that have the sign of their sum (0 counts as +); zeros take no part.

    Source: Yadav et al. 2023, "TIES-Merging" (arXiv 2306.01708), algorithm 1, steps 2 and 3.
    """
    positive = negative = num_positive = num_negative = torch.zeros(())
    for index, change in enumerate(changes):
        if index == 0:
            positive, negative, num_positive, num_negative = (torch.zeros_like(change) for _ in range(4))
            part = torch.empty_like(change)
        positive += torch.clamp(change, min=0, out=part)
        negative += torch.clamp(change, max=0, out=part)
        num_positive += change > 0
        num_negative += change < 0
    elected = positive + negative >= 0
    return torch.where(elected, positive / num_positive.clamp(min=1), negative / num_negative.clamp(min=1))


def _kth_smallest(values: Float[Tensor, " entry"], k: int) -> Tensor | float:
    """Return the k-th smallest value, counted from 1; numpy's selection is twice as fast as torch's."""
    if values.dtype not in (torch.float32, torch.float64):
        return values.kthvalue(k).values
    return float(np.partition(values.numpy(), k - 1)[k - 1])


def _scaled(experts: LayerExperts, changes: Iterable[Tensor]) -> Iterator[Tensor]:
    return (change.mul_(weight) for change, weight in zip(changes, experts.weights, strict=True))


def _total(changes: Iterator[Tensor]) -> Tensor:
    total = next(changes)
    for change in changes:
        total += change
    return total


def _dropped(experts: LayerExperts) -> Iterator[Tensor]:
    for index, layer in enumerate(experts.layers):
        dense = delta(layer)
        kept = _draws(experts, index, dense) < experts.density
        yield torch.where(kept, dense / experts.density, 0.0)


def _draws(experts: LayerExperts, index: int, dense: Tensor) -> Float[Tensor, "d_out d_in"]:
    """Return uniform numbers in [0, 1), the same for every method: what differs is the rule, not the luck."""
    if len(experts.hashes) != len(experts.layers):
        raise SafetyDPOError(
            f"expected one hash per expert to draw for {experts.name!r}, found {len(experts.hashes)} of "
            f"{len(experts.layers)}: merge with `merge_prepared`, which passes them"
        )
    generator = derive_torch(experts.seed, "merging.drop", f"{experts.name}\x1f{experts.hashes[index]}")
    return torch.rand(dense.shape, generator=generator, dtype=dense.dtype)


_FULL_RANK = "; full rank unless truncated"

METHODS = (
    MergeMethod(
        "ties",
        ties,
        "Yadav et al. 2023, TIES-Merging, arXiv 2306.01708",
        "experts that pull the same weights in opposite directions" + _FULL_RANK,
        uses_density=True,
    ),
    MergeMethod(
        "magnitude",
        magnitude,
        "Yadav et al. 2023, TIES-Merging, arXiv 2306.01708",
        "noisy experts that do not contradict each other" + _FULL_RANK,
        uses_density=True,
    ),
    MergeMethod(
        "dare",
        dare,
        "Yu et al. 2024, Language Models are Super Mario (DARE), arXiv 2311.03099",
        "many redundant experts, so that fewer entries collide" + _FULL_RANK,
        uses_density=True,
        draws=True,
    ),
    MergeMethod(
        "dare_ties",
        dare_ties,
        "Yu et al. 2024, Language Models are Super Mario (DARE), arXiv 2311.03099",
        "redundant experts that also pull in opposite directions" + _FULL_RANK,
        uses_density=True,
        draws=True,
    ),
    MergeMethod(
        "della",
        della,
        "Deep et al. 2024, DELLA-Merging, arXiv 2406.11617",
        "as dare_ties, when an expert's large entries matter most" + _FULL_RANK,
        uses_density=True,
        draws=True,
        options=("della_window",),
    ),
    MergeMethod(
        "breadcrumbs",
        breadcrumbs,
        "Davari and Belilovsky 2024, Model Breadcrumbs, arXiv 2312.06795",
        "experts with a few huge entries that spoil the merge" + _FULL_RANK,
        uses_density=True,
        options=("breadcrumbs_outliers",),
    ),
)
