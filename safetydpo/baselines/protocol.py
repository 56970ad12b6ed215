"""What a comparator is asked to remove, and the one interface behind which all of them stand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from safetydpo.baselines.intervention import Intervention
from safetydpo.baselines.settings import Settings, Space
from safetydpo.config.schema import SamplerConfig
from safetydpo.diffusion.backbone import Backbone
from safetydpo.errors import UsageError


@dataclass(frozen=True)
class ErasedConcept:
    """A concept that is to be removed, as the training split knows it."""

    name: str
    """What people call it; goes into negative prompts and safety concepts."""
    prompts: tuple[str, ...]
    """Training prompts that ask for it."""
    safe_prompts: tuple[str, ...]
    """The same prompts, one each, asking for what is to be drawn instead."""


@dataclass(frozen=True)
class Erasure:
    """Everything that a comparator may know: training prompts only."""

    concepts: tuple[ErasedConcept, ...]
    """What is to be removed; none = the base is left as it is."""
    preserved: tuple[str, ...] = ()
    """Training prompts of what is to stay."""


class Comparator(Protocol):
    """A published method that removes concepts from a frozen model."""

    @property
    def name(self) -> str:
        """Return the name of its row in a summary."""
        ...

    @property
    def paper(self) -> str:
        """Return authors, year, title and arXiv number."""
        ...

    @property
    def space(self) -> Space:
        """Return its settings: ranges to be tuned over, and settings that are tried first."""
        ...

    def prepare(
        self,
        backbone: Backbone,
        erasure: Erasure,
        *,
        settings: Settings,
        sampler: SamplerConfig,
        generator: torch.Generator,
    ) -> Intervention:
        """Return how the model is to be changed, or to be sampled, so that it no longer draws the concepts.

        The backbone holds no adapter, and holds none afterwards. Every draw is taken from `generator`.

        Raises:
            UsageError: if the settings are not the method's, or the model has no unguided branch or no cross-attention.
        """
        ...


def require_unet(backbone: Backbone, *, name: str) -> None:
    """Refuse models whose denoiser is no U-Net.

    Raises:
        UsageError: naming the comparator.
    """
    if backbone.denoiser != "unet":
        raise UsageError(
            f"expected a U-Net model (Stable Diffusion 1.x, 2.x, XL) for comparator {name!r}, found a "
            f"{backbone.denoiser}: leave it out of identity.evaluation.comparators"
        )


def number(settings: Settings, name: str) -> float:
    """Return a setting that is a number."""
    return float(settings[name])


def chosen(settings: Mapping[str, float | str], name: str) -> str:
    """Return a setting that is one of several words."""
    return str(settings[name])
