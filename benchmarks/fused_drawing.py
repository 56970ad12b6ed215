"""Seconds of drawing with an adapter beside the base's layers, and with it in their weights (`identity.sampler.fused`).

    python -m benchmarks.fused_drawing [--rank 32] [--batches 2] [--rounds 5] [--threads 1]

The demo's model and sampler; its base without adapter is the bound. All three draw the same prompts and noise.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.harness import alternate, print_result, ratio_of_medians
from safetydpo.artifacts.adapters import LoraLayer, LoraSignature
from safetydpo.config.load import load_config
from safetydpo.diffusion.backbone import Backbone
from safetydpo.diffusion.build import load_backbone
from safetydpo.diffusion.render import render


def main() -> None:
    """Draw each way alternately and print the ratios of CPU seconds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    identity = load_config("configs/demo.yaml").identity
    backbone = load_backbone(identity.base)
    sampler = identity.sampler.model_copy(update={"fused": False})
    pictures = options.batches * sampler.batch_size
    signature = LoraSignature(rank=options.rank, alpha=float(options.rank), targets=tuple(identity.lora.layer_targets))
    layers = some_layers(backbone, signature)
    drawn: dict[str, torch.Tensor] = {}

    def draw(name: str, *, fused: bool) -> None:
        settings = sampler.model_copy(update={"fused": fused})
        seeds = list(range(pictures))
        drawn[name] = render(backbone, prompts=["bomb on white"] * pictures, seeds=seeds, sampler=settings)

    def beside() -> None:
        backbone.swap_adapter(signature, layers)
        draw("beside", fused=False)

    def fused() -> None:
        backbone.swap_adapter(signature, layers)
        draw("fused", fused=True)

    def base() -> None:
        backbone.remove_adapter()
        draw("base", fused=False)

    times = alternate({"beside": beside, "fused": fused, "base": base}, rounds=options.rounds)
    cpu = {name: [one.cpu_seconds for one in rounds] for name, rounds in times.items()}
    apart = (drawn["beside"].int() - drawn["fused"].int()).abs()
    print_result(
        "fused_drawing",
        ratios={
            "fused_vs_beside": ratio_of_medians(cpu["beside"], cpu["fused"]),
            "base_vs_beside": ratio_of_medians(cpu["beside"], cpu["base"]),
        },
        raw={
            "pictures": pictures,
            "rank": options.rank,
            "steps": sampler.steps,
            "cpu_seconds": cpu,
            "largest_difference_of_256_levels": int(apart.max()),
            "share_of_levels_that_differ": float((apart > 0).float().mean()),
        },
    )


def some_layers(backbone: Backbone, signature: LoraSignature) -> dict[str, LoraLayer]:
    """Return an adapter of small random numbers: what it draws does not matter, how long it takes does."""
    generator = torch.Generator().manual_seed(0)
    rank = signature.rank
    return {
        name: LoraLayer(
            down=torch.randn(rank, d_in, generator=generator) / d_in,
            up=torch.randn(d_out, rank, generator=generator) / rank,
        )
        for name, (d_in, d_out) in backbone.named_linear_layers(signature.targets)
    }


if __name__ == "__main__":
    main()
