"""LoRA files of any origin: ours, diffusers', PEFT's and kohya's, read into one form. Nothing is unpickled.

Layers are named `<network>.<module>` in diffusers' names. Every scale (alpha / rank) is folded into `up`, as in our own
files; what a file says of scales is kept beside.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from safetydpo.artifacts.adapters import (
    METADATA_KEY,
    AdapterMetadata,
    LoraLayer,
    check_weights,
    parse_metadata,
    parse_safetensors,
)
from safetydpo.artifacts.json_text import parse_json
from safetydpo.artifacts.kohya_names import from_kohya_name
from safetydpo.artifacts.storage import Location
from safetydpo.errors import SafetyDPOError, UsageError, shown

LoraFormat = Literal["safetydpo", "diffusers", "peft", "kohya"]
PEFT_PREFIX = "base_model.model."
PEFT_ADAPTER = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
DIFFUSERS_METADATA = "lora_adapter_metadata"
NETWORKS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
_SUFFIXES = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".alpha": "alpha",
}
_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
ALPHA_DTYPES = {**_DTYPES, torch.float64: "float64", torch.int64: "int64", torch.int32: "int32"}
"""Types that programs write an alpha in; some write the rank itself, a whole number."""


MAX_PATTERN, MAX_MODULE, MAX_REPETITIONS = 300, 500, 4
_REPETITIONS = re.compile(r"[*+?{|]")
_REPEATED_GROUP = re.compile(r"\)[*+?{]|\*.*\*.*\*|\+.*\+.*\+|\\[1-9]|\(\?P=")


@dataclass(frozen=True)
class LoraFile:
    """What stands in one LoRA file.

    Attributes:
        format: whose keys it has; `safetydpo` are diffusers' with our metadata.
        layers: `<network>.<module>` -> its change, float32, every scale folded into `up`.
        metadata: ours; empty in a file of another origin.
        scales: layer -> alpha / rank as it was folded; 1 where the file does not say.
        alphas: layer -> alpha as the file says it; layers of which it says nothing are left out.
        names: layer -> its name in the file.
        dtype: type of the tensors in the file.
        alpha_dtype: type of its alpha tensors; "" = it has none.
        header: string metadata of the file.
    """

    format: LoraFormat
    layers: Mapping[str, LoraLayer]
    metadata: AdapterMetadata
    scales: Mapping[str, float]
    alphas: Mapping[str, float]
    names: Mapping[str, str]
    dtype: str
    alpha_dtype: str = ""
    header: Mapping[str, str] = field(default_factory=dict)


def read_lora_file(location: Location) -> LoraFile:
    """Read a LoRA file; of PEFT's, the settings that stand beside it too.

    Raises:
        UsageError: if its name does not end in .safetensors: nothing else is opened.
        SafetyDPOError: as `lora_from_bytes`, or if nothing stands there.
    """
    if not location.name.endswith(".safetensors"):
        raise UsageError(
            f"expected a .safetensors file, found {location.name!r}: other weights would have to be unpickled, which "
            "runs whatever code is in them; convert it where it was made"
        )
    config = location.parent / PEFT_CONFIG
    settings = config.read_bytes() if config.is_file() else None
    return lora_from_bytes(location.read_bytes(), source=str(location), peft_config=settings)


def lora_from_bytes(data: bytes, *, source: str, peft_config: bytes | None = None) -> LoraFile:
    """Return what stands in a LoRA file; `source` names it in errors.

    Args:
        data: the file.
        source: its place.
        peft_config: the `adapter_config.json` beside a file of PEFT's, which holds its alpha.

    Raises:
        SafetyDPOError: if the file is damaged, holds other than plain LoRA weights (naming the first such key), a
            factor without its partner, wrong shapes, NaN or infinity, or a network that cannot be told.
    """
    tensors, found = parse_safetensors(data, source=source)
    header = dict(found.get("__metadata__") or {})
    parts: dict[str, dict[str, Tensor]] = {}
    for key in sorted(tensors):
        suffix = next((suffix for suffix in _SUFFIXES if key.endswith(suffix)), None)
        if suffix is None:
            raise SafetyDPOError(
                f"expected LoRA weights ({', '.join(_SUFFIXES)}) in {source}, found {key!r}: "
                "only plain LoRA is known, no LoHa, LoKr, DoRA or whole weights"
            )
        parts.setdefault(key.removesuffix(suffix), {})[_SUFFIXES[suffix]] = tensors[key]
    if not parts:
        raise SafetyDPOError(f"expected LoRA weights in {source}, found a file without tensors: make it again")
    form = _format_of(next(iter(parts)), header)
    metadata, ranks = parse_metadata({"__metadata__": header}, source=source)
    stated = _stated_alphas(form, header, peft_config, source=source)
    layers: dict[str, LoraLayer] = {}
    scales, alphas, names = {}, {}, {}
    for name, part in parts.items():
        layer_name = _layer_name(name, form, source=source)
        layer, alpha = _layer(name, part, stated=stated(name), source=source)
        rank = layer.down.shape[0]
        scales[layer_name] = 1.0 if alpha is None else alpha / rank
        if alpha is not None:
            alphas[layer_name] = alpha
        # What we wrote ourselves is padded to one rank.
        true_rank = ranks.get(layer_name, ranks.get(layer_name.partition(".")[2], rank))
        names[layer_name] = name
        layers[layer_name] = LoraLayer(
            layer.down[:true_rank].contiguous(),
            fold(layer.up[:, :true_rank], scales[layer_name]).contiguous(),
        )
    return LoraFile(
        format=form,
        layers=dict(sorted(layers.items())),
        metadata=metadata,
        scales=dict(sorted(scales.items())),
        alphas=dict(sorted(alphas.items())),
        names=dict(sorted(names.items())),
        dtype=_dtype_of(tensors, source=source),
        alpha_dtype=_alpha_dtype(tensors),
        header=header,
    )


def fold(up: Tensor, scale: float) -> Tensor:
    """Return B with the scale in it; a scale of 1 leaves every bit."""
    return up if scale == 1.0 else up * scale


def unfold(up: Tensor, scale: float) -> Tensor:
    """Return B without the scale.

    Exact once rounded to float16 or bfloat16, where B came from; in float32 exact if the scale is a power of two, else
    to one unit in the last place.
    """
    return up if scale == 1.0 else up / scale


def _format_of(name: str, header: Mapping[str, str]) -> LoraFormat:
    if name.startswith("lora_"):
        return "kohya"
    if name.startswith(PEFT_PREFIX):
        return "peft"
    return "safetydpo" if METADATA_KEY in header else "diffusers"


def _layer_name(name: str, form: LoraFormat, *, source: str) -> str:
    if form == "kohya":
        return from_kohya_name(name)
    if form == "peft":
        return _peft_network(name.removeprefix(PEFT_PREFIX), source=source)
    if name.partition(".")[0] not in NETWORKS:
        raise SafetyDPOError(
            f"expected keys that start with one of {', '.join(NETWORKS)}, {PEFT_PREFIX[:-1]} or lora_ in {source}, "
            f"found {name!r}: save the adapter in the format of diffusers, PEFT or kohya"
        )
    return name


def _peft_network(module: str, *, source: str) -> str:
    """Return `<network>.<module>`: a file of PEFT's does not say which network it changes, its modules' names do."""
    starts = {
        "unet": (
            "down_blocks.",
            "mid_block.",
            "up_blocks.",
            "conv_in",
            "conv_out",
            "time_embedding.",
            "add_embedding.",
        ),
        "transformer": ("transformer_blocks.", "single_transformer_blocks."),
        "text_encoder": ("text_model.",),
    }
    for network, prefixes in starts.items():
        if module.startswith(prefixes):
            return f"{network}.{module}"
    raise SafetyDPOError(
        f"expected modules of a U-Net, a transformer or CLIP's text encoder in {source}, found {module!r}: "
        "this adapter is of another kind of network"
    )


def _stated_alphas(form: LoraFormat, header: Mapping[str, str], peft_config: bytes | None, *, source: str) -> Any:
    """Return what gives a key's alpha as metadata states it, None where none does."""
    text: str | bytes | None = None
    if form == "diffusers":
        text = header.get(DIFFUSERS_METADATA)
    elif form == "peft":
        text = peft_config
    if text is None:
        return lambda _: None
    try:
        settings = parse_json(text)
        if any(value for key, value in settings.items() if key.rpartition(".")[2] in ("use_rslora", "use_dora")):
            raise SafetyDPOError(
                f"expected plain LoRA in the settings of {source}, found use_rslora or use_dora: "
                "merge it into its model with PEFT instead"
            )
        if form == "peft":
            return _peft_alphas({"": settings})
        return _peft_alphas({network: _below(settings, network) for network in NETWORKS})
    except (ValueError, TypeError, AttributeError, re.error, OverflowError) as error:
        raise SafetyDPOError(
            f"expected LoRA settings as JSON with the file {source}, found something else ({error}): save it again"
        ) from error


def _below(settings: Mapping[str, Any], network: str) -> dict[str, Any]:
    return {key.removeprefix(f"{network}."): value for key, value in settings.items() if key.startswith(f"{network}.")}


def _peft_alphas(by_network: Mapping[str, Mapping[str, Any]]) -> Any:
    stated = {network: _stated(settings) for network, settings in by_network.items()}

    def alpha(key: str) -> float | None:
        network, _, module = key.partition(".") if "" not in stated else ("", "", key.removeprefix(PEFT_PREFIX))
        patterns, default = stated.get(network, ((), None))
        # PEFT takes the first pattern, a regular expression, that is the module's name or its end.
        return next((value for pattern, value in patterns if pattern.match(module[:MAX_MODULE])), default)

    return alpha


def _stated(settings: Mapping[str, Any]) -> tuple[list[tuple[re.Pattern[str], float]], float | None]:
    """Return the alphas of settings: by pattern of the module's name, and of all other modules.

    Raises:
        ValueError, TypeError, AttributeError, re.error: if they are none.
    """
    patterns = [(_pattern(text), _number(value)) for text, value in (settings.get("alpha_pattern") or {}).items()]
    default = settings.get("lora_alpha")
    return patterns, None if default is None else _number(default)


def _pattern(text: str) -> re.Pattern[str]:
    # A stranger's regular expression, such as (a+)+$, can take longer than the universe: few repetitions, none of a
    # group. Names of modules need none.
    if len(text) > MAX_PATTERN or _REPEATED_GROUP.search(text) or len(_REPETITIONS.findall(text)) > MAX_REPETITIONS:
        raise ValueError(f"the pattern {shown(text)}, which repeats too much to be tried")
    return re.compile(rf"(.*\.)?({text})$")


def _number(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number) or number == 0:
        raise ValueError(f"an alpha of {number}, not a finite one other than 0")
    return number


def _layer(
    name: str, part: Mapping[str, Tensor], *, stated: float | None, source: str
) -> tuple[LoraLayer, float | None]:
    missing = [side for side in ("down", "up") if side not in part]
    if missing:
        raise SafetyDPOError(
            f"expected both factors of {name!r} in {source}, found no lora_{missing[0]}: make or copy the file again"
        )
    down, up = part["down"].to(torch.float32), part["up"].to(torch.float32)
    check_weights(name, down=down, up=up, source=source)
    if "alpha" not in part:
        return LoraLayer(down, up), stated
    alpha = part["alpha"]
    if alpha.numel() != 1 or not bool(torch.isfinite(alpha).all()) or float(alpha) == 0:
        raise SafetyDPOError(
            f"expected one finite alpha other than 0 of {name!r} in {source}, found {alpha.tolist()}: save it again"
        )
    return LoraLayer(down, up), float(alpha)


def _alpha_dtype(tensors: Mapping[str, Tensor]) -> str:
    found = [tensor.dtype for key, tensor in tensors.items() if key.endswith(".alpha")]
    return ALPHA_DTYPES.get(found[0], "float32") if found else ""


def _dtype_of(tensors: Mapping[str, Tensor], *, source: str) -> str:
    found = sorted({str(t.dtype) for key, t in tensors.items() if not key.endswith(".alpha")})
    dtype = next((name for kind, name in _DTYPES.items() if found == [str(kind)]), None)
    if dtype is None:
        raise SafetyDPOError(
            f"expected LoRA weights of one type ({', '.join(_DTYPES.values())}) in {source}, found {', '.join(found)}: "
            "save it again in one of these"
        )
    return dtype
