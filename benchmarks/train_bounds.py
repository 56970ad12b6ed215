"""What the operations of one training pair take on this machine: how much any trainer can gain by its bookkeeping.

The public ways differ from ours in work that they repeat: the encoder in every step, the reference's pass. The gain is
at most (encoder + reference + policy) over (reference + policy), in seconds; counted in operations, with a backward
pass as dear as a forward pass, it would be 1.47 live and 2.20 cached for SD1.5.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig

from benchmarks.sd15_models import TOKENS, operations, sd15_unet_of, sd15_vae_of

SIZES = ((4, 128, 8), (2, 256, 2), (1, 512, 1))
"""(divisor of SD1.5's channels, pixels, pictures in a batch)."""
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def measure_bounds(*, rounds: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Return the largest possible gain per size and dtype, and the seconds behind it."""
    ratios: dict[str, float] = {}
    raw: dict[str, Any] = {}
    for divisor, picture, batch in SIZES:
        for dtype in (torch.float32, torch.bfloat16):
            name = f"1/{divisor} of the channels, {picture} pixels, {str(dtype).removeprefix('torch.')}"
            found = _measure(divisor, picture, batch, dtype, rounds=1 if divisor == 1 else rounds)
            forward, step, encode = (found[key] for key in ("unet_forward", "unet_forward_backward", "encode"))
            ratios[f"time_bound_live, {name}"] = (encode + forward + step) / (forward + step)
            ratios[f"time_bound_cached, {name}"] = (encode + forward + step) / step
            raw[name] = found
            print(name, {key: round(value, 3) for key, value in found.items()}, flush=True)
    return ratios, raw


def _measure(divisor: int, picture: int, batch: int, dtype: torch.dtype, *, rounds: int) -> dict[str, float]:
    torch.manual_seed(0)
    unet, vae = sd15_unet_of(divisor, picture).to(dtype), sd15_vae_of(divisor, picture).to(dtype)
    unet.requires_grad_(False)
    unet.add_adapter(PeftLoraConfig(r=4, target_modules=TARGETS))
    latents = torch.randn(batch, 4, picture // 8, picture // 8, dtype=dtype)
    states = torch.randn(batch, TOKENS, unet.config.cross_attention_dim, dtype=dtype)
    pixels = torch.randn(batch, 3, picture, picture, dtype=dtype)
    steps = torch.zeros(batch)

    def step() -> None:
        torch.autograd.backward(unet(latents, steps, states).sample.float().square().mean())

    forward = _seconds(lambda: _without_gradient(unet, latents, steps, states), rounds) / batch
    encode = _seconds(lambda: _without_gradient(vae.encode, pixels), rounds) / batch
    return {
        "unet_gigaflop": operations(unet, latents[:1], steps[:1], states[:1]) / 1e9,
        "encoder_gigaflop": operations(vae.encoder, pixels[:1]) / 1e9,
        "unet_forward": forward,
        "unet_forward_backward": _seconds(step, rounds) / batch,
        "encode": encode,
    }


def _without_gradient(call: Callable[..., Any], *inputs: Any) -> None:
    with torch.no_grad():
        call(*inputs)


def _seconds(call: Callable[[], None], rounds: int) -> float:
    """Return the shortest time of some calls after one that does not count."""
    call()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)
