"""The test of a chosen merge: test prompts, drawn once and seen by both judges and CLIP; nothing is chosen by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from safetydpo.artifacts.layout import demo_weights
from safetydpo.config.schema import SamplerConfig
from safetydpo.evaluation.counts import RowCounts, count_row
from safetydpo.evaluation.distances import clip_scores, mismatched_captions
from safetydpo.evaluation.merge_curve import IP, MUSH, NEIGHBOUR, NEUTRAL, UNCOVERED
from safetydpo.evaluation.outcomes import ImageOutcome, Verdict
from safetydpo.prompts.sets import Prompt
from safetydpo.seeding import derive_seed

TALLIED = {
    IP: "ip",
    MUSH: "unrecognisable_rate",
    "safe_and_intact": "safe_and_intact_rate",
    NEUTRAL: "neutral_rate",
    NEIGHBOUR: "neighbour_retention",
}
"""Rates of a row behind the counts of a tally."""


class AuditedTest:
    """Both judges and CLIP."""

    def __init__(self) -> None:
        from safetydpo.judges.build import load_judge
        from safetydpo.judges.clip import ClipScorer
        from safetydpo.judges.demo_audit import load_audit_judge
        from safetydpo.judges.demo_verdicts import NamedDemoJudge

        self._judges = {"select": load_judge("demo_select"), "audit": NamedDemoJudge(load_audit_judge())}
        self._clip = ClipScorer(demo_weights() / "clip")

    def draw(
        self, backbone: Any, prompts: Sequence[Prompt], *, run_seed: int, sampler: SamplerConfig, purpose: str
    ) -> list[dict[str, Any]]:
        """Draw prompts with the model as it is; return what judges and CLIP say of each picture, as JSON values."""
        from safetydpo.diffusion.render import render

        seeds = [derive_seed(run_seed, purpose, prompt.prompt_id) for prompt in prompts]
        pictures = render(backbone, prompts=[prompt.text for prompt in prompts], seeds=seeds, sampler=sampler)
        verdicts = {name: judge.judge(pictures) for name, judge in self._judges.items()}
        embeddings = self._clip.embed_images(pictures).numpy()
        captions = self._clip.embed_texts([prompt.text for prompt in prompts]).numpy()
        other = captions[mismatched_captions([prompt.concept for prompt in prompts])]
        own_scores, other_scores = clip_scores(embeddings, captions), clip_scores(embeddings, other)
        return [
            {
                "judges": {
                    name: {
                        "concept": found.concept[index],
                        "background": found.background[index],
                        "unsafe": bool(found.is_unsafe[index]),
                        "unrecognisable": bool(found.is_unrecognisable[index]),
                    }
                    for name, found in verdicts.items()
                },
                "clip": [float(own_scores[index]), float(other_scores[index])],
            }
            for index in range(len(prompts))
        ]


def count_tested(
    found: Sequence[Mapping[str, Any]],
    base: Sequence[Mapping[str, Any]],
    prompts: Sequence[Prompt],
    *,
    covered: Sequence[str],
) -> tuple[dict[str, tuple[int, int]], RowCounts]:
    """Return the tally of a test, by the `audit` judge, and the totals per concept beside the base's.

    Unsafe prompts of concepts that no expert covers are counted apart and stand in the tally only.
    """
    mine = [row.prompt_set != "unsafe" or row.concept in covered for row in prompts]
    own, reference = (
        [_outcome(row, prompt) for row, prompt, is_mine in zip(rows, prompts, mine, strict=True) if is_mine]
        for rows in (found, base)
    )
    counts = count_row(own, base=reference)
    tally = {}
    for name, rate in TALLIED.items():
        totals = counts.rates[rate].values()
        tally[name] = (sum(int(hits) for hits, _ in totals), sum(n for _, n in totals))
    control = [row["judges"]["audit"]["unsafe"] for row, is_mine in zip(found, mine, strict=True) if not is_mine]
    if control:
        tally[UNCOVERED] = (sum(control), len(control))
    return tally, counts


def _outcome(row: Mapping[str, Any], prompt: Prompt) -> ImageOutcome:
    return ImageOutcome(
        row_name="merge",
        prompt_id=prompt.prompt_id,
        prompt_set=prompt.prompt_set,  # type: ignore[arg-type]
        split=prompt.split,
        seed=0,
        category=prompt.category or None,
        categories=prompt.categories,
        concept=prompt.concept,
        background=prompt.background,
        text=prompt.text,
        verdicts={name: _verdict(said, prompt) for name, said in row["judges"].items()},
        clip_score=row["clip"][0],
        clip_score_mismatched=row["clip"][1],
    )


def _verdict(said: Mapping[str, Any], prompt: Prompt) -> Verdict:
    return Verdict(
        found_concept=None if said["unrecognisable"] else said["concept"],
        unsafe=said["unsafe"],
        unrecognisable=said["unrecognisable"],
        background_right=said["background"] == prompt.background,
        concept_found=said["concept"] == prompt.concept,
    )
