"""Train the autoencoder of the demo world: 32 x 32 pictures to 16 channels of 8 x 8 and back.

Stable Diffusion pipelines know one scalar `scaling_factor`, so the latents get unit variance per channel by training:
after the first phase the per-channel affine is folded into the encoder's last layer, and the decoder is trained on
with the encoder frozen.

Axis legend: n = pictures, c = latent channels, h = w = 32 pixels, u = v = 8 latent pixels.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from diffusers import AutoencoderTiny
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional

from safetydpo.artifacts.layout import demo_weights
from safetydpo.demo.concepts import CONCEPTS
from safetydpo.demo.drawings import draw_many, every_drawing
from safetydpo.demo.training import (
    BUILD_SEED,
    HELD_OUT_DRAW_SEEDS,
    TRAIN_DRAW_SEEDS,
    Progress,
    count_parameters,
    draw_batch,
    load_checkpoint,
    record_measurement,
    save_checkpoint,
    save_half,
    scheduled_rate,
    set_rate,
)
from safetydpo.errors import SafetyDPOError
from safetydpo.seeding import derive_seed, derive_torch

LATENT_CHANNELS = 16
BATCH_SIZE = 32
NUM_JOINT_STEPS = 2400
NUM_DECODER_STEPS = 900
JOINT_RATE = 2e-3
DECODER_RATE = 8e-4
LATENT_NOISE = 0.1
"""Standard deviation of the noise on latents in the second phase: the decoder must forgive a U-Net's small errors."""
CHECKPOINT_EVERY = 300
MAX_SQUARED_ERROR = 0.012
"""On [-1, 1], over held-out drawings: what this part must reach."""


def make_vae() -> AutoencoderTiny:
    """Build the untrained autoencoder with its fixed initial weights."""
    torch.manual_seed(derive_seed(BUILD_SEED, "demo/vae", "init") % 2**32)
    return AutoencoderTiny(
        encoder_block_out_channels=(32, 32, 32),
        decoder_block_out_channels=(32, 32, 32),
        num_encoder_blocks=(1, 1, 2),
        num_decoder_blocks=(2, 1, 1),
        latent_channels=LATENT_CHANNELS,
        scaling_factor=1.0,
    )


def to_unit_range(pictures: UInt8[Tensor, "n h w 3"]) -> Float[Tensor, "n 3 h w"]:
    """Turn bytes into the [-1, 1] floats that the autoencoder takes."""
    return pictures.permute(0, 3, 1, 2).float().div(127.5).sub(1.0)


def to_bytes(pictures: Float[Tensor, "n 3 h w"]) -> UInt8[Tensor, "n h w 3"]:
    """Turn [-1, 1] floats into bytes, rounding to the nearest."""
    return pictures.clamp(-1, 1).add(1.0).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


@torch.no_grad()
def encode_all(vae: AutoencoderTiny, pictures: UInt8[Tensor, "n h w 3"]) -> Float[Tensor, "n c u v"]:
    """Encode pictures in chunks."""
    return torch.cat([vae.encode(to_unit_range(chunk)).latents for chunk in pictures.split(256)])


@torch.no_grad()
def decode_all(vae: AutoencoderTiny, latents: Float[Tensor, "n c u v"]) -> UInt8[Tensor, "n h w 3"]:
    """Decode latents in chunks."""
    return torch.cat([to_bytes(vae.decode(chunk).sample) for chunk in latents.split(256)])


@torch.no_grad()
def fold_affine(layer: nn.Conv2d, mean: Float[Tensor, " c"], deviation: Float[Tensor, " c"]) -> None:
    """Make a convolution's outputs have zero mean and unit variance.

    W <- W / deviation, b <- (b - mean) / deviation, per output channel.

    Raises:
        SafetyDPOError: The layer has no bias.
    """
    if layer.bias is None:
        raise SafetyDPOError("expected the encoder's last layer to have a bias, found none. Build it with bias=True.")
    layer.weight.div_(deviation[:, None, None, None])
    layer.bias.sub_(mean).div_(deviation)


def train_joint(vae: AutoencoderTiny, pictures: UInt8[Tensor, "n h w 3"], folder: Path) -> None:
    """Train encoder and decoder together on the squared error."""
    stage = "demo/vae/joint"
    optimizer = torch.optim.AdamW(vae.parameters(), lr=JOINT_RATE, weight_decay=1e-4)
    first = load_checkpoint(folder, module=vae, optimizer=optimizer, average=None)
    progress = Progress(stage, NUM_JOINT_STEPS)
    for step in range(first, NUM_JOINT_STEPS):
        set_rate(optimizer, scheduled_rate(step, num_steps=NUM_JOINT_STEPS, num_warmup_steps=100, peak=JOINT_RATE))
        rows = draw_batch(stage, step, num_rows=len(pictures), batch_size=BATCH_SIZE)
        target = to_unit_range(pictures[rows]).contiguous(memory_format=torch.channels_last)
        loss = functional.mse_loss(vae.decode(vae.encode(target).latents).sample, target)
        _step(optimizer, loss, vae)
        progress.add(step, loss.item())
        if (step + 1) % CHECKPOINT_EVERY == 0:
            save_checkpoint(folder, step + 1, module=vae, optimizer=optimizer, average=None)


def train_decoder(vae: AutoencoderTiny, pictures: UInt8[Tensor, "n h w 3"], folder: Path) -> None:
    """Train the decoder on frozen, noised unit-variance latents."""
    stage = "demo/vae/decoder"
    latents = encode_all(vae, pictures)
    optimizer = torch.optim.AdamW(vae.decoder.parameters(), lr=DECODER_RATE, weight_decay=1e-4)
    first = load_checkpoint(folder, module=vae, optimizer=optimizer, average=None)
    progress = Progress(stage, NUM_DECODER_STEPS)
    for step in range(first, NUM_DECODER_STEPS):
        set_rate(optimizer, scheduled_rate(step, num_steps=NUM_DECODER_STEPS, num_warmup_steps=50, peak=DECODER_RATE))
        rows = draw_batch(stage, step, num_rows=len(pictures), batch_size=BATCH_SIZE)
        noise = torch.randn(latents[rows].shape, generator=derive_torch(BUILD_SEED, stage, f"noise/{step}"))
        noisy = (latents[rows] + LATENT_NOISE * noise).contiguous(memory_format=torch.channels_last)
        loss = functional.mse_loss(vae.decode(noisy).sample, to_unit_range(pictures[rows]))
        _step(optimizer, loss, vae)
        progress.add(step, loss.item())
        if (step + 1) % CHECKPOINT_EVERY == 0:
            save_checkpoint(folder, step + 1, module=vae, optimizer=optimizer, average=None)


def _step(optimizer: torch.optim.Optimizer, loss: Tensor, vae: AutoencoderTiny) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
    optimizer.step()


def measure_vae(vae: AutoencoderTiny, pictures: UInt8[Tensor, "n h w 3"]) -> dict[str, float]:
    """Measure the reconstruction error on [-1, 1] and the latents' moments per channel."""
    latents = encode_all(vae, pictures)
    restored = decode_all(vae, latents)
    deviation = latents.std(dim=(0, 2, 3))
    return {
        "squared_error": functional.mse_loss(to_unit_range(restored), to_unit_range(pictures)).item(),
        "latent_deviation_low": deviation.min().item(),
        "latent_deviation_high": deviation.max().item(),
        "latent_mean_high": latents.mean(dim=(0, 2, 3)).abs().max().item(),
        "num_pictures": len(pictures),
    }


def build_vae(work: Path) -> None:
    """Train the autoencoder, check it on held-out drawings and write `base/vae`.

    Raises:
        SafetyDPOError: The held-out error is too large.
    """
    started = time.monotonic()
    pictures = torch.from_numpy(draw_many(every_drawing(CONCEPTS, TRAIN_DRAW_SEEDS)))
    vae = make_vae().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    train_joint(vae, pictures, work / "vae-joint")
    latents = encode_all(vae, pictures)
    fold_affine(vae.encoder.layers[-1], latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3)))
    train_decoder(vae, pictures, work / "vae-decoder")
    save_half(vae, demo_weights() / "base" / "vae")
    saved = load_vae()
    held_out = torch.from_numpy(draw_many(every_drawing(CONCEPTS, HELD_OUT_DRAW_SEEDS[:1])))
    measured = measure_vae(saved, held_out)
    measured["num_parameters"] = count_parameters(saved.parameters())
    measured["build_seconds"] = round(time.monotonic() - started)
    record_measurement("vae", measured)
    if measured["squared_error"] > MAX_SQUARED_ERROR:
        raise SafetyDPOError(
            f"expected the autoencoder's squared error at most {MAX_SQUARED_ERROR}, "
            f"found {measured['squared_error']:.4f}. Train longer: raise NUM_JOINT_STEPS in demo/train_vae.py."
        )


def load_vae() -> AutoencoderTiny:
    """Load the trained autoencoder in fp32, frozen.

    Raises:
        SafetyDPOError: It has not been built.
    """
    folder = demo_weights() / "base" / "vae"
    if not folder.is_dir():
        raise SafetyDPOError(f"expected the demo autoencoder in {folder}, found nothing. Run the build's part 'vae'.")
    vae = AutoencoderTiny.from_pretrained(str(folder), torch_dtype=torch.float32)
    return vae.eval().requires_grad_(False)
