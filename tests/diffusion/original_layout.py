"""Write a Stable Diffusion 1, 2 or XL model as one file in the layout of its first release, by renaming tensors back.

Beside the weights stand the tensors that published files have and nobody needs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OPEN_CLIP = {
    "text_model.encoder.layers.": "transformer.resblocks.",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.embeddings.": "",
    "text_model.final_layer_norm": "ln_final",
    "text_projection.weight": "text_projection",
    "layer_norm": "ln_",
    "self_attn": "attn",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
UNET_ENDS = {
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def save_single_file(folder: Path, file: Path, *, layers_per_block: int, num_blocks: int, is_sd2: bool = False) -> None:
    """Write the weights of a diffusers folder to `file`; blocks are those of its U-Net, equal in number and depth."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in weights_in(folder / "unet").items():
        renamed = _unet_name(name, layers_per_block, num_blocks)
        tensors[f"model.diffusion_model.{renamed}"] = tensor
    tensors |= vae_tensors(folder / "vae")
    tensors |= _sd2_text(folder) if is_sd2 else _text(folder)
    tensors |= {"alphas_cumprod": torch.ones(1000), "model_ema.num_updates": torch.ones(1)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


def _text(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    has_two = (folder / "text_encoder_2").is_dir()
    first = "conditioner.embedders.0" if has_two else "cond_stage_model"
    for name, tensor in clip_weights(folder / "text_encoder").items():
        tensors[f"{first}.transformer.{name}"] = tensor
    tensors[f"{first}.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    if has_two:
        for name, tensor in _open_clip(clip_weights(folder / "text_encoder_2")).items():
            tensors[f"conditioner.embedders.1.model.{name}"] = tensor
        tensors["conditioner.embedders.1.model.logit_scale"] = torch.ones(())
    return tensors


def _sd2_text(folder: Path) -> dict[str, Tensor]:
    """Return the encoder in its own layout, with its last layer and its projection, which are never used."""
    weights = clip_weights(folder / "text_encoder")
    tensors = {f"cond_stage_model.model.{name}": tensor for name, tensor in _open_clip(weights).items()}
    last = {name: tensor for name, tensor in tensors.items() if ".resblocks.0." in name}
    tensors |= {name.replace(".resblocks.0.", ".resblocks.23."): torch.zeros_like(last[name]) for name in last}
    width = weights["text_model.final_layer_norm.weight"].shape[0]
    return {
        **tensors,
        "cond_stage_model.model.text_projection": torch.zeros(width, width),
        "cond_stage_model.model.logit_scale": torch.ones(()),
    }


def weights_in(folder: Path) -> Mapping[str, Tensor]:
    """Return the tensors of a component of one file."""
    return load_file(next(folder.glob("*.safetensors")))


def clip_weights(folder: Path) -> Mapping[str, Tensor]:
    """Return those of a CLIP text encoder, under the names that hold for every version of its library."""
    return {
        name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}": tensor
        for name, tensor in weights_in(folder).items()
    }


def _open_clip(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the second encoder in its own layout: three attention maps in one, the projection turned round."""
    found, attention = {}, re.compile(r"(.*self_attn)\.(q|k|v)_proj\.(weight|bias)")
    for name, tensor in weights.items():
        if match := attention.fullmatch(name):
            parts = [weights[f"{match[1]}.{which}_proj.{match[3]}"] for which in "qkv"]
            renamed, tensor = f"{match[1]}.in_proj_{match[3]}", torch.cat(parts)
        else:
            renamed, tensor = name, tensor.T if name == "text_projection.weight" else tensor
        for new, old in OPEN_CLIP.items():
            renamed = renamed.replace(new, old)
        found[renamed] = tensor.contiguous()
    return found


def vae_tensors(folder: Path) -> dict[str, Tensor]:
    """Return an autoencoder in its own layout."""
    tensors = {}
    for name, tensor in weights_in(folder).items():
        renamed, shape = _vae_name(name), tensor.shape
        is_map = ".attn_1." in renamed and tensor.ndim == 2
        tensors[f"first_stage_model.{renamed}"] = tensor.reshape(*shape, 1, 1) if is_map else tensor
    return tensors


def _replace_part(name: str, parts: Mapping[str, str]) -> str:
    for new, old in parts.items():
        name = re.sub(rf"(^|\.){re.escape(new)}(?=\.)", rf"\g<1>{old}", name)
    return name


def _unet_name(name: str, depth: int, num_blocks: int) -> str:
    for new, old in UNET_ENDS.items():
        if name.startswith(f"{new}."):
            return name.replace(new, old, 1)
    if match := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name):
        kind, index, rest = match.groups()
        if kind == "attentions":
            return f"middle_block.1.{rest}"
        return f"middle_block.{2 * int(index)}.{_replace_part(rest, RESNET)}"
    match = re.match(r"(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.*)", name)
    assert match, name
    side, block, kind, index, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if side == "down":
        first = 1 + block * (depth + 1)
        if kind == "downsamplers":
            return f"input_blocks.{first + depth}.0.{rest.replace('conv', 'op')}"
        place = f"input_blocks.{first + index}"
    else:
        first = block * (depth + 1)
        if kind == "upsamplers":
            # After the attention where the block has one; tiny models have it in the first block only.
            return f"output_blocks.{first + depth}.{2 if block == 0 else 1}.{rest}"
        place = f"output_blocks.{first + index}"
    return f"{place}.1.{rest}" if kind == "attentions" else f"{place}.0.{_replace_part(rest, RESNET)}"


def _vae_name(name: str, num_blocks: int = 3) -> str:
    name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
    if "mid_block.attentions.0" in name:
        return _replace_part(name.replace("mid_block.attentions.0", "mid.attn_1"), VAE_ATTENTION)
    name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(
        r"up_blocks\.(\d)\.resnets\.(\d)", lambda match: f"up.{num_blocks - 1 - int(match[1])}.block.{match[2]}", name
    )
    return re.sub(
        r"up_blocks\.(\d)\.upsamplers\.0", lambda match: f"up.{num_blocks - 1 - int(match[1])}.upsample", name
    )
