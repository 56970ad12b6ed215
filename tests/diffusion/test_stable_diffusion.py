from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor

from safetydpo.artifacts.adapters import LoraSignature
from safetydpo.diffusion import schedule
from safetydpo.diffusion.stable_diffusion import StableDiffusion
from safetydpo.errors import SafetyDPOError
from tests.diffusion.models import Model, load_model
from tests.tiny import build_tiny_model

PROMPTS = ["a red ball on a house", "a drawing of a dagger"]


def largest_difference(ours: torch.Tensor, theirs: np.ndarray) -> int:
    return int(np.abs(ours.numpy().astype(int) - (theirs * 255).round().astype(int)).max())


def assert_pictures_equal_the_pipeline(model: Model, pipeline, *, negative: str) -> None:
    """Same initial latents, same solver: at most one of 256 levels apart (seen: 0)."""
    noise = model.noise(2)
    backbone = model.backbone
    latents = backbone.sample(
        noise,
        backbone.encode_prompts(PROMPTS),
        empty=backbone.encode_prompts([negative]),
        steps=5,
        guidance_scale=4.0,
    )
    theirs = pipeline(
        PROMPTS,
        negative_prompt=[negative] * 2,
        num_inference_steps=5,
        guidance_scale=4.0,
        latents=noise,
        output_type="np",
    ).images
    assert largest_difference(backbone.decode(latents), theirs) <= 1


@pytest.mark.parametrize("negative", ["", "a green flower"])
def test_pictures_equal_the_diffusers_pipeline(model: Model, load_pipeline, negative: str):
    assert_pictures_equal_the_pipeline(model, load_pipeline(model.folder), negative=negative)


@pytest.mark.parametrize("autoencoder", ["tiny", "kl"])
def test_v_prediction_pictures_equal_the_diffusers_pipeline(load_pipeline, tmp_path: Path, autoencoder):
    build_tiny_model(tmp_path, prediction_type="v_prediction", autoencoder=autoencoder)
    model = load_model(tmp_path, shrink=4)
    assert model.backbone.prediction_type == "v_prediction"
    assert_pictures_equal_the_pipeline(model, load_pipeline(tmp_path), negative="")


def test_without_guidance_pictures_equal_the_diffusers_pipeline(model: Model, load_pipeline):
    noise, backbone = model.noise(2), model.backbone
    prompts = backbone.encode_prompts(PROMPTS)
    latents = backbone.sample(noise, prompts, empty=backbone.encode_prompts([""]), steps=4, guidance_scale=1.0)
    theirs = load_pipeline(model.folder)(
        PROMPTS, num_inference_steps=4, guidance_scale=1.0, latents=noise, output_type="np"
    ).images
    assert largest_difference(backbone.decode(latents), theirs) <= 1


def test_prompts_are_encoded_as_the_pipeline_does(model: Model, load_pipeline):
    theirs, _ = load_pipeline(model.folder).encode_prompt(PROMPTS, "cpu", 1, False)
    assert torch.equal(model.backbone.encode_prompts(PROMPTS).tokens, theirs)


def test_given_token_embeddings_are_encoded_like_their_tokens(model: Model):
    backbone = model.backbone
    embeddings = backbone.token_embedding_table()[backbone.tokenize(PROMPTS)]
    assert torch.equal(backbone.encode_prompt_embeddings(embeddings).tokens, backbone.encode_prompts(PROMPTS).tokens)


def test_long_prompts_are_cut_and_counted(model: Model, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        ids = model.backbone.tokenize(["a red ball", "a red ball " * 200])
    assert ids.shape[0] == 2
    assert "1 of 2 prompts were cut to the model's" in caplog.text


def test_decoding_rounds_like_the_diffusers_image_processor(model: Model):
    kind = json.loads((model.folder / "vae" / "config.json").read_text())["_class_name"]
    vae = {"AutoencoderTiny": AutoencoderTiny, "AutoencoderKL": AutoencoderKL}[kind].from_pretrained(
        model.folder / "vae", torch_dtype=torch.float32
    )
    latents = model.noise(3) * 2
    with torch.no_grad():
        decoded = vae.decode(latents / vae.config.scaling_factor).sample
    theirs = VaeImageProcessor().postprocess(decoded, output_type="pil")
    ours = model.backbone.decode(latents)
    assert ours.dtype == torch.uint8
    assert np.array_equal(ours.numpy(), np.stack([np.asarray(picture) for picture in theirs]))


def test_encoding_equals_preprocessing_by_diffusers_and_the_mean_of_the_posterior(tmp_path: Path):
    build_tiny_model(tmp_path, autoencoder="kl")
    backbone = StableDiffusion.from_folder(tmp_path)
    images = torch.randint(0, 256, (2, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    vae = AutoencoderKL.from_pretrained(tmp_path / "vae")
    pixels = VaeImageProcessor(vae_scale_factor=4).preprocess(images.numpy().astype("float32") / 255)
    with torch.no_grad():
        theirs = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
    ours = backbone.encode_images(images)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert torch.equal(ours, backbone.encode_images(images))


def test_targets_and_noising_follow_the_prediction_type(tiny_folder: Path, tmp_path: Path):
    build_tiny_model(tmp_path, prediction_type="v_prediction")
    epsilon, v = StableDiffusion.from_folder(tiny_folder), StableDiffusion.from_folder(tmp_path)
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([0, 500, 999])
    at = {"timesteps": timesteps, "alphas_cumprod": v.alphas_cumprod}
    assert torch.equal(epsilon.target(latents, noise, timesteps), noise)
    assert torch.equal(v.target(latents, noise, timesteps, kind="epsilon"), noise)
    native = v.target(latents, noise, timesteps)
    assert torch.equal(native, schedule.v_target(latents, noise, **at))
    noisy = v.add_noise(latents, noise, timesteps)
    assert torch.equal(noisy, epsilon.add_noise(latents, noise, timesteps))
    torch.testing.assert_close(v.to_epsilon(native, noisy, timesteps), noise, rtol=1e-5, atol=1e-5)
    assert epsilon.to_epsilon(noise, noisy, timesteps) is noise


def test_networks_are_frozen_and_in_evaluation_mode(model: Model):
    parts = model.backbone._parts
    for network in (parts.denoiser, parts.vae, parts.towers[0]._encoder):
        assert not network.training
        assert not any(parameter.requires_grad for parameter in network.parameters())


def test_half_precision_base_keeps_a_float32_adapter(tiny_folder: Path):
    backbone = StableDiffusion.from_folder(tiny_folder, dtype=torch.bfloat16)
    condition = backbone.encode_prompts(["a red ball"])
    latents, timestep = torch.randn(1, 4, 8, 8), torch.tensor([300])
    base = backbone.predict(latents, timestep, condition)
    assert base.dtype == torch.bfloat16
    backbone.install_adapter(LoraSignature(rank=2, alpha=2.0, targets=("to_q",)))
    assert {tensor.dtype for _, tensor in backbone.adapter_parameters()} == {torch.float32}
    assert torch.equal(backbone.predict(latents, timestep, condition), base)
    sampled = backbone.sample(latents, condition, empty=condition, steps=2, guidance_scale=2.0)
    assert sampled.dtype == torch.float32
    assert backbone.decode(sampled).shape == (1, 32, 32, 3)


def test_sampling_timesteps_fall_and_sampling_can_start_later(model: Model):
    backbone = model.backbone
    timesteps = backbone.sampling_timesteps(6)
    assert len(timesteps) == 6
    assert timesteps == sorted(timesteps, reverse=True)
    seen: list[tuple[int, int]] = []

    def watch(step):
        seen.append((step.index, step.timestep))
        return step.combined

    prompts, empty = backbone.encode_prompts(["a red ball"]), backbone.encode_prompts([""])
    arguments = {"empty": empty, "steps": 6, "guidance_scale": 2.0}
    backbone.sample(model.noise(1), prompts, callback=watch, start_step=4, **arguments)
    assert seen == [(4, timesteps[4]), (5, timesteps[5])]
    with pytest.raises(SafetyDPOError, match="expected a start step from 0 to 5, found 6"):
        backbone.sample(model.noise(1), prompts, start_step=6, **arguments)


def test_a_condition_of_the_wrong_length_is_refused(model: Model):
    two = model.backbone.encode_prompts(["a", "b"])
    with pytest.raises(ValueError, match="expected a condition of 1 or 3 rows, found 2"):
        model.backbone.sample(model.noise(3), two, empty=two, steps=2, guidance_scale=2.0)


def test_picture_sizes_that_do_not_fit_are_refused(tiny_folder: Path):
    backbone = StableDiffusion.from_folder(tiny_folder)
    assert backbone.latent_shape(height=32, width=64) == (4, 8, 16)
    with pytest.raises(SafetyDPOError, match="multiples of 4, found 32 x 30"):
        backbone.latent_shape(height=32, width=30)


def test_recording_an_unknown_module_is_refused(model: Model):
    expected = pytest.raises(SafetyDPOError, match="expected the name of a module of the unet, found 'nope'")
    with expected, model.backbone.layer_inputs(["nope"]):
        pass


def test_another_autoencoder_class_is_refused(copy_of_tiny: Path):
    path = copy_of_tiny / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vae": ["diffusers", "VQModel"]}))
    with pytest.raises(SafetyDPOError, match="expected an autoencoder of class AutoencoderKL or AutoencoderTiny"):
        StableDiffusion.from_folder(copy_of_tiny)


def test_another_prediction_type_is_refused(copy_of_tiny: Path):
    path = copy_of_tiny / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "sample"}))
    with pytest.raises(SafetyDPOError, match="prediction_type epsilon or v_prediction, found 'sample'"):
        StableDiffusion.from_folder(copy_of_tiny)


def test_network_is_the_unet_that_carries_the_adapter(model: Model):
    model.backbone.install_adapter(LoraSignature(rank=1, alpha=1.0, targets=("to_q",)))
    assert isinstance(model.backbone.network, UNet2DConditionModel)
    trainable = [p for p in model.backbone.network.parameters() if p.requires_grad]
    assert len(trainable) == len(model.backbone.adapter_parameters())
