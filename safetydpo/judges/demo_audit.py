"""The demo world's `audit` judge: it sees the final report's pictures only, never pairs or the merge search."""

from __future__ import annotations

from pathlib import Path

from safetydpo.artifacts.layout import demo_weights
from safetydpo.judges.demo_network import AuditNetwork, DemoJudge

AUDIT_FOLDER = "judge_audit"


def load_audit_judge(folder: Path | None = None) -> DemoJudge:
    """Load the `audit` judge that ships with the project, or the one in `folder`.

    Raises:
        SafetyDPOError: Its weights are missing.
    """
    return DemoJudge(folder or demo_weights() / AUDIT_FOLDER, AuditNetwork)
