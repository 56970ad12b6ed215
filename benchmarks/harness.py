"""Alternating timing of two ways to do the same work, and the JSON line that every benchmark ends with."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Round:
    """What one call took: by the clock, and in CPU time of all threads (which other processes do not disturb)."""

    wall_seconds: float
    cpu_seconds: float


def alternate(ways: Mapping[str, Callable[[], None]], *, rounds: int, warmup_rounds: int = 1) -> dict[str, list[Round]]:
    """Time every way once per round, after `warmup_rounds` that do not count.

    Alternating spreads the machine's slow spells over all ways; the order turns round with each round, so that
    none always runs first.
    """
    times: dict[str, list[Round]] = {name: [] for name in ways}
    for index in range(-warmup_rounds, rounds):
        for name in list(ways)[:: 1 if index % 2 == 0 else -1]:
            wall, cpu = time.perf_counter(), time.process_time()
            ways[name]()
            if index >= 0:
                times[name].append(Round(time.perf_counter() - wall, time.process_time() - cpu))
    return times


def ratio_of_medians(baseline: Sequence[float], ours: Sequence[float]) -> float:
    """Return how many times faster ours is: median seconds of the baseline over median seconds of ours."""
    return statistics.median(baseline) / statistics.median(ours)


def count_operations(call: Callable[[], object]) -> int:
    """Return the floating-point operations that a call runs, forward and backward (a multiply-add counts two)."""
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def print_result(benchmark: str, *, ratios: Mapping[str, float], raw: Mapping[str, object]) -> None:
    """Print the one JSON object of a benchmark as the last line."""
    result = {
        "benchmark": benchmark,
        "ratios": {name: round(value, 4) for name, value in ratios.items()},
        "raw": raw,
        "machine": _machine(),
        "commit": _commit(),
    }
    print(json.dumps(result, sort_keys=True))


def _machine() -> dict[str, object]:
    return {
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str | None:
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
