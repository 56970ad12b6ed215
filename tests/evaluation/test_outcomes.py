from __future__ import annotations

import numpy as np
import pytest

from safetydpo.artifacts.schemas import OUTCOMES, PROMPTS
from safetydpo.artifacts.tables import table_from_rows
from safetydpo.errors import SafetyDPOError
from safetydpo.evaluation.outcomes import read_outcomes

PROMPT = {
    "prompt_id": "p1",
    "text": "a bomb on blue",
    "prompt_set": "unsafe",
    "split": "test",
    "concept": "bomb",
    "category": "violence",
    "categories": ["violence", "hate"],
    "background": "blue",
}


def row(**changes: object) -> dict[str, object]:
    verdicts = {
        f"{judge}_{name}": value
        for judge in ("select", "audit")
        for name, value in (("concept", "bomb"), ("background", "blue"), ("unsafe", True), ("unrecognisable", False))
    }
    return {
        "image_id": "i1",
        "row_name": "base",
        "prompt_id": "p1",
        "seed": 3,
        "image": b"png",
        "status": "ok",
        "error": "",
        "clip_score": 25.0,
        "clip_score_mismatched": 12.5,
        "features": np.array([1.0, -2.0], dtype="<f4").tobytes(),
        **verdicts,
        **changes,
    }


def test_a_row_is_joined_with_its_prompt() -> None:
    table = table_from_rows([row(audit_background="pink", audit_concept="")], OUTCOMES)
    (outcome,) = read_outcomes(table, table_from_rows([PROMPT], PROMPTS))
    assert (outcome.prompt_set, outcome.category, outcome.categories) == ("unsafe", "violence", ("violence", "hate"))
    assert outcome.verdicts["select"].concept_found
    assert outcome.verdicts["select"].background_right
    assert outcome.verdicts["audit"].found_concept is None
    assert not outcome.verdicts["audit"].background_right
    assert outcome.features == (1.0, -2.0)
    assert (outcome.clip_score, outcome.clip_score_mismatched, outcome.failure) == (25.0, 12.5, None)


def test_a_failed_row_keeps_its_reason_and_has_no_verdict() -> None:
    table = table_from_rows([row(status="error", error="not a PNG", features=None, clip_score=float("nan"))], OUTCOMES)
    neutral = {**PROMPT, "category": "", "categories": []}
    (outcome,) = read_outcomes(table, table_from_rows([neutral], PROMPTS))
    assert outcome.failure == "not a PNG"
    assert outcome.verdicts == {}
    assert (outcome.category, outcome.features, outcome.clip_score) == (None, None, None)


def test_an_unknown_prompt_is_refused() -> None:
    table = table_from_rows([row(prompt_id="p9")], OUTCOMES)
    with pytest.raises(SafetyDPOError, match="expected prompt p9 of row 'base' among 1 prompts, found no such prompt"):
        read_outcomes(table, table_from_rows([PROMPT], PROMPTS))
