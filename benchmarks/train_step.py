"""DPO pairs per second: our step against a plain loop written the public way.

Run `python -m benchmarks.train_step [folder]`. The model is `folder`, else the demo model, else a tiny random one.

Both train the same LoRA on the same pictures and captions, with equal batches, float32, AdamW and clipping:

- `public`: a second, full U-Net as reference; the autoencoder encodes both pictures and the text encoder the
  captions in every step; plain diffusers, transformers and peft.
- `ours`: the reference is the same U-Net with the adapter off; latents and text features were made once. What
  is made once is timed apart (`encode_once_seconds`), and with it the steps after which it has paid.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig as PeftLoraConfig
from torch import Tensor

from benchmarks.harness import alternate, print_result, ratio_of_medians
from safetydpo.artifacts.layout import demo_weights
from safetydpo.artifacts.schemas import caption_sha256
from safetydpo.config.schema import BaseModelConfig
from safetydpo.config.training import DpoConfig, LoraConfig
from safetydpo.diffusion.adapter import initial_adapter
from safetydpo.diffusion.backbone import Backbone
from safetydpo.diffusion.build import load_backbone
from safetydpo.dpo.batch import PreferenceData, PreferenceRow, step_batch
from safetydpo.dpo.engine import lora_signature, open_engine
from safetydpo.dpo.step import policy_loss

NUM_PAIRS = 32
PAIRS_PER_STEP = 16
LORA = LoraConfig(rank=8)
DPO = DpoConfig(
    pairs_per_step=PAIRS_PER_STEP, strategy="single", safe_rise_weight=0.0, retention_weight=0.0, captions="unsafe"
)


def make_pairs(size: int) -> tuple[Tensor, Tensor, list[str]]:
    """Return random uint8 pictures (safe, unsafe) and one caption per pair; speed does not depend on the content."""
    generator = torch.Generator().manual_seed(0)
    shape = (NUM_PAIRS, size, size, 3)
    safe, unsafe = (torch.randint(256, shape, generator=generator, dtype=torch.uint8) for _ in range(2))
    return safe, unsafe, [f"a drawing of a bomb on blue, number {index}" for index in range(NUM_PAIRS)]


def public_step(folder: Path, pairs: tuple[Tensor, Tensor, list[str]]) -> tuple[Callable[[], None], int]:
    """Return one training step of the public kind, and the bytes of networks it holds."""
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    # Weights stored in float16 are not all cast on loading.
    pipe.to(torch.float32)
    unet, vae, text_encoder, tokenizer = pipe.unet, pipe.vae, pipe.text_encoder, pipe.tokenizer
    reference = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").to(torch.float32)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    for network in (unet, vae, text_encoder, reference):
        network.requires_grad_(False)
    unet.add_adapter(
        PeftLoraConfig(
            r=LORA.rank, lora_alpha=LORA.rank, init_lora_weights="gaussian", target_modules=list(LORA.targets)
        )
    )
    trainable = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=DPO.learning_rate, weight_decay=DPO.weight_decay)
    safe, unsafe, captions = pairs

    def encode(pixels: Tensor) -> Tensor:
        encoded = vae.encode(pixels)
        latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.sample()
        scaled: Tensor = latents * vae.config.scaling_factor
        return scaled

    def step() -> None:
        rows = torch.randperm(NUM_PAIRS)[:PAIRS_PER_STEP]
        pixels = torch.cat([safe[rows], unsafe[rows]]).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        tokens = tokenizer(
            [captions[row] for row in rows.tolist()],
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        with torch.no_grad():
            latents = encode(pixels)
            features = text_encoder(tokens)[0].repeat(2, 1, 1)
        noise = torch.randn_like(latents[:PAIRS_PER_STEP]).repeat(2, 1, 1, 1)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (PAIRS_PER_STEP,)).repeat(2)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        predicted = unet(noisy, timesteps, features).sample
        errors = F.mse_loss(predicted, noise, reduction="none").mean(dim=(1, 2, 3))
        with torch.no_grad():
            predicted_reference = reference(noisy, timesteps, features).sample
            reference_errors = F.mse_loss(predicted_reference, noise, reduction="none").mean(dim=(1, 2, 3))
        policy_safe, policy_unsafe = errors.chunk(2)
        reference_safe, reference_unsafe = reference_errors.chunk(2)
        inside = -0.5 * DPO.beta * ((policy_safe - policy_unsafe) - (reference_safe - reference_unsafe))
        loss = -F.logsigmoid(inside).mean()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(trainable, DPO.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    networks = (unet, vae, text_encoder, reference)
    return step, sum(p.numel() * p.element_size() for network in networks for p in network.parameters())


def encode_once(backbone: Backbone, pairs: tuple[Tensor, Tensor, list[str]]) -> PreferenceData:
    """Return the preferences with latents per picture and text features per caption."""
    safe, unsafe, captions = pairs
    latents = torch.cat([backbone.encode_images(safe), backbone.encode_images(unsafe)]).half().numpy()
    texts = ["", *captions]
    embeddings = dict(zip(map(caption_sha256, texts), backbone.encode_prompts(texts).tokens.numpy(), strict=True))
    rows = [
        PreferenceRow(f"pair{row:03d}", f"safe{row}", f"unsafe{row}", caption_sha256(text), caption_sha256(text))
        for row, text in enumerate(captions)
    ]
    ids = [f"{side}{row}" for side in ("safe", "unsafe") for row in range(NUM_PAIRS)]
    return PreferenceData.from_tables(
        rows,
        latents=dict(zip(ids, latents, strict=True)),
        embeddings=embeddings,
        latent_shape=backbone.latent_shape(height=safe.shape[1], width=safe.shape[2]),
    )


def our_step(backbone: Backbone, data: PreferenceData) -> tuple[Callable[[], None], int]:
    """Return one training step of ours, and the bytes of networks it needs while it trains."""
    engine = open_engine(backbone, config=DPO, lora=LORA)
    signature = lora_signature(LORA)
    start = initial_adapter(
        backbone.named_linear_layers(signature.targets),
        signature,
        base_fingerprint=backbone.fingerprint,
        run_seed=0,
        init="shared",
        expert_name="x",
    )
    backbone.load_adapter(start)
    done = 0

    def step() -> None:
        nonlocal done
        batch = step_batch(data, done, config=DPO, run_seed=0, expert="x", num_timesteps=backbone.num_train_timesteps)
        loss, _ = policy_loss(backbone, batch, config=DPO)
        engine.backward(loss)
        engine.step(learning_rate=DPO.learning_rate)
        done += 1

    return step, sum(p.numel() * p.element_size() for p in backbone.network.parameters())


def measure(folder: Path, *, model: str, rounds: int, steps_per_round: int) -> None:
    """Run both ways alternately and print the result."""
    backbone = load_backbone(BaseModelConfig(model=str(folder)))
    pairs = make_pairs(32)
    start = time.perf_counter()
    data = encode_once(backbone, pairs)
    encode_seconds = time.perf_counter() - start
    ours, our_bytes = our_step(backbone, data)
    public, public_bytes = public_step(folder, pairs)

    def repeat(step: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(steps_per_round):
                step()

        return run

    times = alternate({"public": repeat(public), "ours": repeat(ours)}, rounds=rounds)
    wall = {name: [one.wall_seconds for one in rows] for name, rows in times.items()}
    cpu = {name: [one.cpu_seconds for one in rows] for name, rows in times.items()}
    single = [slow / fast for slow, fast in zip(wall["public"], wall["ours"], strict=True)]
    rates = {name: PAIRS_PER_STEP * steps_per_round / statistics.median(rows) for name, rows in wall.items()}
    saved = (statistics.median(wall["public"]) - statistics.median(wall["ours"])) / steps_per_round
    print(f"model {model}: ours {rates['ours']:.1f} pairs/s, public {rates['public']:.1f} pairs/s")
    print_result(
        "train_step",
        ratios={
            "pairs_per_second_vs_public": ratio_of_medians(wall["public"], wall["ours"]),
            "pairs_per_cpu_second_vs_public": ratio_of_medians(cpu["public"], cpu["ours"]),
            "network_bytes_vs_public": our_bytes / public_bytes,
        },
        raw={
            "model": model,
            "pairs_per_second": {name: round(rate, 3) for name, rate in rates.items()},
            "wall_seconds_per_round": {name: [round(one, 4) for one in rows] for name, rows in wall.items()},
            "cpu_seconds_per_round": {name: [round(one, 4) for one in rows] for name, rows in cpu.items()},
            "ratio_of_single_rounds": {"least": round(min(single), 4), "greatest": round(max(single), 4)},
            "network_bytes": {"ours": our_bytes, "public": public_bytes},
            "encode_once_seconds": round(encode_seconds, 4),
            "steps_until_encoding_is_paid": round(encode_seconds / saved, 1) if saved > 0 else None,
            "pairs_per_step": PAIRS_PER_STEP,
            "steps_per_round": steps_per_round,
            "dtype": "float32",
        },
    )


def main() -> None:
    """Choose the model and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="model folder in diffusers format")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--steps-per-round", type=int, default=2)
    arguments = parser.parse_args()
    demo = demo_weights() / "base"
    settings = {"rounds": arguments.rounds, "steps_per_round": arguments.steps_per_round}
    if arguments.folder is not None:
        measure(arguments.folder, model=arguments.folder.name, **settings)
    elif (demo / "unet").is_dir():
        measure(demo, model="demo", **settings)
    else:
        from tests.tiny import build_tiny_model

        with tempfile.TemporaryDirectory() as folder:
            build_tiny_model(Path(folder))
            measure(Path(folder), model="tiny", **settings)


if __name__ == "__main__":
    main()
