from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safetydpo.errors import UsageError
from safetydpo.planning.estimate import (
    StageEstimate,
    StageRate,
    StageWork,
    Stored,
    estimate,
    measured_rates,
    price_of,
    total_seconds,
    utilisation,
)


def work(total: int, done: int, weight: float = 1.0, longest: float = 0.0) -> StageWork:
    return StageWork("pairs", "pictures", total, done, weight, longest)


def test_rates_by_hand() -> None:
    """40 pictures of 4 steps in 80 GPU-seconds: 80 / 160 = 0.5 s a step. Training was not measured."""
    used = {"pairs": {"gpu_seconds": 80.0, "cpu_seconds": 3.0}, "train": {"gpu_seconds": None}, "merge": {}}
    done = {"pairs": 160.0, "train": 10.0, "merge": 2.0, "search": 0.0}
    rates = measured_rates(used, done, device="gpu", source="run")
    assert rates == {"pairs": StageRate(0.5, "run", has_beside=True)}
    assert measured_rates(used, done, device="cpu", source="run") == {
        "pairs": StageRate(3 / 160, "run", has_beside=True)
    }


def test_an_estimate_by_hand() -> None:
    """60 of 100 pictures are left, 4 steps each, 0.5 s a step: 120 s; on 8 devices 15 s."""
    found = estimate(work(100, 40, weight=4), StageRate(0.5, ""), num_devices=8)
    assert (found.device_seconds, found.wall_seconds) == (120, 15)


def test_the_longest_expert_bounds_the_wall_time() -> None:
    """100 s of which one expert is 30 %: on 8 devices not 12.5 s but 30."""
    found = estimate(work(100, 0, longest=0.3), StageRate(1.0, ""), num_devices=8)
    assert (found.device_seconds, found.wall_seconds) == (100, 30)


def test_what_is_not_known_stays_unknown_unless_nothing_is_left() -> None:
    assert estimate(work(5, 0), None, num_devices=1).device_seconds is None
    assert estimate(work(5, 5), None, num_devices=1).device_seconds == 0
    assert price_of(None, 1.0) is price_of(1.0, None) is None
    assert price_of(1800, 4.0) == 2.0
    assert total_seconds([StageEstimate(work(5, 0))]) == (None, None)
    known = StageEstimate(work(5, 0), None, 7.0, 3.0)
    assert total_seconds([StageEstimate(work(5, 0)), known, known]) == (14, 6)
    assert Stored("latents", 5, None).num_bytes is None
    assert Stored("latents", 5, 2.5).num_bytes == 12.5


def test_no_device_is_refused() -> None:
    with pytest.raises(UsageError, match="expected a number of devices above 0, found 0: name one with --devices"):
        estimate(work(1, 0), None, num_devices=0)


def test_utilisation_by_hand() -> None:
    """30 busy of 40 held; what was found rather than made can count for more than was held."""
    assert utilisation(30, 40) == 0.75
    assert utilisation(50, 40) == 1.0
    assert utilisation(None, 40) is utilisation(30, None) is utilisation(30, 0) is None


@given(st.integers(0, 1000), st.integers(0, 1000), st.floats(0.001, 100), st.floats(1, 512), st.floats(0, 1))
def test_more_done_and_more_devices_never_take_longer(
    total: int, done: int, rate: float, devices: float, longest: float
) -> None:
    done = min(total, done)
    first = estimate(work(total, done, longest=longest), StageRate(rate, ""), num_devices=devices)
    more = estimate(work(total, total, longest=longest), StageRate(rate, ""), num_devices=devices)
    wider = estimate(work(total, done, longest=longest), StageRate(rate, ""), num_devices=2 * devices)
    assert first.wall_seconds is not None
    assert wider.wall_seconds is not None
    assert first.device_seconds is not None
    assert more.device_seconds == 0
    assert wider.wall_seconds <= first.wall_seconds <= first.device_seconds
    assert wider.device_seconds == first.device_seconds
