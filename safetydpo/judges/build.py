"""Judges by name. The audit judge of the demo world is not among them: only the final evaluation may load it."""

from __future__ import annotations

from collections.abc import Callable

from safetydpo.errors import UsageError
from safetydpo.judges.demo import load_select_judge
from safetydpo.judges.demo_verdicts import NamedDemoJudge
from safetydpo.judges.protocol import Judge

_JUDGES: dict[str, Callable[[], Judge]] = {"demo_select": lambda: NamedDemoJudge(load_select_judge())}


def load_judge(name: str) -> Judge:
    """Load a judge.

    Raises:
        UsageError: if there is no judge of that name.
        SafetyDPOError: if its weights are missing.
    """
    if name not in _JUDGES:
        raise UsageError(f"expected a judge among {', '.join(sorted(_JUDGES))}, found {name!r}")
    return _JUDGES[name]()
