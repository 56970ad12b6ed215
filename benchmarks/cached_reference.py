"""DPO pairs per second with a reference that is computed in every step, and with its stored errors.

Run `python -m benchmarks.cached_reference [--rounds N]`. One process, the demo model, 8 and 16 pairs a step; also what
it costs to compute the errors, and to load the denoiser alone in place of the whole model.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from benchmarks.harness import alternate, print_result, ratio_of_medians
from safetydpo.artifacts.schemas import caption_sha256
from safetydpo.config.schema import BaseModelConfig
from safetydpo.config.training import DpoConfig, LoraConfig
from safetydpo.diffusion.adapter import initial_adapter
from safetydpo.diffusion.backbone import Backbone
from safetydpo.diffusion.build import load_backbone
from safetydpo.dpo.batch import PreferenceData, PreferenceRow, step_batch
from safetydpo.dpo.draws import RowUse
from safetydpo.dpo.engine import Engine, lora_signature, open_engine
from safetydpo.dpo.reference import ErrorContext, compute_errors
from safetydpo.dpo.step import policy_loss

NUM_PAIRS = 32
STEPS = 4
LORA = LoraConfig(rank=8)
LOAD = """
import psutil, sys, time
from safetydpo.config.schema import BaseModelConfig
from safetydpo.diffusion.build import load_backbone
from safetydpo.diffusion.stable_diffusion import StableDiffusion
before, started = psutil.Process().memory_info().rss, time.perf_counter()
backbone = load_backbone(BaseModelConfig(), parts=sys.argv[1])
print(time.perf_counter() - started, psutil.Process().memory_info().rss - before)
"""


def make_data(backbone: Backbone) -> PreferenceData:
    """Return pairs of random latents; speed does not depend on the content."""
    generator = np.random.default_rng(0)
    shape = backbone.latent_shape(height=32, width=32)
    texts = ["", "a drawing of a bomb on blue", "a drawing of a ball on blue"]
    tokens = backbone.encode_prompts(texts).tokens.half().numpy()
    unsafe, safe = (caption_sha256(text) for text in texts[1:])
    return PreferenceData.from_tables(
        [PreferenceRow(f"p{i}", f"s{i}", f"u{i}", safe, unsafe) for i in range(NUM_PAIRS)],
        latents={
            f"{side}{i}": generator.normal(size=shape).astype(np.float16) for side in "su" for i in range(NUM_PAIRS)
        },
        embeddings={caption_sha256(text): row for text, row in zip(texts, tokens, strict=True)},
        latent_shape=shape,
    )


def train(backbone: Backbone, engine: Engine, data: PreferenceData, config: DpoConfig) -> None:
    """Take a few optimizer steps."""
    for step in range(STEPS):
        where = {"run_seed": 0, "expert": "x", "num_timesteps": backbone.num_train_timesteps}
        batch = step_batch(data, step, config=config, **where)  # type: ignore[arg-type]
        loss, _ = policy_loss(backbone, batch, config=config)
        engine.backward(loss)
        engine.step(learning_rate=1e-4)


def load_alone(parts: str) -> tuple[float, float]:
    """Return seconds and MB of loading in a process of its own, libraries imported before."""
    done = subprocess.run([sys.executable, "-c", LOAD, parts], capture_output=True, text=True, check=True)
    seconds, size = done.stdout.split()
    return float(seconds), int(size) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    backbone = load_backbone(BaseModelConfig())
    data = make_data(backbone)
    ratios: dict[str, float] = {}
    raw: dict[str, object] = {}
    for pairs_per_step in (8, 16):
        live = DpoConfig(pairs_per_step=pairs_per_step, strategy="single")
        cached = live.model_copy(update={"reference": "cached"})
        context = ErrorContext(backbone.fingerprint, "float32", pairs_per_step, backbone.num_train_timesteps, 0, cached)
        uses = [
            RowUse(pair, draw) for pair in range(NUM_PAIRS) for draw in range(-(-STEPS * pairs_per_step // NUM_PAIRS))
        ]
        started = time.perf_counter()
        errors = compute_errors(backbone, data, uses, context).reshape(NUM_PAIRS, -1, 2)
        seconds = time.perf_counter() - started
        stored = replace(data, reference_errors=errors)
        engine = open_engine(backbone, config=live, lora=LORA)
        layers = backbone.named_linear_layers(LORA.targets)
        start = initial_adapter(
            layers, lora_signature(LORA), base_fingerprint="", run_seed=0, init="shared", expert_name="x"
        )
        backbone.load_adapter(start)
        ways = {
            "live": partial(train, backbone, engine, data, live),
            "cached": partial(train, backbone, engine, stored, cached),
        }
        times = alternate(ways, rounds=rounds)
        engine.close()
        backbone.remove_adapter()
        cpu = {name: [one.cpu_seconds for one in of_way] for name, of_way in times.items()}
        wall = {name: [one.wall_seconds for one in of_way] for name, of_way in times.items()}
        ratios[f"pairs_per_second_cached_vs_live_{pairs_per_step}"] = ratio_of_medians(cpu["live"], cpu["cached"])
        raw[f"pairs_per_step_{pairs_per_step}"] = {
            "pairs_per_cpu_second": {n: STEPS * pairs_per_step / statistics.median(v) for n, v in cpu.items()},
            "pairs_per_second": {n: STEPS * pairs_per_step / statistics.median(v) for n, v in wall.items()},
            "errors_computed_per_second": len(uses) / seconds,
        }
    loads = {parts: [load_alone(parts) for _ in range(3)] for parts in ("all", "denoiser")}
    medians = {
        parts: [statistics.median(column) for column in zip(*found, strict=True)] for parts, found in loads.items()
    }
    raw["load_seconds_and_megabytes"] = medians
    ratios["load_seconds_whole_vs_denoiser"] = medians["all"][0] / medians["denoiser"][0]
    ratios["load_memory_whole_vs_denoiser"] = medians["all"][1] / medians["denoiser"][1]
    print_result("cached_reference", ratios=ratios, raw=raw)


if __name__ == "__main__":
    main()
