"""Whether experts belong together: same base, same layers, same shapes, finite numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from safetydpo.artifacts.adapters import AdapterMetadata, LoraLayer
from safetydpo.artifacts.lazy_tensors import LazyLayers
from safetydpo.errors import SafetyDPOError, UsageError

REMEDY = "Retrain with the same lora.targets or list only compatible experts."


def check_experts(experts: Sequence[tuple[str, Mapping[str, LoraLayer], AdapterMetadata]]) -> None:
    """Refuse experts, given as (name, layers, metadata), that cannot be merged; names the first difference.

    Ranks may differ: methods that add deltas do not care; `check_same_signature` guards those that do.

    Raises:
        UsageError: if there is no expert or a name occurs twice.
        SafetyDPOError: if experts differ in base model, targets or shapes, or hold NaN or infinity.
    """
    check_names([name for name, _, _ in experts])
    first_name, first_layers, first_metadata = experts[0]
    for name, layers, metadata in experts[1:]:
        if metadata.base_fingerprint != first_metadata.base_fingerprint:
            raise SafetyDPOError(
                f"experts disagree on the base model: {first_name!r} has "
                f"{first_metadata.base_fingerprint[:12] or 'unknown'}, {name!r} "
                f"{metadata.base_fingerprint[:12] or 'unknown'}. Merge only experts of one base model."
            )
        _check_same_layers(first_name, first_layers, name=name, layers=layers)
    for name, layers, _ in experts:
        _check_finite(name, layers)


def check_names(names: Sequence[str]) -> None:
    """Refuse an empty list of experts, or one that names one twice.

    Raises:
        UsageError: names the first that occurs twice.
    """
    if not names:
        raise UsageError("expected at least one expert to merge, found none: train or list some")
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise UsageError(f"expected every expert once, found {repeated[0]!r} twice: give each another name")


def check_same_signature(experts: Sequence[tuple[str, Mapping[str, LoraLayer]]], *, method: str) -> None:
    """Refuse experts, given as (name, layers), of different ranks, for methods that pick rows of A and B.

    Raises:
        SafetyDPOError: names the first layer whose rank differs.
    """
    first_name, first_layers = experts[0]
    for name, layers in experts[1:]:
        for key in sorted(layers):
            one, other = shapes_of(first_layers, key)[0][0], shapes_of(layers, key)[0][0]
            if one != other:
                raise SafetyDPOError(
                    f"experts disagree on LoRA rank: {first_name!r} has {one}, {name!r} {other}; first difference "
                    f"{key!r}. Retrain with the same lora.rank or choose a method other than {method!r}."
                )


def shapes_of(layers: Mapping[str, LoraLayer], name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of a layer's `down` and `up`; those of a file are not read for it."""
    if isinstance(layers, LazyLayers):
        return layers.shapes(name)
    layer = layers[name]
    return tuple(layer.down.shape), tuple(layer.up.shape)


def _check_same_layers(
    first_name: str, first_layers: Mapping[str, LoraLayer], *, name: str, layers: Mapping[str, LoraLayer]
) -> None:
    different = sorted(set(first_layers) ^ set(layers))
    if different:
        # Two tensors per layer: people count the keys of the file.
        raise SafetyDPOError(
            f"experts disagree on LoRA targets: {first_name!r} has {2 * len(first_layers)} keys, {name!r} "
            f"{2 * len(layers)}; first difference {different[0]!r}. {REMEDY}"
        )
    for key in sorted(layers):
        one, other = ([up[0], *down[1:]] for down, up in (shapes_of(first_layers, key), shapes_of(layers, key)))
        if one != other:
            raise SafetyDPOError(
                f"experts disagree on layer shapes: {first_name!r} has {one}, {name!r} {other}; first difference "
                f"{key!r}. {REMEDY}"
            )


def _check_finite(name: str, layers: Mapping[str, LoraLayer]) -> None:
    if not layers:
        raise SafetyDPOError(f"expected LoRA layers in expert {name!r}, found none. {REMEDY}")
    for key in sorted(layers):
        layer = layers[key]
        if not bool(torch.isfinite(layer.down).all() and torch.isfinite(layer.up).all()):
            raise SafetyDPOError(
                f"expected finite numbers in expert {name!r}, found NaN or infinity in {key!r}. "
                "Train it again or leave it out."
            )
