"""Diffusion-DPO steps as two public trainers write them, in plain diffusers, transformers and peft.

- `public`: the released SafetyDPO trainer: a second, full U-Net as reference.
- `script`: diffusers' own Diffusion-DPO example: the reference is the same U-Net with the adapter off.

Both run the autoencoder on both pictures and the text encoder on the captions in every step, as both sources do, and
reduce errors in float32. `autocast` is bfloat16 or nothing, as ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig as PeftLoraConfig
from torch import Tensor, nn

PublicWay = Literal["public", "script"]
PUBLIC_WAYS: tuple[PublicWay, ...] = get_args(PublicWay)


@dataclass(frozen=True)
class PublicNetworks:
    """What a public trainer keeps in memory."""

    unet: UNet2DConditionModel
    vae: nn.Module
    text_encoder: nn.Module
    scheduler: DDPMScheduler
    reference: UNet2DConditionModel | None
    """None: the U-Net with its adapter off."""

    def frozen(self) -> Iterator[nn.Module]:
        """Yield every network."""
        yield from (self.unet, self.vae, self.text_encoder)
        if self.reference is not None:
            yield self.reference


def load_public(
    folder: Path, kind: PublicWay, *, dtype: torch.dtype, device: str = "cpu"
) -> tuple[PublicNetworks, Any]:
    """Load a folder in diffusers format; return networks and tokenizer."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    reference = UNet2DConditionModel.from_pretrained(folder, subfolder="unet") if kind == "public" else None
    networks = PublicNetworks(
        pipe.unet, pipe.vae, pipe.text_encoder, DDPMScheduler.from_config(pipe.scheduler.config), reference
    )
    # Weights stored in float16 are not all cast on loading.
    for network in networks.frozen():
        network.to(device, dtype)
    return networks, pipe.tokenizer


def add_lora(networks: PublicNetworks, *, rank: int, targets: Sequence[str]) -> list[nn.Parameter]:
    """Freeze everything, add a float32 adapter to the U-Net, and return its parameters."""
    for network in networks.frozen():
        network.requires_grad_(False)
    networks.unet.add_adapter(
        PeftLoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(targets))
    )
    trainable = [parameter for parameter in networks.unet.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.data = parameter.data.float()
    return trainable


def public_loss(networks: PublicNetworks, pixels: Tensor, tokens: Tensor, *, beta: float, dtype: torch.dtype) -> Tensor:
    """Return the loss of a batch: `pixels` holds the safe pictures and then the unsafe ones, in [-1, 1]."""
    device = pixels.device
    with _autocast(dtype, device):
        pairs = tokens.shape[0]
        with torch.no_grad():
            encoded = networks.vae.encode(pixels.to(dtype))
            latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.sample()
            latents = latents * networks.vae.config.scaling_factor
            features = networks.text_encoder(tokens)[0].repeat(2, 1, 1)
        noise = torch.randn_like(latents[:pairs]).repeat(2, 1, 1, 1)
        timesteps = torch.randint(networks.scheduler.config.num_train_timesteps, (pairs,), device=device).repeat(2)
        noisy = networks.scheduler.add_noise(latents, noise, timesteps)
        predicted = networks.unet(noisy, timesteps, features).sample
        with torch.no_grad(), _adapter_off(networks) as reference:
            predicted_reference = reference(noisy, timesteps, features).sample
    errors = F.mse_loss(predicted.float(), noise.float(), reduction="none").mean(dim=(1, 2, 3))
    reference_errors = F.mse_loss(predicted_reference.float(), noise.float(), reduction="none").mean(dim=(1, 2, 3))
    policy_safe, policy_unsafe = errors.chunk(2)
    reference_safe, reference_unsafe = reference_errors.chunk(2)
    inside = -0.5 * beta * ((policy_safe - policy_unsafe) - (reference_safe - reference_unsafe))
    return -F.logsigmoid(inside).mean()


def public_step(
    folder: Path,
    kind: PublicWay,
    pairs: tuple[Tensor, Tensor, list[str]],
    *,
    rank: int,
    targets: Sequence[str],
    pairs_per_step: int,
    beta: float,
    learning_rate: float,
    max_grad_norm: float,
    dtype: torch.dtype,
    device: str = "cpu",
) -> Callable[[], None]:
    """Return one training step; `pairs` are safe and unsafe uint8 pictures (pair, height, width, 3) and captions."""
    networks, tokenizer = load_public(folder, kind, dtype=dtype, device=device)
    trainable = add_lora(networks, rank=rank, targets=targets)
    optimizer = torch.optim.AdamW(trainable, lr=learning_rate)
    safe, unsafe, captions = pairs

    def step() -> None:
        rows = torch.randperm(len(captions))[:pairs_per_step]
        pixels = torch.cat([safe[rows], unsafe[rows]]).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        tokens = tokenizer(
            [captions[row] for row in rows.tolist()],
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids.to(device)
        loss = public_loss(networks, pixels, tokens, beta=beta, dtype=dtype)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(trainable, max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _autocast(dtype: torch.dtype, device: torch.device) -> Any:
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


@contextmanager
def _adapter_off(networks: PublicNetworks) -> Iterator[UNet2DConditionModel]:
    if networks.reference is not None:
        yield networks.reference
        return
    networks.unet.disable_adapters()
    try:
        yield networks.unet
    finally:
        networks.unet.enable_adapters()
