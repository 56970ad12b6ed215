"""Tiny random models of every family, in the true classes of diffusers and transformers, in diffusers folder format.

Pictures of 32 x 32; tokenizers are built from a few words, so that nothing is fetched.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from tests.tiny import MAX_TOKENS, WORDS, build_tokenizer

SIZE = 32
WIDTH, WIDTH_2, WIDTH_T5 = 16, 24, 48
FAMILIES = ("sd1", "sd2", "sdxl", "sd3", "sd3-dual", "flux-dev", "flux-schnell")
"""`sd3-dual` has the second attention of Stable Diffusion 3.5 medium."""
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def build_model(name: str, folder: Path, *, seed: int = 0, scheduler: Mapping[str, Any] | None = None) -> None:
    """Write a tiny model of a family into `folder`, as `save_pretrained` does; `scheduler` overrides its settings."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = BUILDERS[name](dict(scheduler or {}))
    pipeline.save_pretrained(folder, safe_serialization=True)


def build_t5_tokenizer() -> T5TokenizerFast:
    """Return T5's tokenizer with a dozen whole words and single letters."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = ["▁", *letters, *(f"▁{word}" for word in WORDS)]
    vocabulary = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", -10.0),
        *((piece, -1.0 - 0.1 * i) for i, piece in enumerate(pieces)),
    ]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=MAX_TOKENS)


def _clip(kind: type, width: int) -> Any:
    tokenizer = build_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projection_dim=width,
    )
    encoder = kind(config)
    with torch.no_grad():
        encoder.get_input_embeddings().weight.normal_(std=1.0)
    return encoder


def _t5() -> T5EncoderModel:
    tokenizer = build_t5_tokenizer()
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer), d_model=WIDTH_T5, d_kv=8, d_ff=64, num_layers=2, num_heads=2,
            feed_forward_proj="gated-gelu", dense_act_fn="gelu_new",
        )
    )  # fmt: skip


def _vae(channels: int, **settings: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=SIZE,
        **settings,
    )


def _unet(width_text: int, **settings: Any) -> UNet2DConditionModel:
    unet = UNet2DConditionModel(
        sample_size=SIZE // 4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=width_text,
        norm_num_groups=8,
        **settings,
    )
    return _sensitive(unet, (".attn2.to_v", ".attn2.to_out.0"))


def _sensitive(network: Any, suffixes: tuple[str, ...]) -> Any:
    # Freshly initialised, prompts barely change the prediction; a trained network's do.
    with torch.no_grad():
        for name, module in network.named_modules():
            if isinstance(module, nn.Linear) and name.endswith(suffixes):
                module.weight.mul_(3.0)
    return network


def _stable_diffusion(scheduler: dict[str, Any]) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=_vae(4, scaling_factor=0.5),
        text_encoder=_clip(CLIPTextModel, WIDTH),
        tokenizer=build_tokenizer(),
        unet=_unet(WIDTH),
        scheduler=DDIMScheduler(**(BETAS | {"steps_offset": 1, "clip_sample": False} | scheduler)),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _stable_diffusion_2(scheduler: dict[str, Any]) -> StableDiffusionPipeline:
    """v-prediction down to zero signal, as in models fine-tuned for it."""
    settings = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return _stable_diffusion(settings | scheduler)


def _stable_diffusion_xl(scheduler: dict[str, Any]) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        vae=_vae(4, scaling_factor=0.13025, force_upcast=True),
        text_encoder=_clip(CLIPTextModel, WIDTH),
        text_encoder_2=_clip(CLIPTextModelWithProjection, WIDTH_2),
        tokenizer=build_tokenizer(),
        tokenizer_2=build_tokenizer(),
        unet=_unet(
            WIDTH + WIDTH_2,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=WIDTH_2 + 6 * 8,
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
        ),
        scheduler=EulerDiscreteScheduler(**(BETAS | {"steps_offset": 1, "timestep_spacing": "leading"} | scheduler)),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def _stable_diffusion_3(
    scheduler: dict[str, Any], *, with_t5: bool = True, **settings: Any
) -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=SIZE // 4,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH_T5,
        caption_projection_dim=16,
        pooled_projection_dim=WIDTH + WIDTH_2,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
        **settings,
    )
    return StableDiffusion3Pipeline(
        vae=_vae(16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=_clip(CLIPTextModelWithProjection, WIDTH),
        text_encoder_2=_clip(CLIPTextModelWithProjection, WIDTH_2),
        text_encoder_3=_t5() if with_t5 else None,
        tokenizer=build_tokenizer(),
        tokenizer_2=build_tokenizer(),
        tokenizer_3=build_t5_tokenizer() if with_t5 else None,
        transformer=_random(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(**({"shift": 3.0} | scheduler)),
    )


def _flux(scheduler: dict[str, Any], *, guidance_embeds: bool = True) -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH_T5,
        pooled_projection_dim=WIDTH,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(2, 2, 4),
    )
    settings = {"shift": 3.0 if guidance_embeds else 1.0, "use_dynamic_shifting": guidance_embeds, "max_shift": 1.15}
    return FluxPipeline(
        vae=_vae(16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=_clip(CLIPTextModel, WIDTH),
        text_encoder_2=_t5(),
        tokenizer=build_tokenizer(),
        tokenizer_2=build_t5_tokenizer(),
        transformer=_random(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(**(settings | scheduler)),
    )


def _random(transformer: Any) -> Any:
    # Some layers of these start at zero, which would hide what flows through them.
    with torch.no_grad():
        for module in transformer.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=module.in_features**-0.5)
    return transformer


BUILDERS: Mapping[str, Any] = {
    "sd1": _stable_diffusion,
    "sd2": _stable_diffusion_2,
    "sdxl": _stable_diffusion_xl,
    "sd3": _stable_diffusion_3,
    "sd3-without-t5": lambda scheduler: _stable_diffusion_3(scheduler, with_t5=False),
    "sd3-dual": lambda scheduler: _stable_diffusion_3(scheduler, dual_attention_layers=(0,)),
    "flux-dev": _flux,
    "flux-schnell": lambda scheduler: _flux(scheduler, guidance_embeds=False),
}
