"""Load the parts of a model folder, and refuse one that is damaged or incomplete with one line.

Both libraries only warn about weights that a file lacks and then draw them at random; here that is an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, ModelMixin
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from transformers import CLIPTokenizer
from transformers.utils import logging as transformers_logging

from safetydpo.diffusion.folder import ModelFiles, read_json
from safetydpo.errors import SafetyDPOError

AUTOENCODERS: dict[str, Any] = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Keep both libraries from talking about what is checked here."""
    # What these libraries would only warn about (weights that are missing) is checked and raised here.
    level_diffusers, level_transformers = (
        diffusers_logging.get_verbosity(),
        transformers_logging.get_verbosity(),
    )
    bars = transformers_logging.is_progress_bar_enabled()
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(level_diffusers)
        transformers_logging.set_verbosity(level_transformers)
        if bars:
            transformers_logging.enable_progress_bar()


def load_network(kind: Any, folder: Path, **dtype: torch.dtype) -> Any:
    """Return a network of class `kind` from its folder: safetensors only, every tensor present.

    Args:
        kind: a diffusers or transformers class.
        folder: the component's folder.
        dtype: the compute type, under the name that the class's library gives it.

    Raises:
        SafetyDPOError: if the configuration or weights are missing, damaged or incomplete.
    """
    read_json(folder / "config.json")
    try:
        with quiet_loading():
            network, info = kind.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, output_loading_info=True, **dtype
            )
    except (OSError, SafetensorError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise SafetyDPOError(
            f"expected readable safetensors weights in {folder}, found {first_line}: "
            "the file may be cut short; fetch or save the model again"
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise SafetyDPOError(
            f"expected all weights of {kind.__name__} in {folder}, found {len(missing)} missing, first {missing[0]!r}: "
            "fetch or save the model again"
        )
    return network


def load_tokenizer(kind: Any, folder: Path) -> Any:
    """Return the tokenizer of class `kind` of a model folder.

    Raises:
        SafetyDPOError: if its configuration or vocabulary is missing; the library would then make one up.
    """
    read_json(folder / "tokenizer_config.json")
    in_two_files = kind is CLIPTokenizer and not (folder / "tokenizer.json").is_file()
    read_json(folder / ("vocab.json" if in_two_files else "tokenizer.json"))
    return kind.from_pretrained(folder, local_files_only=True)


class FolderLoader:
    """Loads the networks of a model in diffusers format."""

    def __init__(self, files: ModelFiles, index: Mapping[str, Any], *, dtype: torch.dtype) -> None:
        """Take the content of the model's `model_index.json` and the compute type of its networks."""
        self._files, self._index, self._dtype = files, index, dtype

    def network(self, component: str, kind: Any) -> Any:
        """Return a network of class `kind`; see `load_network`."""
        name = "torch_dtype" if issubclass(kind, ModelMixin) else "dtype"
        return load_network(kind, self._files.folder_of(component), **{name: self._dtype})

    def autoencoder(self) -> Any:
        """Return the model's autoencoder, or the one that takes its place.

        Raises:
            SafetyDPOError: if it is of an unknown class, normalises latents by channel, or as `load_network`.
        """
        kind, dtype = self._autoencoder_class()
        return load_network(kind, self._files.folder_of("vae"), torch_dtype=dtype)

    def _autoencoder_class(self) -> tuple[Any, torch.dtype]:
        folder = self._files.folder_of("vae")
        stated = (self._index.get("vae") or [None, None])[1]
        if self._files.vae is not None:
            stated = read_json(folder / "config.json").get("_class_name")
        if stated not in AUTOENCODERS:
            place = self._files.folder / "model_index.json" if self._files.vae is None else folder / "config.json"
            raise SafetyDPOError(
                f"expected an autoencoder of class {' or '.join(AUTOENCODERS)} in {place}, "
                f"found {stated!r}: use a model of a supported family"
            )
        config = read_json(folder / "config.json")
        if config.get("latents_mean") is not None or config.get("latents_std") is not None:
            raise SafetyDPOError(
                f"expected an autoencoder without latents_mean and latents_std, found some in "
                f"{folder / 'config.json'}: use a model of a supported family"
            )
        # Such an autoencoder overflows in float16 (SDXL's first one); diffusers computes it in float32 too.
        overflows = self._dtype == torch.float16 and bool(config.get("force_upcast"))
        return AUTOENCODERS[stated], torch.float32 if overflows else self._dtype


def open_loader(files: ModelFiles, index: Mapping[str, Any], *, dtype: torch.dtype) -> FolderLoader:
    """Return what loads the networks of `files`; a single file of weights is read here, once."""
    if files.single_file is None:
        return FolderLoader(files, index, dtype=dtype)
    from safetydpo.diffusion.single_file import SingleFileLoader

    return SingleFileLoader(files, index, dtype=dtype)
