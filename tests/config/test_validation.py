from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from safetydpo.config.schema import Config
from safetydpo.config.training import DpoConfig
from safetydpo.config.validation import ValidationConfig


@pytest.mark.parametrize("mode", ["json", "python"])
def test_without_validation_nothing_of_it_is_in_a_dump(mode: Any):
    """Keys of experts and identities of runs hash that dump."""
    assert "validation" not in DpoConfig().model_dump(mode=mode)
    assert "validation" not in Config().model_dump(mode=mode)["identity"]["dpo"]
    assert "validation" not in DpoConfig(validation=ValidationConfig()).model_dump(mode=mode)
    assert "validation" not in DpoConfig.model_validate({"validation": {"every_steps": None}}).model_dump(mode=mode)


def test_with_validation_all_of_it_is_in_the_dump_and_reads_back():
    config = DpoConfig.model_validate({"validation": {"every_steps": 20, "patience": 2}})
    dump = config.model_dump(mode="json")
    assert set(dump["validation"]) == set(ValidationConfig.model_fields)
    assert DpoConfig.model_validate(dump) == config
    changed = config.model_copy(update={"steps": 3}).model_dump(mode="json")
    assert changed["validation"] == dump["validation"]


def test_a_setting_without_validation_is_refused_by_name():
    with pytest.raises(ValidationError, match="identity.dpo.validation: neutral_prompts, patience do nothing without"):
        ValidationConfig(patience=2, neutral_prompts=3)
    ValidationConfig(neutral_prompts=16)


@pytest.mark.parametrize(
    "setting",
    [
        {"every_steps": 0},
        {"held_out_rate": 0.0},
        {"held_out_rate": 1.0},
        {"held_out_draws": 0},
        {"neutral_floor": 1.1},
        {"patience": 0},
        {"clip_similarity_min": -0.1},
    ],
)
def test_settings_out_of_range_are_refused(setting: dict[str, Any]):
    with pytest.raises(ValidationError):
        ValidationConfig.model_validate({"every_steps": 5} | setting)


def test_what_only_watches_is_no_part_of_the_identity():
    execution = {"loggers": ["wandb", "mlflow"], "grid_prompts": 0}
    config = Config.model_validate({"execution": execution})
    assert config.identity == Config().identity
    with pytest.raises(ValidationError, match="expected each value once, found 'wandb' 2 times"):
        Config.model_validate({"execution": {"loggers": ["wandb", "wandb"]}})
    with pytest.raises(ValidationError, match="wandb"):
        Config.model_validate({"execution": {"loggers": ["tensorflow"]}})
