"""Adapters of self- or of cross-attention alone, in U-Nets; refused where attention is joint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler

from safetydpo.artifacts.adapters import AdapterMetadata, LoraLayer, LoraSignature, read_adapter, write_adapter
from safetydpo.artifacts.storage import open_location
from safetydpo.config.schema import BaseModelConfig
from safetydpo.config.training import LoraConfig
from safetydpo.diffusion.build import check_targets, load_backbone
from safetydpo.errors import UsageError
from tests.diffusion.tiny_models import SIZE, build_model

PROMPTS = ["a red ball on a house", "a drawing of a dagger"]
FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place: Path = tmp_path_factory.mktemp(request.param)
    build_model(request.param, place)
    return place


@pytest.mark.parametrize(("attention", "block"), [("self", "attn1"), ("cross", "attn2")])
def test_its_file_holds_one_kind_of_layer_and_draws_the_same_in_plain_diffusers(
    folder: Path, attention: str, block: str, tmp_path: Path
):
    lora = LoraConfig.model_validate({"rank": 4, "attention": attention})
    base = BaseModelConfig(model=str(folder))
    check_targets(base, lora.layer_targets, attention=lora.attention)
    backbone = load_backbone(base)
    signature = LoraSignature(4, 4.0, lora.layer_targets)
    every = [name for name, _ in backbone.named_linear_layers(lora.targets)]
    generator = torch.Generator().manual_seed(1)
    layers = {
        name: LoraLayer(
            down=torch.randn(4, d_in, generator=generator) / d_in**0.5,
            up=0.5 * torch.randn(d_out, 4, generator=generator),
        )
        for name, (d_in, d_out) in backbone.named_linear_layers(signature.targets)
    }
    assert list(layers) == [name for name in every if f".{block}." in name]
    assert 2 * len(layers) == len(every)

    prompts, empty = backbone.encode_prompts(PROMPTS), backbone.encode_prompts([""] * 2)
    shape = backbone.latent_shape(height=SIZE, width=SIZE)
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))

    def draw() -> torch.Tensor:
        return backbone.sample(noise, prompts, empty=empty, steps=3, guidance_scale=4.0)

    before = draw()
    backbone.swap_adapter(signature, layers)
    place = open_location(str(tmp_path)) / FILE
    metadata = AdapterMetadata(denoiser=backbone.denoiser, signature=signature)
    write_adapter(place, backbone.export_adapter(), metadata=metadata)
    assert read_adapter(place)[1].signature == signature

    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(tmp_path, weight_name=FILE)
    arguments = {"num_inference_steps": 3, "height": SIZE, "width": SIZE, "output_type": "latent"}
    theirs = pipeline(PROMPTS, latents=noise, guidance_scale=4.0, **arguments).images
    ours = draw()
    assert float((ours - theirs).abs().max()) == 0.0
    assert float((ours - before).abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["sd3", "flux-dev"])
def test_joint_attention_is_refused_by_name(name: str, tmp_path: Path):
    build_model(name, tmp_path)
    lora = LoraConfig(attention="cross")
    with pytest.raises(
        UsageError, match=r"expected lora\.attention 'all' for a transformer, found 'cross': only U-Nets"
    ):
        check_targets(BaseModelConfig(model=str(tmp_path)), lora.layer_targets, attention=lora.attention)
