from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from safetydpo.diffusion.loading import load_tokenizer
from safetydpo.diffusion.stable_diffusion import StableDiffusion
from safetydpo.errors import SafetyDPOError


def test_truncated_weights_are_refused(copy_of_tiny: Path):
    weights = copy_of_tiny / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(SafetyDPOError, match=r"expected readable safetensors weights in .*unet, found .*cut short"):
        StableDiffusion.from_folder(copy_of_tiny)


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_missing_tensors_are_refused_by_name(copy_of_tiny: Path, component: str):
    path = next((copy_of_tiny / component).glob("*.safetensors"))
    tensors = load_file(path)
    gone = sorted(tensors)[0]
    del tensors[gone]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(SafetyDPOError, match=f"found 1 missing, first '{gone}'"):
        StableDiffusion.from_folder(copy_of_tiny)


@pytest.mark.parametrize("name", ["unet/config.json", "scheduler/scheduler_config.json", "model_index.json"])
def test_missing_configurations_are_refused_by_name(copy_of_tiny: Path, name: str):
    (copy_of_tiny / name).unlink()
    with pytest.raises(SafetyDPOError, match=f"found no {name.split('/')[-1]} in .*: save the model"):
        StableDiffusion.from_folder(copy_of_tiny)


def test_a_missing_vocabulary_is_refused(copy_of_tiny: Path):
    (copy_of_tiny / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(SafetyDPOError, match=r"found no vocab.json in .*tokenizer: save the model"):
        StableDiffusion.from_folder(copy_of_tiny)


def test_the_tokenizer_is_the_one_that_was_saved(tiny_folder: Path):
    text = ["A red BALL, on a house!", "zebra 42"]
    assert load_tokenizer(CLIPTokenizer, tiny_folder / "tokenizer")(text).input_ids == (
        CLIPTokenizer.from_pretrained(tiny_folder / "tokenizer")(text).input_ids
    )


def test_the_file_layout_of_stable_diffusion_1_5_is_read(tiny_folder: Path, copy_of_tiny: Path):
    """Text weights under `text_model.`, a vocabulary in two files, a PNDM scheduler: the same model comes out."""
    weights = copy_of_tiny / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{name}": tensor for name, tensor in load_file(weights).items()}
    tensors["text_model.embeddings.position_ids"] = torch.arange(16)[None]
    save_file(tensors, weights, metadata={"format": "pt"})
    tokenizer = copy_of_tiny / "tokenizer"
    bpe = json.loads((tokenizer / "tokenizer.json").read_text())["model"]
    (tokenizer / "tokenizer.json").unlink()
    (tokenizer / "vocab.json").write_text(json.dumps(bpe["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]]
    (tokenizer / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    config = {"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    config |= {"beta_schedule": "scaled_linear", "skip_prk_steps": True, "set_alpha_to_one": False}
    (copy_of_tiny / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    old, new = StableDiffusion.from_folder(copy_of_tiny), StableDiffusion.from_folder(tiny_folder)
    prompt = ["a red ball, on a zebra!"]
    assert torch.equal(old.encode_prompts(prompt).tokens, new.encode_prompts(prompt).tokens)
    assert old.sampling_timesteps(10) == new.sampling_timesteps(10)
    assert torch.equal(old.alphas_cumprod, new.alphas_cumprod)
