"""Peak memory of one training step of SD1.5 in full size, each way in a process of its own.

`python -m benchmarks.train_memory public` measures one way and prints its bytes; `measure_memory` runs all of them.
`live` is the product itself: it loads a model of random weights from files, without the networks that training does not
need, and takes a step as `train_expert` does. `--small` measures a model of a quarter of the channels, which shows that
all of it works and says nothing of SD1.5.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler

from benchmarks.public_trainers import PublicNetworks, add_lora, public_loss
from benchmarks.sd15_models import (
    SMALL_PICTURE,
    TOKENS,
    build_small_sd15,
    sd15_text_encoder,
    sd15_unet,
    sd15_vae,
    small_text_encoder,
    small_unet,
    small_vae,
)
from benchmarks.train_ways import LORA, OurTraining
from benchmarks.true_sizes import build_sd15
from safetydpo.artifacts.schemas import caption_sha256
from safetydpo.config.schema import BaseModelConfig
from safetydpo.diffusion.build import load_backbone
from safetydpo.dpo.batch import PreferenceData, PreferenceRow
from tests.tiny import build_tokenizer

BETA = 5000.0
WAYS = ("public", "live", "public checkpointed", "live checkpointed")


@dataclass(frozen=True)
class Size:
    """A model to be measured."""

    picture: int
    width: int
    """Of the text features."""
    networks: Callable[[], tuple[Any, Any, Any]]
    """Makes U-Net, autoencoder and text encoder."""
    write: Callable[[Path], None]
    """Writes the whole model in diffusers format."""


def _small_tokenizer() -> Any:
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = TOKENS
    return tokenizer


FULL = Size(
    512,
    768,
    lambda: (sd15_unet(), sd15_vae(), sd15_text_encoder()),
    partial(build_sd15, dtype=torch.float32, device="cpu"),
)
SMALL = Size(
    SMALL_PICTURE,
    64,
    lambda: (small_unet(), small_vae(), small_text_encoder(_small_tokenizer())),
    lambda folder: build_small_sd15(folder, _small_tokenizer()),
)


def public_peak(size: Size, *, checkpointing: bool) -> None:
    """Take one step as the released trainer does: two U-Nets, autoencoder, text encoder."""
    unet, vae, text_encoder = size.networks()
    networks = PublicNetworks(
        unet,
        vae,
        text_encoder,
        DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        type(unet).from_config(unet.config),
    )
    trainable = add_lora(networks, rank=LORA.rank, targets=LORA.targets)
    if checkpointing:
        networks.unet.enable_gradient_checkpointing()
        networks.unet.train()
    pixels = torch.rand(2, 3, size.picture, size.picture) * 2 - 1
    tokens = torch.randint(text_encoder.config.vocab_size, (1, TOKENS))
    optimizer = torch.optim.AdamW(trainable, lr=1e-5)
    torch.autograd.backward(public_loss(networks, pixels, tokens, beta=BETA, dtype=torch.float32))
    torch.nn.utils.clip_grad_norm_(trainable, 1.0)
    optimizer.step()


def our_peak(size: Size, folder: Path, *, checkpointing: bool) -> None:
    """Take one step of ours with the model in `folder`, on a stored pair."""
    backbone = load_backbone(BaseModelConfig(model=str(folder)), parts="denoiser")
    OurTraining(backbone, one_pair(size), pairs_per_step=1, activation_checkpointing=checkpointing).step()


def one_pair(size: Size) -> PreferenceData:
    """Return a preference of random latents and text features, as the store holds them."""
    generator = np.random.default_rng(0)
    shape = (4, size.picture // 8, size.picture // 8)
    captions = {caption_sha256(text): generator.normal(size=(TOKENS, size.width)) for text in ("", "a caption")}
    caption = caption_sha256("a caption")
    return PreferenceData.from_tables(
        [PreferenceRow("pair", "safe", "unsafe", caption, caption)],
        latents={side: generator.normal(size=shape).astype(np.float16) for side in ("safe", "unsafe")},
        embeddings={sha: features.astype(np.float32) for sha, features in captions.items()},
        latent_shape=shape,
    )


def measure_memory(*, small: bool = False) -> tuple[dict[str, float], dict[str, Any]]:
    """Return ratios of the peaks, with and without activation checkpointing on both sides."""
    gigabytes: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        # In a process too: what it holds is gone before anything is measured.
        command = [sys.executable, "-m", "benchmarks.train_memory", *(["--small"] if small else []), "--folder", folder]
        subprocess.run([*command, "write"], capture_output=True, check=True)
        for way in WAYS:
            done = subprocess.run([*command, way], capture_output=True, text=True, check=True)
            gigabytes[way] = json.loads(done.stdout.strip().splitlines()[-1]) / 1e9
            print(f"{way}: {gigabytes[way]:.2f} GB above the imports", flush=True)
    ratios = {
        "peak_memory_vs_public": gigabytes["live"] / gigabytes["public"],
        "peak_memory_vs_public_checkpointed": gigabytes["live checkpointed"] / gigabytes["public checkpointed"],
    }
    return ratios, {"gigabytes": gigabytes, "small": small}


def _resident_bytes() -> int:
    # Linux counts in kibibytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Measure the way named by the argument, or write the model that `live` loads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=("write", *WAYS))
    parser.add_argument("--folder", type=Path, help="where the model of `live` is written and read")
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    size, way = SMALL if arguments.small else FULL, arguments.way
    if arguments.folder is None and not way.startswith("public"):
        parser.error(f"expected --folder for {way!r}, found none: name the folder of the model")
    torch.manual_seed(0)
    if way == "write":
        size.write(arguments.folder)
        return
    gc.collect()
    before = _resident_bytes()
    if way.startswith("public"):
        public_peak(size, checkpointing=way.endswith("checkpointed"))
    else:
        our_peak(size, arguments.folder, checkpointing=way.endswith("checkpointed"))
    print(_resident_bytes() - before)


if __name__ == "__main__":
    main()
