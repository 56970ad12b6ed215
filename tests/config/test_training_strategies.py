from __future__ import annotations

from typing import Any

import pytest

from safetydpo.config.load import parse_config
from safetydpo.config.training import DistillConfig, DpoConfig
from safetydpo.errors import UsageError


@pytest.mark.parametrize(
    ("dpo", "message"),
    [
        (
            {"optimizer": "adafactor"},
            r"identity\.dpo\.strategy 'deepspeed' trains with identity\.dpo\.optimizer 'adamw' only, found 'adafactor'",
        ),
        (
            {"strategy": "single", "optimizer": "prodigy"},
            r"identity\.dpo\.optimizer 'prodigy' .* identity\.dpo\.learning_rate .* at least 0\.01, found 0\.002",
        ),
        (
            {"base_offload": "cpu", "zero_stage": 2},
            r"identity\.dpo\.base_offload 'cpu' needs identity\.dpo\.strategy 'deepspeed' and identity\.dpo\.zero_stage"
            r" 3, found 'deepspeed' and 2",
        ),
        ({"base_offload": "cpu", "zero_stage": 3, "strategy": "ddp"}, r"base_offload 'cpu' .* found 'ddp' and 3"),
        (
            {"pairs_per_step": 16, "pairs_per_forward": 5},
            r"identity\.dpo\.pairs_per_step \(16\) must be a multiple of identity\.dpo\.pairs_per_forward \(5\)",
        ),
        (
            {"pairs_per_step": 16, "pairs_per_forward": 4, "retention_weight": 1.0, "retention_per_step": 6},
            r"identity\.dpo\.retention_per_step \(6\) must be a multiple of the 4 parts .*pairs_per_forward \(4\)",
        ),
        (
            {"warmup_steps": 120},
            r"identity\.dpo\.warmup_steps \(120\) must be below identity\.dpo\.steps \(120\)",
        ),
        (
            {"zero_stage": 3, "adapter_compute": "base"},
            r"identity\.dpo\.adapter_compute 'base' reads an adapter's weights itself, which identity\.dpo\.zero_stage",
        ),
        (
            {"zero_stage": 3, "compiled": True},
            r"identity\.dpo\.compiled .* which identity\.dpo\.zero_stage 3 shares out",
        ),
        ({"ema_decay": 1.0}, r"identity\.dpo\.ema_decay: expected less than 1, found 1\.0"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_by_name(dpo: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_config({"identity": {"dpo": dpo}}, source="run.yaml")


def test_the_same_rules_hold_for_the_distillation() -> None:
    with pytest.raises(UsageError, match=r"identity\.merge\.distill\.strategy 'deepspeed' trains with"):
        parse_config({"identity": {"merge": {"distill": {"optimizer": "adamw_8bit"}}}}, source="run.yaml")


@pytest.mark.parametrize(
    "dpo",
    [
        {"strategy": "ddp", "optimizer": "prodigy", "learning_rate": 1.0},
        {"strategy": "single", "optimizer": "adamw_8bit"},
        {"zero_stage": 2, "adapter_compute": "base"},
        {"zero_stage": 1, "compiled": True},
        {"zero_stage": 3, "base_offload": "cpu", "activation_checkpointing": True, "ema_decay": 0.999},
        {"pairs_per_step": 16, "pairs_per_forward": 4, "retention_weight": 1.0, "retention_per_step": 8},
        {"pairs_per_step": 16, "pairs_per_forward": 4, "retention_per_step": 6},
    ],
)
def test_settings_that_go_together_are_taken(dpo: dict[str, Any]) -> None:
    found = parse_config({"identity": {"dpo": dpo}}, source="run.yaml").identity.dpo
    assert {name: getattr(found, name) for name in dpo} == dpo


def test_settings_that_came_later_are_left_out_at_their_defaults() -> None:
    added = {
        "optimizer",
        "base_offload",
        "activation_checkpointing",
        "loss_scaling",
        "ema_decay",
        "pairs_per_forward",
        "adapter_compute",
        "compiled",
    }
    for config in (DpoConfig(), DistillConfig()):
        assert not added & config.model_dump(mode="json").keys()
    changed = DpoConfig(activation_checkpointing=True, ema_decay=0.9).model_dump(mode="json")
    assert (changed["activation_checkpointing"], changed["ema_decay"]) == (True, 0.9)
