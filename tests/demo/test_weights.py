"""The weights that ship: plain diffusers draws from them, they are small, fp16, and their quality is written down."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from safetydpo.artifacts.layout import demo_weights
from safetydpo.demo.sampling import load_base
from safetydpo.demo.train_text import load_clip
from safetydpo.demo.train_vae import load_vae
from safetydpo.errors import SafetyDPOError
from safetydpo.judges.demo import load_select_judge

PLAIN_SCRIPT = """
import sys
import torch
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained(sys.argv[1])
prompts = ["balloon on blue", "umbrella on white", "bomb on pink", "penguin on green"]
generators = [torch.Generator().manual_seed(row) for row in range(4)]
images = pipeline(prompts, num_inference_steps=10, guidance_scale=4.0, generator=generators).images
for row, image in enumerate(images):
    image.save(f"{sys.argv[2]}/{row}.png")
assert not any(name.split(".")[0] == "safetydpo" for name in sys.modules)
"""


def test_a_plain_diffusers_script_draws(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PLAIN_SCRIPT, str(demo_weights() / "base"), str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    pictures = np.stack([np.asarray(Image.open(tmp_path / f"{row}.png")) for row in range(4)])
    assert pictures.shape == (4, 32, 32, 3)
    judge = load_select_judge()
    scores = judge.score(pictures)
    found = [judge.labels.name_concept(int(index)) for index in scores.concept_index]
    assert sum(a == b for a, b in zip(found, ["balloon", "umbrella", "bomb", "penguin"], strict=True)) >= 3
    assert scores.is_unsafe.sum() == 1


def test_weights_are_small_and_hold_only_safetensors_json_and_text() -> None:
    files = [file for file in demo_weights().rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 40_000_000
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".txt"}


def test_every_model_is_stored_in_half_precision() -> None:
    for file in demo_weights().rglob("*.safetensors"):
        if file.name == "reference_features.safetensors":
            continue
        with safe_open(str(file), framework="pt") as tensors:
            kinds = {tensors.get_slice(name).get_dtype() for name in tuple(tensors.keys())}
        assert kinds <= {"F16", "I64"}, file


def test_reference_features_are_of_two_thousand_drawings_and_at_most_64_wide() -> None:
    with safe_open(str(demo_weights() / "reference_features.safetensors"), framework="np") as tensors:
        features, projection = tensors.get_tensor("features"), tensors.get_tensor("projection")
        assert tensors.metadata()["num_drawings"] == "2000"
    assert features.shape[0] == 2000
    assert projection.shape == (128, features.shape[1])
    assert features.shape[1] <= 64
    np.testing.assert_allclose(projection.T @ projection, np.eye(features.shape[1]), atol=1e-4)


def test_measured_quality_is_written_down_and_meets_the_acceptance() -> None:
    measured = json.loads((demo_weights() / "measured.json").read_text())
    assert set(measured) == {"text", "vae", "unet", "judge_select", "judge_audit", "features", "check"}
    check = measured["check"]
    assert check["num_pictures"] >= 1000
    for name in range(4):
        assert check[f"found_name_{name}"] >= 0.97
    for template in range(6):
        assert check[f"found_template_{template}"] >= 0.97
    assert check["background_select"] >= 0.97
    assert check["agreement_concept"] >= 0.95
    for judge in ("judge_select", "judge_audit"):
        assert measured[judge]["concept_accuracy_drawings"] >= 0.98


@pytest.mark.parametrize(
    ("load", "message"),
    [(load_vae, "Run the build's part 'vae'"), (load_clip, "Run the build's part 'text'")],
)
def test_missing_parts_say_what_to_build(
    load: object, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("train_vae", "train_text"):
        monkeypatch.setattr(f"safetydpo.demo.{module}.demo_weights", lambda: tmp_path)
    with pytest.raises(SafetyDPOError, match=message):
        load()  # type: ignore[operator]


def test_missing_base_says_what_to_build(tmp_path: Path) -> None:
    with pytest.raises(SafetyDPOError, match="Run `python -m safetydpo.demo.build unet`"):
        load_base(tmp_path)
