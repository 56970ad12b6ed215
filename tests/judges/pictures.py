"""Mild synthetic pictures of different sizes, and the folders of tiny random networks that judges look at them with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
SIDE, WIDTH = 24, 16


def coloured(height: int, width: int, *, seed: int) -> Tensor:
    """Return soft blots of random colours: differences between neighbours are small, as in a photograph."""
    generator = torch.Generator().manual_seed(seed)
    blots = torch.rand(1, 3, 4, 5, generator=generator)
    soft = torch.nn.functional.interpolate(blots, size=(height, width), mode="bicubic", align_corners=False)
    return (soft[0].clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)


def several() -> list[Tensor]:
    """Return five pictures, no two of one size."""
    sizes = ((40, 40), (24, 24), (64, 32), (33, 70), (96, 80))
    return [coloured(height, width, seed=seed) for seed, (height, width) in enumerate(sizes)]


def write_tiny_clip(folder: Path, *, seed: int = 0) -> Path:
    """Write a random CLIP of the true class, as the hub's folders are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vision = CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=8,
        )
        text = CLIPTextConfig(
            vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
        )
        CLIPModel(
            CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=WIDTH)
        ).save_pretrained(folder)
    document = {"image_mean": MEAN, "image_std": STD, "crop_size": SIDE, "size": {"shortest_edge": SIDE}}
    (folder / "preprocessor_config.json").write_text(json.dumps(document))
    return folder


def clip_features(folder: Path, pictures: list[Tensor]) -> np.ndarray:
    """Return CLIP's features by transformers' own preparation and the whole model, one picture at a time."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil.from_pretrained(folder)
    model = CLIPModel.from_pretrained(folder).eval()
    found = []
    with torch.no_grad():
        for picture in pictures:
            pixels = processor(picture.numpy(), return_tensors="pt").pixel_values
            found.append(model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)[0].numpy())
    return np.stack(found)
