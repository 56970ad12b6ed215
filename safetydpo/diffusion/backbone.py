"""The one interface through which every stage touches the frozen text-to-image model.

Axis legend: `batch` pictures, `token` prompt tokens, `width_text` text features, `channel height width`
latent axes, `image_height image_width` picture axes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from safetydpo.artifacts.adapters import LoraLayer, LoraSignature

PredictionType = Literal["epsilon", "v_prediction", "flow"]
TargetKind = Literal["native", "epsilon"]
GuidanceCallback = Callable[["GuidanceStep"], Tensor]


@dataclass(frozen=True)
class Condition:
    """What the network is told about the wanted picture: per-token features and, for some families, more."""

    tokens: Float[Tensor, "batch token width_text"]
    pooled: Float[Tensor, "batch width_pooled"] | None = None

    def select(self, index: Tensor) -> Condition:
        """Return the rows `index` as a new condition."""
        return Condition(self.tokens[index], None if self.pooled is None else self.pooled[index])

    def followed_by(self, other: Condition) -> Condition:
        """Return the rows of this condition and then those of the other as one condition."""
        if (self.pooled is None) != (other.pooled is None):
            raise ValueError("expected two conditions of one model family, found one with and one without pooled")
        pooled = None if self.pooled is None or other.pooled is None else torch.cat([self.pooled, other.pooled])
        return Condition(torch.cat([self.tokens, other.tokens]), pooled)

    def expand(self, num_rows: int) -> Condition:
        """Return this condition of one row repeated `num_rows` times; one of `num_rows` rows stays as it is.

        Raises:
            ValueError: if the number of rows is neither 1 nor `num_rows`.
        """
        found = self.tokens.shape[0]
        if found == num_rows:
            return self
        if found != 1:
            raise ValueError(f"expected a condition of 1 or {num_rows} rows, found {found}: one row per picture")
        pooled = None if self.pooled is None else self.pooled.expand(num_rows, -1)
        return Condition(self.tokens.expand(num_rows, -1, -1), pooled)


@dataclass(frozen=True)
class GuidanceStep:
    """All that a guidance callback may use at one sampling step; predictions are the network's native kind, float32."""

    index: int
    """Position among all steps, counted from 0 also when sampling starts later."""
    timestep: int
    latents: Float[Tensor, "batch channel height width"]
    predicted_empty: Float[Tensor, "batch channel height width"]
    predicted_prompt: Float[Tensor, "batch channel height width"]
    guidance_scale: float
    predict: Callable[[Condition], Tensor]
    """Predict at these latents and this timestep under another condition (float32)."""

    @property
    def combined(self) -> Float[Tensor, "batch channel height width"]:
        """Classifier-free guidance: empty + scale (prompt - empty); what is used when there is no callback.

        Source: Ho and Salimans 2022 (arXiv 2207.12598), equation 6 with w + 1 = scale.
        """
        if self.guidance_scale == 1.0:
            return self.predicted_prompt
        return self.predicted_empty + self.guidance_scale * (self.predicted_prompt - self.predicted_empty)


class Backbone(Protocol):
    """A frozen text-to-image model with at most one LoRA adapter swapped in place.

    Pictures are uint8, red green blue, height x width x 3. Latents are scaled to about unit variance.
    Every method takes tensors of any device and returns tensors on `device`.
    """

    @property
    def fingerprint(self) -> str:
        """Return the sha256 of the model's files."""
        ...

    @property
    def prediction_type(self) -> PredictionType:
        """Return what `predict` returns: noise, v or flow velocity."""
        ...

    @property
    def num_train_timesteps(self) -> int:
        """Return the number of training timesteps; timesteps are 0 ... this - 1."""
        ...

    @property
    def device(self) -> torch.device:
        """Return where the networks stand."""
        ...

    @property
    def network(self) -> nn.Module:
        """Return the denoiser that holds the adapter: what a distributed trainer wraps."""
        ...

    def latent_shape(self, *, height: int, width: int) -> tuple[int, int, int]:
        """Return (channel, height, width) of the latents of a picture of that size in pixels."""
        ...

    def encode_prompts(self, texts: Sequence[str]) -> Condition:
        """Encode prompts, each padded to the model's full token length; over-long ones are cut and logged."""
        ...

    def tokenize(self, texts: Sequence[str]) -> Int[Tensor, "batch token"]:
        """Return the padded token ids of prompts."""
        ...

    def token_embedding_table(self) -> Float[Tensor, "vocabulary width_text"]:
        """Return the input embedding of every token of the vocabulary."""
        ...

    def encode_prompt_embeddings(self, token_embeddings: Float[Tensor, "batch token width_text"]) -> Condition:
        """Run the text tower from given input embeddings, differentiably (token-gradient attacks).

        For `token_embedding_table()[tokenize(texts)]` the result equals `encode_prompts(texts)`.
        """
        ...

    def encode_images(
        self, images: UInt8[Tensor, "batch image_height image_width 3"]
    ) -> Float[Tensor, "batch channel height width"]:
        """Return the latents of pictures: the mean of the posterior times the scaling factor, float32."""
        ...

    def encode_image_moments(
        self, images: UInt8[Tensor, "batch image_height image_width 3"]
    ) -> tuple[Float[Tensor, "batch channel height width"], Float[Tensor, "batch channel height width"]]:
        """Return mean and standard deviation of the posterior of the latents; the mean is what `encode_images` gives.

        Raises:
            UsageError: if the autoencoder has no posterior.
        """
        ...

    def decode(
        self, latents: Float[Tensor, "batch channel height width"]
    ) -> UInt8[Tensor, "batch image_height image_width 3"]:
        """Return the pictures of latents, rounded as diffusers does."""
        ...

    def add_noise(
        self,
        latents: Float[Tensor, "batch channel height width"],
        noise: Float[Tensor, "batch channel height width"],
        timesteps: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch channel height width"]:
        """Return the noisy latents that `predict` sees at these timesteps."""
        ...

    def velocity_weights(self, timesteps: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return the factors that turn squared errors of the native target into those of the velocity."""
        ...

    def predict(
        self,
        latents: Float[Tensor, "batch channel height width"],
        timesteps: Int[Tensor, " batch"],
        condition: Condition,
    ) -> Float[Tensor, "batch channel height width"]:
        """Return the network's native prediction in its own dtype; differentiable in latents, tokens and adapter."""
        ...

    def target(
        self,
        latents: Float[Tensor, "batch channel height width"],
        noise: Float[Tensor, "batch channel height width"],
        timesteps: Int[Tensor, " batch"],
        *,
        kind: TargetKind = "native",
    ) -> Float[Tensor, "batch channel height width"]:
        """Return what `predict` is trained to return (`native`), or the noise itself (`epsilon`)."""
        ...

    def to_epsilon(
        self,
        prediction: Float[Tensor, "batch channel height width"],
        noisy: Float[Tensor, "batch channel height width"],
        timesteps: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch channel height width"]:
        """Return the noise that a native prediction at `noisy` implies."""
        ...

    def sampling_timesteps(self, steps: int) -> list[int]:
        """Return the training timestep of each of `steps` sampling steps, falling."""
        ...

    def sample(
        self,
        initial_latents: Float[Tensor, "batch channel height width"],
        prompts: Condition,
        *,
        empty: Condition,
        steps: int,
        guidance_scale: float,
        callback: GuidanceCallback | None = None,
        start_step: int = 0,
    ) -> Float[Tensor, "batch channel height width"]:
        """Denoise latents with DPM-Solver++ multistep and classifier-free guidance; no gradient.

        `empty` is the condition of the unguided branch (empty or negative prompt), one row or one per picture.
        `callback` returns the prediction to use in place of `GuidanceStep.combined`. With `start_step` s > 0
        (SDEdit), `initial_latents` must be `add_noise(clean, noise, sampling_timesteps(steps)[s])`.
        """
        ...

    def install_adapter(self, signature: LoraSignature) -> None:
        """Put the adapter slot in, with all tensors zero; draw start values with `adapter.initial_adapter`."""
        ...

    def load_adapter(self, layers: Mapping[str, LoraLayer], *, scale: float = 1.0) -> None:
        """Overwrite the slot: the network computes base + scale * up @ down; missing targets get zeros."""
        ...

    def swap_adapter(self, signature: LoraSignature, layers: Mapping[str, LoraLayer]) -> None:
        """Install and load in one step; a slot of this signature that stands there is kept and overwritten."""
        ...

    def export_adapter(self) -> dict[str, LoraLayer]:
        """Return copies of the slot's layers (CPU, float32) with every scale folded into `up`."""
        ...

    def adapter_parameters(self) -> list[tuple[str, Tensor]]:
        """Return the slot's trainable tensors with names, in a fixed order."""
        ...

    def adapter_off(self) -> AbstractContextManager[None]:
        """Compute with the base alone inside this context: the reference of DPO."""
        ...

    def remove_adapter(self) -> None:
        """Take the slot out; the network is the base again, bit for bit."""
        ...

    def layer_inputs(self, modules: Sequence[str]) -> AbstractContextManager[Mapping[str, list[Tensor]]]:
        """Record the first input of the named denoiser modules at every call inside this context (detached)."""
        ...

    def layer_weight(self, module: str) -> Tensor:
        """Return the live base weight (d_out, d_in) of a linear layer, for closed-form edits in place."""
        ...

    def named_linear_layers(self, suffixes: Sequence[str]) -> Iterator[tuple[str, tuple[int, int]]]:
        """Yield (module name, (d_in, d_out)) of the denoiser's linear layers whose name ends in a suffix."""
        ...
