from __future__ import annotations

import fnmatch
import hashlib
import json
import shutil
from pathlib import Path

import pytest

from safetydpo.diffusion.folder import HUB_PATTERNS, fingerprint_folder, read_json
from safetydpo.errors import SafetyDPOError
from tests.tiny import build_tiny_model


def test_fingerprint_by_hand(tmp_path: Path):
    """Three one-file networks and nothing else: sha256 over three lines `name US sha256 LF`, sorted by name."""
    index = {name: ["library", "Class"] for name in ("text_encoder", "unet", "vae")} | {"tokenizer": [None, None]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    lines = ""
    for name, content in (
        ("text_encoder/model.safetensors", b"t"),
        ("unet/diffusion_pytorch_model.safetensors", b"u"),
        ("vae/diffusion_pytorch_model.safetensors", b"v"),
    ):
        path = tmp_path / name
        path.parent.mkdir()
        path.write_bytes(content)
        lines += f"{name}\x1f{hashlib.sha256(content).hexdigest()}\n"
    assert fingerprint_folder(tmp_path) == hashlib.sha256(lines.encode()).hexdigest()


def test_fingerprint_ignores_files_that_are_not_loaded(copy_of_tiny: Path):
    before = fingerprint_folder(copy_of_tiny)
    (copy_of_tiny / "README.md").write_text("words")
    (copy_of_tiny / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"other precision")
    (copy_of_tiny / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text("{}")
    (copy_of_tiny / "safety_checker").mkdir()
    (copy_of_tiny / "safety_checker" / "model.safetensors").write_bytes(b"not used")
    assert fingerprint_folder(copy_of_tiny) == before


@pytest.mark.parametrize(
    "name", ["unet/diffusion_pytorch_model.safetensors", "vae/config.json", "tokenizer/tokenizer.json"]
)
def test_fingerprint_changes_with_any_loaded_file(copy_of_tiny: Path, name: str):
    before = fingerprint_folder(copy_of_tiny)
    path = copy_of_tiny / name
    path.write_bytes(path.read_bytes() + b" ")
    assert fingerprint_folder(copy_of_tiny) != before


def test_the_tiny_model_is_built_to_the_same_bytes_again(tiny_folder: Path, tmp_path: Path):
    build_tiny_model(tmp_path)
    assert fingerprint_folder(tmp_path) == fingerprint_folder(tiny_folder)


def test_a_folder_of_pickles_is_refused_by_file_name(copy_of_tiny: Path):
    weights = copy_of_tiny / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(
        SafetyDPOError, match=r"found only the pickle 'diffusion_pytorch_model.bin', which is never read: convert"
    ):
        fingerprint_folder(copy_of_tiny)


def test_missing_weights_are_refused(copy_of_tiny: Path):
    shutil.rmtree(copy_of_tiny / "vae")
    with pytest.raises(SafetyDPOError, match=r"expected safetensors weights in .*vae, found none"):
        fingerprint_folder(copy_of_tiny)


def test_json_errors_name_the_file(tmp_path: Path):
    with pytest.raises(SafetyDPOError, match=r"found no model_index.json in .*: save the model with save_pretrained"):
        read_json(tmp_path / "model_index.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(SafetyDPOError, match=r"expected JSON in .*bad.json, found"):
        read_json(tmp_path / "bad.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(SafetyDPOError, match=r"expected a JSON object in .*list.json, found a list"):
        read_json(tmp_path / "list.json")


@pytest.mark.parametrize(
    ("name", "fetched"),
    [
        ("unet/diffusion_pytorch_model.safetensors", True),
        ("unet/diffusion_pytorch_model-00001-of-00002.safetensors", True),
        ("text_encoder/model.safetensors", True),
        ("tokenizer/merges.txt", True),
        ("scheduler/scheduler_config.json", True),
        ("model_index.json", True),
        ("text_encoder_2/model-00001-of-00002.safetensors", True),
        ("transformer/diffusion_pytorch_model-00003-of-00003.safetensors", True),
        ("tokenizer_3/tokenizer.json", True),
        ("text_encoder_3/model.fp16-00001-of-00002.safetensors", False),
        ("flux1-dev.safetensors", False),
        ("own_pipeline.py", False),
        ("unet/diffusion_pytorch_model.bin", False),
        ("unet/diffusion_pytorch_model.fp16.safetensors", False),
        ("unet/diffusion_pytorch_model.non_ema.safetensors", False),
        ("v1-5-pruned.safetensors", False),
        ("safety_checker/model.safetensors", False),
    ],
)
def test_only_needed_files_are_fetched_from_a_hub(name: str, fetched: bool):
    assert any(fnmatch.fnmatch(name, pattern) for pattern in HUB_PATTERNS) == fetched
