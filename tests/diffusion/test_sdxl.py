from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

from safetydpo.config.schema import BaseModelConfig
from safetydpo.diffusion.adapter import AdapterSlot
from safetydpo.diffusion.backbone import Condition
from safetydpo.diffusion.build import base_fingerprint, load_backbone
from safetydpo.diffusion.folder import read_json
from safetydpo.diffusion.sdxl import StableDiffusionXL
from safetydpo.errors import SafetyDPOError
from tests.diffusion.tiny_models import build_model

SDXL_UNET = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
"""The U-Net of stable-diffusion-xl-base-1.0."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdxl")
    build_model("sdxl", folder)
    return folder


@pytest.fixture(scope="module")
def backbone(folder: Path) -> StableDiffusionXL:
    return StableDiffusionXL.from_folder(folder)


def test_rank_4_on_sdxl_has_5806080_parameters():
    """70 transformer blocks, 560 layers.

    By hand: 10 blocks of 640 and 60 of 1280 channels; a block of c channels has 4 + 2 maps c -> c and 2 maps
    2048 -> c, that is 4 (6 * 2c + 2 (2048 + c)): 10 * 52,224 = 522,240 and 60 * 88,064 = 5,283,840 parameters.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL_UNET)
    assert sum(parameter.numel() for parameter in unet.parameters()) == 2_567_463_684
    shapes = list(AdapterSlot(unet).shapes(("to_q", "to_k", "to_v", "to_out.0")))
    assert len(shapes) == 560
    assert sum(4 * (d_in + d_out) for _, (d_in, d_out) in shapes) == 5_806_080


def test_empty_texts_are_zeros_as_in_the_pipeline_unless_the_model_says_no(folder: Path, tmp_path: Path):
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    _, empty, _, empty_pooled = pipeline.encode_prompt(["a red ball"], device="cpu", num_images_per_prompt=1)
    ours = StableDiffusionXL.from_folder(folder).encode_prompts(["", "a red ball"])
    assert ours.pooled is not None
    assert torch.equal(ours.tokens[:1], empty)
    assert torch.equal(ours.pooled[:1], empty_pooled)
    assert ours.tokens[1].abs().max() > 0
    build_model("sdxl", tmp_path)
    index = (tmp_path / "model_index.json").read_text()
    (tmp_path / "model_index.json").write_text(index.replace('prompt": true', 'prompt": false'))
    other = StableDiffusionXL.from_folder(tmp_path)
    assert read_json(tmp_path / "model_index.json")["force_zeros_for_empty_prompt"] is False
    assert other.encode_prompts([""]).tokens.abs().max() > 0
    assert other.fingerprint != StableDiffusionXL.from_folder(folder).fingerprint


def test_sizes_are_the_pictures_own_unless_the_condition_says_otherwise(backbone: StableDiffusionXL, folder: Path):
    """Original 96 x 64 with a crop, target 48 x 32: the same latents as the pipeline's with these arguments."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 12, 8, generator=torch.Generator().manual_seed(0))
    prompts, empty = backbone.encode_prompts(["a red ball"]), backbone.encode_prompts([""])
    common = {"num_inference_steps": 3, "guidance_scale": 3.0, "latents": noise, "output_type": "latent"}
    sizes = torch.tensor([[96.0, 64.0, 8.0, 4.0, 48.0, 32.0]])
    plain = backbone.sample(noise, prompts, empty=empty, steps=3, guidance_scale=3.0)
    theirs = pipeline("a red ball", height=48, width=32, **common).images
    assert torch.equal(plain, theirs)
    sized = backbone.sample(
        noise, replace(prompts, sizes=sizes), empty=replace(empty, sizes=sizes), steps=3, guidance_scale=3.0
    )
    theirs = pipeline(
        "a red ball", height=48, width=32, original_size=(96, 64), crops_coords_top_left=(8, 4), target_size=(48, 32),
        **common,
    ).images  # fmt: skip
    assert torch.equal(sized, theirs)
    assert not torch.equal(sized, plain)


def test_a_condition_without_pooled_features_is_refused(backbone: StableDiffusionXL):
    bare = Condition(backbone.encode_prompts(["a red ball"]).tokens)
    with pytest.raises(SafetyDPOError, match="expected a condition with pooled features, .* found none: encode"):
        backbone.predict(torch.zeros(1, 4, 8, 8), torch.tensor([5]), bare)
    with pytest.raises(ValueError, match="found one with and one without pooled: encode both with the same model"):
        bare.followed_by(backbone.encode_prompts(["a"]))


def test_an_autoencoder_that_overflows_is_computed_in_float32_another_one_in_float16(folder: Path, tmp_path: Path):
    half = load_backbone(BaseModelConfig(model=str(folder), dtype="float16"))
    assert half._parts.vae.dtype == torch.float32  # type: ignore[attr-defined]
    assert next(half.network.parameters()).dtype == torch.float16
    config = AutoencoderKL.load_config(folder / "vae")
    torch.manual_seed(1)
    AutoencoderKL.from_config(config | {"force_upcast": False}).save_pretrained(tmp_path / "fixed")
    base = BaseModelConfig(model=str(folder), dtype="float16", vae=str(tmp_path / "fixed"))
    fixed = load_backbone(base)
    assert fixed._parts.vae.dtype == torch.float16  # type: ignore[attr-defined]
    assert base_fingerprint(base) == fixed.fingerprint != half.fingerprint
    other = AutoencoderKL.from_pretrained(tmp_path / "fixed")
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        decoded = other.decode(latents / config["scaling_factor"]).sample
    theirs = ((decoded * 0.5 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1)
    whole = load_backbone(BaseModelConfig(model=str(folder), vae=str(tmp_path / "fixed")))
    assert (whole.decode(latents).int() - theirs.int()).abs().max() <= 1


def test_an_autoencoder_that_normalises_by_channel_is_refused(tmp_path: Path):
    build_model("sdxl", tmp_path)
    path = tmp_path / "vae" / "config.json"
    path.write_text(path.read_text().replace('"latents_mean": null', '"latents_mean": [1.0, 1.0, 1.0, 1.0]'))
    with pytest.raises(SafetyDPOError, match="expected an autoencoder without latents_mean and latents_std, found"):
        StableDiffusionXL.from_folder(tmp_path)
