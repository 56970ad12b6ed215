from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safetydpo.artifacts.kohya_names import from_kohya_name, is_first_release, tell_rule, to_kohya_name
from safetydpo.errors import SafetyDPOError

BLOCK = "transformer_blocks.0"
KNOWN = [
    ("sd1", f"unet.down_blocks.0.attentions.1.{BLOCK}.attn1.to_q",
     "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_q"),
    ("sd1", f"unet.mid_block.attentions.0.{BLOCK}.attn2.to_out.0",
     "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0"),
    ("sd2", f"unet.up_blocks.3.attentions.2.{BLOCK}.ff.net.0.proj",
     "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_ff_net_0_proj"),
    ("sd1", "unet.down_blocks.1.resnets.0.conv_shortcut", "lora_unet_down_blocks_1_resnets_0_conv_shortcut"),
    ("sd1", "unet.down_blocks.1.resnets.0.time_emb_proj", "lora_unet_down_blocks_1_resnets_0_time_emb_proj"),
    ("sd1", "unet.down_blocks.1.downsamplers.0.conv", "lora_unet_down_blocks_1_downsamplers_0_conv"),
    ("sd1", "unet.time_embedding.linear_1", "lora_unet_time_embedding_linear_1"),
    ("sd1", "text_encoder.text_model.encoder.layers.11.self_attn.q_proj",
     "lora_te_text_model_encoder_layers_11_self_attn_q_proj"),
    ("sdxl", "text_encoder.text_model.encoder.layers.0.mlp.fc1", "lora_te1_text_model_encoder_layers_0_mlp_fc1"),
    ("sdxl", "text_encoder_2.text_model.encoder.layers.31.self_attn.out_proj",
     "lora_te2_text_model_encoder_layers_31_self_attn_out_proj"),
    # SDXL's attention starts at the second resolution: input block 1 + 3 x 1 + 0 = 4.
    ("sdxl", f"unet.down_blocks.1.attentions.0.{BLOCK}.attn1.to_q",
     "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"),
    ("sdxl", "unet.down_blocks.2.attentions.1.transformer_blocks.9.ff.net.2",
     "lora_unet_input_blocks_8_1_transformer_blocks_9_ff_net_2"),
    ("sdxl", "unet.mid_block.attentions.0.proj_in", "lora_unet_middle_block_1_proj_in"),
    ("sdxl", "unet.mid_block.resnets.1.conv2", "lora_unet_middle_block_2_out_layers_3"),
    ("sdxl", "unet.up_blocks.0.attentions.2.proj_out", "lora_unet_output_blocks_2_1_proj_out"),
    ("sdxl", "unet.up_blocks.2.resnets.2.conv_shortcut", "lora_unet_output_blocks_8_0_skip_connection"),
    ("sdxl", "unet.down_blocks.0.downsamplers.0.conv", "lora_unet_input_blocks_3_0_op"),
    ("sdxl", "unet.up_blocks.1.upsamplers.0.conv", "lora_unet_output_blocks_5_2_conv"),
    ("sdxl", "unet.add_embedding.linear_2", "lora_unet_label_emb_0_2"),
    ("sdxl", "unet.conv_out", "lora_unet_out_2"),
    ("sdxl", "unet.time_embedding.linear_1", "lora_unet_time_embed_0"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "layer", "name"), KNOWN)
def test_known_names_both_ways(rule, layer, name):
    assert to_kohya_name(layer, rule) == name
    assert from_kohya_name(name) == layer


ATTENTION = st.sampled_from(
    ["proj_in", "proj_out"]
    + [f"transformer_blocks.{n}.attn{a}.to_{p}" for n in (0, 9) for a in (1, 2) for p in ("q", "k", "v", "out.0")]
    + [f"transformer_blocks.{n}.ff.net.{leaf}" for n in (0, 9) for leaf in ("0.proj", "2")]
)
RESNET = st.sampled_from(["conv1", "conv2", "time_emb_proj", "conv_shortcut"])


@given(st.data())
def test_every_layer_of_sdxl_has_a_name_of_its_own_and_comes_back(data):
    side = data.draw(st.sampled_from(["down", "mid", "up"]))
    kind = data.draw(st.sampled_from(["attentions", "resnets"]))
    leaf = data.draw(ATTENTION if kind == "attentions" else RESNET)
    level, number = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 2 if side == "up" else 1))
    if side == "mid":
        layer = f"unet.mid_block.{kind}.{0 if kind == 'attentions' else number}.{leaf}"
    else:
        layer = f"unet.{side}_blocks.{level}.{kind}.{number}.{leaf}"
    for rule in ("sd1", "sdxl"):
        name = to_kohya_name(layer, rule)
        assert is_first_release(name) is (rule == "sdxl")
        assert from_kohya_name(name) == layer


def test_sdxl_layers_under_the_names_of_diffusers_are_read_too():
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_1_attn1_to_q"
    assert from_kohya_name(name) == "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q"


@pytest.mark.parametrize(
    ("layer", "rule"),
    [
        ("unet.somewhere.to_q", "sd1"),
        ("transformer.transformer_blocks.0.attn.to_q", "sd1"),
        ("text_encoder_2.text_model.encoder.layers.0.mlp.fc1", "sd1"),
        # A fourth resolution, which SDXL has not, and a third block of a level.
        (f"unet.down_blocks.3.attentions.0.{BLOCK}.attn1.to_q", "sdxl"),
        (f"unet.down_blocks.1.attentions.2.{BLOCK}.attn1.to_q", "sdxl"),
        ("unet.mid_block.resnets.7.conv1", "sdxl"),
    ],
)
def test_a_layer_without_a_name_is_refused(layer, rule):
    with pytest.raises(
        SafetyDPOError, match=rf"expected a layer that has a kohya name by the rule {rule} .* {layer!r}"
    ):
        to_kohya_name(layer, rule)


@pytest.mark.parametrize(
    "name", ["lora_unet_double_blocks_0_img_attn_qkv", "lora_te_x", "lora_unet_input_blocks_4_1_x"]
)
def test_a_name_of_no_rule_is_refused(name):
    with pytest.raises(SafetyDPOError, match=f"expected a layer's name by kohya's rule .* found {name!r}"):
        from_kohya_name(name)


@pytest.mark.parametrize(
    ("layers", "rule"),
    [
        ([("unet.a.attn2.to_k", 768)], "sd1"),
        ([("unet.a.attn2.to_v", 1024), ("unet.a.attn2.to_q", 320)], "sd2"),
        ([("unet.a.attn2.to_k", 2048)], "sdxl"),
        ([("text_encoder_2.a", 1280)], "sdxl"),
        ([("unet.a.attn2.to_k", 64)], None),
        ([("unet.a.attn1.to_k", 768)], None),
        ([("unet.a.attn2.to_k", 768), ("unet.b.attn2.to_k", 2048)], None),
        ([], None),
    ],
)
def test_the_family_is_told_by_the_width_of_text_features(layers, rule):
    assert tell_rule(layers) == rule
