"""A text-to-image model on disk: which files of a diffusers folder count, and what they are called together.

Only safetensors, JSON and plain text are read; a folder that holds its weights as pickles is refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from safetydpo.artifacts.storage import open_location
from safetydpo.artifacts.weights import read_header
from safetydpo.errors import SafetyDPOError

COMPONENTS = ("scheduler", "text_encoder", "tokenizer", "unet", "vae")
NETWORKS = ("text_encoder", "unet", "vae")
_WEIGHTS = re.compile(r"(diffusion_pytorch_model|model)(-\d+-of-\d+)?\.safetensors")
_VARIANT_INDEX = re.compile(r".*\.index\.[^.]+\.json")

HUB_PATTERNS = (
    "model_index.json",
    *(f"{component}/*.{suffix}" for component in COMPONENTS for suffix in ("json", "txt")),
    *(
        f"{component}/{stem}{shard}.safetensors"
        for component in NETWORKS
        for stem in ("diffusion_pytorch_model", "model")
        for shard in ("", "-[0-9]*-of-[0-9]*")
    ),
)
"""Files to fetch from a hub: never a pickle, never a second precision of the same weights."""


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        SafetyDPOError: if the file is missing or holds no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SafetyDPOError(
            f"expected a model folder in diffusers format, found no {path.name} in {path.parent}: "
            "save the model with save_pretrained(folder)"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SafetyDPOError(f"expected JSON in {path}, found {error}: fetch or save the model again") from None
    if not isinstance(value, dict):
        raise SafetyDPOError(
            f"expected a JSON object in {path}, found a {type(value).__name__}: fetch or save the model again"
        )
    return value


def check_weights(folder: Path) -> None:
    """Refuse a folder in which a network has no safetensors weights.

    Raises:
        SafetyDPOError: naming the first component without safetensors, and its pickle if there is one.
    """
    for component in NETWORKS:
        names = sorted(path.name for path in (folder / component).glob("*"))
        if any(_WEIGHTS.fullmatch(name) for name in names):
            continue
        pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl"))]
        found = f"only the pickle {pickles[0]!r}, which is never read" if pickles else "none"
        raise SafetyDPOError(
            f"expected safetensors weights in {folder / component}, found {found}: "
            "convert the model once with save_pretrained(folder, safe_serialization=True)"
        )


def check_whole(folder: Path) -> None:
    """Refuse a folder with weights that are cut short; only headers are read.

    Raises:
        SafetyDPOError: naming the first such file.
    """
    for component in NETWORKS:
        for path in sorted((folder / component).glob("*")):
            if _WEIGHTS.fullmatch(path.name):
                read_header(open_location(str(path)), remedy="fetch or save the model again")


def fingerprint_folder(folder: Path) -> str:
    """Return the identity of a model: sha256 over the sorted lines `relative name, sha256 of the file's bytes`.

    Counted are the weights that are loaded by default, and the configurations and vocabularies of the five
    components; other precisions of the same weights, safety checkers and readmes are not.

    Raises:
        SafetyDPOError: if a network has no safetensors weights.
    """
    check_weights(folder)
    total = hashlib.sha256()
    for component in COMPONENTS:
        for path in sorted((folder / component).glob("*")):
            if path.is_file() and _counts(path.name):
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                total.update(f"{component}/{path.name}\x1f{digest}\n".encode())
    return total.hexdigest()


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
