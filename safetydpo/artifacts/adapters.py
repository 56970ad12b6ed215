"""LoRA adapters: the in-memory form and the safetensors file that passes between stages.

File: one safetensors file with diffusers/PEFT keys (`unet.<module>.lora_A.weight`, `...lora_B.weight`; `transformer.`
in place of `unet.` where the denoiser is one),
alpha = rank with every scale folded into B (plain loaders drop alpha when metadata is missing), and string
metadata: base fingerprint, signature, initialisation seed, training hash, categories or concepts.

Axis legend: `rank` LoRA components, `d_in d_out` features of the linear layer.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor

from safetydpo.artifacts.json_text import parse_json
from safetydpo.artifacts.schemas import canonical_json
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tensor_files import BrokenTensors, parse_tensor_header, parse_tensors
from safetydpo.artifacts.weights import read_header
from safetydpo.errors import SafetyDPOError

AdapterKind = Literal["expert", "merged", "all_single", "comparator"]
Denoiser = Literal["unet", "transformer"]

# One key: safetensors writes several in random order, which would change the bytes from run to run.
METADATA_KEY = "safetydpo"
DOWN_SUFFIX = ".lora_A.weight"
UP_SUFFIX = ".lora_B.weight"


@dataclass(frozen=True)
class LoraLayer:
    """The change of one linear layer: delta = up @ down, every scale already folded into `up`.

    That of a convolution has the axes of its weights: a down-projection by the kernel, an up-projection by a 1 x 1 one.
    """

    down: Float[Tensor, "rank d_in"] | Float[Tensor, "rank d_in height width"]
    up: Float[Tensor, "d_out rank"] | Float[Tensor, "d_out rank 1 1"]


@dataclass(frozen=True)
class LoraSignature:
    """What must be equal for experts to be trained in one slot and merged row by row."""

    rank: int
    alpha: float
    targets: tuple[str, ...]


@dataclass(frozen=True)
class AdapterMetadata:
    """Where an adapter comes from.

    Attributes:
        base_fingerprint: fingerprint of the base model; "" = unknown (a file that is not ours).
        signature: LoRA signature of an expert; None for merged adapters and foreign files.
        init_seed: seed of the draw of A; None if there was none.
        training_hash: hash of the training (or merge) that made the weights.
        kind: one expert, a merge of experts, one adapter trained on all pairs, or another method's change of weights.
        categories: categories (or concepts) that took part.
        recipe: how a merge was made; JSON values only.
        denoiser: network that is changed, as diffusers calls it: the first part of every key of the file.
        base_model: name of the base model for people, such as its id on the hub; "" = unknown.
        licence: the hub's word for the adapter's licence; "" = unknown.
        source: of an adapter that was read from another format, what the way back needs; JSON values only.
    """

    base_fingerprint: str = ""
    signature: LoraSignature | None = None
    init_seed: int | None = None
    training_hash: str = ""
    kind: AdapterKind = "expert"
    categories: tuple[str, ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    denoiser: Denoiser = "unet"
    base_model: str = ""
    licence: str = ""
    source: Mapping[str, Any] = field(default_factory=dict)


def adapter_to_bytes(layers: Mapping[str, LoraLayer], metadata: AdapterMetadata) -> bytes:
    """Return the safetensors file of an adapter; equal adapters give equal bytes.

    Where layers have different ranks, all are padded with zero components to the largest one: several plain
    loaders take one alpha for all layers, which scales a layer of another rank wrongly. `adapter_from_bytes`
    takes the padding off again.

    Raises:
        SafetyDPOError: if the adapter is empty, has wrong shapes or holds NaN or infinity.
    """
    return pack_layers({f"{metadata.denoiser}.{name}": layer for name, layer in layers.items()}, metadata)


def pack_layers(layers: Mapping[str, LoraLayer], metadata: AdapterMetadata) -> bytes:
    """Return the safetensors file of layers named `<network>.<module>`, which may change text encoders too.

    Raises:
        SafetyDPOError: as `adapter_to_bytes`.
    """
    if not layers:
        raise SafetyDPOError("expected an adapter with at least one layer, found none: nothing to write")
    tensors: dict[str, Tensor] = {}
    for key, layer in padded_layers(layers).items():
        tensors[f"{key}{DOWN_SUFFIX}"], tensors[f"{key}{UP_SUFFIX}"] = layer.down, layer.up
    return save(tensors, metadata={METADATA_KEY: header_text(layers, metadata)})


def header_text(layers: Mapping[str, LoraLayer], metadata: AdapterMetadata) -> str:
    """Return the metadata of a file as it holds them, with the ranks of layers `<network>.<module>` that differ."""
    header = metadata_to_header(metadata)
    ranks = {key: int(layers[key].down.shape[0]) for key in sorted(layers)}
    if len(set(ranks.values())) > 1:
        # Files of the denoiser alone leave out its name.
        prefix = f"{metadata.denoiser}."
        is_alone = all(key.startswith(prefix) for key in ranks)
        header["ranks"] = {key.removeprefix(prefix) if is_alone else key: rank for key, rank in ranks.items()}
    return canonical_json(header).decode()


def padded_layers(layers: Mapping[str, LoraLayer]) -> dict[str, LoraLayer]:
    """Return checked float32 copies on the CPU in sorted order, all padded with zero components to the largest rank.

    Raises:
        SafetyDPOError: as `check_weights`.
    """
    width = max(int(layer.down.shape[0]) for layer in layers.values())
    padded: dict[str, LoraLayer] = {}
    for key in sorted(layers):
        layer = layers[key]
        check_weights(key, down=layer.down, up=layer.up, source="the adapter to be written")
        padded[key] = LoraLayer(down=_pad(layer.down, axis=0, size=width), up=_pad(layer.up, axis=1, size=width))
    return padded


def metadata_to_header(metadata: AdapterMetadata) -> dict[str, Any]:
    """Return metadata as JSON values; what came later is left out where it says nothing: files keep their bytes."""
    header = asdict(metadata)
    # The keys say it.
    del header["denoiser"]
    return {key: value for key, value in header.items() if key not in ("base_model", "licence", "source") or value}


def parse_safetensors(data: bytes, *, source: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the whole header of a safetensors file; `source` names it in errors.

    Raises:
        SafetyDPOError: if the file is truncated or damaged.
    """
    try:
        tensors, header = parse_tensors(data), parse_tensor_header(data)
    except BrokenTensors as error:
        raise SafetyDPOError(
            f"expected a safetensors file at {source}, found {len(data):,} bytes that do not parse ({error}): "
            "make or copy the file again"
        ) from error
    return tensors, header


def adapter_from_bytes(data: bytes, *, source: str) -> tuple[dict[str, LoraLayer], AdapterMetadata]:
    """Return the layers and the metadata of an adapter file; `source` names it in errors.

    A plain diffusers LoRA file is accepted too: its metadata is empty (`base_fingerprint` "").

    Raises:
        SafetyDPOError: if the file is truncated or damaged, has keys that are not LoRA weights of one denoiser or
            stand without their partner, has wrong shapes, or holds NaN or infinity; names the first such key.
    """
    tensors, header = parse_safetensors(data, source=source)
    metadata, ranks = parse_metadata(header, source=source)
    layers: dict[str, LoraLayer] = {}
    denoiser, names = _module_names(tensors, source=source)
    for name in names:
        key = f"{denoiser}.{name}"
        down, up = (tensors[f"{key}{suffix}"].to(torch.float32) for suffix in (DOWN_SUFFIX, UP_SUFFIX))
        check_weights(key, down=down, up=up, source=source)
        rank = ranks.get(name, down.shape[0])
        layers[name] = LoraLayer(down[:rank].contiguous(), up[:, :rank].contiguous())
    return layers, replace(metadata, denoiser=denoiser)


def adapter_hash(layers: Mapping[str, LoraLayer]) -> str:
    """Return the sha256 hex digest over names, shapes and float32 bytes of all tensors, in sorted order."""
    digest = hashlib.sha256()
    for name in sorted(layers):
        for part, tensor in (("down", layers[name].down), ("up", layers[name].up)):
            values = tensor.detach().to("cpu", torch.float32).contiguous()
            digest.update(f"{name}\x1f{part}\x1f{tuple(values.shape)}\x1f".encode())
            digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def write_adapter(location: Location, layers: Mapping[str, LoraLayer], *, metadata: AdapterMetadata) -> None:
    """Write the adapter file, all or nothing.

    Raises:
        SafetyDPOError: as `adapter_to_bytes`, or if the place cannot be written.
    """
    location.write_bytes(adapter_to_bytes(layers, metadata))


def read_adapter(location: Location) -> tuple[dict[str, LoraLayer], AdapterMetadata]:
    """Return the layers and the metadata of the adapter file at `location`.

    Raises:
        SafetyDPOError: as `adapter_from_bytes`, or if nothing stands there.
    """
    return adapter_from_bytes(location.read_bytes(), source=str(location))


def read_adapter_metadata(location: Location) -> AdapterMetadata:
    """Return the metadata of the adapter file at `location` without reading its weights.

    Raises:
        SafetyDPOError: if the file is missing, cut short, or has metadata of another origin.
    """
    header = read_header(location, remedy="delete its folder and run the same command again")
    return parse_metadata(header, source=str(location))[0]


def _pad(tensor: Tensor, *, axis: int, size: int) -> Tensor:
    """Return a float32 copy on the CPU with zeros at the end of one axis."""
    values = tensor.detach().to("cpu", torch.float32)
    shape = list(values.shape)
    shape[axis] = size - shape[axis]
    return torch.cat([values, values.new_zeros(shape)], dim=axis)


def check_weights(name: str, *, down: Tensor, up: Tensor, source: str) -> None:
    """Refuse a file's tensors of one layer that are of wrong shapes or hold NaN or infinity.

    Raises:
        SafetyDPOError: naming the layer.
    """
    linear, convolution = down.ndim == up.ndim == 2, down.ndim == up.ndim == 4 and up.shape[2:] == (1, 1)
    if not (linear or convolution) or down.shape[0] != up.shape[1] or down.shape[0] == 0:
        raise SafetyDPOError(
            f"expected lora_A [rank, d_in] and lora_B [d_out, rank] of {name!r} in {source}, or [rank, channels, "
            f"height, width] and [channels, rank, 1, 1] of a convolution, found {list(down.shape)} and "
            f"{list(up.shape)}: save a plain LoRA of linear layers and convolutions"
        )
    for suffix, tensor in ((DOWN_SUFFIX, down), (UP_SUFFIX, up)):
        if not bool(torch.isfinite(tensor).all()):
            raise SafetyDPOError(
                f"expected finite numbers in {source}, found NaN or infinity in '{name}{suffix}': "
                "train this adapter again"
            )


def _module_names(tensors: Mapping[str, Tensor], *, source: str) -> tuple[Denoiser, list[str]]:
    """Return the network that a file changes, told by its first key, and the names of the changed modules."""
    if not tensors:
        raise SafetyDPOError(f"expected LoRA weights in {source}, found a file without tensors: make it again")
    is_transformer = min(tensors).startswith("transformer.")
    denoiser: Denoiser = "transformer" if is_transformer else "unet"
    prefix = f"{denoiser}."
    names = set()
    for key in sorted(tensors):
        suffix = next((suffix for suffix in (DOWN_SUFFIX, UP_SUFFIX) if key.endswith(suffix)), None)
        if suffix is None or not key.startswith(prefix):
            raise SafetyDPOError(
                f"expected keys '{prefix}<module>{DOWN_SUFFIX}' and '…{UP_SUFFIX}' in {source}, found {key!r}: "
                "save the adapter in the diffusers format, for the denoiser only"
            )
        name = key.removeprefix(prefix).removesuffix(suffix)
        partner = f"{prefix}{name}{UP_SUFFIX if suffix == DOWN_SUFFIX else DOWN_SUFFIX}"
        if partner not in tensors:
            raise SafetyDPOError(
                f"expected {partner!r} beside {key!r} in {source}, found no such key: make or copy the file again"
            )
        names.add(name)
    return denoiser, sorted(names)


def parse_metadata(file_header: Mapping[str, Any], *, source: str) -> tuple[AdapterMetadata, dict[str, int]]:
    """Return the metadata in the header of a safetensors file, and the ranks of layers that are padded.

    Raises:
        SafetyDPOError: if there is metadata of safetydpo that does not parse.
    """
    text = (file_header.get("__metadata__") or {}).get(METADATA_KEY)
    if text is None:
        return AdapterMetadata(), {}
    try:
        header = parse_json(text)
        ranks = _parse_ranks(header.pop("ranks", {}))
        signature = header.pop("signature")
        if signature is not None:
            signature = LoraSignature(
                rank=signature["rank"], alpha=signature["alpha"], targets=_texts(signature["targets"])
            )
        categories = _texts(header.pop("categories"))
        metadata = AdapterMetadata(**header, signature=signature, categories=categories)
        _check_types(metadata)
        if metadata.kind not in get_args(AdapterKind):
            raise ValueError(f"unknown kind {metadata.kind!r}")
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise SafetyDPOError(
            f"expected adapter metadata written by safetydpo in {source}, found something else ({error}): "
            "make the file again with this version"
        ) from error
    return metadata, ranks


def _parse_ranks(found: Mapping[str, Any]) -> dict[str, int]:
    ranks = {str(name): int(rank) for name, rank in found.items()}
    if any(rank < 1 for rank in ranks.values()):
        raise ValueError("a rank below 1")
    return ranks


def _texts(found: Any) -> tuple[str, ...]:
    if not isinstance(found, list | tuple) or not all(isinstance(text, str) for text in found):
        raise TypeError("a list that is none of texts")
    return tuple(found)


def _check_types(metadata: AdapterMetadata) -> None:
    for name, value in asdict(metadata).items():
        if not isinstance(value, _TYPES.get(name, str)):
            raise TypeError(f"{name} of another type")
    if metadata.signature is not None:
        rank, alpha = metadata.signature.rank, metadata.signature.alpha
        if not (isinstance(rank, int) and isinstance(alpha, int | float) and rank >= 1 and math.isfinite(alpha)):
            raise ValueError("a signature without a rank and an alpha")


_TYPES: Mapping[str, Any] = {
    "init_seed": int | None,
    "signature": dict | None,
    "categories": tuple,
    "recipe": dict,
    "source": dict,
}
