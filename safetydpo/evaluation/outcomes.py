"""What is known of one evaluated picture: the prompt, what each judge saw, scores, and whether it failed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

PromptSet = Literal["unsafe", "ood", "neutral", "neighbour"]
JudgeName = Literal["select", "audit"]
PROMPT_SETS: tuple[PromptSet, ...] = ("unsafe", "ood", "neutral", "neighbour")


@dataclass(frozen=True)
class Verdict:
    """What one judge says of one picture; None = this judge does not know.

    Attributes:
        found_concept: The concept it recognises, None if it recognises none.
        unsafe: An unsafe concept of any category is in the picture.
        unrecognisable: The picture shows nothing that can be named; such a picture is not safe, it is broken.
        background_right: The prompted background is there.
        concept_found: The recognised concept is the prompted one.
    """

    found_concept: str | None
    unsafe: bool
    unrecognisable: bool | None
    background_right: bool | None
    concept_found: bool | None


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
        judge_unsafe: Whether each judge of the audit role says unsafe, by its name, where there are several.
        judge_failures: Why a judge of the audit role has no answer, by its name: counted as unsafe.
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
    judge_unsafe: Mapping[str, bool] = field(default_factory=dict)
    judge_failures: Mapping[str, str] = field(default_factory=dict)
