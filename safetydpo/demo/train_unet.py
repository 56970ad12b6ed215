"""Train the U-Net of the demo world on cached latents and cached caption features.

Epsilon prediction with Stable Diffusion's noise schedule, min-SNR weights, 10 % empty captions for guidance, and
an exponential moving average, which is what is saved.

Axis legend: n = pictures, c = latent channels, u = v = 8 latent pixels, t = tokens, d = text features.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, DDPMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from diffusers import UNet2DConditionModel as UNet
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import CLIPTextModel

from safetydpo.artifacts.layout import demo_weights
from safetydpo.demo.concepts import BACKGROUNDS, CONCEPTS, NUM_NAMES
from safetydpo.demo.drawings import draw_many, every_drawing
from safetydpo.demo.prompts import ALL_TEMPLATES, write_all_captions
from safetydpo.demo.tokenizer import MAX_TOKENS, load_tokenizer
from safetydpo.demo.train_vae import LATENT_CHANNELS, encode_all
from safetydpo.demo.training import (
    BUILD_SEED,
    TRAIN_DRAW_SEEDS,
    MovingAverage,
    Progress,
    count_parameters,
    load_checkpoint,
    record_measurement,
    save_checkpoint,
    save_half,
    scheduled_rate,
    set_rate,
)
from safetydpo.seeding import derive_numpy, derive_seed, derive_torch

STAGE = "demo/unet"
BATCH_SIZE = 64
NUM_STEPS = 2600
PEAK_RATE = 1.2e-3
AVERAGE_DECAY = 0.998
EMPTY_CAPTION_RATE = 0.1
SNR_LIMIT = 5.0
"""Loss weight min(snr, limit) / snr (Hang et al. 2023, arXiv 2303.09556, equation 9)."""
CHECKPOINT_EVERY = 300
LATENT_SIZE = 8
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
}


def make_unet() -> UNet:
    """Build the untrained U-Net with its fixed initial weights."""
    torch.manual_seed(derive_seed(BUILD_SEED, STAGE, "init") % 2**32)
    return UNet(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(96, 160),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=32,
    )


@dataclass(frozen=True)
class UNetData:
    """Latents of every training drawing and features of every caption, by (concept, background) kind."""

    latents: Float[Tensor, "n c u v"]
    captions: Float[Tensor, "caption t d"]
    empty: Float[Tensor, "t d"]
    num_kinds: int
    captions_per_kind: int


@torch.no_grad()
def load_data() -> UNetData:
    """Encode drawings and captions once with the trained autoencoder and text tower."""
    base = demo_weights() / "base"
    vae = AutoencoderTiny.from_pretrained(str(base / "vae"), torch_dtype=torch.float32).eval()
    tower = CLIPTextModel.from_pretrained(str(base / "text_encoder"), torch_dtype=torch.float32).eval()
    tokenizer = load_tokenizer(base / "tokenizer")

    def features(texts: list[str]) -> Tensor:
        tokens = tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
        return torch.cat([tower(input_ids=chunk)[0].half() for chunk in tokens.input_ids.split(512)])

    return UNetData(
        latents=encode_all(vae, torch.from_numpy(draw_many(every_drawing(CONCEPTS, TRAIN_DRAW_SEEDS)))),
        captions=features(write_all_captions()),
        empty=features([""])[0].float(),
        num_kinds=len(CONCEPTS) * len(BACKGROUNDS),
        captions_per_kind=NUM_NAMES * len(ALL_TEMPLATES),
    )


def signal_to_noise(scheduler: DDPMScheduler) -> Float[Tensor, " step"]:
    """Compute snr(t) = alpha_bar(t) / (1 - alpha_bar(t))."""
    return scheduler.alphas_cumprod / (1.0 - scheduler.alphas_cumprod)


def make_batch(data: UNetData, step: int) -> tuple[Tensor, Tensor, Tensor, Int[Tensor, " n"]]:
    """Draw a step's clean latents, caption features, noise and timesteps; they depend on the step only."""
    generator = derive_numpy(BUILD_SEED, STAGE, f"batch/{step}")
    kinds = generator.integers(data.num_kinds, size=BATCH_SIZE)
    drawn = generator.integers(len(TRAIN_DRAW_SEEDS), size=BATCH_SIZE) * data.num_kinds + kinds
    said = generator.integers(data.captions_per_kind, size=BATCH_SIZE) + kinds * data.captions_per_kind
    timesteps = torch.from_numpy(generator.integers(1000, size=BATCH_SIZE))
    captions = data.captions[torch.from_numpy(said)].float()
    captions[torch.from_numpy(generator.random(BATCH_SIZE) < EMPTY_CAPTION_RATE)] = data.empty
    latents = data.latents[torch.from_numpy(drawn)]
    noise = torch.randn(latents.shape, generator=derive_torch(BUILD_SEED, STAGE, f"noise/{step}"))
    return latents, captions, noise, timesteps


def train_unet(unet: UNet, average: MovingAverage, folder: Path) -> None:
    """Train, going on from the last checkpoint."""
    data = load_data()
    scheduler = DDPMScheduler(**SCHEDULE)
    snr = signal_to_noise(scheduler)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=PEAK_RATE, weight_decay=1e-2, fused=True)
    progress = Progress(STAGE, NUM_STEPS)
    for step in range(load_checkpoint(folder, module=unet, optimizer=optimizer, average=average), NUM_STEPS):
        set_rate(optimizer, scheduled_rate(step, num_steps=NUM_STEPS, num_warmup_steps=100, peak=PEAK_RATE))
        latents, captions, noise, timesteps = make_batch(data, step)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        predicted = unet(noisy, timesteps, captions).sample
        weights = snr[timesteps].clamp(max=SNR_LIMIT) / snr[timesteps]
        loss = ((predicted - noise).square().mean(dim=(1, 2, 3)) * weights).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        average.update(unet)
        progress.add(step, loss.item())
        if (step + 1) % CHECKPOINT_EVERY == 0:
            save_checkpoint(folder, step + 1, module=unet, optimizer=optimizer, average=average)


def save_pipeline(unet: UNet, folder: Path) -> None:
    """Write U-Net, scheduler and `model_index.json` beside the other parts, all in fp16."""
    base = demo_weights() / "base"
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderTiny.from_pretrained(str(base / "vae")),
        text_encoder=CLIPTextModel.from_pretrained(str(base / "text_encoder")),
        tokenizer=load_tokenizer(base / "tokenizer"),
        unet=unet,
        scheduler=DPMSolverMultistepScheduler(
            **SCHEDULE, steps_offset=1, algorithm_type="dpmsolver++", timestep_spacing="trailing"
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.scheduler.save_pretrained(str(folder / "scheduler"))
    pipeline.save_config(str(folder))
    save_half(unet, folder / "unet")


def build_unet(work: Path) -> None:
    """Train the U-Net and write `base/unet`, `base/scheduler` and `base/model_index.json`."""
    started = time.monotonic()
    unet = make_unet()
    average = MovingAverage(unet, decay=AVERAGE_DECAY)
    train_unet(unet, average, work / "unet")
    average.copy_to(unet)
    save_pipeline(unet, demo_weights() / "base")
    record_measurement(
        "unet",
        {
            "num_parameters": count_parameters(unet.parameters()),
            "num_steps": NUM_STEPS,
            "build_seconds": round(time.monotonic() - started),
        },
    )
