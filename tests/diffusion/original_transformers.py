"""Write an SD3 or FLUX.1 model as one file in the layout of its first release, by renaming tensors back.

What a published file holds differs: `parts` says which networks beside the transformer it does.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.diffusion.original_layout import clip_weights, vae_tensors, weights_in

SD3_ENCODERS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"}
FLUX_ENCODERS = {"text_encoder": "clip_l", "text_encoder_2": "t5xxl"}
SD3_TOP = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}
SD3_BLOCK = {
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
SD3_JOINT = {
    ("attn.to_q", "attn.to_k", "attn.to_v"): "x_block.attn.qkv",
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"): "context_block.attn.qkv",
    ("attn2.to_q", "attn2.to_k", "attn2.to_v"): "x_block.attn2.qkv",
}
FLUX_TOP = {
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "context_embedder": "txt_in",
    "x_embedder": "img_in",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}
FLUX_DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
    "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
    "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
FLUX_JOINT = {
    ("attn.to_q", "attn.to_k", "attn.to_v"): "img_attn.qkv",
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"): "txt_attn.qkv",
}
FLUX_SINGLE = {
    "norm.linear": "modulation.lin",
    "attn.norm_q.weight": "norm.query_norm.scale",
    "attn.norm_k.weight": "norm.key_norm.scale",
    "proj_out": "linear2",
}
FLUX_SINGLE_JOINT = {("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"): "linear1"}


def save_sd3_file(folder: Path, file: Path, *, parts: Collection[str], half_t5: bool = False) -> None:
    """Write the transformer of a diffusers folder and `parts` of the rest; with `half_t5` T5 has 8 bits."""
    weights = weights_in(folder / "transformer")
    tensors = _turned(_renamed(weights, "", SD3_TOP, {}), "final_layer.adaLN_modulation.1")
    for block in _blocks(weights, "transformer_blocks"):
        tensors |= _renamed(weights, f"transformer_blocks.{block}.", SD3_BLOCK, SD3_JOINT, f"joint_blocks.{block}.")
    # The last block's context is normalised like the output: shift before scale.
    tensors = _turned(tensors, f"joint_blocks.{block}.context_block.adaLN_modulation.1")
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}
    tensors |= _rest(folder, parts, SD3_ENCODERS)
    if half_t5:
        is_t5 = "text_encoders.t5xxl."
        tensors = {n: t.to(torch.float8_e4m3fn) if n.startswith(is_t5) else t for n, t in tensors.items()}
    _save(tensors, file)


def save_flux_file(folder: Path, file: Path, *, parts: Collection[str], prefix: str = "") -> None:
    """Write the transformer of a diffusers folder, its names after `prefix`, and `parts` of the rest."""
    weights = weights_in(folder / "transformer")
    tensors = _turned(_renamed(weights, "", FLUX_TOP, {}), "final_layer.adaLN_modulation.1")
    for block in _blocks(weights, "transformer_blocks"):
        tensors |= _renamed(weights, f"transformer_blocks.{block}.", FLUX_DOUBLE, FLUX_JOINT, f"double_blocks.{block}.")
    for block in _blocks(weights, "single_transformer_blocks"):
        places = (f"single_transformer_blocks.{block}.", f"single_blocks.{block}.")
        tensors |= _renamed(weights, places[0], FLUX_SINGLE, FLUX_SINGLE_JOINT, places[1])
    _save(
        {**{f"{prefix}{name}": tensor for name, tensor in tensors.items()}, **_rest(folder, parts, FLUX_ENCODERS)}, file
    )


def _save(tensors: Mapping[str, Tensor], file: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


def _blocks(weights: Mapping[str, Tensor], stem: str) -> list[int]:
    return sorted({int(match[1]) for name in weights if (match := re.match(rf"{stem}\.(\d+)\.", name))})


def _renamed(
    weights: Mapping[str, Tensor],
    stem: str,
    names: Mapping[str, str],
    joint: Mapping[tuple[str, ...], str],
    old_stem: str = "",
) -> dict[str, Tensor]:
    """Return the tensors below `stem` under their old names; several maps of one input become one."""
    found = {}
    for new, old in names.items():
        for end in ("", ".weight", ".bias"):
            if f"{stem}{new}{end}" in weights:
                found[f"{old_stem}{old}{end}"] = weights[f"{stem}{new}{end}"]
    for parts, old in joint.items():
        for end in ("weight", "bias"):
            if f"{stem}{parts[0]}.{end}" in weights:
                found[f"{old_stem}{old}.{end}"] = torch.cat([weights[f"{stem}{part}.{end}"] for part in parts])
    return found


def _turned(tensors: Mapping[str, Tensor], layer: str) -> dict[str, Tensor]:
    """Return the same with scale and shift of one layer changed over."""
    ends = {f"{layer}.{end}" for end in ("weight", "bias")}
    return {name: torch.cat(tensor.chunk(2)[::-1]) if name in ends else tensor for name, tensor in tensors.items()}


def _rest(folder: Path, parts: Collection[str], encoders: Mapping[str, str]) -> dict[str, Tensor]:
    tensors = vae_tensors(folder / "vae") if "vae" in parts else {}
    for component in sorted(set(parts) & set(encoders)):
        place = f"text_encoders.{encoders[component]}."
        is_t5 = encoders[component] == "t5xxl"
        weights = weights_in(folder / component) if is_t5 else clip_weights(folder / component)
        tensors |= {f"{place}transformer.{name}": tensor for name, tensor in weights.items()}
        if not is_t5:
            tensors[f"{place}logit_scale"] = torch.ones(())
    return tensors
