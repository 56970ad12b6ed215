"""A whole model with an adapter in its weights: for programs that load no LoRA. Folders in diffusers format."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from safetydpo.artifacts.adapters import LoraLayer
from safetydpo.artifacts.storage import open_location
from safetydpo.artifacts.weights import read_header
from safetydpo.diffusion.folder import ModelFiles, is_variant, names_component, read_json
from safetydpo.errors import SafetyDPOError, UsageError

MODEL_INDEX = "model_index.json"
_SKIPPED_ENDINGS = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle", ".py", ".msgpack", ".onnx", ".h5")
"""What a copy of a model folder leaves out: pickles, code, weights of other programs."""


def fuse_adapter(files: ModelFiles, layers: Mapping[str, LoraLayer], out: Path) -> int:
    """Write the model with `weight + up @ down` in place of each changed weight; return how many there are.

    Sums are made in float32 and rounded to the type in which the model is stored. The folder appears whole or not at
    all.

    Args:
        files: the base model, as a folder.
        layers: `<network>.<module>` -> its change.
        out: a folder that does not exist, or is empty.

    Raises:
        UsageError: if the base model is a single file.
        SafetyDPOError: if a changed layer is none of the model's, or has another shape.
    """
    if files.single_file is not None:
        raise UsageError(
            f"expected a base model that is a folder in diffusers format, found the single file "
            f"{files.single_file.name!r}: save it with save_pretrained(folder) once, and name that folder"
        )
    unfinished = out.parent / f".{out.name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for component in _component_folders(files):
        shutil.copytree(component, unfinished / component.name, ignore=_not_copied)
    if files.vae is not None:
        shutil.rmtree(unfinished / "vae", ignore_errors=True)
        shutil.copytree(files.vae, unfinished / "vae", ignore=_not_copied)
    _write_index(files.folder, unfinished)
    try:
        for network in sorted({name.partition(".")[0] for name in layers}):
            _fuse_network(unfinished / network, {n: layer for n, layer in layers.items() if _is_of(n, network)})
    except SafetyDPOError:
        shutil.rmtree(unfinished)
        raise
    if out.is_dir():
        out.rmdir()
    unfinished.rename(out)
    return len(layers)


def _is_of(name: str, network: str) -> bool:
    return name.partition(".")[0] == network


def _not_copied(_: str, names: list[str]) -> set[str]:
    # A variant beside the fused weights would still hold the base's: whoever loads it gets no change at all.
    return {name for name in names if name.endswith(_SKIPPED_ENDINGS) or is_variant(name)}


def _component_folders(files: ModelFiles) -> list[Path]:
    index = read_json(files.folder / MODEL_INDEX)
    return [
        files.folder / name for name in sorted(index) if names_component(index, name) and (files.folder / name).is_dir()
    ]


def _write_index(folder: Path, target: Path) -> None:
    """Write `model_index.json`; a part without a folder, such as a checker that was not fetched, becomes none."""
    index = read_json(folder / MODEL_INDEX)
    for name in index:
        if names_component(index, name) and not (target / name).is_dir():
            index[name] = [None, None]
    (target / MODEL_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _fuse_network(folder: Path, layers: Mapping[str, LoraLayer]) -> None:
    missing = {name.partition(".")[2] + ".weight": name for name in layers}
    for file in sorted(folder.glob("*.safetensors")):
        header = read_header(open_location(str(file)), remedy="fetch or save the model again")
        # transformers 5 saves CLIP's text encoder without the first part of its modules' names.
        here = {key: key for key in missing if key in header}
        here |= {key.removeprefix("text_model."): key for key in missing if key.removeprefix("text_model.") in header}
        if not here:
            continue
        tensors = load_file(file)
        for key, of_layer in here.items():
            name = missing[of_layer]
            tensors[key] = _fused(name, tensors[key], layers[name])
        save_file(tensors, file, metadata=header.get("__metadata__"))
        missing = {key: name for key, name in missing.items() if key not in here.values()}
    if missing:
        first = missing[min(missing)]
        raise SafetyDPOError(
            f"expected every layer of the adapter in the base model, found no weight of {first!r} in {folder.name}: "
            "name the base model that the adapter was made for with --base"
        )


def _fused(name: str, weight: Tensor, layer: LoraLayer) -> Tensor:
    up, down = (factor.to(torch.float32).flatten(1) for factor in (layer.up, layer.down))
    found = [up.shape[0], *layer.down.shape[1:]]
    # A 1 x 1 convolution of the model may be a linear layer of the adapter's, and the other way round.
    if [size for size in found if size > 1] != [size for size in weight.shape if size > 1]:
        raise SafetyDPOError(
            f"expected a change of shape {list(weight.shape)} for {name!r}, found {found}: "
            "the adapter is of another base model"
        )
    return (weight.to(torch.float32) + (up @ down).reshape(weight.shape)).to(weight.dtype).contiguous()
