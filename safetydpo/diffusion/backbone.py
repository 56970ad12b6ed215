"""The one interface through which every stage touches the frozen text-to-image model.

Axis legend: `batch` pictures, `token` prompt tokens, `width_text` text features, `channel height width`
latent axes, `image_height image_width` picture axes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from typing import Literal, Protocol

import torch
from jaxtyping import Float, Int, Real, UInt8
from torch import Tensor, nn

from safetydpo.artifacts.adapters import Denoiser, LoraLayer, LoraSignature

PredictionType = Literal["epsilon", "v_prediction", "flow"]
TargetKind = Literal["native", "epsilon"]
LoadedParts = Literal["all", "denoiser"]
GuidanceCallback = Callable[["GuidanceStep"], Tensor]


@dataclass(frozen=True)
class Condition:
    """What the network is told about the wanted picture; a family uses the fields it needs, the others are None."""

    tokens: Float[Tensor, "batch token width_text"]
    """Features of every prompt token."""
    pooled: Float[Tensor, "batch width_pooled"] | None = None
    """Features of the prompt as a whole (SDXL, SD3, FLUX)."""
    sizes: Float[Tensor, "batch 6"] | None = None
    """Size conditioning of SDXL in pixels: original height and width, crop top and left, target height and width.
    None = an uncropped picture of the size of the latents."""
    guidance: Float[Tensor, " batch"] | None = None
    """Guidance scale that a guidance-distilled network (FLUX.1 dev) is told; None = the family's default."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Condition:
        """Return the condition with `change` applied to every field that is there."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: change(value) for name, value in values.items() if value is not None})

    def select(self, index: Tensor) -> Condition:
        """Return the rows `index` as a new condition."""
        return self.map(lambda value: value[index])

    def followed_by(self, other: Condition) -> Condition:
        """Return the rows of this condition and then those of the other as one condition.

        Raises:
            ValueError: if one has a field that the other lacks.
        """
        joined = {}
        for field in fields(self):
            mine, others = getattr(self, field.name), getattr(other, field.name)
            if (mine is None) != (others is None):
                raise ValueError(
                    f"expected two conditions of one kind, found one with and one without {field.name}: "
                    "encode both with the same model"
                )
            if mine is not None:
                joined[field.name] = torch.cat([mine, others])
        return replace(self, **joined)

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
        return self.map(lambda value: value.expand(num_rows, *(-1,) * (value.ndim - 1)))


@dataclass(frozen=True)
class GuidanceStep:
    """All that a guidance callback may use at one sampling step; predictions are the network's native kind, float32."""

    index: int
    """Position among all steps, counted from 0 also when sampling starts later."""
    timestep: float
    """Training timestep; between two whole ones where a flow model's sampler steps there."""
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
    Every method takes tensors of any device and returns tensors on `device`. Timesteps are 0 (hardly any noise) ...
    num_train_timesteps - 1; training draws whole ones, flow models also take those in between.
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
    def denoiser(self) -> Denoiser:
        """Return the folder of the network that holds the adapter, and the first part of keys in adapter files."""
        ...

    @property
    def guidance_is_embedded(self) -> bool:
        """Return whether the network is told the guidance scale and so is sampled without an unguided branch."""
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
        """Return the padded token ids of prompts.

        With several text encoders: the ids of the first, then those of the next, each counted from where the
        vocabulary before it ends.
        """
        ...

    def token_embedding_table(self) -> Float[Tensor, "vocabulary width_embedding"]:
        """Return the input embedding of every token of the vocabulary.

        With several text encoders: their tables one below the other, filled up with zeros to the widest.
        """
        ...

    def token_texts(self) -> list[str]:
        """Return what every row of `token_embedding_table` stands for, as the tokenizers write it; empty if nothing."""
        ...

    def encode_prompt_embeddings(
        self,
        token_embeddings: Float[Tensor, "batch token width_embedding"],
        *,
        ids: Int[Tensor, "batch token"] | None = None,
    ) -> Condition:
        """Run all text encoders from given input embeddings, differentiably (token-gradient attacks).

        For `token_embedding_table()[ids]` with `ids = tokenize(texts)` the result equals `encode_prompts(texts)`,
        but for an empty text where a family has a condition of its own (SDXL).

        Args:
            token_embeddings: rows of `token_embedding_table`, or anything in their place.
            ids: where prompts end; families with pooled features need them.
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
        timesteps: Real[Tensor, " batch"],
    ) -> Float[Tensor, "batch channel height width"]:
        """Return the noisy latents that `predict` sees at these timesteps."""
        ...

    def velocity_weights(self, timesteps: Real[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return the factors that turn squared errors of the native target into those of the velocity."""
        ...

    def min_snr_weights(self, timesteps: Int[Tensor, " batch"], *, gamma: float) -> Float[Tensor, " batch"]:
        """Return the Min-SNR weights of squared errors of the native target, at whole timesteps."""
        ...

    def predict(
        self,
        latents: Float[Tensor, "batch channel height width"],
        timesteps: Real[Tensor, " batch"],
        condition: Condition,
    ) -> Float[Tensor, "batch channel height width"]:
        """Return the network's native prediction in its own dtype; differentiable in latents, tokens and adapter."""
        ...

    def target(
        self,
        latents: Float[Tensor, "batch channel height width"],
        noise: Float[Tensor, "batch channel height width"],
        timesteps: Real[Tensor, " batch"],
        *,
        kind: TargetKind = "native",
    ) -> Float[Tensor, "batch channel height width"]:
        """Return what `predict` is trained to return (`native`), or the noise itself (`epsilon`)."""
        ...

    def to_epsilon(
        self,
        prediction: Float[Tensor, "batch channel height width"],
        noisy: Float[Tensor, "batch channel height width"],
        timesteps: Real[Tensor, " batch"],
    ) -> Float[Tensor, "batch channel height width"]:
        """Return the noise that a native prediction at `noisy` implies."""
        ...

    def sampling_timesteps(self, steps: int, *, latent_shape: tuple[int, int, int] | None = None) -> Sequence[float]:
        """Return the training timestep of each of `steps` sampling steps, falling; whole ones but for flow models.

        `latent_shape` is needed by models whose steps depend on the size of the picture (FLUX.1 dev).
        """
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
        """Denoise latents with classifier-free guidance; no gradient. DPM-Solver++ multistep, or Euler for flow models.

        `empty` is the condition of the unguided branch (empty or negative prompt), one row or one per picture. Where
        `guidance_is_embedded`, `guidance_scale` is told to the network and `empty` is not used, unless the prompts
        carry a guidance of their own: then `guidance_scale` is that of classifier-free guidance as everywhere else.
        `callback` returns the prediction to use in place of `GuidanceStep.combined`. With `start_step` s > 0
        (SDEdit), `initial_latents` must be `add_noise(clean, noise, sampling_timesteps(steps)[s])`.
        """
        ...

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Keep few activations of the denoiser in passes with a gradient and compute the others again, or keep all."""
        ...

    def compiled(self) -> AbstractContextManager[None]:
        """Run the denoiser's passes compiled inside this context: the first of each shape takes a minute or more."""
        ...

    def compiled_for_training(self) -> AbstractContextManager[None]:
        """Run the denoiser's passes compiled inside this context, those of `as_reference` by the policy's own code.

        Predictions of both are then equal to the last bit while the adapter changes nothing.
        """
        ...

    def as_reference(self) -> AbstractContextManager[None]:
        """Predict with the base alone inside this context, as the reference of a loss; detach what comes of it."""
        ...

    def compute_adapter_in(self, compute: Literal["float32", "base"]) -> None:
        """Say in which type the adapter is computed from now on: float32, or that of the base."""
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

    def adapter_fused(self) -> AbstractContextManager[None]:
        """Compute with the adapter in the base's weights inside this context (float32 only), and restore them after."""
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
