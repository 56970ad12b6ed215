"""Train a small CLIP model on drawings and captions; its text tower conditions the U-Net, the whole serves CLIPScore.

Axis legend: n = rows of a batch, t = tokens, d = projected features, k = (concept, background) kinds, h = w = 32.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer

from safetydpo.artifacts.layout import demo_weights
from safetydpo.demo.concepts import BACKGROUNDS, CONCEPTS, NUM_NAMES
from safetydpo.demo.drawings import PICTURE_SIZE, draw_many, every_drawing
from safetydpo.demo.prompts import ALL_TEMPLATES, write_all_captions, write_caption
from safetydpo.demo.tokenizer import MAX_TOKENS, load_tokenizer, train_merges, write_tokenizer
from safetydpo.demo.train_vae import to_unit_range
from safetydpo.demo.training import (
    BUILD_SEED,
    HELD_OUT_DRAW_SEEDS,
    TRAIN_DRAW_SEEDS,
    Progress,
    count_parameters,
    load_checkpoint,
    record_measurement,
    save_checkpoint,
    save_half,
    scheduled_rate,
    set_rate,
)
from safetydpo.errors import SafetyDPOError
from safetydpo.seeding import derive_numpy, derive_seed

WIDTH = 128
NUM_LAYERS = 3
NUM_HEADS = 4
PATCH_SIZE = 4
BATCH_SIZE = 128
NUM_STEPS = 1000
PEAK_RATE = 1e-3
CHECKPOINT_EVERY = 200
MIN_CAPTION_ACCURACY = 0.98
"""Share of all captions whose nearest mean picture is the right concept on the right background."""


def make_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Build the untrained model with its fixed initial weights."""
    torch.manual_seed(derive_seed(BUILD_SEED, "demo/text", "init") % 2**32)
    shared = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "projection_dim": WIDTH,
    }
    text = {
        **shared,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {**shared, "image_size": PICTURE_SIZE, "patch_size": PATCH_SIZE}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


def contrastive_loss(
    image_features: Float[Tensor, "n d"], text_features: Float[Tensor, "n d"], scale: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """Compute CLIP's loss: the mean of the cross-entropies of picture to caption and caption to picture.

    Rows must show distinct (concept, background) kinds, or true partners would count as negatives.

    Source: Radford et al. 2021, arXiv 2103.00020, figure 3.
    """
    images = functional.normalize(image_features, dim=-1)
    texts = functional.normalize(text_features, dim=-1)
    logits = scale * images @ texts.T
    labels = torch.arange(len(logits), device=logits.device)
    return (functional.cross_entropy(logits, labels) + functional.cross_entropy(logits.T, labels)) / 2


def embed_images(clip: CLIPModel, pixels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
    """Give the projected picture features, not normalised."""
    return clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output)


def embed_texts(clip: CLIPModel, tokens: Int[Tensor, "n t"]) -> Float[Tensor, "n d"]:
    """Give the projected text features, not normalised; what follows the end token cannot matter (causal attention)."""
    return clip.text_projection(clip.text_model(input_ids=tokens).pooler_output)


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Int[Tensor, "n t"]:
    """Tokenize captions, padded with the end token to the longest."""
    return tokenizer(list(captions), padding="longest", truncation=True, return_tensors="pt").input_ids


def train_clip(clip: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Train on batches of distinct (concept, background) kinds with a random drawing and a random caption each."""
    stage = "demo/text"
    pictures = torch.from_numpy(draw_many(every_drawing(CONCEPTS, TRAIN_DRAW_SEEDS)))
    captions = write_all_captions()
    per_kind = NUM_NAMES * len(ALL_TEMPLATES)
    num_kinds = len(CONCEPTS) * len(BACKGROUNDS)
    optimizer = torch.optim.AdamW(clip.parameters(), lr=PEAK_RATE, weight_decay=0.02, betas=(0.9, 0.98))
    progress = Progress(stage, NUM_STEPS)
    for step in range(load_checkpoint(folder, module=clip, optimizer=optimizer, average=None), NUM_STEPS):
        set_rate(optimizer, scheduled_rate(step, num_steps=NUM_STEPS, num_warmup_steps=60, peak=PEAK_RATE))
        generator = derive_numpy(BUILD_SEED, stage, f"batch/{step}")
        kinds = generator.permutation(num_kinds)[:BATCH_SIZE]
        drawn = generator.integers(len(TRAIN_DRAW_SEEDS), size=BATCH_SIZE) * num_kinds + kinds
        said = generator.integers(per_kind, size=BATCH_SIZE) + kinds * per_kind
        tokens = tokenize(tokenizer, [captions[row] for row in said])
        loss = contrastive_loss(
            embed_images(clip, to_unit_range(pictures[torch.from_numpy(drawn)])),
            embed_texts(clip, tokens),
            clip.logit_scale.exp(),
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            clip.logit_scale.clamp_(max=4.6)
        progress.add(step, loss.item())
        if (step + 1) % CHECKPOINT_EVERY == 0:
            save_checkpoint(folder, step + 1, module=clip, optimizer=optimizer, average=None)


@torch.no_grad()
def embed_pictures(clip: CLIPModel, pictures: UInt8[Tensor, "n h w 3"]) -> Float[Tensor, "n d"]:
    """Give the projected features of pictures in bytes, scaled to length one, in chunks."""
    features = torch.cat([embed_images(clip, to_unit_range(chunk)) for chunk in pictures.split(256)])
    return functional.normalize(features, dim=-1)


def mean_of_kinds(clip: CLIPModel, draw_seeds: Sequence[int]) -> Float[Tensor, "k d"]:
    """Give each (concept, background) kind's mean picture features, concepts slowest, scaled to length one."""
    features = embed_pictures(clip, torch.from_numpy(draw_many(every_drawing(CONCEPTS, draw_seeds))))
    num_kinds = len(CONCEPTS) * len(BACKGROUNDS)
    return functional.normalize(features.reshape(-1, num_kinds, features.shape[-1]).mean(dim=0), dim=-1)


@torch.no_grad()
def measure_clip(clip: CLIPModel, tokenizer: CLIPTokenizer) -> dict[str, float]:
    """Measure, on held-out drawings, how often a caption's nearest mean picture is the right one, per name index."""
    means = mean_of_kinds(clip, HELD_OUT_DRAW_SEEDS[:2])
    num_kinds = len(means)
    measured: dict[str, float] = {}
    for name_index in range(NUM_NAMES):
        hits: list[Tensor] = []
        for template in ALL_TEMPLATES:
            captions = [
                write_caption(concept, background, name_index=name_index, template=template)
                for concept in CONCEPTS
                for background in BACKGROUNDS
            ]
            nearest = (embed_texts(clip, tokenize(tokenizer, captions)) @ means.T).argmax(dim=-1)
            hits.append(nearest == torch.arange(num_kinds))
        measured[f"caption_accuracy_name_{name_index}"] = torch.cat(hits).float().mean().item()
    return measured


def build_text(work: Path) -> None:
    """Train tokenizer and CLIP, check them, write `base/tokenizer`, `base/text_encoder` and `clip`.

    Raises:
        SafetyDPOError: Captions do not find their pictures.
    """
    started = time.monotonic()
    weights = demo_weights()
    write_tokenizer(train_merges(write_all_captions()), weights / "base" / "tokenizer")
    tokenizer = load_tokenizer(weights / "base" / "tokenizer")
    clip = make_clip(tokenizer)
    train_clip(clip, tokenizer, work / "text")
    clip.eval()
    save_half(clip, weights / "clip")
    _save_text_tower(weights)
    for file in (weights / "base" / "tokenizer").iterdir():
        shutil.copyfile(file, weights / "clip" / file.name)
    (weights / "clip" / "preprocessor_config.json").write_text(json.dumps(_preprocessor(), indent=2) + "\n")
    saved = load_clip()
    measured = measure_clip(saved, tokenizer)
    lowest = min(measured.values())
    measured["num_parameters"] = count_parameters(saved.parameters())
    measured["build_seconds"] = round(time.monotonic() - started)
    record_measurement("text", measured)
    if lowest < MIN_CAPTION_ACCURACY:
        raise SafetyDPOError(
            f"expected at least {MIN_CAPTION_ACCURACY:.0%} of captions to find their picture, found {lowest:.1%}. "
            "Train longer: raise NUM_STEPS in demo/train_text.py."
        )


def _save_text_tower(weights: Path) -> None:
    """Save the text tower of the CLIP model on disk as the `CLIPTextModel` that Stable Diffusion loads."""
    tower = CLIPTextModel.from_pretrained(str(weights / "clip"), torch_dtype=torch.float32)
    save_half(tower, weights / "base" / "text_encoder")


def _preprocessor() -> dict[str, object]:
    """Describe the pictures CLIP takes: 32 x 32 in [-1, 1], as the autoencoder's."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"height": PICTURE_SIZE, "width": PICTURE_SIZE},
        "do_center_crop": False,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 3,
    }


def load_clip() -> CLIPModel:
    """Load the trained CLIP model in fp32, frozen.

    Raises:
        SafetyDPOError: It has not been built.
    """
    folder = demo_weights() / "clip"
    if not folder.is_dir():
        raise SafetyDPOError(f"expected the demo CLIP model in {folder}, found nothing. Run the build's part 'text'.")
    clip = CLIPModel.from_pretrained(str(folder), torch_dtype=torch.float32)
    return clip.eval().requires_grad_(False)
