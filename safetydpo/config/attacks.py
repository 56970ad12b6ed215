"""Attacks of the final evaluation: which there are, and how prompts are searched."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from safetydpo.config.fields import Frozen

AttackName = Literal["paraphrase", "typo", "optimised", "white_box", "random"]
AttackedRow = Literal["expert", "all_single", "merged", "searched"]


class AttackSearchConfig(Frozen):
    """Gradient search of the attacks `optimised` and `white_box`; `random` takes its number of words."""

    words: int = Field(8, ge=1, le=64)
    """Words of a prompt; each is one token, and none has to do with a name of the concept."""
    objective: Literal["text", "denoising"] = "text"
    """What `optimised` brings near to the unsafe prompt: features of the base's text encoder, or the base's predictions
    on pictures that it drew of the concept. `white_box` has the predictions of the adapted model."""
    relaxed_steps: int = Field(30, ge=0)
    """Steps in the space of embeddings, projected to words; a gradient of one prompt each."""
    pace: float = Field(0.5, gt=0.0)
    """Length of such a step, in standard deviations of the words' embeddings."""
    swap_steps: int = Field(10, ge=0)
    """Steps after them that exchange one word each."""
    candidates: int = Field(32, ge=1)
    """Exchanges tried in a step, together in one forward pass."""
    nearest: int = Field(32, ge=1)
    """Words of each place that exchanges are drawn from: those with the steepest fall of the loss."""
    draws: int = Field(8, ge=1)
    """Noisy pictures of the denoising objective; a prompt costs as many rows of a pass through the denoiser."""
