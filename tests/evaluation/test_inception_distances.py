from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.evaluation.distances import FeatureSet, frechet_distance, kernel_distance
from safetydpo.evaluation.inception_distances import (
    fid_by_torchmetrics,
    fid_interval,
    fid_refusal,
    kid_by_torchmetrics,
)


def sets(pictures: int = 60, features: int = 6, shift: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    return generator.normal(size=(pictures, features)), generator.normal(shift, 1.3, size=(pictures + 7, features))


def test_fid_of_two_sets_by_hand() -> None:
    """Features -1, 0, 1 and 2, 3, 4: means 0 and 3, both variances 1: 9 + 1 + 1 - 2 sqrt(1 * 1) = 9."""
    first = np.array([[-1.0], [0.0], [1.0]])
    assert fid_by_torchmetrics(first, first + 3) == pytest.approx(9.0)


def test_torchmetrics_and_our_own_form_agree() -> None:
    first, second = sets()
    assert fid_by_torchmetrics(first, second) == pytest.approx(frechet_distance(first, second), rel=1e-9)
    assert fid_by_torchmetrics(first, first) == pytest.approx(0.0, abs=1e-6)


def test_kid_over_one_whole_subset_is_the_distance_of_the_sets() -> None:
    """Subsets as large as both sets are the sets: torchmetrics' mean is then our own unbiased form, without spread."""
    first, second = sets()
    second = second[: len(first)]
    mean, deviation = kid_by_torchmetrics(first, second, subset_size=len(first), subsets=3)
    assert mean == pytest.approx(kernel_distance(first, second), rel=1e-9)
    assert deviation == pytest.approx(0.0, abs=1e-9)


def test_kid_of_subsets_draws_from_its_seed_and_leaves_torch_s_state() -> None:
    first, second = sets()
    before = torch.random.get_rng_state()
    found = [kid_by_torchmetrics(first, second, subset_size=20, subsets=5, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert found[0] == found[1] != found[2]


def test_fid_of_fewer_pictures_than_features_is_refused_and_named() -> None:
    first, second = sets(pictures=6, features=6)
    wanted = "expected more pictures than features for FID, found 6 of 6: .* read kid_inception or cmmd"
    assert fid_refusal(FeatureSet(first), FeatureSet(second)) is not None
    with pytest.raises(SafetyDPOError, match=wanted):
        fid_by_torchmetrics(first, second)
    assert fid_refusal(FeatureSet(second), FeatureSet(second)) is None


def test_kid_of_fewer_pictures_than_a_subset_is_refused() -> None:
    first, second = sets()
    with pytest.raises(SafetyDPOError, match="expected at least 1000 pictures .* found 60 and 67: lower subset_size"):
        kid_by_torchmetrics(first, second, subset_size=1000)


def test_the_interval_is_of_torchmetrics_value_and_widens_with_groups_that_differ() -> None:
    first, second = sets()
    concepts = tuple(f"c{n % 12}" for n in range(len(first)))
    even = fid_interval(FeatureSet(first, concepts), FeatureSet(second))
    assert even.value == fid_by_torchmetrics(first, second)
    assert even.low < even.value < even.high
    assert even.n == len(first)
    uneven = first + 10.0 * (np.arange(len(first)) % 12 == 0)[:, None]
    wide = fid_interval(FeatureSet(uneven, concepts), FeatureSet(second))
    assert wide.high - wide.low > 2 * (even.high - even.low)


def test_a_concept_is_left_out_on_both_sides() -> None:
    """A row that equals the base is at distance 0 whichever concepts are left out."""
    first, _ = sets()
    concepts = tuple(f"c{n % 12}" for n in range(len(first)))
    found = fid_interval(FeatureSet(first, concepts), FeatureSet(first, concepts))
    assert (found.value, found.low, found.high) == pytest.approx((0, 0, 0), abs=1e-6)


def test_without_torchmetrics_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.image", None)
    with pytest.raises(UsageError, match=r"expected torchmetrics .* pip install 'safetydpo\[metrics\]'"):
        fid_by_torchmetrics(*sets())
