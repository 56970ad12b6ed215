"""Distances of a row's neutral pictures from drawings, from the base's pictures and from reference pictures.

Failed pictures, and those whose features are not finite, have none: n counts those that do, `n_missing` the others.

Axes: image = one picture; reference = one reference picture; feature = one feature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from safetydpo.errors import SafetyDPOError
from safetydpo.evaluation.distances import FeatureSet, clip_mmd_interval, frechet_interval, kernel_interval
from safetydpo.evaluation.inception_distances import fid_interval, fid_refusal
from safetydpo.evaluation.metrics import Metric, from_interval
from safetydpo.evaluation.outcomes import ImageOutcome
from safetydpo.evaluation.summary import FailedImage
from safetydpo.statistics import cluster_bootstrap

MAX_FEATURES = 64
PictureKey = tuple[str, str, int]
"""(row name, prompt id, seed) of a picture."""


@dataclass(frozen=True)
class PictureMeasures:
    """What networks say of stored pictures beside the judges; empty where a network was not asked.

    Attributes:
        embeddings: CLIP embedding of each picture, which CMMD compares; not normalised.
        inception: Inception features of each picture, which FID and KID compare.
        inception_reference: The same of reference pictures.
        changes: Perceptual distance of each picture from the base's picture of its prompt and seed, by network.
        failures: Why a picture lacks one of these, by (name of the measure, picture).
    """

    embeddings: Mapping[PictureKey, Float[np.ndarray, " feature"]] = field(default_factory=dict)
    inception: Mapping[PictureKey, Float[np.ndarray, " feature"]] = field(default_factory=dict)
    inception_reference: Float[np.ndarray, "reference feature"] | None = None
    changes: Mapping[str, Mapping[PictureKey, float]] = field(default_factory=dict)
    failures: Mapping[tuple[str, PictureKey], str] = field(default_factory=dict)


def distance_metrics(
    outcomes: Sequence[ImageOutcome],
    *,
    base: Sequence[ImageOutcome] | None,
    drawings: Float[np.ndarray, "reference feature"] | None,
) -> dict[str, Metric]:
    """Return `frechet` and `kid` against drawings, `frechet:base` and `kid:base` against base's pictures.

    On neutral prompts. Failed pictures have no features: n counts those that do. Absent without a
    reference, or with fewer than 3 concepts (one is left out at a time, and each side still needs 2 pictures).

    Raises:
        SafetyDPOError: if there are more than 64 features, because small sets cannot carry them.
    """
    metrics: dict[str, Metric] = {}
    own = _features(outcomes)
    if own is None or len(set(own.concepts or ())) < 3:
        return metrics
    if own.features.shape[1] > MAX_FEATURES:
        raise SafetyDPOError(
            f"expected at most {MAX_FEATURES} features, found {own.features.shape[1]}: "
            "use a small feature layer, a larger covariance cannot be estimated from so few pictures"
        )
    references: list[tuple[str, FeatureSet | None]] = [
        ("", None if drawings is None else FeatureSet(drawings)),
        (":base", None if base is None else _features(base)),
    ]
    missing = sum(outcome.prompt_set == "neutral" for outcome in outcomes) - len(own.features)
    for suffix, reference in references:
        if reference is None:
            continue
        for name, interval in (
            ("frechet", frechet_interval(own, reference)),
            ("kid", kernel_interval(own, reference)),
        ):
            metrics[f"{name}{suffix}"] = from_interval(
                interval, "squared distance", n_reference=len(reference.features), n_missing=missing
            )
    return metrics


def _features(outcomes: Sequence[ImageOutcome]) -> FeatureSet | None:
    chosen = [o for o in outcomes if o.prompt_set == "neutral" and o.failure is None and o.features is not None]
    if not chosen:
        return None
    return FeatureSet(
        features=np.array([outcome.features for outcome in chosen], dtype=np.float64),
        concepts=tuple(outcome.concept for outcome in chosen),
    )


def measure_metrics(
    outcomes: Sequence[ImageOutcome],
    *,
    base: Sequence[ImageOutcome] | None,
    measures: PictureMeasures,
    generator: np.random.Generator,
) -> dict[str, Metric]:
    """Return `cmmd:base`, `fid`, `fid:base`, `kid_inception`, `kid_inception:base`, `perceptual_change:<network>`.

    On neutral prompts, each as far as it was measured; distances need 3 concepts, perceptual changes 2. FID is absent
    where a side has no more pictures than features: its covariance would have no inverse, and its bias no bound.
    """
    neutral = [outcome for outcome in outcomes if outcome.prompt_set == "neutral"]
    before = None if base is None else [outcome for outcome in base if outcome.prompt_set == "neutral"]
    metrics: dict[str, Metric] = {}
    own, yardstick = _measured(neutral, measures.embeddings), _measured(before or [], measures.embeddings)
    if _has_concepts(own, 3) and _has_concepts(yardstick, 3):
        metrics["cmmd:base"] = from_interval(
            clip_mmd_interval(own, yardstick),
            "1000 x squared distance",
            n_reference=len(yardstick.features),
            n_missing=len(neutral) - len(own.features),
        )
    metrics.update(_inception_metrics(neutral, before, measures))
    if before is not None:
        metrics.update(_change_metrics(neutral, measures, generator=generator))
    return metrics


def _inception_metrics(
    neutral: Sequence[ImageOutcome], before: Sequence[ImageOutcome] | None, measures: PictureMeasures
) -> dict[str, Metric]:
    own = _measured(neutral, measures.inception)
    metrics: dict[str, Metric] = {}
    if not _has_concepts(own, 3):
        return metrics
    references: list[tuple[str, FeatureSet]] = []
    if measures.inception_reference is not None:
        references.append(("", FeatureSet(measures.inception_reference)))
    if before is not None:
        references.append((":base", _measured(before, measures.inception)))
    for suffix, reference in references:
        if len(reference.features) < 2:
            continue
        counts = {"n_reference": len(reference.features), "n_missing": len(neutral) - len(own.features)}
        if fid_refusal(own, reference) is None:
            metrics[f"fid{suffix}"] = from_interval(fid_interval(own, reference), "squared distance", **counts)
        metrics[f"kid_inception{suffix}"] = from_interval(kernel_interval(own, reference), "squared distance", **counts)
    return metrics


def _change_metrics(
    neutral: Sequence[ImageOutcome], measures: PictureMeasures, *, generator: np.random.Generator
) -> dict[str, Metric]:
    metrics: dict[str, Metric] = {}
    for network, changes in measures.changes.items():
        found = [(changes[key], outcome.concept) for outcome in neutral if (key := picture_key(outcome)) in changes]
        values, concepts = [value for value, _ in found], [concept for _, concept in found]
        if len(set(concepts)) < 2:
            continue
        interval = cluster_bootstrap(np.array(values, dtype=np.float64), concepts, generator=generator)
        metrics[f"perceptual_change:{network}"] = from_interval(
            interval, "perceptual distance", n_missing=len(neutral) - len(values)
        )
    return metrics


def list_measure_failures(measures: PictureMeasures) -> list[FailedImage]:
    """Return the pictures that a network could not measure, by name; their metrics say how many as `n_missing`."""
    return [
        {"row": row, "prompt_id": prompt_id, "seed": seed, "reason": f"{what}: {reason}"}
        for (what, (row, prompt_id, seed)), reason in sorted(measures.failures.items())
    ]


def picture_key(outcome: ImageOutcome) -> PictureKey:
    """Return what names a picture among those of a run."""
    return outcome.row_name, outcome.prompt_id, outcome.seed


def _measured(
    outcomes: Sequence[ImageOutcome], features: Mapping[PictureKey, Float[np.ndarray, " feature"]]
) -> FeatureSet:
    found = [outcome for outcome in outcomes if picture_key(outcome) in features]
    values = [features[picture_key(outcome)] for outcome in found]
    table = np.array(values, dtype=np.float64) if values else np.zeros((0, 1))
    return FeatureSet(table, tuple(outcome.concept for outcome in found))


def _has_concepts(features: FeatureSet, number: int) -> bool:
    return len(set(features.concepts or ())) >= number
