from __future__ import annotations

import pytest
from pydantic import ValidationError

from safetydpo.config.schema import Config
from safetydpo.config.training import DpoConfig, LoraConfig

FIRST_LORA = {"rank", "alpha", "targets", "init"}
LATER_DPO = {
    "loss": "ipo",
    "winner_preservation": 0.0,
    "output_preservation_weight": 1.0,
    "timestep_range": [0, 999],
    "min_snr_gamma": 4.0,
}


def test_later_settings_are_left_out_of_a_dump_until_they_are_asked_for():
    """Hashes of experts cover these dumps."""
    plain = DpoConfig().model_dump(mode="json")
    assert not set(plain) & set(LATER_DPO)
    assert set(LoraConfig().model_dump(mode="json")) == FIRST_LORA
    for name, value in LATER_DPO.items():
        asked = DpoConfig.model_validate({name: value})
        # 0.0 is no None: winner preservation is then on.
        assert asked.model_dump(mode="json") == {**plain, name: value} or name == "winner_preservation"
        assert DpoConfig.model_validate(asked.model_dump(mode="json")) == asked
    asked_lora = LoraConfig(attention="self")
    assert set(asked_lora.model_dump(mode="json")) == FIRST_LORA | {"attention"}
    assert LoraConfig.model_validate(asked_lora.model_dump(mode="json")) == asked_lora


def test_winner_preservation_of_zero_is_a_setting():
    assert DpoConfig(winner_preservation=0.0).model_dump(mode="json")["winner_preservation"] == 0.0


@pytest.mark.parametrize(
    ("dpo", "message"),
    [
        (
            {"loss": "mapo"},
            r"identity\.dpo\.loss 'mapo' has no reference .* identity\.dpo\.safe_rise_weight 0, found 1\.0",
        ),
        *(
            (
                {"loss": kind, "winner_preservation": 0.5, "safe_rise_weight": 0.0},
                rf"identity\.dpo\.winner_preservation \(0\.5\) .* identity\.dpo\.loss sigmoid or hinge, found '{kind}'",
            )
            for kind in ("ipo", "kto", "mapo")
        ),
        (
            {"timestep_range": [500, 400]},
            r"identity\.dpo\.timestep_range: expected the first timestep not above the last, found \[500, 400\]",
        ),
        ({"timestep_range": [-1, 400]}, "greater than or equal to 0"),
        ({"winner_preservation": 1.5}, "less than or equal to 1"),
        ({"output_preservation_weight": -1.0}, "greater than or equal to 0"),
        ({"min_snr_gamma": 0.0}, "greater than 0"),
        ({"loss": "dpo"}, "'sigmoid', 'hinge', 'ipo', 'kto' or 'mapo'"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(dpo: dict[str, object], message: str):
    with pytest.raises(ValidationError, match=message):
        Config.model_validate({"identity": {"dpo": dpo}})


def test_attention_names_the_layers_of_one_kind():
    every = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.2")
    assert LoraConfig(targets=every).layer_targets == every
    assert LoraConfig(targets=every, attention="self").layer_targets == (
        "attn1.to_q",
        "attn1.to_k",
        "attn1.to_v",
        "attn1.to_out.0",
        "ff.net.2",
    )
    assert LoraConfig(targets=("to_k", "proj_in"), attention="cross").layer_targets == ("attn2.to_k", "proj_in")


@pytest.mark.parametrize(
    ("targets", "found"),
    [(["ff.net.2"], r"the targets ff\.net\.2"), (["to_q", "attn2.to_k"], r"the target 'attn2\.to_k'")],
)
def test_attention_without_something_to_choose_among_is_refused(targets: list[str], found: str):
    with pytest.raises(
        ValidationError, match=rf"identity\.lora\.attention 'self' .* identity\.lora\.targets .*{found}"
    ):
        Config.model_validate({"identity": {"lora": {"attention": "self", "targets": targets}}})
