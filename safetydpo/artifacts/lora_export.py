"""LoRA files for other programs: kohya's keys (ComfyUI, A1111), diffusers' and PEFT's, from any file that is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from safetydpo.artifacts.adapters import (
    DOWN_SUFFIX,
    METADATA_KEY,
    UP_SUFFIX,
    AdapterMetadata,
    header_text,
    pack_layers,
    padded_layers,
)
from safetydpo.artifacts.kohya_names import NamingRule, tell_rule, to_kohya_name
from safetydpo.artifacts.lora_files import ALPHA_DTYPES, NETWORKS, PEFT_PREFIX, LoraFile, unfold
from safetydpo.artifacts.weights import sort_header
from safetydpo.errors import SafetyDPOError, UsageError

BASE_VERSIONS: dict[NamingRule, str] = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}
"""Naming rule -> what kohya's trainer calls the model family; A1111 sorts adapters by it."""
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def to_kohya(file: LoraFile, *, rule: NamingRule | None = None) -> bytes:
    """Return the file under kohya's names, with an alpha per layer; equal files give equal bytes.

    An adapter that came from a kohya file goes back under its old names, alphas and types (see `unfold` for how
    exactly); any other has alpha = rank, in float32: every scale is in B. Layers of different ranks are padded to the
    largest one: diffusers' reader of such files takes one alpha for all.

    Args:
        file: what was read.
        rule: naming rule; None = as the layers tell.

    Raises:
        UsageError: if the layers do not tell the naming rule and none is given.
        SafetyDPOError: naming the first layer that has no kohya name.
    """
    source = kohya_source(file)
    if set(source.get("layers", {})) == set(file.layers):
        return _back_to_kohya(file, source)
    chosen = rule or _told_rule(file)
    tensors: dict[str, Tensor] = {}
    layers = padded_layers(file.layers)
    rank = next(iter(layers.values())).down.shape[0]
    for name, layer in layers.items():
        kohya_name = to_kohya_name(name, chosen)
        _put(tensors, kohya_name, down=layer.down, up=layer.up)
        tensors[f"{kohya_name}.alpha"] = torch.tensor(float(rank))
    header = {
        METADATA_KEY: header_text(file.layers, exported_metadata(file)),
        "ss_base_model_version": BASE_VERSIONS[chosen],
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
    }
    return sort_header(save(tensors, metadata=header))


def to_diffusers(file: LoraFile) -> bytes:
    """Return the file under diffusers' names with our metadata: for the denoiser alone, our own format.

    Raises:
        SafetyDPOError: as `adapter_to_bytes`, or if the file changes two denoisers.
    """
    return pack_layers(file.layers, exported_metadata(file))


def to_peft(file: LoraFile, *, base_model: str) -> tuple[bytes, bytes]:
    """Return the adapter and the settings of a folder in PEFT's format.

    Args:
        file: what was read.
        base_model: name of the base model, for PEFT's settings.

    Raises:
        UsageError: if the file changes more than one network: PEFT's format has no name for a network.
    """
    networks = sorted({name.partition(".")[0] for name in file.layers})
    if len(networks) > 1:
        raise UsageError(
            f"expected layers of one network, because PEFT's format names none, found {', '.join(networks)}: "
            "use --to diffusers"
        )
    layers = padded_layers(file.layers)
    rank = next(iter(layers.values())).down.shape[0]
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        key = PEFT_PREFIX + name.partition(".")[2]
        tensors[f"{key}{DOWN_SUFFIX}"], tensors[f"{key}{UP_SUFFIX}"] = layer.down, layer.up
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model or None,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": [name.partition(".")[2] for name in layers],
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
    }
    header = {"format": "pt", METADATA_KEY: header_text(file.layers, exported_metadata(file))}
    return sort_header(save(tensors, metadata=header)), json.dumps(settings, indent=2).encode() + b"\n"


def exported_metadata(file: LoraFile) -> AdapterMetadata:
    """Return the metadata of the file in our format: what the way back to kohya needs goes along.

    Raises:
        SafetyDPOError: if the file changes a U-Net and a transformer.
    """
    denoisers = {name.partition(".")[0] for name in file.layers} & {"unet", "transformer"}
    if len(denoisers) > 1:
        raise SafetyDPOError("expected layers of one denoiser, found a U-Net's and a transformer's: split the file")
    denoiser: Any = denoisers.pop() if denoisers else "unet"
    return replace(file.metadata, denoiser=denoiser, source=kohya_source(file))


def kohya_source(file: LoraFile) -> Mapping[str, Any]:
    """Return what the way back to kohya needs: names, alphas, types and metadata; empty for a file of ours.

    What we wrote ourselves under kohya's names is ours: it has nothing to go back to.
    """
    if file.format != "kohya" or METADATA_KEY in file.header:
        return file.metadata.source
    return {
        "format": "kohya",
        "dtype": file.dtype,
        "alpha_dtype": file.alpha_dtype,
        "layers": {name: [file.names[name], file.alphas.get(name)] for name in file.layers},
        "header": dict(file.header),
    }


def is_exact_both_ways(file: LoraFile) -> bool:
    """Return whether a kohya file can come back bit by bit: scales are powers of two, or its type is a half."""
    return file.dtype != "float32" or all(
        scale == 0 or abs(torch.frexp(torch.tensor(scale))[0].item()) == 0.5 for scale in file.scales.values()
    )


def _told_rule(file: LoraFile) -> NamingRule:
    told = tell_rule((name, int(layer.down.shape[1])) for name, layer in file.layers.items())
    if told is None:
        networks = sorted({name.partition(".")[0] for name in file.layers} & set(NETWORKS))
        raise UsageError(
            "expected the text features of SD1.x (768), SD2.x (1024) or SDXL (2048) in the cross-attention layers, by "
            f"which the naming rule is told, found none in layers of {', '.join(networks)}: name it with --family"
        )
    return told


def _back_to_kohya(file: LoraFile, source: Mapping[str, Any]) -> bytes:
    dtype = _DTYPES[source["dtype"]]
    alpha_dtypes = {name: kind for kind, name in ALPHA_DTYPES.items()}
    tensors: dict[str, Tensor] = {}
    for name, layer in file.layers.items():
        old_name, alpha = source["layers"][name]
        scale = 1.0 if alpha is None else alpha / layer.down.shape[0]
        _put(tensors, old_name, down=layer.down.to(dtype), up=unfold(layer.up, scale).to(dtype))
        if alpha is not None:
            tensors[f"{old_name}.alpha"] = torch.tensor(alpha, dtype=alpha_dtypes[source["alpha_dtype"]])
    return sort_header(save(tensors, metadata=dict(source["header"]) or None))


def _put(tensors: dict[str, Tensor], name: str, *, down: Tensor, up: Tensor) -> None:
    tensors[f"{name}.lora_down.weight"] = down.to("cpu").contiguous()
    tensors[f"{name}.lora_up.weight"] = up.to("cpu").contiguous()
