"""Load a model from one safetensors file in the layout of its first release, by diffusers' own key tables.

Such a file holds weights only: configurations and vocabularies come from a folder in diffusers format beside it, and so
do the networks that the file has none of (`original_layout`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.loaders.single_file_model import SingleFileComponentError
from diffusers.loaders.single_file_utils import (
    create_diffusers_clip_model_from_ldm,
    create_diffusers_t5_model_from_checkpoint,
)
from transformers import T5EncoderModel

from safetydpo.artifacts.tensor_files import BrokenTensors, load_tensors
from safetydpo.diffusion.folder import ModelFiles
from safetydpo.diffusion.loading import FolderLoader, quiet_loading
from safetydpo.diffusion.original_layout import require_plain
from safetydpo.errors import SafetyDPOError


class SingleFileLoader(FolderLoader):
    """Loads the networks of a single file, each by its configuration in the folder beside it."""

    def __init__(self, files: ModelFiles, index: Mapping[str, Any], *, dtype: torch.dtype) -> None:
        """Read the whole file.

        Raises:
            SafetyDPOError: if it is damaged, or its weights are quantised.
        """
        super().__init__(files, index, dtype=dtype)
        try:
            self._tensors = load_tensors(Path(str(files.single_file)))
        except BrokenTensors as error:
            raise SafetyDPOError(
                f"expected readable safetensors weights at {files.single_file}, found {error}: fetch the file again"
            ) from error
        assert files.single_file is not None
        require_plain(self._tensors, file=files.single_file)

    def network(self, component: str, kind: Any) -> Any:
        """Return a network of class `kind` with the file's weights, or those beside it if the file has none.

        Raises:
            SafetyDPOError: if the file lacks some of them.
        """
        if self._files.in_folder(component):
            return super().network(component, kind)
        return self._build(component, kind, self._dtype)

    def autoencoder(self) -> Any:
        """Return the file's autoencoder, or the one that takes its place.

        Raises:
            SafetyDPOError: as `FolderLoader.autoencoder`, or if the file lacks weights.
        """
        if self._files.in_folder("vae"):
            return super().autoencoder()
        kind, dtype = self._autoencoder_class()
        return self._build("vae", kind, dtype)

    def _build(self, component: str, kind: Any, dtype: torch.dtype) -> Any:
        # diffusers' converters take tensors out of what they are given.
        options = {"config": str(self._files.folder), "subfolder": component, "local_files_only": True}
        make: Callable[..., Any]
        given: tuple[Any, ...]
        is_t5 = issubclass(kind, T5EncoderModel)
        if issubclass(kind, ModelMixin):
            make, given = kind.from_single_file, (dict(self._tensors),)
        else:
            make = create_diffusers_t5_model_from_checkpoint if is_t5 else create_diffusers_clip_model_from_ldm
            given = (kind, dict(self._tensors))
        try:
            with quiet_loading():
                network: Any = make(*given, torch_dtype=dtype, **options)
            if is_t5:
                # One table under two names, of which a file may hold one.
                network.tie_weights()
        except IndexError as error:
            # A key table that counts blocks and finds none.
            raise self._unfit(component, kind, "none of some kind of its blocks") from error
        except (AttributeError, KeyError, ValueError, RuntimeError, SingleFileComponentError, OSError) as error:
            raise self._unfit(component, kind, " ".join(str(error).split())[:160] or type(error).__name__) from error
        missing = [name for name, tensor in network.state_dict(keep_vars=True).items() if tensor.is_meta]
        if missing:
            raise self._unfit(component, kind, f"{len(missing)} missing, first {missing[0]!r}")
        return network

    def _unfit(self, component: str, kind: Any, found: str) -> SafetyDPOError:
        return SafetyDPOError(
            f"expected all weights of the {component} ({kind.__name__}) in {self._files.single_file}, found {found}: "
            f"use a complete file of the model that base.config ({self._files.folder}) describes"
        )
