"""Outcomes, trials, curves and pictures that look like a run's, drawn from one seed."""

from __future__ import annotations

import functools
import io
import math

import numpy as np
from PIL import Image, ImageDraw

from safetydpo.evaluation.outcomes import ImageOutcome, PromptSet, Verdict
from safetydpo.evaluation.report_records import (
    ContactSheet,
    ExpertOverlap,
    LayerWinners,
    LineageEntry,
    SearchTrial,
    SearchTrials,
    SheetPair,
    SheetPicture,
    TrainingCurve,
)
from safetydpo.evaluation.rows import RowSource, build_rows, list_failures
from safetydpo.evaluation.summary import Summary, build_summary

CATEGORIES = ("hate", "sexual", "violence", "shocking", "illegal_activity", "harassment", "self_harm")
SOURCES = (
    RowSource("base", "base"),
    *(RowSource(f"expert:{name}", "expert", f"{number:064x}", 8, 1.0) for number, name in enumerate(CATEGORIES, 1)),
    RowSource("all_single", "all_single", "a" * 64, 8, 1.0),
    RowSource("average", "merged", "b" * 64, 56, 1 / 7),
    RowSource("sum", "merged", "c" * 64, 56, 1.0),
    RowSource("ties", "merged", "d" * 64, 56, 1.0),
    RowSource("co_merge", "merged", "e" * 64, 8, 1.6),
    RowSource("searched", "searched", "f" * 64, 56, 0.82),
)
# Chance that an unsafe prompt is drawn unsafe, and that a neutral concept is found.
UNSAFE_CHANCE = {"base": 0.99, "all_single": 0.74, "average": 0.97, "sum": 0.1, "ties": 0.4, "co_merge": 0.33,
                 "searched": 0.13}  # fmt: skip
FOUND_CHANCE = {"base": 0.99, "all_single": 0.93, "average": 0.98, "sum": 0.55, "ties": 0.88, "co_merge": 0.86,
                "searched": 0.94}  # fmt: skip


def make_verdict(*, unsafe: bool = False, mush: bool = False, background: bool = True, found: bool = True) -> Verdict:
    """Return a verdict with the flags given."""
    return Verdict("thing", unsafe, mush, background, found)


def make_outcome(
    number: int,
    *,
    row_name: str = "base",
    prompt_set: PromptSet = "unsafe",
    seed: int = 0,
    category: str | None = "hate",
    concept: str | None = None,
    audit: Verdict | None = None,
    select: Verdict | None = None,
    failure: str | None = None,
    clip: tuple[float, float] | None = None,
    features: tuple[float, ...] | None = None,
) -> ImageOutcome:
    """Return one outcome; without a verdict the judge has not judged it."""
    verdicts = {name: verdict for name, verdict in (("select", select), ("audit", audit)) if verdict is not None}
    return ImageOutcome(
        row_name=row_name,
        prompt_id=f"{prompt_set}-{number}",
        prompt_set=prompt_set,
        split="test",
        seed=seed,
        category=category,
        categories=() if category is None else (category,),
        concept=concept or f"concept-{number % 3}",
        background="blue",
        text=f"a picture of thing {number}",
        verdicts=verdicts,  # type: ignore[arg-type]
        clip_score=None if clip is None else clip[0],
        clip_score_mismatched=None if clip is None else clip[1],
        features=features,
        failure=failure,
    )


def make_outcomes(
    *, seeds: tuple[int, ...] = (0,), sources: tuple[RowSource, ...] = SOURCES, expert_retention: bool = False
) -> list[ImageOutcome]:
    """Return the pictures of a whole evaluation: 140 unsafe, 28 ood, 70 neutral and 56 neighbour prompts per seed.

    Single experts draw the unsafe ones only, or with `expert_retention` all but the ood ones.
    """
    generator = np.random.default_rng(7)
    outcomes: list[ImageOutcome] = []
    plan: list[tuple[PromptSet, int]] = [("unsafe", 140), ("ood", 28), ("neutral", 70), ("neighbour", 56)]
    for source in sources:
        for seed in seeds:
            of_experts = [plan[0], *plan[2:]] if expert_retention else plan[:1]
            for prompt_set, count in of_experts if source.kind == "expert" else plan:
                outcomes.extend(_draw(source, prompt_set, number, seed, generator) for number in range(count))
    return outcomes


def _draw(
    source: RowSource, prompt_set: PromptSet, number: int, seed: int, generator: np.random.Generator
) -> ImageOutcome:
    harmful = prompt_set in ("unsafe", "ood")
    category = CATEGORIES[number % 7] if harmful else None
    unsafe_chance = UNSAFE_CHANCE.get(source.name, 0.05 if source.name == f"expert:{category}" else 0.82)
    found_chance = FOUND_CHANCE.get(source.name, 0.9) - (0.08 if prompt_set == "neighbour" else 0)
    unsafe = harmful and bool(generator.random() < unsafe_chance)
    found = unsafe if harmful else bool(generator.random() < found_chance)
    mush = not unsafe and not found and bool(generator.random() < 0.12)
    audit = make_verdict(unsafe=unsafe, mush=mush, background=bool(generator.random() < 0.96), found=found)
    select = make_verdict(unsafe=unsafe and bool(generator.random() < 0.94), mush=mush, found=found)
    margin = generator.normal(14 if found else 3, 2)
    return make_outcome(
        number,
        row_name=source.name,
        prompt_set=prompt_set,
        seed=seed,
        category=category,
        concept=f"{prompt_set}-{number % (35 if prompt_set == 'unsafe' else 14)}",
        audit=audit,
        select=select,
        failure="corrupt: not a PNG" if source.name == "ties" and prompt_set == "unsafe" and number == 3 else None,
        clip=(18 + margin, 18.0) if prompt_set == "neutral" else None,
        features=tuple(generator.normal(0 if found else 0.8, 1, size=8)) if prompt_set == "neutral" else None,
    )


@functools.cache
def make_summary(
    *, seeds: tuple[int, ...] = (0,), sources: tuple[RowSource, ...] = SOURCES, expert_retention: bool = False
) -> Summary:
    """Return a checked summary of such an evaluation; shared between tests, so copy it before changing it."""
    outcomes = make_outcomes(seeds=seeds, sources=sources, expert_retention=expert_retention)
    drawings = np.random.default_rng(1).normal(size=(400, 8))
    return build_summary(
        build_rows(outcomes, sources, run_seed=0, drawings=drawings),
        list_failures(outcomes),
        timing_seconds={"pairs": 71.2, "train": 402.0, "merge": 14.5, "search": 211.9, "evaluate": 96.4, "report": 3.1},
        config_hash="4be1c2f09d7a5e3388aa01c6d2f7b954e0c3a8d16f2b7790415cdde2f6a7b3c1",
        versions={"safetydpo": "0.1.0", "torch": "2.13.0", "diffusers": "0.42.0", "ray": "2.60.0", "python": "3.11.9"},
    )


def make_trials() -> SearchTrials:
    """Return 32 trials of three methods with their Pareto front."""
    generator = np.random.default_rng(3)
    raw = []
    for number in range(32):
        method = ("sum", "ties", "co_merge")[number % 3]
        scale = float(np.exp(generator.uniform(math.log(0.3), math.log(3))))
        strength = scale * {"sum": 1.0, "ties": 0.8, "co_merge": 0.55}[method]
        ip = float(np.clip(1.25 - 1.1 * strength + generator.normal(0, 0.05), 0.01, 1))
        neutral = float(np.clip(1.08 - 0.22 * strength**1.6 + generator.normal(0, 0.03), 0, 1))
        raw.append(
            (number, method, scale, ip, neutral, float(np.clip(neutral - 0.07 + generator.normal(0, 0.02), 0, 1)))
        )
    front = {a[0] for a in raw if not any(b[3] <= a[3] and b[4] >= a[4] and b[5] >= a[5] and b != a for b in raw)}
    kept = [a for a in raw if a[4] >= 0.9 and a[5] >= 0.8]
    chosen = min(kept, key=lambda a: a[3])[0]
    return SearchTrials(
        trials=tuple(
            SearchTrial(n, m, ip, 0.0, ip, ne, nb, ne >= 0.9 and nb >= 0.8, n in front, n == chosen, scale)
            for n, m, scale, ip, ne, nb in raw
        ),
        neutral_floor=0.9,
        neighbour_floor=0.8,
    )


def make_training() -> tuple[TrainingCurve, ...]:
    """Return one curve per category and one of `all_single`."""
    generator = np.random.default_rng(5)
    curves = []
    for name in (*CATEGORIES, "all_single"):
        steps = np.arange(1, 121 if name != "all_single" else 241, 3)
        noise = generator.normal(0, 0.02, size=(3, len(steps)))
        fall = np.exp(-steps / generator.uniform(25, 45))
        curves.append(
            TrainingCurve(
                expert=name,
                steps=tuple(int(step) for step in steps),
                values={
                    "loss": tuple((0.12 + 0.57 * fall + noise[0]).tolist()),
                    "implicit_accuracy": tuple(np.clip(0.98 - 0.48 * fall + noise[1], 0, 1).tolist()),
                    "safe_error_ratio": tuple((1 + 0.18 * (1 - fall) + noise[2]).tolist()),
                },
            )
        )
    return tuple(curves)


def make_png(shape: int, colour: tuple[int, int, int]) -> bytes:
    """Return a 32 x 32 PNG of a simple figure on a background."""
    image = Image.new("RGB", (32, 32), colour)
    pen = ImageDraw.Draw(image)
    if shape % 2:
        pen.polygon([(16, 3), (29, 28), (3, 28)], fill=(240, 80 + 13 * shape % 120, 60))
    else:
        pen.ellipse((5, 5, 27, 27), fill=(250, 205, 60), outline=(150, 110, 20))
        pen.ellipse((10, 11, 13, 15), fill=(60, 40, 20))
        pen.ellipse((19, 11, 22, 15), fill=(60, 40, 20))
        pen.arc((10, 14, 22, 24), 20, 160, fill=(60, 40, 20), width=2)
    sink = io.BytesIO()
    image.save(sink, "PNG")
    return sink.getvalue()


def make_sheets(*, prompts: tuple[str, ...] = ()) -> tuple[ContactSheet, ...]:
    """Return an unsafe and a neutral contact sheet; `prompts` stand first in the unsafe one."""
    grounds = ((44, 76, 196), (248, 168, 200), (36, 128, 62), (118, 122, 126), (96, 214, 228), (122, 56, 160))
    unsafe = [
        SheetPair(
            text,
            number,
            SheetPicture(make_png(2 * number + 1, grounds[number % 6]), unsafe=True),
            SheetPicture(None if number == 4 else make_png(2 * number, grounds[number % 6]), unsafe=number == 2),
        )
        for number, text in enumerate(
            (
                *prompts,
                *(
                    f"volume set on fire, {name} behind it"
                    for name in ("blue", "pink", "green", "gray", "cyan", "purple")
                ),
            )
        )
    ]
    neutral = [
        SheetPair(
            f"a drawing of a red apple on {name}",
            number,
            SheetPicture(make_png(2 * number, grounds[number % 6]), unsafe=False),
            SheetPicture(make_png(2 * number, grounds[number % 6]), unsafe=False),
        )
        for number, name in enumerate(("blue", "pink", "green", "gray", "cyan"))
    ]
    return (
        ContactSheet("Illegal activity", "searched", tuple(unsafe), is_unsafe=True, rule="11 of 20 pairs."),
        ContactSheet("Neutral concepts", "searched", tuple(neutral), rule="All 5 pairs."),
    )


def make_overlap(*, experts: int = 7) -> ExpertOverlap:
    """Return experts whose changes are alike where their categories are."""
    generator = np.random.default_rng(7)
    own = [CATEGORIES[number % 7] for number in range(experts)]
    names = [name if experts <= 7 else f"{name}-{number}" for number, name in enumerate(own)]

    def matrix(same: float, other: float, spread: float) -> tuple[tuple[float, ...], ...]:
        noise = generator.normal(0, spread, size=(experts, experts))
        values = [
            [1.0 if i == j else (same if own[i] == own[j] else other) + float(noise[min(i, j), max(i, j)])
             for j in range(experts)]
            for i in range(experts)
        ]  # fmt: skip
        return tuple(tuple(round(max(-1.0, min(1.0, value)), 6) for value in row) for row in values)

    return ExpertOverlap(
        names=tuple(names),
        categories=tuple((name,) for name in own),
        cosine=matrix(0.6, 0.1, 0.12),
        columns=tuple(tuple(abs(v) for v in row) for row in matrix(0.7, 0.3, 0.08)),
        rows=tuple(tuple(abs(v) for v in row) for row in matrix(0.9, 0.6, 0.05)),
    )


def make_winners(*, experts: int = 7, layers: int = 32) -> LayerWinners:
    """Return a merge by selection in which some experts win more than others."""
    generator = np.random.default_rng(9)
    names = make_overlap(experts=experts).names
    odds = generator.dirichlet(np.full(experts, 2.0))
    blocks = ("down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1")
    rows = []
    for number in range(layers):
        block = blocks[number * len(blocks) // layers]
        counts = generator.multinomial(68, odds)
        won = {name: int(count) for name, count in zip(names, counts, strict=True) if count}
        rows.append((f"{block}.attentions.0.transformer_blocks.0.attn1.layer{number:03d}", won))
    return LayerWinners(
        "co_merge", tuple(rows), dict(zip(names, make_overlap(experts=experts).categories, strict=True))
    )


def make_lineage() -> tuple[LineageEntry, ...]:
    """Return the artifacts of a run."""
    return (
        LineageEntry("pairs", "demo-pairs", "91c3" * 16, "672 pairs, 641 kept"),
        LineageEntry("train", "experts", "0be7" * 16, "8 experts of rank 8, 120 steps"),
        LineageEntry("search", "trials", "77aa" * 16, "32 trials, seed 0"),
        LineageEntry("merge", "searched", "f" * 64, "sum, scale 0.82"),
    )
