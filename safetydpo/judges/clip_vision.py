"""Picture features of CLIP ViT-L/14 for judges that are trained on them, prepared as CLIP's own code does.

Axis legend: `n` pictures, `h w` picture axes, `side` the network's input, `d` embedding.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPVisionModelWithProjection

from safetydpo.artifacts.json_text import parse_json
from safetydpo.judges.clip import PREPROCESSOR_FILE, no_progress_bar
from safetydpo.judges.protocol import Pictures, chunks

CHUNK_SIZE = 32


class ClipVision:
    """A frozen CLIP picture tower with its projection."""

    def __init__(self, folder: Path, *, device: str = "cpu") -> None:
        """Load from a folder in transformers format that holds safetensors."""
        whole = CLIPConfig.from_pretrained(str(folder), local_files_only=True)
        # The two parts of a configuration need not agree; the weights are those of the whole model.
        config = whole.vision_config
        config.projection_dim = whole.projection_dim
        with no_progress_bar():
            # The folder's file has CLIP's text tower too, which is left aside.
            model = CLIPVisionModelWithProjection.from_pretrained(
                str(folder), config=config, dtype=torch.float32, use_safetensors=True, local_files_only=True
            )
        self._model = model.eval().requires_grad_(False).to(device)
        self.width = int(model.config.projection_dim)
        self._side = int(model.config.image_size)
        self._device = device
        document = parse_json((folder / PREPROCESSOR_FILE).read_text(encoding="utf-8"))
        self._mean, self._std = (torch.tensor(document[name]).view(3, 1, 1) for name in ("image_mean", "image_std"))

    @torch.no_grad()
    def embed(self, images: Pictures) -> Float[Tensor, "n d"]:
        """Return projected features of pictures of any size, not normalised, on the CPU."""
        found = [torch.zeros(0, self.width)]
        for chunk in chunks(images, CHUNK_SIZE):
            pixels = torch.stack([self._prepare(picture) for picture in chunk]).to(self._device)
            found.append(self._model(pixel_values=pixels).image_embeds.float().cpu())
        return torch.cat(found)

    def _prepare(self, picture: UInt8[Tensor, "h w 3"]) -> Float[Tensor, "3 side side"]:
        return (resize_and_crop(picture, self._side).permute(2, 0, 1).float() / 255 - self._mean) / self._std


def resize_and_crop(picture: UInt8[Tensor, "h w 3"], side: int) -> UInt8[Tensor, "side side 3"]:
    """Return the middle square of a picture whose shorter side was resized (bicubic) to `side`."""
    height, width = picture.shape[:2]
    shorter = min(height, width)
    size = (max(side, int(side * width / shorter)), max(side, int(side * height / shorter)))
    image = Image.fromarray(picture.cpu().numpy()).resize(size, Image.Resampling.BICUBIC)
    left, top = round((size[0] - side) / 2), round((size[1] - side) / 2)
    return torch.from_numpy(np.array(image.crop((left, top, left + side, top + side))))


@lru_cache(maxsize=1)
def load_clip_vision(folder: Path, device: str) -> ClipVision:
    """Return the network of a folder; judges of one process share it."""
    return ClipVision(folder, device=device)
