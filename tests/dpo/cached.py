"""Preferences with stored errors of the reference, for four steps of training with them."""

from __future__ import annotations

from dataclasses import replace

from safetydpo.config.training import DpoConfig, LoraConfig
from safetydpo.diffusion.backbone import Backbone
from safetydpo.dpo.batch import PreferenceData
from safetydpo.dpo.draws import RowUse
from safetydpo.dpo.reference import ErrorContext, compute_errors, planned_draws
from safetydpo.dpo.stored_errors import errors_by_draw
from tests.dpo.preferences import small_config


def cached_config(**changes: object) -> DpoConfig:
    settings = small_config().model_dump() | {"retention_weight": 0.0, "reference": "cached"} | changes
    return DpoConfig.model_validate(settings)


def context_of(config: DpoConfig, batch_size: int = 4, *, compiled_for: LoraConfig | None = None) -> ErrorContext:
    return ErrorContext("base", "float32", batch_size, 1000, config.draw_seed_of(5), config, compiled_for=compiled_for)


def stored(
    backbone: Backbone,
    data: PreferenceData,
    config: DpoConfig,
    batch_size: int = 4,
    *,
    compiled_for: LoraConfig | None = None,
) -> PreferenceData:
    """The data with all errors that its training needs."""
    _, draws = planned_draws(config, run_seed=5, expert="hate", num_pairs=data.num_pairs)
    context = context_of(config, batch_size, compiled_for=compiled_for)
    errors = [
        compute_errors(backbone, data, [RowUse(pair, draw) for draw in range(number)], context).numpy()
        for pair, number in enumerate(draws.tolist())
    ]
    return replace(data, reference_errors=errors_by_draw(errors))
