"""The one place that knows model families: from a config to a loaded backbone.

The family is what the model's own `model_index.json` says, never a part of a path or name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

from safetydpo.artifacts import layout
from safetydpo.artifacts.storage import open_location
from safetydpo.artifacts.weights import read_header
from safetydpo.config.schema import BaseModelConfig
from safetydpo.diffusion.backbone import Backbone, LoadedParts
from safetydpo.diffusion.folder import (
    CONFIG_PATTERNS,
    HUB_PATTERNS,
    PICKLES,
    VAE_PATTERNS,
    ModelFiles,
    check_weights,
    check_whole,
    fingerprint_files,
    linear_layers_of,
    read_json,
    weight_patterns,
)
from safetydpo.diffusion.original_layout import PREFIXES, networks_beside
from safetydpo.diffusion.targets import matches_suffix, require_attention, require_targets
from safetydpo.errors import SafetyDPOError, UsageError


def _stable_diffusion() -> Any:
    # Imported when a model is loaded only: a look at its fingerprint must not cost the seconds that diffusers takes.
    from safetydpo.diffusion.stable_diffusion import StableDiffusion

    return StableDiffusion


def _stable_diffusion_xl() -> Any:
    from safetydpo.diffusion.sdxl import StableDiffusionXL

    return StableDiffusionXL


def _stable_diffusion_3() -> Any:
    from safetydpo.diffusion.sd3 import StableDiffusion3

    return StableDiffusion3


def _flux() -> Any:
    from safetydpo.diffusion.flux import Flux

    return Flux


DEMO = "demo"
_STAYS_LOCAL: ContextVar[bool] = ContextVar("stays_local", default=False)
FAMILIES: Mapping[str, Callable[[], Any]] = {
    "StableDiffusionPipeline": _stable_diffusion,
    "StableDiffusionXLPipeline": _stable_diffusion_xl,
    "StableDiffusion3Pipeline": _stable_diffusion_3,
    "FluxPipeline": _flux,
}
"""Pipeline class named in `model_index.json` -> what gives its backbone class."""
DENOISERS: Mapping[str, str] = {
    "StableDiffusionPipeline": "unet",
    "StableDiffusionXLPipeline": "unet",
    "StableDiffusion3Pipeline": "transformer",
    "FluxPipeline": "transformer",
}
"""Pipeline class -> folder of the network that gets adapters."""
PATCHES: Mapping[str, int] = {"StableDiffusion3Pipeline": 2, "FluxPipeline": 2}
"""Pipeline class -> its backbone's `patch`, where that is not 1: known without importing the family."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_TIMESTEPS = 1000
"""What diffusers' schedulers take where a configuration does not say."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def load_backbone(
    base: BaseModelConfig,
    *,
    device: str = "cpu",
    num_threads: int | None = None,
    parts: LoadedParts = "all",
    denoiser_device: str | None = None,
) -> Backbone:
    """Load the base model of a run, frozen, on `device`.

    Args:
        base: which model, and the compute type of its networks.
        device: a torch device, such as `cpu` or `cuda:0`.
        num_threads: CPU threads of this process from now on (they change the last bits); None = as they are.
        parts: `denoiser` leaves out autoencoder and text encoders, which training on stored latents and features does
            not need; what would use them raises.
        denoiser_device: where the denoiser's weights are put instead, for an engine that brings them to `device` layer
            by layer; until then nothing can be computed with them. None = `device`.

    Raises:
        UsageError: if the model is not found or is of an unsupported family.
        SafetyDPOError: if its files are incomplete, damaged or pickles.
    """
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    files = resolve_files(base)
    family = FAMILIES[_family(files.folder)]()
    backbone: Backbone = family.from_files(
        files, dtype=DTYPES[base.dtype], device=device, parts=parts, denoiser_device=denoiser_device
    )
    return backbone


def num_train_timesteps(base: BaseModelConfig) -> int:
    """Return the number of training timesteps that the loaded model will have, reading its configuration only.

    Raises:
        UsageError: if the model is not found.
        SafetyDPOError: if its scheduler has no configuration.
    """
    config = read_json(resolve_files(base).folder / "scheduler" / "scheduler_config.json")
    return int(config.get("num_train_timesteps", DEFAULT_TIMESTEPS))


def base_fingerprint(base: BaseModelConfig) -> str:
    """Return the fingerprint that the loaded model will have, reading its files but loading no network.

    Raises:
        UsageError: if the model is not found or is of an unsupported family.
        SafetyDPOError: if its files are incomplete, cut short or pickles.
    """
    files = resolve_files(base)
    _family(files.folder)
    check_weights(files)
    check_whole(files)
    return fingerprint_files(files)


def check_targets(base: BaseModelConfig, targets: Sequence[str], *, attention: str = "all") -> list[str]:
    """Check that every LoRA target names a linear layer of the model's denoiser, reading names only; return all named.

    `attention` is that of the LoRA settings.

    Raises:
        UsageError: naming the first that names none; or if the model has no attention layers to choose among.
    """
    files = resolve_files(base)
    family = _family(files.folder)
    require_attention(DENOISERS[family], attention)
    if files.single_file is None:
        names = linear_layers_of(files.folder / DENOISERS[family])
    else:
        # The file's own names are those of the first release; the configuration tells the network's.
        names = _linear_layers_by_configuration(FAMILIES[family]().network_class, files.folder / DENOISERS[family])
    require_targets(names, targets)
    return sorted(name for name in names if any(matches_suffix(name, suffix) for suffix in targets))


def _linear_layers_by_configuration(network_class: Any, folder: Path) -> list[str]:
    from safetydpo.diffusion.adapter import linear_layers

    with torch.device("meta"):
        return list(linear_layers(network_class.from_config(read_json(folder / "config.json"))))


def denoiser_of(base: BaseModelConfig) -> str:
    """Return which kind of denoiser a model has, reading its configurations only."""
    return DENOISERS[_family(resolve_files(base).folder)]


def check_picture_size(base: BaseModelConfig, *, height: int, width: int) -> None:
    """Check that the model can draw pictures of that size, reading its configurations only.

    Raises:
        UsageError: if a side is not a multiple of the autoencoder's shrink factor times the denoiser's patch.
    """
    files = resolve_files(base)
    family = _family(files.folder)
    config = files.folder_of("vae") / "config.json"
    # A model without it is refused as incomplete, with all that it lacks.
    if not config.is_file():
        return
    factor = 2 ** (len(read_json(config)["block_out_channels"]) - 1) * PATCHES.get(family, 1)
    if height % factor or width % factor:
        raise UsageError(
            f"expected a picture height and width that are multiples of {factor} for base.model {base.model!r} "
            f"({family}), found {height} x {width}: change identity.sampler.height and identity.sampler.width"
        )


def embeds_guidance(base: BaseModelConfig) -> bool:
    """Return whether the denoiser is told the guidance scale (FLUX.1 dev), reading its configuration only."""
    files = resolve_files(base)
    config = files.folder / "transformer" / "config.json"
    return _family(files.folder) == "FluxPipeline" and config.is_file() and bool(read_json(config)["guidance_embeds"])


def resolve_files(base: BaseModelConfig) -> ModelFiles:
    """Return where the parts of a model are read from; what is on a hub is fetched first.

    Raises:
        UsageError: as `resolve_folder`; or a single file has no `base.config` or is no safetensors file, or another
            model has one; or `base.vae` is not found.
    """
    vae = None if base.vae is None else _resolve_vae(base.vae)
    single_file = Path(base.model).expanduser()
    if not single_file.is_file():
        if base.config is not None:
            raise UsageError(
                f"expected base.config to be null, because base.model {base.model!r} is no single file, found "
                f"{base.config!r}: remove it, a model's own configurations are used"
            )
        return ModelFiles(resolve_folder(base), vae=vae)
    if single_file.suffix != ".safetensors":
        what = "the pickle" if single_file.suffix in PICKLES else "the file"
        raise UsageError(
            f"expected a single-file model in safetensors format, found {what} {single_file.name!r}, which is never "
            "read: convert it to safetensors once"
        )
    _refuse_revision(base)
    if base.config is None:
        raise UsageError(
            f"expected base.config to name a local folder or hub id with the configurations and vocabularies (in "
            f"diffusers format) of the single file {single_file.name!r}, which holds weights only, found null: "
            "name the model that it is a variant of"
        )
    folder = Path(base.config).expanduser()
    is_local = folder.is_dir()
    if not is_local:
        folder = _fetch(base.config, setting="base.config", patterns=CONFIG_PATTERNS)
    beside = _networks_beside(single_file, folder)
    if not is_local and set(beside) - ({"vae"} if vae is not None else set()):
        folder = _fetch(base.config, setting="base.config", patterns=(*CONFIG_PATTERNS, *weight_patterns(beside)))
    return ModelFiles(folder, vae=vae, single_file=single_file, beside=beside)


def _networks_beside(single_file: Path, folder: Path) -> tuple[str, ...]:
    family = _family(folder)
    if family not in PREFIXES:
        return ()
    return networks_beside(family, read_header(open_location(str(single_file)), remedy="fetch the file again"))


def _resolve_vae(vae: str) -> Path:
    folder = Path(vae).expanduser()
    if not folder.is_dir():
        folder = _fetch(vae, setting="base.vae", patterns=VAE_PATTERNS)
    # A whole model's folder may be named as well as an autoencoder's own.
    return folder if (folder / "config.json").is_file() else folder / "vae"


def resolve_folder(base: BaseModelConfig) -> Path:
    """Return the local folder of `base.model`; a hub model is fetched first (safetensors and configurations only).

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
    return _fetch(base.model, setting="base.model", patterns=HUB_PATTERNS, revision=base.revision)


def _refuse_revision(base: BaseModelConfig) -> None:
    if base.revision is not None:
        raise UsageError(
            f"expected base.revision to be null for the local model {base.model!r}, found {base.revision!r}: "
            "remove it, a local model is identified by its files"
        )


class ModelNotHereError(SafetyDPOError):
    """A model of a hub was asked for where nothing may be fetched, and this machine has no copy."""


@contextmanager
def no_fetching() -> Iterator[None]:
    """Fetch nothing from a hub while the block runs; a model that is not on this machine raises `ModelNotHereError`."""
    token = _STAYS_LOCAL.set(True)
    try:
        yield
    finally:
        _STAYS_LOCAL.reset(token)


def _fetch(name: str, *, setting: str, patterns: Sequence[str], revision: str | None = None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    is_model = setting == "base.model"
    # The model has a setting of its own for it.
    hub_id, at, pinned = (name, "", "") if is_model else name.partition("@")
    if not _HUB_ID.fullmatch(hub_id) or bool(at) != bool(pinned):
        known = "'demo', a local folder or a hub id 'owner/name'"
        if not is_model:
            known = "a local folder or a hub id 'owner/name' or 'owner/name@revision'"
        raise UsageError(f"expected {setting} to be {known}, found {name!r}, which does not exist: correct the path")
    revision = pinned or revision
    is_local = _STAYS_LOCAL.get()
    only_here: dict[str, Any] = {"local_files_only": True} if is_local else {}
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(patterns), **only_here))
    except LocalEntryNotFoundError as error:
        if is_local:
            raise ModelNotHereError(
                f"expected {setting} {name!r} on this machine, found no copy of it: download it first"
            ) from error
        raise _unreachable(name, error) from error
    except (HfHubHTTPError, OSError) as error:
        raise _unreachable(name, error) from error


def _unreachable(name: str, error: Exception) -> SafetyDPOError:
    return SafetyDPOError(
        f"expected a local folder or a reachable hub model {name!r}, found neither "
        f"({type(error).__name__}): check the name, the network and your access, or download it and give the folder"
    )


def _family(folder: Path) -> str:
    found = read_json(folder / "model_index.json").get("_class_name")
    # A pipeline with code of its own names a list: its file and its class.
    if not isinstance(found, str) or found not in FAMILIES:
        raise UsageError(
            f"expected a model of a supported family ({', '.join(FAMILIES)}), found {found!r} in "
            f"{folder / 'model_index.json'}: choose another base.model"
        )
    return str(found)
