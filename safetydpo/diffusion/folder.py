"""A text-to-image model on disk: which files of a diffusers folder count, and what they are called together.

Only safetensors, JSON and plain text are read; weights that are pickles are refused, Python files never looked at.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetydpo.artifacts.json_text import JsonError, parse_json
from safetydpo.artifacts.storage import open_location
from safetydpo.artifacts.weights import read_header
from safetydpo.diffusion.original_layout import require_plain
from safetydpo.errors import SafetyDPOError

NETWORKS = ("text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "unet", "vae")
COMPONENTS = tuple(sorted((*NETWORKS, "scheduler", "tokenizer", "tokenizer_2", "tokenizer_3")))
"""Every part that some family has; `model_index.json` says which of them a model has."""
INDEX_SETTINGS = ("force_zeros_for_empty_prompt",)
"""Values of `model_index.json` that change what a model computes (SDXL)."""
_WEIGHTS = re.compile(r"(diffusion_pytorch_model|model)(-\d+-of-\d+)?\.safetensors")
PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
"""Name endings of weights that would have to be unpickled."""
_VARIANT_INDEX = re.compile(r".*\.index\.[^.]+\.json")


def weight_patterns(networks: Iterable[str]) -> tuple[str, ...]:
    """Return which files of a hub repository hold the weights of these networks."""
    return tuple(
        f"{network}/{stem}{shard}.safetensors"
        for network in networks
        for stem in ("diffusion_pytorch_model", "model")
        for shard in ("", "-[0-9]*-of-[0-9]*")
    )


HUB_PATTERNS = (
    "model_index.json",
    *(f"{component}/*.{suffix}" for component in COMPONENTS for suffix in ("json", "txt")),
    *weight_patterns(NETWORKS),
)
"""Files to fetch from a hub: never a pickle, never a second precision of the same weights."""
CONFIG_PATTERNS = tuple(pattern for pattern in HUB_PATTERNS if not pattern.endswith(".safetensors"))
"""Those of them that a single file of weights needs beside it."""
VAE_PATTERNS = tuple(
    f"{folder}{name}" for folder in ("", "vae/") for name in ("config.json", "diffusion_pytorch_model.safetensors")
)
"""Files to fetch of an autoencoder that stands in a repository of its own, or of a whole model."""


@dataclass(frozen=True)
class ModelFiles:
    """Where the parts of a model are read from."""

    folder: Path
    """Folder in diffusers format: configurations and vocabularies, and the weights unless `single_file` has them."""
    vae: Path | None = None
    """Folder of an autoencoder that takes the place of the model's own."""
    single_file: Path | None = None
    """One safetensors file with the weights, in the layout of the model's first release."""
    beside: tuple[str, ...] = ()
    """Networks that the single file does not hold; their weights stand in `folder`."""

    def folder_of(self, component: str) -> Path:
        """Return the folder of a component."""
        return self.vae if component == "vae" and self.vae is not None else self.folder / component

    def components(self) -> list[str]:
        """Return the parts that the model has, sorted.

        Raises:
            SafetyDPOError: if `model_index.json` is missing or damaged.
        """
        index = read_json(self.folder / "model_index.json")
        return [component for component in COMPONENTS if names_component(index, component)]

    def weight_folders(self) -> list[Path]:
        """Return the folders from which weights are read."""
        networks = [component for component in self.components() if component in NETWORKS]
        return [self.folder_of(component) for component in networks if self.in_folder(component)]

    def in_folder(self, component: str) -> bool:
        """Return whether the weights of a network stand in its folder, not in the single file."""
        replaced = component == "vae" and self.vae is not None
        return self.single_file is None or replaced or component in self.beside


def names_component(index: Mapping[str, Any], component: str) -> bool:
    """Return whether the content of a `model_index.json` names a class for `component`."""
    entry = index.get(component)
    return isinstance(entry, list) and len(entry) == 2 and entry[1] is not None


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        SafetyDPOError: if the file is missing or holds no JSON object.
    """
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SafetyDPOError(
            f"expected a model folder in diffusers format, found no {path.name} in {path.parent}: "
            "save the model with save_pretrained(folder)"
        ) from None
    except (UnicodeDecodeError, JsonError) as error:
        raise SafetyDPOError(f"expected JSON in {path}, found {error}: fetch or save the model again") from None
    if not isinstance(value, dict):
        raise SafetyDPOError(
            f"expected a JSON object in {path}, found a {type(value).__name__}: fetch or save the model again"
        )
    return value


def check_weights(files: ModelFiles) -> None:
    """Refuse a model in which a network has no safetensors weights.

    Raises:
        SafetyDPOError: naming the first network without safetensors, and its pickle if there is one.
    """
    for folder in files.weight_folders():
        names = sorted(path.name for path in folder.glob("*"))
        if any(_WEIGHTS.fullmatch(name) for name in names):
            continue
        pickles = [name for name in names if name.endswith(PICKLES)]
        found = f"only the pickle {pickles[0]!r}, which is never read" if pickles else "none"
        if files.single_file is not None and folder.parent == files.folder:
            raise SafetyDPOError(
                f"expected safetensors weights in {folder}, because {files.single_file.name} holds none of the "
                f"{folder.name}, found {found}: name a whole model in base.config, or use a file that holds it"
            )
        raise SafetyDPOError(
            f"expected safetensors weights in {folder}, found {found}: "
            "convert the model once with save_pretrained(folder, safe_serialization=True)"
        )


def check_whole(files: ModelFiles) -> None:
    """Refuse weights that are cut short, and a single file of quantised ones; only headers are read.

    Raises:
        SafetyDPOError: naming the first such file.
    """
    for folder in files.weight_folders():
        for path in sorted(folder.glob("*")):
            if _WEIGHTS.fullmatch(path.name):
                read_header(open_location(str(path)), remedy="fetch or save the model again")
    if files.single_file is not None:
        names = read_header(open_location(str(files.single_file)), remedy="fetch the file again")
        require_plain(names, file=files.single_file)


def fingerprint_folder(folder: Path) -> str:
    """Return the fingerprint of a model that is one folder; see `fingerprint_files`.

    Raises:
        SafetyDPOError: as `fingerprint_files`.
    """
    return fingerprint_files(ModelFiles(folder))


def fingerprint_files(files: ModelFiles) -> str:
    """Return the identity of a model: sha256 over the sorted lines `relative name, sha256 of the file's bytes`.

    Counted are the weights that are loaded by default, and the configurations and vocabularies of the model's
    components; other precisions of the same weights, safety checkers and readmes are not. Another autoencoder stands
    in place of the model's own. A single file and the settings of `model_index.json` that change results have a line
    of their own.

    Raises:
        SafetyDPOError: if a network has no safetensors weights.
    """
    check_weights(files)
    total = hashlib.sha256()
    for component in files.components():
        whole = files.in_folder(component)
        for path in sorted(files.folder_of(component).glob("*")):
            if path.is_file() and _counts(path.name) and (whole or not path.name.endswith(".safetensors")):
                total.update(f"{component}/{path.name}\x1f{_sha256(path)}\n".encode())
    if files.single_file is not None:
        total.update(f"single_file\x1f{_sha256(files.single_file)}\n".encode())
    index = read_json(files.folder / "model_index.json")
    for name in INDEX_SETTINGS:
        if name in index:
            total.update(f"{name}\x1f{json.dumps(index[name])}\n".encode())
    return total.hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_variant(name: str) -> bool:
    """Return whether a file holds weights that are not read here, such as `*.fp16.safetensors`, or is their index."""
    is_other = name.endswith(".safetensors") and _WEIGHTS.fullmatch(name) is None
    return is_other or _VARIANT_INDEX.fullmatch(name) is not None


def _counts(name: str) -> bool:
    if name.endswith(".safetensors"):
        return _WEIGHTS.fullmatch(name) is not None
    return name.endswith((".json", ".txt")) and _VARIANT_INDEX.fullmatch(name) is None


def linear_layers_of(component: Path) -> list[str]:
    """Return the names of a network's linear layers, told by matrices in the headers of its safetensors files.

    Raises:
        SafetyDPOError: if a file is cut short.
    """
    headers = [
        read_header(open_location(str(file)), remedy="copy the model again")
        for file in sorted(component.glob("*.safetensors"))
    ]
    return [
        name.removesuffix(".weight")
        for header in headers
        for name, entry in header.items()
        if name.endswith(".weight") and len(entry["shape"]) == 2
    ]
