"""The demo world's `select` judge: it filters pairs and drives the merge search."""

from __future__ import annotations

from pathlib import Path

from safetydpo.artifacts.layout import demo_weights
from safetydpo.judges.demo_network import DemoJudge, JudgeLabels, JudgeScores, SelectNetwork

__all__ = ["DemoJudge", "JudgeLabels", "JudgeScores", "load_select_judge"]

SELECT_FOLDER = "judge_select"


def load_select_judge(folder: Path | None = None) -> DemoJudge:
    """Load the `select` judge that ships with the project, or the one in `folder`.

    Raises:
        SafetyDPOError: Its weights are missing.
    """
    return DemoJudge(folder or demo_weights() / SELECT_FOLDER, SelectNetwork)
