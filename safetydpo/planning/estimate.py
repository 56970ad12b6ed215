"""Arithmetic of a plan: what is left of each stage, and what it will take. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from safetydpo.errors import UsageError

HOUR_SECONDS = 3600.0
GIGABYTE = 1e9
Usage = Mapping[str, Mapping[str, float | None]]
"""By stage: `cpu_seconds` and `gpu_seconds`, None where they were not measured."""


@dataclass(frozen=True)
class StageWork:
    """What one stage of a run consists of, and how much of it is done."""

    stage: str
    unit: str
    """What is counted, in the plural."""
    total: int
    done: int
    """Of which nothing has to be made again; 0 where that cannot be known yet."""
    weight: float = 1.0
    """Work in a unit: sampling steps of a picture, else 1."""
    longest: float = 0.0
    """Share of `total` in the largest part that only one worker can do, in [0, 1]."""
    is_closed: bool = False
    detail: str = ""
    is_beside: bool = False
    """Whether this is work beside the stage's units, `weight` in passes; a measured speed of the stage has it in."""

    @property
    def left(self) -> int:
        """How much is to be made."""
        return self.total - self.done


@dataclass(frozen=True)
class StageRate:
    """Seconds of one device per unit of weight."""

    seconds: float
    source: str
    pass_seconds: float | None = None
    """Of a sampling step of one picture, for work beside the units; None = not known."""
    has_beside: bool = False
    """Whether work beside the units is in `seconds` already, as it is in what a run took."""


@dataclass(frozen=True)
class StageEstimate:
    """What a stage still takes; None = not known."""

    work: StageWork
    rate: StageRate | None = None
    device_seconds: float | None = None
    """Of one GPU, or of one CPU core."""
    wall_seconds: float | None = None
    """With all devices."""


def measured_rates(used: Usage, done: Mapping[str, float], *, device: str, source: str) -> dict[str, StageRate]:
    """Return what a former run needed: seconds used / (units x weight), for each stage where both are known.

    Args:
        used: device seconds by stage.
        done: units x weight by stage.
        device: `gpu` or `cpu`.
        source: the run, for a reader.
    """
    rates = {}
    for stage, units in done.items():
        seconds = used.get(stage, {}).get(f"{device}_seconds")
        if seconds and units > 0:
            rates[stage] = StageRate(seconds / units, source, has_beside=True)
    return rates


def estimate(work: StageWork, rate: StageRate | None, *, num_devices: float) -> StageEstimate:
    """Return what is left of a stage in seconds.

    device seconds = left x weight x rate; wall seconds = max(device seconds / devices, those of the longest part, which
    is taken to be as far as the rest).

    Raises:
        UsageError: if there are no devices.
    """
    if num_devices <= 0:
        raise UsageError(f"expected a number of devices above 0, found {num_devices:g}: name one with --devices")
    if rate is None and work.left:
        return StageEstimate(work)
    seconds = work.left * work.weight * (rate.seconds if rate else 0.0)
    return StageEstimate(work, rate, seconds, max(seconds / num_devices, seconds * work.longest))


def total_seconds(estimates: Sequence[StageEstimate]) -> tuple[float | None, float | None]:
    """Return device seconds and wall seconds of all stages that are known, one after another; None if none is."""
    devices = [one.device_seconds for one in estimates if one.device_seconds is not None]
    walls = [one.wall_seconds for one in estimates if one.wall_seconds is not None]
    return (math.fsum(devices), math.fsum(walls)) if devices else (None, None)


def price_of(seconds: float | None, per_hour: float | None) -> float | None:
    """Return seconds / 3600 x price; None if either is not known."""
    return None if seconds is None or per_hour is None else seconds / HOUR_SECONDS * per_hour


@dataclass(frozen=True)
class Stored:
    """What some files of a run take; `row_bytes` None = not known before the first one is there."""

    what: str
    rows: int
    row_bytes: float | None
    source: str = ""

    @property
    def num_bytes(self) -> float | None:
        """Of all rows."""
        return None if self.row_bytes is None else self.rows * self.row_bytes


def utilisation(busy_seconds: float | None, held_seconds: float | None) -> float | None:
    """Return busy / held, at most 1; None if either is not known or nothing was held.

    Of GPUs the time in which work was under way counts as busy, of CPU cores their CPU time.
    """
    if busy_seconds is None or not held_seconds:
        return None
    return min(1.0, busy_seconds / held_seconds)
