"""Text encoders with their tokenizers: prompts to features, from texts or from given input embeddings.

Axis legend: `batch` prompts, `token` prompt tokens, `width_embedding` input features of an encoder.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from safetydpo.errors import SafetyDPOError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptTokens:
    """Prompts as one text encoder sees them."""

    ids: Int[Tensor, "batch token"]
    mask: Int[Tensor, "batch token"] | None = None
    """1 for tokens of the prompt, 0 for padding; None = all count."""
    embeddings: Float[Tensor, "batch token width_embedding"] | None = None
    """What stands in place of the looked-up input embeddings; None = those of `ids`."""


class TextTower:
    """One frozen text encoder and its tokenizer; every prompt is padded to `num_tokens`."""

    def __init__(self, encoder: Any, tokenizer: Any, *, device: torch.device, max_tokens: int | None = None) -> None:
        """Take a loaded encoder; `max_tokens` cuts prompts shorter than its tokenizer and positions would."""
        self._encoder, self._tokenizer, self._device = encoder, tokenizer, device
        limits = (tokenizer.model_max_length, getattr(encoder.config, "max_position_embeddings", None), max_tokens)
        self.num_tokens = min(limit for limit in limits if limit is not None)

    @property
    def lookup(self) -> nn.Module:
        """Return the layer that gives every token its input embedding."""
        # A T5 encoder shares the table of the whole model, but looks it up in a layer of its own.
        inner = getattr(self._encoder, "encoder", None)
        layer: nn.Module = getattr(inner, "embed_tokens", None) or self._encoder.get_input_embeddings()
        return layer

    @property
    def table(self) -> Float[Tensor, "vocabulary width_embedding"]:
        """Return the input embedding of every token."""
        table: Tensor = self.lookup.weight  # type: ignore[assignment]
        return table

    @property
    def texts(self) -> list[str]:
        """Return every token as the tokenizer writes it, in the order of the table; rows of none are empty."""
        found = [""] * self.table.shape[0]
        for text, number in self._tokenizer.get_vocab().items():
            found[number] = text
        return found

    def tokenize(self, texts: Sequence[str]) -> PromptTokens:
        """Return the padded tokens; prompts that had to be cut are counted in the log."""
        lengths = [len(ids) for ids in self._tokenizer(list(texts), verbose=False).input_ids]
        num_cut = sum(length > self.num_tokens for length in lengths)
        if num_cut:
            log.warning("%d of %d prompts were cut to the model's %d tokens", num_cut, len(lengths), self.num_tokens)
        found = self._tokenizer(
            list(texts), padding="max_length", max_length=self.num_tokens, truncation=True, return_tensors="pt"
        ).to(self._device)
        masked = getattr(self._encoder.config, "use_attention_mask", False)
        return PromptTokens(found.input_ids, found.attention_mask if masked else None)

    def run(self, tokens: PromptTokens, **options: bool) -> Any:
        """Return the encoder's outputs; `options` are its own, such as `output_hidden_states`."""
        with self._replaced_lookup(tokens.embeddings):
            return self._encoder(tokens.ids, attention_mask=tokens.mask, **options)

    def _replaced_lookup(self, embeddings: Tensor | None) -> AbstractContextManager[None]:
        if embeddings is None:
            return nullcontext()
        return _replaced_output(self.lookup, embeddings)


@contextmanager
def _replaced_output(layer: nn.Module, output: Tensor) -> Any:
    # CLIP's text encoder takes no input embeddings, so its lookup is replaced for this one call; the rest
    # (positions, causal mask, layers, final norm) is then the very code that encodes texts.
    handle = layer.register_forward_hook(lambda *_: output)
    try:
        yield
    finally:
        handle.remove()


def joint_ids(towers: Sequence[TextTower], texts: Sequence[str]) -> Int[Tensor, "batch token"]:
    """Return the ids of all towers side by side, each counted from where the vocabulary before it ends."""
    parts, offset = [], 0
    for tower in towers:
        parts.append(tower.tokenize(texts).ids + offset)
        offset += tower.table.shape[0]
    return torch.cat(parts, dim=1)


def joint_table(towers: Sequence[TextTower]) -> Float[Tensor, "vocabulary width_embedding"]:
    """Return the towers' tables one below the other, filled up with zeros to the widest; one alone stays itself."""
    if len(towers) == 1:
        return towers[0].table
    width = max(tower.table.shape[1] for tower in towers)
    return torch.cat([nn.functional.pad(tower.table, (0, width - tower.table.shape[1])) for tower in towers])


def split_embeddings(
    towers: Sequence[TextTower],
    embeddings: Float[Tensor, "batch token width_embedding"],
    ids: Int[Tensor, "batch token"] | None,
) -> list[PromptTokens]:
    """Return what `joint_table()[joint_ids]` holds for each tower; `ids` may be None where only one tower is.

    Raises:
        SafetyDPOError: if the numbers of tokens are not the towers', or `ids` are needed and missing.
    """
    counts = [tower.num_tokens for tower in towers]
    if embeddings.shape[1] != sum(counts):
        raise SafetyDPOError(
            f"expected input embeddings of {' + '.join(map(str, counts))} tokens, found {embeddings.shape[1]}: "
            "use token_embedding_table()[tokenize(texts)] as pattern"
        )
    if ids is None:
        if len(towers) > 1:
            raise SafetyDPOError(
                "expected the token ids beside the input embeddings, because this model's pooled features are taken "
                "where a prompt ends, found none: give ids=tokenize(texts)"
            )
        ids = torch.zeros(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
    found, offset = [], 0
    parts = zip(towers, embeddings.split(counts, dim=1), ids.split(counts, dim=1), strict=True)
    for tower, rows, numbers in parts:
        vocabulary, width = tower.table.shape
        given = rows[..., :width].to(tower.table.device, tower.table.dtype)
        found.append(PromptTokens((numbers - offset).to(tower.table.device), embeddings=given))
        offset += vocabulary
    return found
