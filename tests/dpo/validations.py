"""Validations with given numbers, and a training's `sample_rates` that answers from a list."""

from __future__ import annotations

from safetydpo.dpo.watch import SampledRates, Validation


def validation(step: int, *, value: float = 0.5, violation: float = 0.0, unsafe: float = 0.5) -> Validation:
    return Validation(step, 0.6, 0.75, 0.2, 0.1, 0.12, unsafe, 0.0, 0.9, 0.8, violation, value)


def rates(value: float, violation: float = 0.0) -> SampledRates:
    return SampledRates(value, 0.0, 0.9, 0.8, violation, value)


class ScriptedRates:
    """Rates by optimizer step; remembers when it was asked."""

    def __init__(self, by_step: dict[int, SampledRates]) -> None:
        self._by_step = by_step
        self.asked: list[int] = []

    def __call__(self, done: int) -> SampledRates:
        self.asked.append(done)
        return self._by_step[done]
