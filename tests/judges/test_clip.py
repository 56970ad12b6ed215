from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import CLIPImageProcessor, CLIPModel

from safetydpo.artifacts.layout import demo_weights
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.judges.build import clip_folder
from safetydpo.judges.clip import ClipScorer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_weights() / "clip", tmp_path / "clip"))


@pytest.mark.parametrize(("mean", "std"), [([0.5] * 3, [0.5] * 3), ([0.48, 0.46, 0.41], [0.27, 0.26, 0.28])])
def test_pictures_are_normalised_as_the_folder_says(folder: Path, mean: list[float], std: list[float]):
    """Equal to transformers' own preparation of pictures of the network's size, which are not resized."""
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_mean": mean, "image_std": std}))
    pictures = torch.randint(0, 256, (3, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    processor = CLIPImageProcessor.from_pretrained(folder, do_resize=False)
    prepared = processor(list(pictures.permute(0, 3, 1, 2)), return_tensors="pt").pixel_values
    with torch.no_grad():
        model = CLIPModel.from_pretrained(folder)
        expected = model.visual_projection(model.vision_model(pixel_values=prepared).pooler_output)
    torch.testing.assert_close(ClipScorer(folder).embed_images(pictures), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("file", ["model.safetensors", "preprocessor_config.json"])
def test_a_folder_that_lacks_a_file(folder: Path, file: str):
    (folder / file).unlink()
    with pytest.raises(SafetyDPOError, match=f"expected a CLIP model at .*clip, found no {file}: name a folder that"):
        ClipScorer(folder)


def test_a_model_is_the_demos_or_a_folder(folder: Path):
    assert clip_folder("demo") == demo_weights() / "clip"
    assert clip_folder(str(folder)) == folder
    with pytest.raises(
        UsageError, match=r"expected identity\.pairs\.layout_clip to be 'demo' or a folder .* '/nowhere'"
    ):
        clip_folder("/nowhere")
