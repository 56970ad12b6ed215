"""Peak memory of one training step of SD1.5 in full size, each way in a process of its own.

`python -m benchmarks.train_memory public` measures one way and prints its bytes; `measure_memory` runs all of them.
"""

from __future__ import annotations

import gc
import json
import resource
import subprocess
import sys
from typing import Any

import torch
from diffusers import DDPMScheduler

from benchmarks.public_trainers import PublicNetworks, add_lora, public_loss
from benchmarks.sd15_models import TOKENS, sd15_text_encoder, sd15_unet, sd15_vae
from safetydpo.artifacts.adapters import LoraSignature
from safetydpo.diffusion.adapter import AdapterSlot
from safetydpo.dpo.loss import preference_loss, squared_error

RANK = 4
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
BETA = 5000.0
WAYS = ("public", "live", "public checkpointed", "live checkpointed")


def public_peak(*, checkpointing: bool) -> None:
    """Take one step as the released trainer does: two U-Nets, autoencoder, text encoder."""
    networks = PublicNetworks(
        sd15_unet(),
        sd15_vae(),
        sd15_text_encoder(),
        DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        sd15_unet(),
    )
    trainable = add_lora(networks, rank=RANK, targets=TARGETS)
    if checkpointing:
        networks.unet.enable_gradient_checkpointing()
        networks.unet.train()
    pixels = torch.rand(2, 3, 512, 512) * 2 - 1
    tokens = torch.randint(49408, (1, TOKENS))
    _update(public_loss(networks, pixels, tokens, beta=BETA, dtype=torch.float32), trainable)


def our_peak(*, checkpointing: bool) -> None:
    """Take one step in the shape of ours: one U-Net, adapter off for the reference, stored latents and features.

    Written out here, because the product loads a whole model from files and this one has random weights.
    """
    unet = sd15_unet().requires_grad_(False).eval()
    slot = AdapterSlot(unet)
    slot.install(LoraSignature(RANK, float(RANK), TARGETS))
    if checkpointing:
        unet.enable_gradient_checkpointing()
        unet.train()
    trainable = [tensor for _, tensor in slot.parameters()]
    noisy, noise = torch.randn(2, 4, 64, 64), torch.randn(2, 4, 64, 64)
    features, timesteps = torch.randn(2, TOKENS, 768), torch.tensor([500, 500])
    with torch.no_grad(), slot.off():
        reference = squared_error(unet(noisy, timesteps, features).sample, noise)
    policy = squared_error(unet(noisy, timesteps, features).sample, noise)
    loss = preference_loss(
        policy[:1],
        policy[1:],
        error_reference_safe=reference[:1],
        error_reference_unsafe=reference[1:],
        beta=BETA,
        safe_rise_weight=0.0,
    ).loss
    _update(loss, trainable)


def _update(loss: torch.Tensor, trainable: list[Any]) -> None:
    optimizer = torch.optim.AdamW(trainable, lr=1e-5)
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(trainable, 1.0)
    optimizer.step()


def measure_memory() -> tuple[dict[str, float], dict[str, Any]]:
    """Return ratios of the peaks, with and without activation checkpointing on both sides."""
    gigabytes: dict[str, float] = {}
    for way in WAYS:
        command = [sys.executable, "-m", "benchmarks.train_memory", way]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        gigabytes[way] = json.loads(done.stdout.strip().splitlines()[-1]) / 1e9
        print(f"{way}: {gigabytes[way]:.2f} GB above the imports", flush=True)
    ratios = {
        "peak_memory_vs_public": gigabytes["live"] / gigabytes["public"],
        "peak_memory_vs_public_checkpointed": gigabytes["live checkpointed"] / gigabytes["public checkpointed"],
    }
    return ratios, {"gigabytes": gigabytes}


def _resident_bytes() -> int:
    # Linux counts in kibibytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Measure the way named by the argument."""
    way = sys.argv[1]
    torch.manual_seed(0)
    gc.collect()
    before = _resident_bytes()
    take_step = public_peak if way.startswith("public") else our_peak
    take_step(checkpointing=way.endswith("checkpointed"))
    print(_resident_bytes() - before)


if __name__ == "__main__":
    main()
