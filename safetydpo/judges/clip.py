"""CLIP embeddings of pictures and captions from a local folder in transformers format.

Axis legend: `n` pictures or captions, `h w` picture axes, `d` embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional
from transformers import CLIPModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from safetydpo.artifacts.json_text import parse_json
from safetydpo.errors import SafetyDPOError

PREPROCESSOR_FILE = "preprocessor_config.json"
EMBEDDED_AT_ONCE = 64


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Keep the library from drawing a progress bar while it reads a model."""
    # The library draws one for every model it reads, however small, between the lines of our own.
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


class ClipScorer:
    """A frozen CLIP model; pictures are resized to its input size and normalised as its folder says."""

    def __init__(self, folder: Path, *, device: str = "cpu") -> None:
        """Load from a folder that holds model and tokenizer; embeddings come back to the CPU.

        Raises:
            SafetyDPOError: if there is none.
        """
        for file in ("model.safetensors", PREPROCESSOR_FILE):
            if not (folder / file).is_file():
                raise SafetyDPOError(
                    f"expected a CLIP model at {folder}, found no {file}: name a folder that has it, reinstall the "
                    "package with its weights, or run `python -m safetydpo.demo.build text`"
                )
        with no_progress_bar():
            model = CLIPModel.from_pretrained(str(folder), dtype=torch.float32)
        self._model, self._device = model.eval().requires_grad_(False).to(device), device
        prepared = parse_json((folder / PREPROCESSOR_FILE).read_text(encoding="utf-8"))
        mean, std = (torch.tensor(prepared[name]).view(3, 1, 1) for name in ("image_mean", "image_std"))
        # (x / 255 - mean) / std = x / (255 std) - mean / std.
        self._divisor, self._offset = 255 * std, mean / std
        self._tokenizer = CLIPTokenizer.from_pretrained(str(folder))

    @torch.no_grad()
    def embed_images(self, images: UInt8[Tensor, "n h w 3"]) -> Float[Tensor, "n d"]:
        """Return projected picture embeddings, not normalised."""
        pooled = self._model.vision_model(pixel_values=self._pixels(images)).pooler_output
        embedding: Tensor = self._model.visual_projection(pooled)
        return embedding.cpu()

    @torch.no_grad()
    def embed_patches(self, images: UInt8[Tensor, "n h w 3"]) -> list[Float[Tensor, "n patch width"]]:
        """Return what each layer of the picture tower says of each patch, the class token left out."""
        found = self._model.vision_model(pixel_values=self._pixels(images), output_hidden_states=True)
        # The first are the embedded patches, before any layer.
        return [states[:, 1:].cpu() for states in found.hidden_states[1:]]

    def _pixels(self, images: UInt8[Tensor, "n h w 3"]) -> Float[Tensor, "n 3 size size"]:
        size = self._model.config.vision_config.image_size
        pixels = images.permute(0, 3, 1, 2).float().div(self._divisor).sub(self._offset)
        if pixels.shape[-2:] != (size, size):
            pixels = functional.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True)
        return pixels.to(self._device)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "n d"]:
        """Return projected caption embeddings, not normalised."""
        limit = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(
            list(texts), padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
        )
        pooled = self._model.text_model(input_ids=tokens.input_ids.to(self._device)).pooler_output
        embedding: Tensor = self._model.text_projection(pooled)
        return embedding.cpu()


def unit_embeddings(embed: Callable[[Any], Tensor], items: Any) -> Float[Tensor, "n d"]:
    """Return the embeddings of pictures or texts at length 1, made some at a time: large pictures fill a memory.

    Args:
        embed: `embed_images` or `embed_texts` of a scorer.
        items: what it takes, at least one.
    """
    parts = [embed(items[start : start + EMBEDDED_AT_ONCE]) for start in range(0, len(items), EMBEDDED_AT_ONCE)]
    return functional.normalize(torch.cat(parts), dim=1)
