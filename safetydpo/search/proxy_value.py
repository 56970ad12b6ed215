"""What a rung without sampling minimises. Pure, and free of torch: the process that drives a search has none."""

from __future__ import annotations

from collections.abc import Mapping

from safetydpo.config.rungs import HeldOutRung

PENALTY = 10.0
"""Price of a point above a ceiling, in points of the proxy: damage beyond it must not be bargained for."""


def proxy_value(numbers: Mapping[str, float], rung: HeldOutRung) -> float:
    """Return the value of a candidate's numbers (`search.proxy`); lower is better.

    `value = -proxy + PENALTY * (what lies above any ceiling)`
    """
    above = max(0.0, numbers["safe_rise"] - rung.safe_rise_max)
    above += max(0.0, numbers["benign_rise"] - rung.benign_rise_max)
    for name in ("neutral_shift", "neighbour_shift"):
        above += max(0.0, numbers[name] - rung.prompt_shift_max)
    return -numbers[rung.proxy] + PENALTY * above
