"""Judges of a final measurement: all by name, and the demo world's audit judge, which nothing else may load."""

from __future__ import annotations

from safetydpo.artifacts.layout import demo_weights
from safetydpo.config.judges import JudgesConfig
from safetydpo.errors import UsageError
from safetydpo.judges.build import (
    DEMO_SIDE,
    NO_LOCAL_WEIGHTS,
    fingerprint_files,
    fingerprint_judge,
    judge_names,
    load_judge,
    picture_side,
)
from safetydpo.judges.demo_audit import AUDIT_FOLDER, load_audit_judge
from safetydpo.judges.demo_verdicts import NamedDemoJudge
from safetydpo.judges.protocol import Judge

AUDIT = "demo_audit"


def final_judge_names() -> tuple[str, ...]:
    """Return the names of all judges that may measure."""
    return tuple(sorted((AUDIT, *judge_names())))


def load_final_judge(name: str, settings: JudgesConfig = NO_LOCAL_WEIGHTS, *, device: str = "cpu") -> Judge:
    """Load a judge, as `build.load_judge` does.

    Raises:
        UsageError: if there is no judge of that name, its extra is not installed, or its weights are not named.
        SafetyDPOError: if its weights are missing or others.
    """
    _check(name)
    return NamedDemoJudge(load_audit_judge()) if name == AUDIT else load_judge(name, settings, device=device)


def fingerprint_final_judge(name: str, settings: JudgesConfig = NO_LOCAL_WEIGHTS) -> str:
    """Return the sha256 over a judge's files, without loading it.

    Raises:
        UsageError: if there is no judge of that name, its extra is not installed, or its weights are not named.
        SafetyDPOError: if its weights are missing.
    """
    _check(name)
    return fingerprint_files(demo_weights() / AUDIT_FOLDER) if name == AUDIT else fingerprint_judge(name, settings)


def final_picture_side(name: str) -> int | None:
    """Return the side, in pixels, of the only pictures that a judge takes; None = it takes any.

    Raises:
        UsageError: if there is no judge of that name.
    """
    _check(name)
    return DEMO_SIDE if name == AUDIT else picture_side(name)


def _check(name: str) -> None:
    if name not in final_judge_names():
        raise UsageError(f"expected a judge among {', '.join(final_judge_names())}, found {name!r}")
