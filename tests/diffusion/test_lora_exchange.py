"""Exported files in the libraries that read them: diffusers', PEFT's, and the whole model with the adapter in it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from safetydpo.artifacts.adapters import AdapterMetadata, LoraLayer
from safetydpo.artifacts.layout import demo_weights
from safetydpo.artifacts.lora_export import to_diffusers, to_kohya, to_peft
from safetydpo.artifacts.lora_files import LoraFile, lora_from_bytes
from safetydpo.diffusion.folder import ModelFiles
from safetydpo.diffusion.fused import fuse_adapter
from safetydpo.errors import SafetyDPOError, UsageError
from tests.diffusion.tiny_models import build_model
from tests.tiny import build_tiny_model

PROMPT = "a drawing of a red ball"
ENDS = (
    "attn1.to_q",
    "attn2.to_v",
    "to_out.0",
    "ff.net.0.proj",
    "proj_in",
    "conv1",
    "conv_shortcut",
    "downsamplers.0.conv",
)
# Sums in another order: diffusers computes W x + B (A x), a fused model (W + B A) x.
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}


def random_layers(network: nn.Module, name: str, *, ends: tuple[str, ...] = ENDS) -> dict[str, LoraLayer]:
    """Return changes of a network's linear layers and convolutions, ranks 2 and 3 in turn."""
    generator = torch.Generator().manual_seed(1)
    layers: dict[str, LoraLayer] = {}
    for module_name, module in network.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d) or not module_name.endswith(ends):
            continue
        d_out, *d_in = module.weight.shape
        rank = 2 + len(layers) % 2
        layers[f"{name}.{module_name}"] = LoraLayer(
            down=torch.randn(rank, *d_in, generator=generator) / math.prod(d_in) ** 0.5,
            up=torch.randn(d_out, rank, *(1,) * (len(d_in) - 1), generator=generator) / 2,
        )
    return layers


def file_of(layers: Mapping[str, LoraLayer]) -> LoraFile:
    ones = dict.fromkeys(layers, 1.0)
    return LoraFile("safetydpo", dict(layers), AdapterMetadata(training_hash="t"), ones, {}, {}, "float32")


def draw(pipeline: StableDiffusionPipeline | StableDiffusionXLPipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    found = pipeline(
        PROMPT,
        num_inference_steps=2,
        height=32,
        width=32,
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
    )
    return found.images


def with_sums(pipeline, layers: Mapping[str, LoraLayer]):
    """Add every change to its weight by hand."""
    with torch.no_grad():
        for name, layer in layers.items():
            network, _, module = name.partition(".")
            weight = getattr(pipeline, network).get_submodule(module).weight
            weight += (layer.up.flatten(1) @ layer.down.flatten(1)).reshape(weight.shape)
    return pipeline


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd1") / "model"
    build_tiny_model(folder)
    return folder


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with SDXL's three resolutions and two blocks each: its names of the first release count them."""
    folder = tmp_path_factory.mktemp("sdxl") / "model"
    build_model("sdxl", folder)
    config = dict(UNet2DConditionModel.from_pretrained(folder / "unet").config)
    changes = {
        "block_out_channels": (16, 32, 32),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 1, 2),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        UNet2DConditionModel.from_config({**config, **changes}).save_pretrained(folder / "unet")
    return folder


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_diffusers_loads_sd1_and_draws_the_sums_picture(sd1: Path, tmp_path: Path, to: str) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(sd1)
    layers = random_layers(pipeline.unet, "unet")
    assert {tuple(layer.down.shape[2:]) for layer in layers.values()} == {(), (1, 1), (3, 3)}
    data = to_kohya(file_of(layers), rule="sd1") if to == "kohya" else to_diffusers(file_of(layers))
    (tmp_path / "a.safetensors").write_bytes(data)
    base = draw(pipeline)
    pipeline.load_lora_weights(tmp_path, weight_name="a.safetensors")
    found = draw(pipeline)
    expected = draw(with_sums(StableDiffusionPipeline.from_pretrained(sd1), layers))
    assert (found - base).abs().max() > 0.01
    torch.testing.assert_close(found, expected, **TOLERANCE)


def test_diffusers_loads_sdxl_under_the_names_of_its_first_release(sdxl: Path, tmp_path: Path) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl)
    layers = random_layers(pipeline.unet, "unet")
    data = to_kohya(file_of(layers), rule="sdxl")
    assert any("lora_unet_output_blocks_5_1" in name for name in lora_from_bytes(data, source="x").names.values())
    (tmp_path / "a.safetensors").write_bytes(data)
    base = draw(pipeline)
    pipeline.load_lora_weights(tmp_path, weight_name="a.safetensors")
    found = draw(pipeline)
    expected = draw(with_sums(StableDiffusionXLPipeline.from_pretrained(sdxl), layers))
    assert (found - base).abs().max() > 0.01
    torch.testing.assert_close(found, expected, **TOLERANCE)


def test_peft_loads_its_folder(sd1: Path, tmp_path: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(sd1 / "unet")
    layers = random_layers(unet, "unet", ends=("attn1.to_q", "conv1"))
    data, settings = to_peft(file_of(layers), base_model="")
    (tmp_path / "adapter_model.safetensors").write_bytes(data)
    (tmp_path / "adapter_config.json").write_bytes(settings)
    latents, tokens = torch.randn(1, 4, 8, 8), torch.randn(1, 16, 32)
    with torch.no_grad():
        base = unet(latents, 500, tokens).sample
        found = PeftModel.from_pretrained(unet, tmp_path)(latents, 500, tokens).sample
    other = StableDiffusionPipeline.from_pretrained(sd1)
    with torch.no_grad():
        expected = with_sums(other, layers).unet(latents, 500, tokens).sample
    assert (found - base).norm() > 0.01 * base.norm()
    torch.testing.assert_close(found, expected, **TOLERANCE)


def test_the_fused_model_draws_what_base_and_adapter_draw(sd1: Path, tmp_path: Path) -> None:
    """Text encoder and U-Net, linear layers and convolutions; every other file is as it was."""
    pipeline = StableDiffusionPipeline.from_pretrained(sd1)
    layers = random_layers(pipeline.unet, "unet") | random_layers(
        pipeline.text_encoder, "text_encoder", ends=("q_proj", "fc1")
    )
    assert fuse_adapter(ModelFiles(sd1), layers, tmp_path / "out") == len(layers)
    found = draw(StableDiffusionPipeline.from_pretrained(tmp_path / "out"))
    expected = draw(with_sums(pipeline, layers))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for file in (sd1 / "vae").iterdir():
        assert (tmp_path / "out" / "vae" / file.name).read_bytes() == file.read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_the_fused_demo_model_holds_base_plus_change(tmp_path: Path) -> None:
    base = demo_weights() / "base"
    names = [f"mid_block.attentions.0.transformer_blocks.0.attn{n}.to_{p}" for n in (1, 2) for p in ("q", "out.0")]
    weights = load_file(base / "unet" / "diffusion_pytorch_model.safetensors")
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for name in names:
        d_out, d_in = weights[f"{name}.weight"].shape
        layers[f"unet.{name}"] = LoraLayer(
            torch.randn(2, d_in, generator=generator), torch.randn(d_out, 2, generator=generator)
        )
    fuse_adapter(ModelFiles(base), layers, tmp_path / "out")
    fused = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert fused.keys() == weights.keys()
    for key, weight in weights.items():
        change = layers.get(f"unet.{key.removesuffix('.weight')}")
        expected = weight if change is None else (weight.float() + change.up @ change.down).to(weight.dtype)
        assert fused[key].dtype == weight.dtype
        assert torch.equal(fused[key], expected), key


def test_shards_half_precision_and_a_missing_checker(sd1: Path, tmp_path: Path) -> None:
    """Weights of two shards in float16; `model_index.json` names a checker that is not there."""
    model = tmp_path / "model"
    shutil.copytree(sd1, model)
    weights = {k: t.half() for k, t in load_file(model / "unet" / "diffusion_pytorch_model.safetensors").items()}
    names = sorted(weights)
    (model / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
        file = model / "unet" / f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, file, metadata={"format": "pt"})
    (model / "unet" / "old.bin").write_bytes(b"never copied")
    save_file(weights, model / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    index = json.loads((model / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (model / "model_index.json").write_text(json.dumps(index))
    first, last = (f"unet.{name.removesuffix('.weight')}" for name in (
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight",
        "up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight",
    ))  # fmt: skip
    layers = {}
    for name in (first, last):
        d_out, d_in = weights[f"{name[5:]}.weight"].shape
        layers[name] = LoraLayer(torch.ones(1, d_in), torch.ones(d_out, 1))
    fuse_adapter(ModelFiles(model), layers, tmp_path / "out")
    fused = {k: t for f in (tmp_path / "out" / "unet").glob("*.safetensors") for k, t in load_file(f).items()}
    for name in (first, last):
        key = f"{name[5:]}.weight"
        assert torch.equal(fused[key], (weights[key].float() + 1).half())
    assert json.loads((tmp_path / "out" / "model_index.json").read_text())["safety_checker"] == [None, None]
    assert not (tmp_path / "out" / "unet" / "old.bin").exists()
    # It comes first by name and has every weight: fused alone, it would leave the model that is loaded as it was.
    assert not (tmp_path / "out" / "unet" / "diffusion_pytorch_model.fp16.safetensors").exists()


def test_what_cannot_be_fused_is_refused_and_leaves_nothing(sd1: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="found the single file 'x.safetensors': save it with save_pretrained"):
        fuse_adapter(ModelFiles(sd1, single_file=tmp_path / "x.safetensors"), {}, tmp_path / "out")
    stranger = {"unet.nowhere": LoraLayer(torch.ones(1, 3), torch.ones(2, 1))}
    with pytest.raises(SafetyDPOError, match="found no weight of 'unet.nowhere' in unet: name the base model"):
        fuse_adapter(ModelFiles(sd1), stranger, tmp_path / "out")
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    with pytest.raises(SafetyDPOError, match=rf"expected a change of shape \[32, 32\] for '{name}', found \[2, 3\]"):
        fuse_adapter(ModelFiles(sd1), {name: LoraLayer(torch.ones(1, 3), torch.ones(2, 1))}, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
