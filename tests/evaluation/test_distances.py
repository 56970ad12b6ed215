from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from safetydpo.errors import SafetyDPOError
from safetydpo.evaluation.distances import (
    FeatureSet,
    clip_mmd,
    clip_mmd_interval,
    clip_scores,
    frechet_distance,
    frechet_interval,
    kernel_distance,
    kernel_interval,
    mismatched_captions,
)


class Pixels(torch.nn.Module):
    """The twelve pixels of a 2 x 2 picture as its features."""

    num_features = 12

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1).double() / 255


def pictures(seed: int, count: int, centre: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 3, 2, 2, generator=generator) * 30 + centre
    return noise.clamp(0, 255).to(torch.uint8)


def test_clip_score_by_hand() -> None:
    """(3, 4) against (1, 0): cosine 3/5, score 60; against (0, -2): cosine -4/5, score -80, not clipped."""
    scores = clip_scores(np.array([[3.0, 4], [3, 4]]), np.array([[1.0, 0], [0, -2]]))
    assert scores == pytest.approx([60.0, -80.0])


def test_clip_score_equals_torch() -> None:
    generator = np.random.default_rng(0)
    images, texts = generator.normal(size=(9, 16)), generator.normal(size=(9, 16))
    theirs = 100 * torch.cosine_similarity(torch.tensor(images), torch.tensor(texts))
    assert clip_scores(images, texts) == pytest.approx(theirs.numpy())


def test_clip_score_refuses() -> None:
    with pytest.raises(SafetyDPOError, match=r"expected embeddings of one shape .* found \(2, 3\) and \(1, 3\)"):
        clip_scores(np.ones((2, 3)), np.ones((1, 3)))
    with pytest.raises(SafetyDPOError, match="expected embeddings with finite, non-zero length"):
        clip_scores(np.zeros((1, 3)), np.ones((1, 3)))


def test_mismatched_captions_by_hand() -> None:
    """Sorted a0 a2 b1 c3; the largest concept has 2, so shift by 2: a0 -> b1, a2 -> c3, b1 -> a0, c3 -> a2."""
    assert mismatched_captions(["a", "b", "a", "c"]) == [1, 0, 3, 2]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from("abcdef"), min_size=0, max_size=60))
def test_mismatched_captions_are_a_permutation_to_other_concepts(concepts: list[str]) -> None:
    if concepts and 2 * max(concepts.count(name) for name in concepts) > len(concepts):
        with pytest.raises(SafetyDPOError, match="expected at most half"):
            mismatched_captions(concepts)
        return
    partner = mismatched_captions(concepts)
    assert sorted(partner) == list(range(len(concepts)))
    assert all(concepts[index] != concepts[other] for index, other in enumerate(partner))


def test_frechet_by_hand() -> None:
    """{0, 2} and {1, 5}: means 1 and 3, variances 2 and 8: 4 + 2 + 8 - 2 sqrt(16) = 6."""
    assert frechet_distance(np.array([[0.0], [2]]), np.array([[1.0], [5]])) == pytest.approx(6.0)


def test_kernel_distance_by_hand() -> None:
    """k(x, y) = (xy + 1)^3 on {0, 1} and {1, 2}: 1 + 27 - 2 * (1 + 1 + 8 + 27) / 4 = 9.5."""
    assert kernel_distance(np.array([[0.0], [1]]), np.array([[1.0], [2]])) == pytest.approx(9.5)


def test_frechet_equals_torchmetrics_and_the_matrix_root() -> None:
    real, fake = pictures(0, 300, 120), pictures(1, 200, 140)
    metric = FrechetInceptionDistance(feature=Pixels(), input_img_size=(3, 2, 2)).set_dtype(torch.float64)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    ours = frechet_distance(Pixels()(fake).numpy(), Pixels()(real).numpy())
    assert ours == pytest.approx(float(metric.compute()), rel=1e-6)
    a, b = Pixels()(fake).numpy(), Pixels()(real).numpy()
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    by_root = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(s + t - 2 * np.real(scipy.linalg.sqrtm(s @ t)))
    assert ours == pytest.approx(float(by_root), rel=1e-6)


# torchmetrics warns that it keeps all features: the sets here are tiny.
@pytest.mark.filterwarnings("ignore:Metric .Kernel Inception Distance. will save:UserWarning")
def test_kernel_distance_equals_torchmetrics() -> None:
    real, fake = pictures(0, 150, 120), pictures(1, 150, 140)
    metric = KernelInceptionDistance(feature=Pixels(), subsets=1, subset_size=150).set_dtype(torch.float64)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    theirs, _ = metric.compute()
    ours = kernel_distance(Pixels()(fake).numpy(), Pixels()(real).numpy())
    assert ours == pytest.approx(float(theirs), rel=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 8))
def test_distances_are_symmetric_and_frechet_of_a_set_with_itself_is_zero(seed: int, dims: int) -> None:
    generator = np.random.default_rng(seed)
    a, b = generator.normal(size=(12, dims)), generator.normal(size=(9, dims))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), abs=1e-8)
    assert kernel_distance(a, b) == pytest.approx(kernel_distance(b, a))
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-6)
    assert frechet_distance(a, b) >= 0


def test_kernel_distance_is_unbiased() -> None:
    """Two sets of one distribution: the mean over 400 draws is within 4 standard errors of 0."""
    generator = np.random.default_rng(0)
    draws = np.array(
        [kernel_distance(generator.normal(size=(8, 3)), generator.normal(size=(6, 3))) for _ in range(400)]
    )
    assert abs(draws.mean()) < 4 * draws.std() / np.sqrt(400)


def test_intervals_leave_a_concept_out_on_both_sides() -> None:
    """The same pictures on both sides stay at distance 0 whichever concept is left out."""
    features = np.random.default_rng(0).normal(size=(12, 2))
    pair = FeatureSet(features, tuple(f"c{i % 3}" for i in range(12)))
    interval = frechet_interval(pair, pair)
    assert (interval.low, interval.high) == (pytest.approx(0, abs=1e-6), pytest.approx(0, abs=1e-6))
    assert interval.n == 12
    one_sided = kernel_interval(pair, FeatureSet(features))
    assert one_sided.high > one_sided.value > one_sided.low


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_distances_refuse(distance: object) -> None:
    assert callable(distance)
    with pytest.raises(SafetyDPOError, match="expected two feature tables with equal columns"):
        distance(np.ones((3, 2)), np.ones((3, 4)))
    with pytest.raises(SafetyDPOError, match="expected at least 2 pictures on each side, found 1 and 3"):
        distance(np.ones((1, 2)), np.ones((3, 2)))
    with pytest.raises(SafetyDPOError, match="expected finite features"):
        distance(np.full((3, 2), np.nan), np.ones((3, 2)))


def test_intervals_need_concepts() -> None:
    with pytest.raises(SafetyDPOError, match="expected a concept for each of 3 generated pictures, found 0"):
        frechet_interval(FeatureSet(np.ones((3, 2))), FeatureSet(np.ones((3, 2))))


def test_cmmd_by_hand() -> None:
    """Sets {(1,0), (0,1)} and {(-1,0), (0,-1)}; squared distances 2 within, 4 and 2 across, k(d2) = exp(-d2 / 200).
    Unbiased: 1000 (k(2) + k(2) - 2 (k(4) + k(2)) / 2) = 1000 (k(2) - k(4)) = 9.8512. Biased: each set with itself has
    the mean (1 + k(2)) / 2, so 1000 (1 + k(2) - (k(4) + k(2))) = 1000 (1 - k(4)) = 19.8013. Lengths do not matter."""
    first, second = np.array([[1.0, 0], [0, 3.0]]), np.array([[-2.0, 0], [0, -1.0]])
    kernel = {d2: np.exp(-d2 / 200) for d2 in (2, 4)}
    assert clip_mmd(first, second) == pytest.approx(1000 * (kernel[2] - kernel[4]))
    assert round(clip_mmd(first, second), 4) == 9.8512
    assert clip_mmd(first, second, estimator="biased") == pytest.approx(1000 * (1 - kernel[4]))


def test_cmmd_against_plain_loops() -> None:
    generator = np.random.default_rng(2)
    first, second = generator.normal(size=(7, 5)), generator.normal(0.4, 1, size=(9, 5))

    def mean(xs: np.ndarray, ys: np.ndarray, *, skip: bool) -> float:
        values = [
            float(np.exp(-np.sum((x / np.linalg.norm(x) - y / np.linalg.norm(y)) ** 2) / (2 * 10.0**2)))
            for i, x in enumerate(xs)
            for j, y in enumerate(ys)
            if not (skip and i == j)
        ]
        return sum(values) / len(values)

    cross = mean(first, second, skip=False)
    for estimator, skip in (("unbiased", True), ("biased", False)):
        expected = 1000 * (mean(first, first, skip=skip) + mean(second, second, skip=skip) - 2 * cross)
        assert clip_mmd(first, second, estimator=estimator) == pytest.approx(expected, abs=1e-9)  # type: ignore[arg-type]


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.integers(2, 12), st.integers(2, 12))
def test_cmmd_is_symmetric_and_its_biased_form_lies_above(seed: int, m: int, n: int) -> None:
    generator = np.random.default_rng(seed)
    first, second = generator.normal(size=(m, 4)), generator.normal(size=(n, 4))
    unbiased, biased = clip_mmd(first, second), clip_mmd(first, second, estimator="biased")
    assert unbiased == pytest.approx(clip_mmd(second, first), abs=1e-9)
    assert -1e-9 <= biased - unbiased <= 20 * (1 / m + 1 / n)
    assert clip_mmd(first, first, estimator="biased") == pytest.approx(0, abs=1e-9)


def test_cmmd_interval_leaves_a_concept_out_on_both_sides() -> None:
    generator = np.random.default_rng(1)
    concepts = tuple(f"c{n % 5}" for n in range(20))
    own = FeatureSet(generator.normal(size=(20, 4)), concepts)
    other = FeatureSet(generator.normal(0.5, 1, size=(20, 4)), concepts)
    found = clip_mmd_interval(own, other)
    assert found.value == pytest.approx(clip_mmd(own.features, other.features))
    assert found.low < found.value < found.high
    assert found.n == 20


def test_cmmd_refuses_embeddings_without_length_or_with_nan() -> None:
    good = np.ones((3, 2))
    with pytest.raises(SafetyDPOError, match="expected embeddings of non-zero length, found one without"):
        clip_mmd(np.zeros((3, 2)), good)
    with pytest.raises(SafetyDPOError, match="expected finite features, found a NaN or infinity: mark that picture"):
        clip_mmd(np.full((3, 2), np.nan), good)
