"""Load the parts of a model folder, and refuse one that is damaged or incomplete with one line.

Both libraries only warn about weights that a file lacks and then draw them at random; here that is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from transformers import CLIPTokenizer
from transformers.utils import logging as transformers_logging

from safetydpo.diffusion.folder import read_json
from safetydpo.errors import SafetyDPOError


@contextmanager
def _quiet_loading() -> Iterator[None]:
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
        with _quiet_loading():
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


def load_clip_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a model folder.

    Raises:
        SafetyDPOError: if its configuration or vocabulary is missing; the library would then make one up.
    """
    read_json(folder / "tokenizer_config.json")
    vocabulary = folder / "tokenizer.json" if (folder / "tokenizer.json").is_file() else folder / "vocab.json"
    read_json(vocabulary)
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
