"""The parts of a loaded model; training on stored latents and features does with the denoiser and the noise process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safetydpo.diffusion.process import NoiseProcess
from safetydpo.diffusion.text import TextTower
from safetydpo.errors import SafetyDPOError


@dataclass(frozen=True)
class EncoderSlot:
    """Where a family keeps one of its text encoders, and of which classes it and its tokenizer are."""

    encoder: str
    encoder_class: Any
    tokenizer: str
    tokenizer_class: Any
    is_optional: bool = False


@dataclass(frozen=True)
class Parts:
    """The loaded parts of a model, frozen and on one device."""

    denoiser: Any
    vae: Any | None
    """None = left out."""
    towers: tuple[TextTower, ...] | None
    """None = left out."""
    shrink: int
    """Pixels to a side of a latent pixel."""
    process: NoiseProcess
    fingerprint: str
    index: Mapping[str, Any]
    """Content of `model_index.json`."""

    @property
    def loaded_vae(self) -> Any:
        """The autoencoder.

        Raises:
            SafetyDPOError: if it was left out.
        """
        if self.vae is None:
            raise _left_out("autoencoder")
        return self.vae

    @property
    def loaded_towers(self) -> tuple[TextTower, ...]:
        """The text encoders.

        Raises:
            SafetyDPOError: if they were left out.
        """
        if self.towers is None:
            raise _left_out("text encoders")
        return self.towers


def _left_out(what: str) -> SafetyDPOError:
    return SafetyDPOError(
        f"expected a model with its {what}, found one loaded with parts='denoiser': load it with parts='all', or use "
        "stored latents and text features"
    )
