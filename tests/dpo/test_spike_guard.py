from __future__ import annotations

from dataclasses import replace

import pytest

from safetydpo.config.training import DpoConfig
from safetydpo.dpo.trainer import SpikeGuard, StepMetrics
from safetydpo.errors import SafetyDPOError


def metrics(step: int, policy: float, reference: float = 0.1) -> StepMetrics:
    return StepMetrics(step, 0.5, 0.5, 0.0, 0.0, 1.0, 3.0, policy, policy, reference, reference, 0.0, 1.0, 1e-3)


def test_spike_guard_counts_consecutive_steps() -> None:
    """Limit 10 x 0.1 = 1, patience 5: four bad steps, one good, then five bad ones end it."""
    guard = SpikeGuard("hate", DpoConfig())
    for step in range(4):
        guard.check(metrics(step, 1.01))
    guard.check(metrics(4, 1.0))
    assert guard.spike_steps == 0
    for step in range(5, 9):
        guard.check(metrics(step, 2.0))
    with pytest.raises(
        SafetyDPOError, match=r"expert 'hate': .* below 10 x the reference's 0.1, found 2 for 5 steps up to step 9"
    ):
        guard.check(metrics(9, 2.0))


def test_spike_guard_goes_on_counting_after_a_resume() -> None:
    guard = SpikeGuard("hate", DpoConfig(), spike_steps=4)
    with pytest.raises(SafetyDPOError, match="for 5 steps"):
        guard.check(metrics(7, 2.0))


def test_without_a_reference_the_first_steps_stand_for_it() -> None:
    """Patience 5: errors 0.1, 0.3, 0.2, 0.1, 0.3 have the mean 0.2, limit 2; it stays, also after a resume."""
    config = DpoConfig(loss="mapo", safe_rise_weight=0.0)
    first = (0.1, 0.3, 0.2, 0.1, 0.3)
    guard = SpikeGuard("hate", config)
    for step, error in enumerate((*first, 1.9, 1.9)):
        guard.check(replace(metrics(step, error), error_reference_safe=0.0))
        assert guard.spike_steps == 0
    resumed = SpikeGuard("hate", config, errors_safe=[*first, 1.9, 1.9])
    for one in (guard, resumed):
        for step in range(7, 11):
            one.check(replace(metrics(step, 2.1), error_reference_safe=0.0))
        with pytest.raises(
            SafetyDPOError, match=r"below 10 x the first steps' 0\.2, found 2\.1 for 5 .* dpo\.safe_likelihood_weight"
        ):
            one.check(replace(metrics(11, 2.1), error_reference_safe=0.0))
