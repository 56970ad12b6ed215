"""What is known of one evaluated picture: the prompt, what each judge saw, scores, and whether it failed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from safetydpo.errors import SafetyDPOError

PromptSet = Literal["unsafe", "ood", "neutral", "neighbour"]
JudgeName = Literal["select", "audit"]
JUDGE_NAMES: tuple[JudgeName, ...] = ("select", "audit")
PROMPT_SETS: tuple[PromptSet, ...] = ("unsafe", "ood", "neutral", "neighbour")


@dataclass(frozen=True)
class Verdict:
    """What one judge says of one picture.

    Attributes:
        found_concept: The concept it recognises, None if it recognises none.
        unsafe: An unsafe concept of any category is in the picture.
        unrecognisable: The picture shows nothing that can be named; such a picture is not safe, it is broken.
        background_right: The prompted background is there.
        concept_found: The recognised concept is the prompted one.
    """

    found_concept: str | None
    unsafe: bool
    unrecognisable: bool
    background_right: bool
    concept_found: bool


@dataclass(frozen=True)
class ImageOutcome:
    """One picture of one row of the summary, drawn from one prompt with one seed.

    Attributes:
        row_name: Row that drew it: `base`, `expert:<category>`, `co_merge`, …
        prompt_id: Identifier of the prompt; equal in all rows that share it.
        prompt_set: `unsafe`; `ood` (unsafe, no expert saw it); `neutral`; `neighbour` (look-alike).
        split: `train`, `validation` or `test`.
        seed: Generation seed.
        category: First category of an unsafe prompt, under which it is counted; None for neutral ones.
        categories: All of its categories.
        concept: Prompted concept: the cluster of intervals.
        background: Prompted background.
        text: The prompt.
        verdicts: Verdict by judge name; empty for a failed picture.
        clip_score: 100 x cosine to its own caption, None if not measured.
        clip_score_mismatched: 100 x cosine to a caption of another concept (`mismatched_captions`).
        features: The feature vector that the distances compare, None if not measured.
        failure: None for a good picture, else why there is none: `missing`, `corrupt: …`, `judge found NaN`.
            A failed picture stays in every denominator and counts against the row.
    """

    row_name: str
    prompt_id: str
    prompt_set: PromptSet
    split: str
    seed: int
    category: str | None
    categories: tuple[str, ...]
    concept: str
    background: str
    text: str
    verdicts: Mapping[JudgeName, Verdict] = field(default_factory=dict)
    clip_score: float | None = None
    clip_score_mismatched: float | None = None
    features: tuple[float, ...] | None = None
    failure: str | None = None


def read_outcomes(outcomes: pa.Table, prompts: pa.Table) -> list[ImageOutcome]:
    """Return the rows of the `outcomes` table joined with their prompts.

    A row whose status is not `ok` becomes a failed picture with the row's error as its reason; a feature column
    of null, or a score that is no number, is left out.

    Raises:
        SafetyDPOError: if a row's prompt is not in `prompts`.
    """
    known = {prompt["prompt_id"]: prompt for prompt in prompts.to_pylist()}
    columns = [name for name in outcomes.column_names if name != "image"]
    records: list[ImageOutcome] = []
    for row in outcomes.select(columns).to_pylist():
        prompt = known.get(row["prompt_id"])
        if prompt is None:
            raise SafetyDPOError(
                f"expected prompt {row['prompt_id']} of row '{row['row_name']}' among {len(known)} prompts, "
                "found no such prompt: read outcomes and prompts of the same evaluation"
            )
        records.append(_to_outcome(row, prompt))
    return records


def _to_outcome(row: Mapping[str, Any], prompt: Mapping[str, Any]) -> ImageOutcome:
    failure = None if row["status"] == "ok" else str(row["error"] or row["status"])
    verdicts: dict[JudgeName, Verdict] = {}
    for judge in JUDGE_NAMES if failure is None else ():
        verdicts[judge] = Verdict(
            found_concept=row[f"{judge}_concept"] or None,
            unsafe=row[f"{judge}_unsafe"],
            unrecognisable=row[f"{judge}_unrecognisable"],
            background_right=row[f"{judge}_background"] == prompt["background"],
            concept_found=row[f"{judge}_concept"] == prompt["concept"],
        )
    scores = {
        name: float(row[name]) if row[name] is not None and np.isfinite(row[name]) else None
        for name in ("clip_score", "clip_score_mismatched")
    }
    features = None if row["features"] is None else np.frombuffer(row["features"], dtype="<f4")
    return ImageOutcome(
        row_name=row["row_name"],
        prompt_id=row["prompt_id"],
        prompt_set=prompt["prompt_set"],
        split=prompt["split"],
        seed=row["seed"],
        category=prompt["category"] or None,
        categories=tuple(prompt["categories"]),
        concept=prompt["concept"],
        background=prompt["background"],
        text=prompt["text"],
        verdicts=verdicts,
        features=None if features is None else tuple(float(value) for value in features),
        failure=failure,
        **scores,
    )
