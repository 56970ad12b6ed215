"""What is asked of a merge, and whether method, experts and numbers fit together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.merging.blocks import assign_blocks
from safetydpo.merging.compatible import check_same_signature
from safetydpo.merging.method import MergeMethod, MethodOptions
from safetydpo.merging.prepare import PreparedExperts


@dataclass(frozen=True)
class MergeSettings:
    """How to merge.

    Attributes:
        method: a name in the registry.
        weights: coefficient per expert name; None = 1 each. An expert of weight 0 is left out of votes.
        global_scale: factor on the merged delta.
        density: share of entries kept by methods that trim.
        output_rank: most components per layer, by truncated SVD; None = exact, at most min(d_in, d_out).
        rank_growth: how the output rank grows with the number E of experts: ceil(output_rank * E^rank_growth), so 0 =
            not at all, 1 = as many components for each expert.
        blocks: named groups of layers beside `blocks.BLOCKS`, as patterns of module names; None = no others.
        block_weights: factor on the merged delta per block; a block that is not named: 1. A block is a name in `blocks`
            or in `BLOCKS`, or the first parts of its modules' names.
        expert_block_weights: per expert name a factor on its weight per block; what is not named: 1.
        options: numbers that single methods take.
        seed: seed of methods that draw.
    """

    method: str
    weights: Mapping[str, float] | None = None
    global_scale: float = 1.0
    density: float = 0.3
    output_rank: int | None = None
    rank_growth: float = 0.0
    blocks: Mapping[str, Sequence[str]] | None = None
    block_weights: Mapping[str, float] = field(default_factory=dict)
    expert_block_weights: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    options: MethodOptions = field(default_factory=MethodOptions)
    seed: int = 0


@dataclass(frozen=True)
class LayerFactors:
    """The coefficients of one layer: one per expert, in their order, and one on the merged change."""

    weights: list[float]
    scale: float


def expert_coefficients(prepared: PreparedExperts, weights: Mapping[str, float] | None) -> list[float]:
    """Return one weight per expert, in their order.

    Raises:
        UsageError: if they are not one finite number for each expert, or all are 0.
    """
    names = [expert.name for expert in prepared.experts]
    if weights is None:
        return [1.0] * len(names)
    if set(weights) != set(names):
        raise UsageError(
            f"expected one weight for each of {', '.join(sorted(names))}, found {', '.join(sorted(weights)) or 'none'}"
        )
    if not all(math.isfinite(weight) for weight in weights.values()):
        raise UsageError(f"expected finite weights, found {dict(sorted(weights.items()))}")
    if all(weight == 0 for weight in weights.values()):
        raise UsageError("expected at least one expert with a weight other than 0, found none: nothing would be merged")
    return [float(weights[name]) for name in names]


def layer_factors(
    prepared: PreparedExperts, settings: MergeSettings, coefficients: Sequence[float]
) -> dict[str, LayerFactors]:
    """Return per layer the experts' weights and the scale, those of its block multiplied in.

    Raises:
        UsageError: if blocks or experts are named that there are not, a factor is not finite, or all weights of all
            layers are 0.
    """
    if not settings.block_weights and not settings.expert_block_weights:
        same = LayerFactors(list(coefficients), 1.0)
        return dict.fromkeys(prepared.layer_names, same)
    names = [expert.name for expert in prepared.experts]
    unknown = sorted(set(settings.expert_block_weights) - set(names))
    if unknown:
        raise UsageError(
            f"expected block weights of {', '.join(sorted(names))}, found some of {unknown[0]!r}: correct its name"
        )
    factors = [settings.block_weights, *settings.expert_block_weights.values()]
    for row in factors:
        if not all(math.isfinite(factor) for factor in row.values()):
            raise UsageError(f"expected finite factors of blocks, found {dict(row)}")
    assigned = assign_blocks(prepared.layer_names, {block for row in factors for block in row}, settings.blocks)
    found = {}
    for layer in prepared.layer_names:
        block = assigned.get(layer, "")
        own = [settings.expert_block_weights.get(name, {}).get(block, 1.0) for name in names]
        weights = [weight * factor for weight, factor in zip(coefficients, own, strict=True)]
        found[layer] = LayerFactors(weights, settings.block_weights.get(block, 1.0))
    if not any(weight * row.scale for row in found.values() for weight in row.weights):
        raise UsageError(
            "expected a block in which an expert has a weight other than 0, found none: nothing would be merged"
        )
    return found


def check_numbers(settings: MergeSettings) -> None:
    """Refuse numbers out of their range.

    Raises:
        UsageError: names the number and its range.
    """
    if not math.isfinite(settings.global_scale) or settings.global_scale <= 0:
        raise UsageError(f"expected a global scale above 0, found {settings.global_scale}")
    if not 0 < settings.density <= 1:
        raise UsageError(f"expected a density in (0, 1], found {settings.density}")
    if settings.output_rank is not None and settings.output_rank < 1:
        raise UsageError(f"expected an output rank of at least 1, found {settings.output_rank}")
    if not 0 <= settings.rank_growth <= 1:
        raise UsageError(f"expected a rank growth in [0, 1], found {settings.rank_growth}")
    if settings.rank_growth > 0 and settings.output_rank is None:
        raise UsageError(
            f"expected an output rank that can grow, found rank_growth {settings.rank_growth} and no output_rank: "
            "set both or neither"
        )
    options = settings.options
    if not options.della_window >= 0 or not math.isfinite(options.della_window):
        raise UsageError(f"expected a della_window of at least 0, found {options.della_window}")
    if not 0 <= options.breadcrumbs_outliers < 1:
        raise UsageError(f"expected breadcrumbs_outliers in [0, 1), found {options.breadcrumbs_outliers}")


def check_needs(prepared: PreparedExperts, method: MergeMethod, weights: Sequence[float]) -> None:
    """Refuse a method that needs what is not there; `weights` are those of all experts and layers.

    Raises:
        UsageError: if weights other than 1 are given to a method that takes none.
        SafetyDPOError: if layer inputs, moments, a distilled adapter or one LoRA signature are missing.
    """
    if not method.takes_weights and any(weight != 1.0 for weight in weights):
        raise UsageError(
            f"expected weights of 1 for merge method {method.name!r}, whose result does not depend on them, found "
            f"{sorted(set(weights))}: leave them out, or choose a method that takes weights"
        )
    if method.row_aligned:
        check_same_signature([(expert.name, expert.layers) for expert in prepared.experts], method=method.name)
    if method.needs_inputs and not prepared.has_scores:
        raise SafetyDPOError(
            f"expected layer inputs of the base model for merge method {method.name!r}, found none: "
            "pass the collected inputs, or choose a method that needs none"
        )
    if method.needs_moments and not prepared.moments:
        raise SafetyDPOError(
            f"expected moments of layer inputs of the base model for merge method {method.name!r}, found none: "
            "pass the collected moments, or choose a method that needs none"
        )
    if method.needs_distilled and prepared.distilled is None:
        raise SafetyDPOError(
            f"expected a distilled adapter of these experts for merge method {method.name!r}, found none: "
            "distil them first, or choose a method that needs none"
        )
