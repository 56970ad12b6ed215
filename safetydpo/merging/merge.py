"""Merge experts into one adapter, layer by layer.

`prepare_experts` checks a set of experts once and keeps what does not depend on scale, weights or method (the
activation scores), so that a search can merge the same experts many times; `merge_experts` is both in one call.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from safetydpo.artifacts.adapters import AdapterMetadata, LoraLayer, adapter_hash
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.merging.algebra import (
    cap_rank,
    factor_dense,
    max_rank,
    rank_of,
    reduce_rank,
    relative_error,
    scale_layer,
)
from safetydpo.merging.compatible import check_experts, check_same_signature
from safetydpo.merging.methods import LayerExperts
from safetydpo.merging.moments import BENIGN, Moments, expert_moment
from safetydpo.merging.registry import MergeMethod, find_method
from safetydpo.merging.votes import NeuronScores, score_neurons


@dataclass(frozen=True)
class Expert:
    """One adapter that takes part in a merge; `hash` decides order and ties, `name` is for people."""

    name: str
    hash: str
    layers: Mapping[str, LoraLayer]
    metadata: AdapterMetadata


@dataclass(frozen=True)
class PreparedExperts:
    """Checked experts in rising order of hash, with the scores of each on the layer inputs (if there are any)."""

    experts: tuple[Expert, ...]
    layer_names: tuple[str, ...]
    scores: Mapping[str, tuple[NeuronScores, ...]] = field(default_factory=dict)
    moments: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)
    """Per module the second moments of each expert's inputs, and last that of benign prompts."""
    distilled: Mapping[str, LoraLayer] | None = None
    """The adapter that was fitted to these experts."""


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


def prepare_experts(
    experts: Sequence[Expert],
    *,
    inputs: Mapping[str, Tensor] | None = None,
    moments: Moments | None = None,
    distilled: Mapping[str, LoraLayer] | None = None,
) -> PreparedExperts:
    """Check that experts belong together, put them in order, score them on the layer inputs and find their moments.

    Raises:
        UsageError: if there is no expert or a name occurs twice.
        SafetyDPOError: if experts differ in base model, target layers or shapes, hold NaN, or a layer has no inputs
            or no distilled change.
    """
    check_experts([(expert.name, expert.layers, expert.metadata) for expert in experts])
    ordered = tuple(sorted(experts, key=lambda expert: (expert.hash, expert.name)))
    names = tuple(sorted(ordered[0].layers))
    scores: dict[str, tuple[NeuronScores, ...]] = {}
    if inputs is not None:
        missing = next((name for name in names if name not in inputs), None)
        if missing is not None:
            raise SafetyDPOError(
                f"expected layer inputs of every LoRA target, found none for {missing!r}: "
                "collect them again with the same lora.targets"
            )
        for name in names:
            scores[name] = tuple(score_neurons(expert.layers[name], inputs[name]) for expert in ordered)
    if distilled is not None and set(distilled) != set(names):
        first = sorted(set(distilled) ^ set(names))[0]
        raise SafetyDPOError(
            f"expected a distilled adapter of the experts' {len(names)} layers, found {len(distilled)} and a first "
            f"difference at {first!r}: distil these experts again"
        )
    found = {} if moments is None else _moments(ordered, names, moments)
    return PreparedExperts(ordered, names, scores, found, distilled)


def _moments(ordered: Sequence[Expert], names: Sequence[str], moments: Moments) -> dict[str, tuple[Tensor, ...]]:
    found: dict[str, tuple[Tensor, ...]] = {}
    for name in names:
        if BENIGN not in moments.get(name, {}):
            raise SafetyDPOError(
                f"expected moments of the inputs of every LoRA target, on benign prompts too, found none for {name!r}: "
                "collect them again with the same lora.targets"
            )
        own = [expert_moment(moments[name], expert=e.name, categories=e.metadata.categories) for e in ordered]
        found[name] = (*own, moments[name][BENIGN])
    return found


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
    seed: int = 0,
) -> MergeResult:
    """Merge prepared experts: delta = global_scale * method(w_e delta_e), for every layer on its own.

    The result does not depend on the order in which experts were given.

    Args:
        prepared: experts that belong together.
        method: a name in the registry.
        weights: coefficient per expert name; None = 1 each. An expert of weight 0 is left out of votes.
        global_scale: factor on the merged delta.
        density: share of entries kept by methods that trim.
        output_rank: most components per layer, by truncated SVD; None = exact, at most min(d_in, d_out).
        seed: seed of methods that draw.

    Raises:
        UsageError: if the method is unknown, weights name other experts, are not finite or all zero, or a number
            is out of range.
        SafetyDPOError: if the method needs layer inputs or one LoRA signature and there is none.
    """
    chosen = find_method(method)
    coefficients = _coefficients(prepared, weights)
    _check_numbers(global_scale=global_scale, density=density, output_rank=output_rank)
    _check_needs(prepared, chosen, coefficients)
    layers: dict[str, LoraLayer] = {}
    suppliers: dict[str, tuple[int, ...]] = {}
    lost: dict[str, tuple[float, float]] = {}
    for name in prepared.layer_names:
        merged = chosen.function(
            LayerExperts(
                name=name,
                layers=[expert.layers[name] for expert in prepared.experts],
                weights=coefficients,
                density=density,
                scores=prepared.scores.get(name, ()) if chosen.needs_inputs else (),
                seed=seed,
                moments=prepared.moments[name][:-1] if chosen.needs_moments else (),
                benign_moment=prepared.moments[name][-1] if chosen.needs_moments else None,
                distilled=prepared.distilled[name] if chosen.needs_distilled and prepared.distilled else None,
            )
        )
        layers[name], lost[name] = _finish(merged.layer, global_scale=global_scale, output_rank=output_rank)
        if merged.suppliers is not None:
            suppliers[name] = merged.suppliers
    recipe = _recipe(prepared, chosen, coefficients, global_scale=global_scale, output_rank=output_rank)
    recipe |= {"density": density} if chosen.uses_density else {}
    recipe |= {"seed": seed} if chosen.draws else {}
    return _describe(prepared, layers, suppliers=suppliers, lost=lost, recipe=recipe)


def _check_needs(prepared: PreparedExperts, method: MergeMethod, coefficients: Sequence[float]) -> None:
    if not method.takes_weights and any(weight != 1.0 for weight in coefficients):
        raise UsageError(
            f"expected weights of 1 for merge method {method.name!r}, whose result does not depend on them, found "
            f"{list(coefficients)}: leave them out, or choose a method that takes weights"
        )
    if method.row_aligned:
        check_same_signature([(expert.name, expert.layers) for expert in prepared.experts], method=method.name)
    if method.needs_inputs and not prepared.scores:
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


def _finish(layer: LoraLayer, *, global_scale: float, output_rank: int | None) -> tuple[LoraLayer, tuple[float, float]]:
    """Scale and bring to the output rank; also return (squared error, squared norm) of the reduction."""
    scaled = scale_layer(layer, global_scale) if global_scale != 1.0 else layer
    if output_rank is None or output_rank >= max_rank(scaled) or rank_of(scaled) <= output_rank:
        return cap_rank(scaled), (0.0, 0.0) if output_rank is None else (0.0, _squared_norm(scaled))
    if rank_of(scaled) >= max_rank(scaled):
        reduction = factor_dense(scaled.up @ scaled.down, output_rank)
    else:
        reduction = reduce_rank(scaled, output_rank)
    return reduction.layer, (reduction.squared_error, reduction.squared_norm)


def _squared_norm(layer: LoraLayer) -> float:
    # |U D|^2 = trace((U'U)(D D')): small matrices only.
    up, down = layer.up.to(torch.float64), layer.down.to(torch.float64)
    return float(((up.T @ up) * (down @ down.T)).sum())


def _coefficients(prepared: PreparedExperts, weights: Mapping[str, float] | None) -> list[float]:
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


def _check_numbers(*, global_scale: float, density: float, output_rank: int | None) -> None:
    if not math.isfinite(global_scale) or global_scale <= 0:
        raise UsageError(f"expected a global scale above 0, found {global_scale}")
    if not 0 < density <= 1:
        raise UsageError(f"expected a density in (0, 1], found {density}")
    if output_rank is not None and output_rank < 1:
        raise UsageError(f"expected an output rank of at least 1, found {output_rank}")


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
    prepared: PreparedExperts,
    method: MergeMethod,
    coefficients: Sequence[float],
    *,
    global_scale: float,
    output_rank: int | None,
) -> dict[str, Any]:
    rows = sorted(zip(prepared.experts, coefficients, strict=True), key=lambda row: row[0].name)
    return {
        "method": method.name,
        "paper": method.paper,
        "global_scale": global_scale,
        "output_rank": output_rank,
        "experts": [{"name": e.name, "hash": e.hash, "weight": w, "init_seed": e.metadata.init_seed} for e, w in rows],
    }
