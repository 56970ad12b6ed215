from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from safetydpo.config.schema import BaseModelConfig
from safetydpo.diffusion.build import base_fingerprint, load_backbone
from safetydpo.diffusion.sd3 import T5_TOKENS, StableDiffusion3
from safetydpo.errors import SafetyDPOError
from tests.diffusion.tiny_models import SIZE, WIDTH_T5, build_model
from tests.tiny import MAX_TOKENS

PROMPTS = ["a red ball on a house", "a drawing of a dagger"]


def assert_latents_equal_the_pipeline(folder: Path, pipeline: StableDiffusion3Pipeline, *, tokens: int) -> None:
    """Same noise, steps and guidance: largest difference seen 0.0."""
    pipeline.set_progress_bar_config(disable=True)
    backbone = StableDiffusion3.from_folder(folder)
    noise = torch.randn(2, 16, SIZE // 4, SIZE // 4, generator=torch.Generator().manual_seed(0))
    empty = backbone.encode_prompts(["", ""])
    ours = backbone.sample(noise, backbone.encode_prompts(PROMPTS), empty=empty, steps=4, guidance_scale=4.0)
    theirs = pipeline(
        PROMPTS, num_inference_steps=4, guidance_scale=4.0, latents=noise, output_type="latent",
        height=SIZE, width=SIZE, max_sequence_length=tokens,
    ).images  # fmt: skip
    assert float((ours - theirs).abs().max()) == 0.0


def test_without_t5_its_tokens_are_zeros_as_in_the_pipeline(tmp_path: Path):
    build_model("sd3-without-t5", tmp_path)
    backbone = load_backbone(BaseModelConfig(model=str(tmp_path)))
    assert backbone.fingerprint == base_fingerprint(BaseModelConfig(model=str(tmp_path)))
    tokens = backbone.encode_prompts(PROMPTS).tokens
    assert tokens.shape == (2, MAX_TOKENS + T5_TOKENS, WIDTH_T5)
    assert not tokens[:, MAX_TOKENS:].any()
    ids = backbone.tokenize(PROMPTS)
    assert ids.shape == (2, 2 * MAX_TOKENS)
    given = backbone.encode_prompt_embeddings(backbone.token_embedding_table()[ids], ids=ids)
    assert torch.equal(given.tokens, tokens)
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path, text_encoder_3=None, tokenizer_3=None)
    assert_latents_equal_the_pipeline(tmp_path, pipeline, tokens=T5_TOKENS)


def test_a_dynamic_shift_is_the_pipelines(tmp_path: Path):
    build_model("sd3", tmp_path, scheduler={"use_dynamic_shifting": True})
    assert_latents_equal_the_pipeline(tmp_path, StableDiffusion3Pipeline.from_pretrained(tmp_path), tokens=MAX_TOKENS)
    backbone = StableDiffusion3.from_folder(tmp_path)
    with pytest.raises(SafetyDPOError, match="expected the size of the picture, because this model's sampling steps"):
        backbone.sampling_timesteps(4)


def test_a_vocabulary_that_would_have_to_be_converted_is_refused(tmp_path: Path):
    build_model("sd3", tmp_path)
    (tmp_path / "tokenizer_3" / "tokenizer.json").rename(tmp_path / "tokenizer_3" / "spiece.model")
    with pytest.raises(SafetyDPOError, match=r"found no tokenizer.json in .*tokenizer_3: save the model"):
        StableDiffusion3.from_folder(tmp_path)
