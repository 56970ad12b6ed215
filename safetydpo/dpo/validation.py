"""Validation of an expert while it is trained: held-out pairs, sampled pictures, the best state so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import astuple
from typing import Literal

import torch
from torch import Tensor

from safetydpo.artifacts.adapters import LoraLayer
from safetydpo.config.training import DpoConfig
from safetydpo.diffusion.backbone import Backbone
from safetydpo.dpo.batch import PreferenceData
from safetydpo.dpo.engine import Engine
from safetydpo.dpo.held_out import held_out_metrics, split_held_out
from safetydpo.dpo.step import METRICS
from safetydpo.dpo.watch import (
    SampledRates,
    Validation,
    best_validation,
    is_over,
    is_validation_due,
    validations_from_tensor,
    validations_to_tensor,
)
from safetydpo.errors import SafetyDPOError, UsageError

SampleRates = Callable[[int], SampledRates]
"""Draws and judges pictures with the adapter as it stands in the backbone, after that many optimizer steps."""
VALIDATIONS = "validations"
BEST = "best/"
HELD_OUT = ("loss", "implicit_accuracy", "margin", "error_policy_safe", "error_policy_unsafe")


class Validator:
    """Validates one expert at its steps and remembers the best state; every process holds one.

    Attributes:
        training_data: the pairs that are not held out.
        validations: all so far, from step 0.
    """

    def __init__(
        self,
        backbone: Backbone,
        data: PreferenceData,
        *,
        config: DpoConfig,
        run_seed: int,
        expert: str,
        engine: Engine,
        rank: int,
        sample_rates: SampleRates,
    ) -> None:
        """Split the pairs.

        Raises:
            SafetyDPOError: if no pair would be left to train on.
        """
        self.training_data, self._held_out = split_held_out(
            data, rate=config.validation.held_out_rate, run_seed=config.draw_seed_of(run_seed)
        )
        self._backbone, self._config, self._engine, self._rank = backbone, config, engine, rank
        self._run_seed, self._expert, self._sample_rates = run_seed, expert, sample_rates
        self.validations: list[Validation] = []
        self._best: dict[str, LoraLayer] = {}

    @property
    def is_over(self) -> bool:
        """Whether the training is to end now, before its last step."""
        return is_over(self.validations, patience=self._config.validation.patience)

    @property
    def best_layers(self) -> dict[str, LoraLayer]:
        """The adapter to be published."""
        return self._best

    @property
    def best(self) -> Validation:
        """The validation of the adapter to be published."""
        place = best_validation(self.validations)
        assert place is not None
        return self.validations[place]

    def is_due(self, done: int) -> bool:
        """Return whether there is a validation after `done` optimizer steps that has not been made."""
        every = self._config.validation.every_steps
        assert every is not None
        made = bool(self.validations) and self.validations[-1].step >= done
        return not made and is_validation_due(done, every_steps=every, steps=self._config.steps)

    def validate(self, done: int) -> Validation:
        """Measure the adapter as it is after `done` optimizer steps and keep it if it is the best; on every process.

        Raises:
            SafetyDPOError: if the loss on the held-out pairs is not finite.
        """
        numbers = held_out_metrics(
            self._backbone,
            self._held_out,
            config=self._config,
            run_seed=self._run_seed,
            expert=self._expert,
            rank=self._rank,
            world_size=self._engine.world_size,
            mean_over_processes=self._engine.mean_over_processes,
        )
        rates = self._sample_rates(done)
        held_out = [float(numbers[METRICS.index(name)]) for name in HELD_OUT]
        # Processes that disagreed in the last bit could stop at different steps and wait for each other for ever.
        agreed = self._engine.mean_over_processes(
            torch.tensor([*held_out, *astuple(rates)], dtype=torch.float64).to(self._backbone.device)
        )
        validation = Validation(done, *agreed.tolist())
        if not math.isfinite(validation.held_out_loss):
            raise SafetyDPOError(
                f"expert {self._expert!r}: expected a finite loss on the held-out pairs after step {done}, found "
                f"{validation.held_out_loss}: lower dpo.learning_rate or dpo.beta"
            )
        self.validations.append(validation)
        if best_validation(self.validations) == len(self.validations) - 1:
            self._best = self._backbone.export_adapter()
        return validation

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint must hold so that a resumed training chooses the same state."""
        tensors = {VALIDATIONS: validations_to_tensor(self.validations)}
        for name, layer in self._best.items():
            tensors |= {f"{BEST}{name}.down": layer.down, f"{BEST}{name}.up": layer.up}
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned; nothing = from the start."""
        if not tensors:
            return
        self.validations = validations_from_tensor(tensors[VALIDATIONS])

        def part(suffix: Literal[".down", ".up"]) -> dict[str, Tensor]:
            return {
                key.removeprefix(BEST).removesuffix(suffix): tensor
                for key, tensor in tensors.items()
                if key.startswith(BEST) and key.endswith(suffix)
            }

        ups = part(".up")
        self._best = {name: LoraLayer(down, ups[name]) for name, down in part(".down").items()}


def open_validator(
    backbone: Backbone,
    data: PreferenceData,
    *,
    config: DpoConfig,
    run_seed: int,
    expert: str,
    engine: Engine,
    rank: int,
    sample_rates: SampleRates | None,
) -> Validator | None:
    """Return the validator that the settings ask for, or None.

    Raises:
        UsageError: if pictures are to be sampled and nobody says how.
        SafetyDPOError: if no pair would be left to train on.
    """
    if config.validation.every_steps is None:
        return None
    if sample_rates is None:
        raise UsageError(
            "expected a function that draws and judges pictures because dpo.validation.every_steps is "
            f"{config.validation.every_steps}, found none: pass `sample_rates`, or set every_steps to null"
        )
    return Validator(
        backbone,
        data,
        config=config,
        run_seed=run_seed,
        expert=expert,
        engine=engine,
        rank=rank,
        sample_rates=sample_rates,
    )
