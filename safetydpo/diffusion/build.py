"""The one place that knows model families: from a config to a loaded backbone.

The family is what the model's own `model_index.json` says, never a part of a path or name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from safetydpo.artifacts import layout
from safetydpo.config.schema import BaseModelConfig
from safetydpo.diffusion.backbone import Backbone
from safetydpo.diffusion.folder import HUB_PATTERNS, check_whole, fingerprint_folder, linear_layers_of, read_json
from safetydpo.diffusion.targets import require_targets
from safetydpo.errors import SafetyDPOError, UsageError


def _stable_diffusion() -> Any:
    # Imported when a model is loaded only: a look at its fingerprint must not cost the seconds that diffusers takes.
    from safetydpo.diffusion.stable_diffusion import StableDiffusion

    return StableDiffusion


DEMO = "demo"
FAMILIES: Mapping[str, Callable[[], Any]] = {"StableDiffusionPipeline": _stable_diffusion}
"""Pipeline class named in `model_index.json` -> what gives its backbone class."""
DENOISERS: Mapping[str, str] = {"StableDiffusionPipeline": "unet"}
"""Pipeline class -> folder of the network that gets adapters."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def load_backbone(base: BaseModelConfig, *, device: str = "cpu", num_threads: int | None = None) -> Backbone:
    """Load the base model of a run, frozen, on `device`.

    Args:
        base: which model, and the compute type of its networks.
        device: a torch device, such as `cpu` or `cuda:0`.
        num_threads: CPU threads of this process from now on (they change the last bits); None = as they are.

    Raises:
        UsageError: if the model is not found or is of an unsupported family.
        SafetyDPOError: if its files are incomplete, damaged or pickles.
    """
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    folder = resolve_folder(base)
    backbone: Backbone = FAMILIES[_family(folder)]().from_folder(folder, dtype=DTYPES[base.dtype], device=device)
    return backbone


def base_fingerprint(base: BaseModelConfig) -> str:
    """Return the fingerprint that the loaded model will have, reading its files but loading no network.

    Raises:
        UsageError: if the model is not found or is of an unsupported family.
        SafetyDPOError: if its files are incomplete, cut short or pickles.
    """
    folder = resolve_folder(base)
    _family(folder)
    check_whole(folder)
    return fingerprint_folder(folder)


def check_targets(base: BaseModelConfig, targets: Sequence[str]) -> None:
    """Check that every LoRA target names a linear layer of the model's denoiser, reading names only.

    Raises:
        UsageError: naming the first that names none.
    """
    folder = resolve_folder(base)
    require_targets(linear_layers_of(folder / DENOISERS[_family(folder)]), targets)


def resolve_folder(base: BaseModelConfig) -> Path:
    """Return the local folder of a model; a hub model is fetched first (safetensors and configurations only).

    Raises:
        UsageError: if there is no such folder and the name is no hub id, or a local model has a revision.
    """
    if base.model == DEMO:
        _refuse_revision(base)
        folder = layout.demo_weights() / "base"
        if not folder.is_dir():
            raise UsageError(
                f"expected the demo model in {folder}, found no such folder: install the package with its data, "
                "or build the demo model as docs/demo-world.md says"
            )
        return folder
    local = Path(base.model).expanduser()
    if local.is_dir():
        _refuse_revision(base)
        return local
    if not _HUB_ID.fullmatch(base.model):
        raise UsageError(
            f"expected base.model to be 'demo', a local folder or a hub id 'owner/name', found {base.model!r}, "
            "which does not exist: correct the path"
        )
    return _fetch(base)


def _refuse_revision(base: BaseModelConfig) -> None:
    if base.revision is not None:
        raise UsageError(
            f"expected base.revision to be null for the local model {base.model!r}, found {base.revision!r}: "
            "remove it, a local model is identified by its files"
        )


def _fetch(base: BaseModelConfig) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(base.model, revision=base.revision, allow_patterns=list(HUB_PATTERNS)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise SafetyDPOError(
            f"expected a local folder or a reachable hub model {base.model!r}, found neither "
            f"({type(error).__name__}): check the name, the network and your access, or download it and give the folder"
        ) from error


def _family(folder: Path) -> str:
    found = read_json(folder / "model_index.json").get("_class_name")
    if found not in FAMILIES:
        raise UsageError(
            f"expected a model of a supported family ({', '.join(FAMILIES)}), found {found!r} in "
            f"{folder / 'model_index.json'}: choose another base.model"
        )
    return str(found)
