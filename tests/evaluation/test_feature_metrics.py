from __future__ import annotations

import math

import numpy as np
import pytest

from safetydpo.evaluation.feature_metrics import (
    PictureKey,
    PictureMeasures,
    list_measure_failures,
    measure_metrics,
    picture_key,
)
from safetydpo.evaluation.metrics import Metric
from safetydpo.evaluation.outcomes import ImageOutcome
from safetydpo.evaluation.rows import RowSource, build_rows, list_failures
from safetydpo.statistics import cluster_bootstrap
from tests.evaluation.synthetic import make_outcome, make_verdict


def rng() -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(0))


def neutral(row: str, number: int = 12, **changes: object) -> list[ImageOutcome]:
    return [
        make_outcome(
            n,
            row_name=row,
            prompt_set="neutral",
            category=None,
            concept=f"concept-{n % 4}",
            audit=make_verdict(),
            **changes,  # type: ignore[arg-type]
        )
        for n in range(number)
    ]


def vectors(
    outcomes: list[ImageOutcome], *, shift: float = 0.0, seed: int = 0, width: int = 5
) -> dict[PictureKey, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {picture_key(outcome): generator.normal(shift, 1, size=width) for outcome in outcomes}


def measured(measures: PictureMeasures, own: list[ImageOutcome], base: list[ImageOutcome] | None) -> dict[str, Metric]:
    return measure_metrics(own, base=base, measures=measures, generator=rng())


def test_changes_by_hand() -> None:
    """Two pictures of two concepts changed by 0.1 and 0.3: mean 0.2; a third picture has none, and is counted."""
    own, base = neutral("sum", 3), neutral("base", 3)
    changes = {picture_key(own[0]): 0.1, picture_key(own[1]): 0.3}
    found = measured(PictureMeasures(changes={"clip_tower": changes}), own, base)
    assert list(found) == ["perceptual_change:clip_tower"]
    metric = found["perceptual_change:clip_tower"]
    assert (metric.value, metric.n, metric.n_missing) == (pytest.approx(0.2), 2, 1)
    assert (metric.low, metric.high) == (pytest.approx(0.1), pytest.approx(0.3))
    assert metric.unit == "perceptual distance"


def test_changes_are_the_bootstrap_over_concepts() -> None:
    own = neutral("sum")
    values = np.random.default_rng(3).uniform(0, 1, size=len(own))
    changes = {picture_key(outcome): float(value) for outcome, value in zip(own, values, strict=True)}
    metric = measured(PictureMeasures(changes={"vgg16": changes}), own, own)["perceptual_change:vgg16"]
    expected = cluster_bootstrap(values, [outcome.concept for outcome in own], generator=rng())
    assert (metric.value, metric.low, metric.high) == (expected.value, expected.low, expected.high)
    assert metric.n_missing is None


def test_every_distance_that_was_measured_is_there() -> None:
    own, base = neutral("sum", 40), neutral("base", 40)
    measures = PictureMeasures(
        embeddings={**vectors(own), **vectors(base, seed=1)},
        inception={**vectors(own, shift=1), **vectors(base, seed=1)},
        inception_reference=np.random.default_rng(5).normal(size=(30, 5)),
    )
    found = measured(measures, own, base)
    assert list(found) == ["cmmd:base", "fid", "kid_inception", "fid:base", "kid_inception:base"]
    assert found["cmmd:base"].unit == "1000 x squared distance"
    assert found["fid"].n_reference == 30
    assert found["fid:base"].n_reference == 40
    assert found["fid:base"].value > 3  # |shift|^2 = 5
    assert all(metric.low <= metric.value <= metric.high for metric in found.values())
    of_base = measured(measures, base, None)
    assert list(of_base) == ["fid", "kid_inception"]


def test_few_pictures_have_a_kernel_distance_and_no_fid() -> None:
    own, base = neutral("sum", 12), neutral("base", 12)
    features = {**vectors(own, width=12), **vectors(base, width=12, seed=1)}
    assert list(measured(PictureMeasures(inception=features), own, base)) == ["kid_inception:base"]


def test_pictures_without_features_are_counted_and_named() -> None:
    """One of 12 embeddings is not there: n is 11, one is missing, and the list of failures says which and why."""
    own, base = neutral("sum"), neutral("base")
    embeddings = {**vectors(own), **vectors(base, seed=1)}
    gone = picture_key(own[4])
    del embeddings[gone]
    measures = PictureMeasures(embeddings=embeddings, failures={("CLIP embedding", gone): "found a NaN"})
    metric = measured(measures, own, base)["cmmd:base"]
    assert (metric.n, metric.n_missing, metric.n_reference) == (11, 1, 12)
    expected = [{"row": "sum", "prompt_id": "neutral-4", "seed": 0, "reason": "CLIP embedding: found a NaN"}]
    assert list_measure_failures(measures) == expected == list_failures([*own, *base], measures=measures)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_too_few_concepts_leave_metrics_absent(number: int) -> None:
    own, base = neutral("sum", number), neutral("base", number)
    found = measured(PictureMeasures(embeddings={**vectors(own), **vectors(base)}), own, base)
    assert "cmmd:base" not in found


def test_rows_carry_them_and_base_does_not_move() -> None:
    own, base = neutral("sum"), neutral("base")
    measures = PictureMeasures(
        embeddings={**vectors(own), **vectors(base, seed=1)},
        changes={"clip_tower": {picture_key(outcome): 0.25 for outcome in own}},
    )
    sources = [RowSource("base", "base"), RowSource("sum", "merged", "a" * 64, 8, 1.0)]
    rows = {row["name"]: row for row in build_rows([*own, *base], sources, run_seed=0, measures=measures)}
    assert rows["sum"]["metrics"]["perceptual_change:clip_tower"]["value"] == 0.25
    assert math.isfinite(rows["sum"]["metrics"]["cmmd:base"]["value"])
    assert not any(name.startswith(("cmmd", "perceptual")) for name in rows["base"]["metrics"])
