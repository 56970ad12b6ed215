"""What is seen of an expert while it is trained, and the rules that follow from it (pure)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class SampledRates:
    """What a judge found in pictures drawn with the adapter as it is now; shares in [0, 1]."""

    unsafe_rate: float
    """Share of unsafe prompts with an unsafe picture."""
    unrecognisable_rate: float
    """Share of unsafe prompts with a picture of nothing."""
    neutral_rate: float
    """Share of neutral prompts with a picture of what they ask for."""
    neighbour_rate: float
    """The same of neutral neighbours of unsafe concepts."""
    violation: float
    """Sum over both floors of what is missing; 0 = both are kept."""
    value: float
    """What is to be low: unsafe rate plus the price of unrecognisable pictures and of missed floors."""


@dataclass(frozen=True)
class Validation:
    """One validation: the held-out pairs and the sampled pictures after `step` optimizer steps."""

    step: int
    """Optimizer steps done; 0 = the base."""
    held_out_loss: float
    """Loss of a step on the held-out pairs, without the retention term."""
    held_out_accuracy: float
    """Implicit accuracy on them. It saturates long before the pictures change."""
    held_out_margin: float
    """Mean logit on them."""
    held_out_error_safe: float
    """Error of the policy on their safe pictures; that of the reference is the one at step 0."""
    held_out_error_unsafe: float
    """Error of the policy on their unsafe pictures."""
    unsafe_rate: float
    unrecognisable_rate: float
    neutral_rate: float
    neighbour_rate: float
    violation: float
    value: float


VALIDATION_NAMES = tuple(field.name for field in fields(Validation))


class TrainingLog(Protocol):
    """Takes the numbers of one training as they come; called on process 0."""

    def start(self, history: Sequence[Mapping[str, float]], validations: Sequence[Validation]) -> None:
        """Begin, or go on after these steps and validations of an interrupted run."""
        ...

    def step(self, metrics: Mapping[str, float], *, seconds: float) -> None:
        """Take one step's numbers (`step` among them) and its duration."""
        ...

    def validation(self, validation: Validation, *, seconds: float) -> None:
        """Take one validation and its duration."""
        ...


def is_validation_due(done: int, *, every_steps: int, steps: int) -> bool:
    """Return whether there is a validation after `done` optimizer steps: at the interval and after the last."""
    return done % every_steps == 0 or done == steps


def best_validation(validations: Sequence[Validation]) -> int | None:
    """Return the position of the state to be published; None if only the base (step 0) was looked at.

    States that keep both floors before those that do not; among the first the lowest `value`, among the others the
    smallest `violation`, then the lowest `value`; of equal ones the earliest, which has moved least from the base.
    """
    ranked = [
        ((one.violation > 0, one.violation, one.value), index) for index, one in enumerate(validations) if one.step > 0
    ]
    return min(ranked)[1] if ranked else None


def is_over(validations: Sequence[Validation], *, patience: int | None) -> bool:
    """Return whether the last `patience` validations were all no better than the best before them."""
    best = best_validation(validations)
    return patience is not None and best is not None and len(validations) - 1 - best >= patience


def validations_to_tensor(validations: Sequence[Validation]) -> Float[Tensor, "validation number"]:
    """Return validations as rows of float64, one column per name of `VALIDATION_NAMES`."""
    rows = [astuple(one) for one in validations]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), len(VALIDATION_NAMES))


def validations_from_tensor(rows: Float[Tensor, "validation number"]) -> list[Validation]:
    """Return the validations of `validations_to_tensor`."""
    named = (dict(zip(VALIDATION_NAMES, row, strict=True)) for row in rows.tolist())
    return [Validation(step=int(values.pop("step")), **values) for values in named]
