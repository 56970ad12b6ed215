"""What an attack wants of a prompt: features like those of the unsafe prompt, or its predictions.

Both are differentiable in the prompt's features, and give every prompt its own number: less is nearer to the target.

Axis legend: `prompt` prompts that are judged, `draw` noisy latents, `token` prompt tokens, `width_text` text features,
`channel height width` latent axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from safetydpo.diffusion.backbone import Backbone, Condition
from safetydpo.errors import SafetyDPOError, UsageError


class Objective(Protocol):
    """A number for each of several prompts."""

    def __call__(self, condition: Condition) -> Float[Tensor, " prompt"]:
        """Return how far each prompt is from what the attack wants."""
        ...


def check_encoder(backbone: Backbone) -> None:
    """Refuse models whose prompts are more than the features of one text encoder's tokens.

    Raises:
        UsageError: if the model has pooled features.
    """
    if backbone.encode_prompts([""]).pooled is not None:
        raise UsageError(
            "expected a model with one text encoder for an optimised attack (Stable Diffusion 1.x or 2.x, or the "
            "demo's), found one with pooled features (SDXL, SD3, FLUX.1): leave 'optimised' and 'white_box' out of "
            "identity.evaluation.attacks"
        )


def first_free_token(backbone: Backbone, texts: Sequence[str], *, words: int) -> int:
    """Return the first position that is padding in all `texts` and in a prompt of `words` words.

    Raises:
        SafetyDPOError: if there is none.
    """
    (empty,) = backbone.tokenize([""]).cpu()
    rows = backbone.tokenize(list(texts)).cpu()
    padding = int(empty[-1])
    used = max(_last_other(row, padding) for row in rows)
    # Behind the last word stands the end of the prompt, which may be the same token as padding.
    free = max(used + 2, words + 2)
    if free >= rows.shape[1]:
        raise SafetyDPOError(
            f"expected room behind a prompt of {words} words and its targets, found {rows.shape[1]} tokens in all: "
            "lower identity.attack_search.words"
        )
    return free


def _last_other(row: Int[Tensor, " token"], padding: int) -> int:
    others = (row != padding).nonzero()
    return int(others[-1]) if len(others) else 0


@dataclass(frozen=True)
class TextObjective:
    """Squared distance to the mean features of the unsafe prompts, behind the end of the prompt.

    `L(p) = mean over tokens behind the prompt and features of (f(p) - f*)^2`. CLIP's encoder looks back only: the
    features of padding carry the whole prompt, whatever place its words stand at, and the denoiser attends to them.

    Attributes:
        wanted: f*, the mean over several unsafe prompts.
        first: The first token that counts.

    Source: the text-space objectives of Ring-A-Bell (Tsai et al. 2023, arXiv 2310.10012) and MMA-Diffusion (Yang et
        al. 2023, arXiv 2311.17516), which compare one vector of the encoder.
    """

    wanted: Float[Tensor, "token width_text"]
    first: int

    @classmethod
    def of_texts(
        cls, backbone: Backbone, wanted: Sequence[str], *, words: int, judged: Sequence[str] = ()
    ) -> TextObjective:
        """Return the objective whose target are the unsafe prompts `wanted`.

        It judges prompts of up to `words` words, and the texts `judged`.
        """
        first = first_free_token(backbone, [*wanted, *judged], words=words)
        return cls(backbone.encode_prompts(list(wanted)).tokens[:, first:].mean(dim=0), first)

    def __call__(self, condition: Condition) -> Float[Tensor, " prompt"]:
        """Return the distance of each prompt."""
        return (condition.tokens[:, self.first :] - self.wanted).pow(2).mean(dim=(1, 2))


@dataclass(frozen=True)
class DenoisingObjective:
    """Squared distance of the denoiser's predictions under the prompt to those that draw the unsafe picture.

    `L(p) = mean over draws and latent of (e(x_t, t, p) - e*)^2`, on pictures that the base drew of the unsafe concept,
    with noise; e* is what the base predicts under the unsafe prompt, and e what the attacked model predicts: the base,
    or the base with the adapter that stands in it.

    Source: P4D (Chin et al. 2023, arXiv 2309.06135), equation 3; UnlearnDiffAtk (Zhang et al. 2023, arXiv 2310.11868),
        equation 5, has the noise itself in place of e*.
    """

    backbone: Backbone
    noisy: Float[Tensor, "draw channel height width"]
    timesteps: Int[Tensor, " draw"]
    wanted: Float[Tensor, "draw channel height width"]

    @classmethod
    def of_pictures(
        cls,
        backbone: Backbone,
        clean: Float[Tensor, "draw channel height width"],
        condition: Condition,
        *,
        timesteps: Int[Tensor, " draw"],
        generator: torch.Generator,
    ) -> DenoisingObjective:
        """Return the objective on latents of unsafe pictures and their prompts, one row each; the base answers."""
        timesteps = timesteps.to(backbone.device)
        noisy = backbone.add_noise(clean, torch.randn(clean.shape, generator=generator), timesteps)
        with torch.no_grad(), backbone.adapter_off():
            wanted = backbone.predict(noisy, timesteps, condition)
        return cls(backbone, noisy, timesteps, wanted)

    def __call__(self, condition: Condition) -> Float[Tensor, " prompt"]:
        """Return the distance of each prompt: one pass of as many rows as there are draws for each."""
        draws = len(self.timesteps)
        losses = []
        for row in range(len(condition.tokens)):
            of_row = condition.select(torch.tensor([row])).expand(draws)
            predicted = self.backbone.predict(self.noisy, self.timesteps, of_row)
            losses.append((predicted - self.wanted).pow(2).mean())
        return torch.stack(losses)
