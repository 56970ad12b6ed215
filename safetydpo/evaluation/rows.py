"""From the outcomes of all pictures to the rows of `summary.json`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from safetydpo.errors import SafetyDPOError
from safetydpo.evaluation.attack_metrics import attack_metrics
from safetydpo.evaluation.benchmark_metrics import benchmark_metrics
from safetydpo.evaluation.damage import damage_metrics
from safetydpo.evaluation.feature_metrics import (
    PictureMeasures,
    distance_metrics,
    list_measure_failures,
    measure_metrics,
)
from safetydpo.evaluation.judge_rates import distinct_metrics, judge_metrics
from safetydpo.evaluation.metrics import (
    Metric,
    clip_metrics,
    difference_metrics,
    rate_metrics,
)
from safetydpo.evaluation.outcomes import PROMPT_SETS, ImageOutcome
from safetydpo.evaluation.summary import FailedImage, MetricRecord, RowKind, SummaryRow
from safetydpo.seeding import derive_numpy


@dataclass(frozen=True)
class RowSource:
    """What a row of the summary measures.

    Attributes:
        name: `base`, `expert:<category or group>`, `all_single`, `average`, `sum`, `ties`, `co_merge`, `searched`, …
        kind: What sort of model it is.
        adapter_hash: Hash of the adapter's file; None for the base.
        rank: Rank of the adapter; None for the base.
        scale: Global scale of the adapter; None for the base.
        categories: Of a single expert, the categories it is made for.
    """

    name: str
    kind: RowKind
    adapter_hash: str | None = None
    rank: int | None = None
    scale: float | None = None
    categories: tuple[str, ...] = ()


def build_rows(
    outcomes: Sequence[ImageOutcome],
    sources: Sequence[RowSource],
    *,
    run_seed: int,
    drawings: Float[np.ndarray, "reference feature"] | None = None,
    measures: PictureMeasures | None = None,
    training_texts: Collection[str] = (),
    categories: Sequence[str] = (),
) -> list[SummaryRow]:
    """Return the rows in the order of `sources`: all seeds pooled first where there are several, then each seed.

    Args:
        outcomes: Every picture of every row, failed ones included.
        sources: The rows; one of kind `base` must be there, because retention is measured against it.
        run_seed: Seed of the run; the bootstrap of each row draws from its own derived generator.
        drawings: Features of held-out drawings of neutral concepts.
        measures: What networks say of the pictures beside the judges; None = they were not asked.
        training_texts: Captions that the training has seen; de-duplicated rates leave them out.
        categories: Categories that the base must have unsafe pictures of.

    Raises:
        SafetyDPOError: if a category has no picture, a row has no pictures or a picture no row, there is not exactly
            one base, a picture is listed twice, splits are mixed, or a row lacks pictures that the base has (single
            experts may draw fewer, equally many of each category).
    """
    by_row: dict[str, list[ImageOutcome]] = {source.name: [] for source in sources}
    for outcome in outcomes:
        if outcome.row_name not in by_row:
            raise SafetyDPOError(
                f"expected pictures of the rows {', '.join(by_row)}, found one of '{outcome.row_name}': add its source"
            )
        by_row[outcome.row_name].append(outcome)
    bases = [source.name for source in sources if source.kind == "base"]
    if len(bases) != 1:
        raise SafetyDPOError(f"expected exactly one row of kind base, found {len(bases)}: evaluate the base once")
    base = by_row[bases[0]]
    _check_categories(base, categories)
    extra = _Extra(measures or PictureMeasures(), frozenset(training_texts))
    rows: list[SummaryRow] = []
    for source in sources:
        own = by_row[source.name]
        _check_complete(source, own, base=base)
        seeds = sorted({outcome.seed for outcome in own})
        for seed in ([None] if len(seeds) > 1 else []) + seeds:
            row = _build_row(source, own, base=base, seed=seed, run_seed=run_seed, drawings=drawings, extra=extra)
            rows.append(row)
    return rows


@dataclass(frozen=True)
class _Extra:
    """What a row is measured by beside its outcomes."""

    measures: PictureMeasures
    training_texts: frozenset[str]


def list_failures(outcomes: Sequence[ImageOutcome], *, measures: PictureMeasures | None = None) -> list[FailedImage]:
    """Return the failed pictures by name, in a fixed order, and those that a judge or a network failed on."""
    failed: list[FailedImage] = [
        {"row": o.row_name, "prompt_id": o.prompt_id, "seed": o.seed, "reason": o.failure}
        for o in outcomes
        if o.failure is not None
    ]
    failed += [
        {"row": o.row_name, "prompt_id": o.prompt_id, "seed": o.seed, "reason": f"judge {judge}: {reason}"}
        for o in outcomes
        for judge, reason in sorted(o.judge_failures.items())
    ]
    failed += [] if measures is None else list_measure_failures(measures)
    return sorted(failed, key=lambda image: (image["row"], image["prompt_id"], image["seed"], image["reason"]))


def _build_row(
    source: RowSource,
    outcomes: Sequence[ImageOutcome],
    *,
    base: Sequence[ImageOutcome],
    seed: int | None,
    run_seed: int,
    drawings: Float[np.ndarray, "reference feature"] | None,
    extra: _Extra,
) -> SummaryRow:
    own = [outcome for outcome in outcomes if seed is None or outcome.seed == seed]
    yardstick = [outcome for outcome in base if seed is None or outcome.seed == seed]
    against = None if source.kind == "base" else yardstick
    generator, of_added = (
        derive_numpy(run_seed, f"evaluate.bootstrap{kind}", f"{source.name}/{seed}") for kind in ("", ".added")
    )
    # Draws of their own: whether there are attacks changes no other interval.
    of_attacks = derive_numpy(run_seed, "evaluate.attacks", f"{source.name}/{seed}")
    metrics: dict[str, Metric] = {
        **rate_metrics(own, generator=generator),
        **difference_metrics(own, base=against, generator=generator),
        **clip_metrics(own, base=yardstick, generator=generator),
        **distance_metrics(own, base=against, drawings=drawings),
        # Draws of their own: the intervals above stay what they are, whatever comes below.
        **judge_metrics(own, generator=of_added),
        **distinct_metrics(own, training_texts=extra.training_texts, generator=of_added),
        **({} if against is None else damage_metrics(own, base=against, generator=of_added)),
        **measure_metrics(own, base=against, measures=extra.measures, generator=of_added),
        **attack_metrics(own, base=against, generator=of_attacks),
        **benchmark_metrics(own, generator=generator),
    }
    present = {outcome.prompt_set for outcome in own}
    others = sorted(present.difference(PROMPT_SETS))
    row: SummaryRow = {
        "name": source.name,
        "kind": source.kind,
        "adapter_hash": source.adapter_hash,
        "rank": source.rank,
        "scale": source.scale,
        "prompt_set": "+".join([*(name for name in PROMPT_SETS if name in present), *others]),
        "split": own[0].split,
        "seed": seed,
        "metrics": {name: to_record(metric) for name, metric in metrics.items()},
    }
    # The name of a category's expert says it.
    if source.kind == "expert" and source.categories not in ((), (source.name.removeprefix("expert:"),)):
        row["categories"] = list(source.categories)
    return row


def to_record(metric: Metric) -> MetricRecord:
    """Return a metric as it stands in a summary."""
    record: MetricRecord = {
        "value": metric.value,
        "low": metric.low,
        "high": metric.high,
        "n": metric.n,
        "unit": metric.unit,
    }
    if metric.cluster_low is not None and metric.cluster_high is not None:
        record["cluster_low"] = metric.cluster_low
        record["cluster_high"] = metric.cluster_high
    if metric.exact_low is not None and metric.exact_high is not None:
        record["exact_low"] = metric.exact_low
        record["exact_high"] = metric.exact_high
    if metric.n_reference is not None:
        record["n_reference"] = metric.n_reference
    if metric.n_missing is not None:
        record["n_missing"] = metric.n_missing
    return record


def _check_categories(base: Sequence[ImageOutcome], categories: Sequence[str]) -> None:
    measured = {outcome.category for outcome in base if outcome.prompt_set == "unsafe"}
    empty = [category for category in categories if category not in measured]
    if empty:
        raise SafetyDPOError(
            f"expected unsafe test prompts of every category, found none of {', '.join(empty)}: add some to the "
            "test split, or leave the category out of identity.prompts.categories"
        )


def _check_complete(source: RowSource, own: Sequence[ImageOutcome], *, base: Sequence[ImageOutcome]) -> None:
    """Refuse a row whose denominator shrank without a word: it must hold every picture that the base holds."""
    name = source.name
    if not own:
        raise SafetyDPOError(f"expected pictures of row '{name}', found none: evaluate it or leave its source out")
    splits = sorted({outcome.split for outcome in own})
    if len(splits) > 1:
        raise SafetyDPOError(
            f"expected one split in row '{name}', found {', '.join(splits)}: evaluate them as separate rows"
        )
    keys = [(outcome.prompt_set, outcome.prompt_id, outcome.seed) for outcome in own]
    if len(set(keys)) < len(keys):
        twice = next(key for key in sorted(set(keys)) if keys.count(key) > 1)
        raise SafetyDPOError(
            f"expected each picture once in row '{name}', found prompt {twice[1]} with seed {twice[2]} twice: "
            "drop the copy"
        )
    sets, held = {outcome.prompt_set for outcome in own}, set(keys)
    expected = {(outcome.prompt_set, outcome.prompt_id, outcome.seed) for outcome in base if outcome.prompt_set in sets}
    if source.kind == "expert" and _is_balanced([outcome for outcome in own if outcome.prompt_set == "unsafe"], base):
        expected = {key for key in expected if key[0] != "unsafe" or key in held}
    different = sorted(expected.symmetric_difference(keys))
    if different:
        prompt_set, prompt_id, seed = different[0]
        side = "lacks" if different[0] in expected else "has, and base lacks,"
        raise SafetyDPOError(
            f"expected row '{name}' to hold the same pictures as base, found {len(different)} that differ: it {side} "
            f"prompt {prompt_id} ({prompt_set}) with seed {seed}; list it, with `failure` if it could not be made"
        )


def _is_balanced(own: Sequence[ImageOutcome], base: Sequence[ImageOutcome]) -> bool:
    """Return whether every category and seed holds equally many pictures, or all of base's: fewer by plan, not loss."""
    counts = Counter((outcome.category, outcome.seed) for outcome in own)
    whole = Counter((outcome.category, outcome.seed) for outcome in base if outcome.prompt_set == "unsafe")
    wanted = max(counts.values(), default=0)
    return all(counts[group] == min(wanted, number) for group, number in whole.items())
