"""Merge experts into one adapter, layer by layer.

`prepare_experts` checks a set of experts once and keeps what does not depend on scale, weights or method (the
activation scores), so that a search can merge the same experts many times; `add_experts` makes the set larger at the
cost of the new ones; `merge_experts` prepares and merges in one call.

One layer is held at a time beside the result: with experts that are read as they are needed
(`artifacts.lazy_tensors.LazyLayers`) and an output rank, memory hardly grows with their number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from safetydpo.artifacts.adapters import AdapterMetadata, LoraLayer, adapter_hash
from safetydpo.merging.algebra import (
    cap_rank,
    flatten_kernel,
    max_rank,
    rank_of,
    relative_error,
    restore_kernel,
    scale_layer,
    truncate,
)
from safetydpo.merging.method import LayerExperts, LayerMerge, MergeMethod
from safetydpo.merging.moments import Moments
from safetydpo.merging.prepare import Expert, PreparedExperts, add_experts, prepare_experts
from safetydpo.merging.registry import find_method
from safetydpo.merging.settings import MergeSettings, check_needs, check_numbers, expert_coefficients, layer_factors

__all__ = [
    "Expert",
    "MergeResult",
    "MergeSettings",
    "PreparedExperts",
    "add_experts",
    "merge_experts",
    "merge_prepared",
    "merge_with",
    "prepare_experts",
]


@dataclass(frozen=True)
class MergeResult:
    """A merged adapter and what is known of it.

    Attributes:
        layers: the merged change per module.
        shares: share of rows of A and B (or output rows) that each expert supplies; None for methods that blend.
        suppliers_per_layer: how many experts supply at least one row, per module; None for methods that blend.
        won: per module the rows that each expert supplies, by name, those without one left out; None for methods that
            blend.
        truncation_error: relative Frobenius error of the rank reduction, per module; 0 if there was none.
        overall_truncation_error: the same over all modules together.
        recipe: what made it, as JSON values.
    """

    layers: dict[str, LoraLayer]
    shares: dict[str, float] | None
    suppliers_per_layer: dict[str, int] | None
    truncation_error: dict[str, float]
    overall_truncation_error: float
    recipe: dict[str, Any]
    won: dict[str, dict[str, int]] | None = None

    @property
    def num_suppliers(self) -> dict[str, float] | None:
        """Experts that could supply a layer, and the fewest, mean and most that do; None for methods that blend."""
        if self.suppliers_per_layer is None:
            return None
        counts = list(self.suppliers_per_layer.values())
        return {
            "experts": len(self.recipe["experts"]),
            "fewest": min(counts),
            "mean": sum(counts) / len(counts),
            "most": max(counts),
        }

    def metadata(self, prepared: PreparedExperts) -> AdapterMetadata:
        """Return the metadata under which this adapter is written."""
        named = sorted(prepared.experts, key=lambda expert: expert.name)
        return AdapterMetadata(
            base_fingerprint=named[0].metadata.base_fingerprint,
            denoiser=named[0].metadata.denoiser,
            training_hash=adapter_hash(self.layers),
            kind="merged",
            categories=tuple(dict.fromkeys(c for expert in named for c in expert.metadata.categories)),
            recipe=self.recipe,
        )


def merge_experts(
    experts: Sequence[Expert],
    *,
    method: str,
    weights: Mapping[str, float] | None = None,
    global_scale: float = 1.0,
    density: float = 0.3,
    output_rank: int | None = None,
    inputs: Mapping[str, Tensor] | None = None,
    moments: Moments | None = None,
    distilled: Mapping[str, LoraLayer] | None = None,
    seed: int = 0,
) -> MergeResult:
    """Merge experts once; see `merge_prepared`."""
    chosen = find_method(method)
    prepared = prepare_experts(
        experts,
        inputs=inputs if chosen.needs_inputs else None,
        moments=moments if chosen.needs_moments else None,
        distilled=distilled if chosen.needs_distilled else None,
    )
    return merge_prepared(
        prepared,
        method=method,
        weights=weights,
        global_scale=global_scale,
        density=density,
        output_rank=output_rank,
        seed=seed,
    )


def merge_prepared(
    prepared: PreparedExperts,
    *,
    method: str,
    weights: Mapping[str, float] | None = None,
    global_scale: float = 1.0,
    density: float = 0.3,
    output_rank: int | None = None,
    block_weights: Mapping[str, float] | None = None,
    seed: int = 0,
) -> MergeResult:
    """Merge prepared experts by the settings that every method has; see `MergeSettings` and `merge_with`."""
    return merge_with(
        prepared,
        MergeSettings(
            method,
            weights=weights,
            global_scale=global_scale,
            density=density,
            output_rank=output_rank,
            block_weights=block_weights or {},
            seed=seed,
        ),
    )


def merge_with(prepared: PreparedExperts, settings: MergeSettings) -> MergeResult:
    """Merge prepared experts: delta = scale * method(w_e delta_e), for every layer on its own.

    `scale` is the global one times that of the layer's block, w_e the expert's weight times its own in the block. The
    result does not depend on the order in which experts were given.

    Raises:
        UsageError: if the method is unknown, weights or blocks name what is not there, weights are not finite or all
            zero or add up to nothing where they are shares, or a number is out of range.
        SafetyDPOError: if the method needs layer inputs or one LoRA signature and there is none.
    """
    method = find_method(settings.method)
    coefficients = expert_coefficients(prepared, settings.weights)
    check_numbers(settings)
    factors = layer_factors(prepared, settings, coefficients)
    check_needs(prepared, method, [weight for row in factors.values() for weight in row.weights])
    rank = output_rank(prepared, settings)
    layers: dict[str, LoraLayer] = {}
    suppliers: dict[str, tuple[int, ...]] = {}
    lost: dict[str, tuple[float, float]] = {}
    for name in prepared.layer_names:
        merged = _merge_layer(prepared, name, method, settings, weights=factors[name].weights, rank=rank)
        scale = settings.global_scale * factors[name].scale
        finished, lost[name] = _finish(merged, scale=scale, output_rank=rank)
        layers[name] = restore_kernel(finished, prepared.kernel(name))
        if merged.suppliers is not None:
            suppliers[name] = merged.suppliers
    recipe = _recipe(prepared, method, coefficients, settings)
    return _describe(prepared, layers, suppliers=suppliers, lost=lost, recipe=recipe)


def output_rank(prepared: PreparedExperts, settings: MergeSettings) -> int | None:
    """Return the most components that a merged layer may have; None = as many as it needs."""
    if settings.output_rank is None or settings.rank_growth == 0:
        return settings.output_rank
    num_experts = sum(expert.num_merged for expert in prepared.experts)
    # Rounded first: 4 * 8^(2/3) is 16, not 17.
    return math.ceil(round(settings.output_rank * num_experts**settings.rank_growth, 6))


def _merge_layer(
    prepared: PreparedExperts,
    name: str,
    method: MergeMethod,
    settings: MergeSettings,
    *,
    weights: Sequence[float],
    rank: int | None,
) -> LayerMerge:
    layers = prepared.layers(name)
    if all(weight == 0 for weight in weights) and method.takes_weights:
        # No expert acts in this block.
        empty = LoraLayer(torch.zeros_like(layers[0].down[:1]), torch.zeros_like(layers[0].up[:, :1]))
        return LayerMerge(empty, suppliers=(0,) * len(layers) if method.selects else None)
    # One access, which may read a file.
    moments = prepared.moments[name] if method.needs_moments else ()
    return method.function(
        LayerExperts(
            name=name,
            layers=layers,
            weights=weights,
            density=settings.density,
            scores=prepared.layer_scores(name, layers) if method.needs_inputs else (),
            seed=settings.seed,
            moments=moments[:-1],
            benign_moment=moments[-1] if moments else None,
            distilled=flatten_kernel(prepared.distilled[name])
            if method.needs_distilled and prepared.distilled
            else None,
            hashes=[expert.hash for expert in prepared.experts],
            output_rank=rank,
            options=settings.options,
            kept=prepared.kept_of(name),
        )
    )


def _describe(
    prepared: PreparedExperts,
    layers: dict[str, LoraLayer],
    *,
    suppliers: Mapping[str, tuple[int, ...]],
    lost: Mapping[str, tuple[float, float]],
    recipe: dict[str, Any],
) -> MergeResult:
    num_suppliers = {name: sum(count > 0 for count in counts) for name, counts in suppliers.items()}
    total_error, total_norm = (sum(column) for column in zip(*lost.values(), strict=True))
    return MergeResult(
        layers=layers,
        shares=_shares(prepared, suppliers) if suppliers else None,
        suppliers_per_layer=num_suppliers or None,
        truncation_error={name: relative_error(error, norm) for name, (error, norm) in lost.items()},
        overall_truncation_error=relative_error(total_error, total_norm),
        recipe=recipe,
        won=_won(prepared, suppliers) or None,
    )


def _finish(merged: LayerMerge, *, scale: float, output_rank: int | None) -> tuple[LoraLayer, tuple[float, float]]:
    """Scale and bring to the output rank; also return (squared error, squared norm) of the reduction."""
    scaled = scale_layer(merged.layer, scale) if scale != 1.0 else merged.layer
    if merged.lost is not None:
        # The method kept to the output rank itself.
        error, norm = merged.lost
        return cap_rank(scaled), (error * scale**2, norm * scale**2)
    if output_rank is None or output_rank >= max_rank(scaled) or rank_of(scaled) <= output_rank:
        return cap_rank(scaled), (0.0, 0.0) if output_rank is None else (0.0, _squared_norm(scaled))
    reduction = truncate(scaled, output_rank)
    return reduction.layer, (reduction.squared_error, reduction.squared_norm)


def _squared_norm(layer: LoraLayer) -> float:
    # |U D|^2 = trace((U'U)(D D')): small matrices only.
    up, down = layer.up.to(torch.float64), layer.down.to(torch.float64)
    return float(((up.T @ up) * (down @ down.T)).sum())


def _shares(prepared: PreparedExperts, suppliers: Mapping[str, tuple[int, ...]]) -> dict[str, float]:
    totals = [sum(counts[index] for counts in suppliers.values()) for index in range(len(prepared.experts))]
    shares = {expert.name: total / sum(totals) for expert, total in zip(prepared.experts, totals, strict=True)}
    return dict(sorted(shares.items()))


def _won(prepared: PreparedExperts, suppliers: Mapping[str, tuple[int, ...]]) -> dict[str, dict[str, int]]:
    names = [expert.name for expert in prepared.experts]
    return {
        layer: dict(sorted((name, count) for name, count in zip(names, counts, strict=True) if count > 0))
        for layer, counts in suppliers.items()
    }


def _recipe(
    prepared: PreparedExperts, method: MergeMethod, coefficients: Sequence[float], settings: MergeSettings
) -> dict[str, Any]:
    """Return what made a merge; settings that leave it as it would be without them are left out."""
    rows = sorted(zip(prepared.experts, coefficients, strict=True), key=lambda row: row[0].name)
    recipe: dict[str, Any] = {
        "method": method.name,
        "paper": method.paper,
        "global_scale": settings.global_scale,
        "output_rank": settings.output_rank,
        "experts": [_expert_row(expert, weight) for expert, weight in rows],
    }
    recipe |= {"density": settings.density} if method.uses_density else {}
    recipe |= {"seed": settings.seed} if method.draws else {}
    recipe |= {"rank_growth": settings.rank_growth} if settings.rank_growth else {}
    if settings.block_weights or settings.expert_block_weights:
        recipe["blocks"] = {name: list(patterns) for name, patterns in (settings.blocks or {}).items()}
        recipe["block_weights"] = dict(settings.block_weights)
        recipe["expert_block_weights"] = {name: dict(row) for name, row in settings.expert_block_weights.items()}
    return recipe | {name: getattr(settings.options, name) for name in method.options}


def _expert_row(expert: Expert, weight: float) -> dict[str, Any]:
    row = {"name": expert.name, "hash": expert.hash, "weight": weight, "init_seed": expert.metadata.init_seed}
    return row | ({"recipe": dict(expert.metadata.recipe)} if expert.metadata.kind == "merged" else {})
