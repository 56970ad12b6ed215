"""The names that kohya's trainer gives to LoRA layers, which ComfyUI and A1111 read: between them and diffusers' own.

A kohya name joins a network's prefix and a module's name with underscores. SD1.x and SD2.x take diffusers' names of
modules (`lora_unet_down_blocks_0_attentions_0_…`), SDXL's U-Net those of its first release
(`lora_unet_input_blocks_4_1_…`). Underscores stand in names too, so the way back follows a rule per kind of module and
refuses what fits none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal, get_args

from safetydpo.errors import SafetyDPOError

NamingRule = Literal["sd1", "sd2", "sdxl"]
RULES: tuple[str, ...] = get_args(NamingRule)
UNET_PREFIX = "lora_unet_"
TEXT_PREFIXES: dict[NamingRule, dict[str, str]] = {
    "sd1": {"text_encoder": "lora_te_"},
    "sd2": {"text_encoder": "lora_te_"},
    "sdxl": {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
}
"""Naming rule -> network as diffusers calls it -> prefix of its layers."""
BLOCKS_PER_LEVEL = 3
"""SDXL: two residual blocks and what follows them, at each of its three resolutions."""
WIDTH_OF_TEXT = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
"""Features of a prompt's tokens, the inputs of a cross-attention's keys -> model family."""

_ATTENTION = r"(?:proj_in|proj_out|transformer_blocks_\d+_(?:attn[12]_to_(?:q|k|v|out_0)|ff_net_(?:0_proj|2)))"
_RESNET = r"(?:conv1|conv2|time_emb_proj|conv_shortcut)"
_DIFFUSERS_UNET = re.compile(
    rf"(?:(?:(?:down|up)_blocks_\d+|mid_block)_(?:attentions_\d+_{_ATTENTION}|resnets_\d+_{_RESNET})"
    r"|down_blocks_\d+_downsamplers_0_conv|up_blocks_\d+_upsamplers_0_conv"
    r"|conv_in|conv_out|(?:time|add)_embedding_linear_[12])"
)
_TEXT = re.compile(r"text_model_encoder_layers_\d+_(?:self_attn_(?:q|k|v|out)_proj|mlp_fc[12])")
# Names whose underscores are no joints.
_WORDS = (
    "down_blocks", "up_blocks", "mid_block", "transformer_blocks", "proj_in", "proj_out", "to_q", "to_k", "to_v",
    "to_out", "time_emb_proj", "conv_shortcut", "conv_in", "conv_out", "time_embedding", "add_embedding", "linear_1",
    "linear_2", "text_model", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj",
)  # fmt: skip
_RESNET_IN_FIRST_RELEASE = {
    "conv1": "in_layers_2",
    "conv2": "out_layers_3",
    "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}
_OTHERS_IN_FIRST_RELEASE = {
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
    "time_embedding_linear_1": "time_embed_0",
    "time_embedding_linear_2": "time_embed_2",
    "add_embedding_linear_1": "label_emb_0_0",
    "add_embedding_linear_2": "label_emb_0_2",
    "down_blocks_0_downsamplers_0_conv": "input_blocks_3_0_op",
    "down_blocks_1_downsamplers_0_conv": "input_blocks_6_0_op",
    "up_blocks_0_upsamplers_0_conv": "output_blocks_2_2_conv",
    "up_blocks_1_upsamplers_0_conv": "output_blocks_5_2_conv",
}


def to_kohya_name(layer: str, rule: NamingRule) -> str:
    """Return the kohya name of a layer `<network>.<module>` in diffusers' names, such as `unet.mid_block.…`.

    Raises:
        SafetyDPOError: if the rule has no name for it.
    """
    network, _, module = layer.partition(".")
    joined = module.replace(".", "_")
    prefixes = TEXT_PREFIXES[rule]
    if network == "unet" and _DIFFUSERS_UNET.fullmatch(joined):
        name = UNET_PREFIX + (_to_first_release(joined, layer=layer) if rule == "sdxl" else joined)
    elif network in prefixes and _TEXT.fullmatch(joined):
        name = prefixes[network] + joined
    else:
        raise _no_name(layer, rule)
    # The way back is the check: a name that another layer has too, or that no reader takes apart, is none.
    if from_kohya_name(name) != layer:
        raise _no_name(layer, rule)
    return name


def from_kohya_name(name: str) -> str:
    """Return the layer `<network>.<module>` of a kohya name, in diffusers' names.

    Raises:
        SafetyDPOError: if it follows no rule for SD1.x, SD2.x or SDXL.
    """
    if name.startswith(UNET_PREFIX):
        joined = name.removeprefix(UNET_PREFIX)
        if is_first_release(name):
            joined = _from_first_release(joined)
        if _DIFFUSERS_UNET.fullmatch(joined):
            return "unet." + _dotted(joined)
    for prefixes in TEXT_PREFIXES.values():
        for network, prefix in prefixes.items():
            if name.startswith(prefix) and _TEXT.fullmatch(name.removeprefix(prefix)):
                return f"{network}.{_dotted(name.removeprefix(prefix))}"
    raise SafetyDPOError(
        f"expected a layer's name by kohya's rule for SD1.x, SD2.x or SDXL (lora_unet_…, lora_te_…, lora_te1_…, "
        f"lora_te2_…), found {name!r}: save the adapter in the diffusers format"
    )


def is_first_release(name: str) -> bool:
    """Return whether a kohya name is one of SDXL's first release and not one of diffusers."""
    parts = ("input_blocks_", "middle_block_", "output_blocks_", "time_embed_", "label_emb_", "out_2")
    return name.startswith(tuple(UNET_PREFIX + part for part in parts)) and not name.startswith(
        f"{UNET_PREFIX}time_embedding"
    )


def tell_rule(layers: Iterable[tuple[str, int]]) -> NamingRule | None:
    """Return the naming rule of an adapter, told by its layers (`<network>.<module>`, d_in); None if they do not tell.

    Told are SDXL by its second text encoder, and each family by the features of a prompt's tokens.
    """
    found: set[str] = set()
    for layer, d_in in layers:
        if layer.startswith("text_encoder_2."):
            found.add("sdxl")
        if layer.startswith("unet.") and layer.endswith((".attn2.to_k", ".attn2.to_v")):
            found.add(WIDTH_OF_TEXT.get(d_in, ""))
    told = [rule for rule in RULES if found == {rule}]
    return told[0] if told else None  # type: ignore[return-value]


def _no_name(layer: str, rule: str) -> SafetyDPOError:
    networks = ", ".join(("unet", *TEXT_PREFIXES[rule]))  # type: ignore[index]
    return SafetyDPOError(
        f"expected a layer that has a kohya name by the rule {rule} (networks: {networks}), found {layer!r}: "
        "export it with --to diffusers, or choose another --family"
    )


def _dotted(joined: str) -> str:
    """Return a module's name with dots for those underscores that join its parts."""
    for word in _WORDS:
        joined = re.sub(rf"(?<![a-z]){word}(?![a-z])", word.replace("_", "\x00"), joined)
    return joined.replace("_", ".").replace("\x00", "_")


def _to_first_release(joined: str, *, layer: str) -> str:
    if joined in _OTHERS_IN_FIRST_RELEASE:
        return _OTHERS_IN_FIRST_RELEASE[joined]
    found = re.fullmatch(r"(down|up)_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)", joined)
    if found:
        side, level, kind, number, leaf = found.groups()
        place = BLOCKS_PER_LEVEL * int(level) + int(number) + (side == "down")
        if int(number) < BLOCKS_PER_LEVEL - (side == "down") and int(level) < BLOCKS_PER_LEVEL:
            block = "input" if side == "down" else "output"
            return f"{block}_blocks_{place}_{int(kind == 'attentions')}_{_leaf(leaf, kind)}"
    found = re.fullmatch(r"mid_block_(attentions_0|resnets_[01])_(.+)", joined)
    if found:
        (kind, number), leaf = found[1].split("_"), found[2]
        return f"middle_block_{1 if kind == 'attentions' else 2 * int(number)}_{_leaf(leaf, kind)}"
    raise _no_name(layer, "sdxl")


def _leaf(leaf: str, kind: str) -> str:
    return leaf if kind == "attentions" else _RESNET_IN_FIRST_RELEASE[leaf]


def _from_first_release(joined: str) -> str:
    others = {theirs: ours for ours, theirs in _OTHERS_IN_FIRST_RELEASE.items()}
    if joined in others:
        return others[joined]
    leaves = {theirs: ours for ours, theirs in _RESNET_IN_FIRST_RELEASE.items()}
    found = re.fullmatch(r"(input|output)_blocks_(\d+)_([01])_(.+)", joined)
    if found:
        block, place, inner, leaf = found.groups()
        side = "down" if block == "input" else "up"
        level, number = divmod(int(place) - (block == "input"), BLOCKS_PER_LEVEL)
        return f"{side}_blocks_{level}_{'attentions' if inner == '1' else 'resnets'}_{number}_{leaves.get(leaf, leaf)}"
    found = re.fullmatch(r"middle_block_([012])_(.+)", joined)
    if found:
        middle, leaf = found.groups()
        middle_name = "attentions_0" if middle == "1" else f"resnets_{int(middle) // 2}"
        return f"mid_block_{middle_name}_{leaves.get(leaf, leaf)}"
    return joined
