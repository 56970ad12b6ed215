"""Distances between two sets of pictures in a feature space, and the score of pictures against captions.

Pure numpy and scipy. Axes: image = one generated picture; reference = one picture it is compared with;
feature = one number of the feature network; pair = one picture with one caption; dim = one embedding axis. The
second table's axes have their own names, so that a wrong shape reaches the error that says what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from safetydpo.errors import SafetyDPOError
from safetydpo.statistics import Interval, cluster_jackknife

CMMD_SIGMA = 10.0
CMMD_SCALE = 1000.0
"""Width of CMMD's kernel and factor of its value, as in the paper."""


@dataclass(frozen=True)
class FeatureSet:
    """Features of a set of pictures, with the concept of each picture where it is known.

    Attributes:
        features: One row per picture.
        concepts: Concept of each row; None if unknown.
    """

    features: Float[np.ndarray, "image feature"]
    concepts: tuple[str, ...] | None = None


def clip_scores(
    image_embeddings: Float[np.ndarray, "pair dim"], text_embeddings: Float[np.ndarray, "caption caption_dim"]
) -> Float[np.ndarray, " pair"]:
    """Return `100 * <image, text> / (|image| |text|)` per pair, without clipping at zero.

    Raises:
        SafetyDPOError: if the shapes differ or an embedding has no length.

    Source: Hessel et al. 2021 (arXiv 2104.08718), equation 1, with w = 100 and no clipping.
    """
    images = np.asarray(image_embeddings, dtype=np.float64)
    texts = np.asarray(text_embeddings, dtype=np.float64)
    if images.shape != texts.shape or images.ndim != 2:
        raise SafetyDPOError(
            f"expected embeddings of one shape (pairs, dims), found {images.shape} and {texts.shape}: "
            "repeat or select captions so that row i belongs to picture i"
        )
    lengths = np.linalg.norm(images, axis=1) * np.linalg.norm(texts, axis=1)
    if not (np.isfinite(lengths).all() and (lengths > 0).all()):
        raise SafetyDPOError(
            "expected embeddings with finite, non-zero length, found one without: mark that picture as failed"
        )
    scores: Float[np.ndarray, " pair"] = 100.0 * np.sum(images * texts, axis=1) / lengths
    return scores


def mismatched_captions(concepts: Sequence[str]) -> list[int]:
    """Return, for each caption, the index of a caption of another concept; each is used exactly once.

    Captions are sorted by concept and shifted by the size of the largest concept: no run of one concept is
    longer than the shift, so nothing lands on its own concept. Deterministic, and independent of any seed.

    Raises:
        SafetyDPOError: if one concept holds more than half of the captions, because no such pairing exists.
    """
    order = sorted(range(len(concepts)), key=lambda index: concepts[index])
    counts = {name: concepts.count(name) for name in set(concepts)}
    largest = max(counts, key=lambda name: (counts[name], name), default="")
    shift = counts.get(largest, 0)
    if 2 * shift > len(concepts):
        raise SafetyDPOError(
            f"expected at most half of the {len(concepts)} captions under one concept, "
            f"found {shift} of {largest!r}: add captions of other concepts"
        )
    partner = [0] * len(concepts)
    for place, index in enumerate(order):
        partner[index] = order[(place + shift) % len(order)]
    return partner


def frechet_distance(
    features: Float[np.ndarray, "image feature"], reference: Float[np.ndarray, "reference reference_feature"]
) -> float:
    """Return the squared Fréchet distance of two Gaussians fitted to the features.

    `|m1 - m2|^2 + tr(S1 + S2 - 2 (S1^(1/2) S2 S1^(1/2))^(1/2))`, covariances with n - 1. Biased upwards on
    small sets: compare only at equal n.

    Raises:
        SafetyDPOError: if a set has fewer than 2 pictures, feature counts differ, or a feature is not finite.

    Source: Heusel et al. 2017 (arXiv 1706.08500), equation 6.
    """
    first, second = _checked(features, reference)
    covariance_first = np.atleast_2d(np.cov(first, rowvar=False))
    covariance_second = np.atleast_2d(np.cov(second, rowvar=False))
    # The symmetric form has real, non-negative eigenvalues up to rounding, unlike the product S1 S2.
    eigenvalues, vectors = np.linalg.eigh(covariance_first)
    root = (vectors * np.sqrt(np.clip(eigenvalues, 0.0, None))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ covariance_second @ root)
    trace_of_root = float(np.sum(np.sqrt(np.clip(cross, 0.0, None))))
    shift = float(np.sum((first.mean(axis=0) - second.mean(axis=0)) ** 2))
    distance = shift + float(np.trace(covariance_first) + np.trace(covariance_second)) - 2.0 * trace_of_root
    return max(distance, 0.0)


def kernel_distance(
    features: Float[np.ndarray, "image feature"], reference: Float[np.ndarray, "reference reference_feature"]
) -> float:
    """Return the unbiased squared MMD with the cubic kernel `k(x, y) = (x.y / d + 1)^3` (KID).

    `sum_{i != j} k(x_i, x_j) / (m (m - 1)) + sum_{i != j} k(y_i, y_j) / (n (n - 1)) - 2 mean k(x_i, y_j)`,
    over the whole sets rather than over random subsets. Unbiased, so it may be negative.

    Raises:
        SafetyDPOError: as in `frechet_distance`.

    Source: Bińkowski et al. 2018 (arXiv 1801.01401), section 3 and equation 4.
    """
    first, second = _checked(features, reference)
    own, other = _mean_off_diagonal(_cubic_kernel(first, first)), _mean_off_diagonal(_cubic_kernel(second, second))
    return own + other - 2.0 * float(_cubic_kernel(first, second).mean())


def clip_mmd(
    embeddings: Float[np.ndarray, "image feature"],
    reference: Float[np.ndarray, "reference reference_feature"],
    *,
    estimator: Literal["unbiased", "biased"] = "unbiased",
) -> float:
    """Return CMMD: 1000 x the squared MMD of CLIP embeddings of length 1.

    The kernel is `k(x, y) = exp(-|x - y|^2 / (2 * 10^2))`. `unbiased` is the paper's estimator, means over pairs of
    different pictures, and may be negative; `biased`, which the released code computes, takes each picture with itself
    too and lies up to `20 (1/m + 1/n)` above it: nothing for 30,000 pictures, but much for 70.

    Raises:
        SafetyDPOError: as in `frechet_distance`, or if an embedding has no length.

    Source: Jayasumana et al. 2024, "Rethinking FID" (arXiv 2401.09603), section 4 and equation 4.
    """
    first, second = _unit_rows(embeddings, reference)
    own, other, cross = (_gaussian_kernel(*sides) for sides in ((first, first), (second, second), (first, second)))
    if estimator == "unbiased":
        return CMMD_SCALE * (_mean_off_diagonal(own) + _mean_off_diagonal(other) - 2.0 * float(cross.mean()))
    return CMMD_SCALE * float(own.mean() + other.mean() - 2.0 * cross.mean())


def clip_mmd_interval(embeddings: FeatureSet, reference: FeatureSet) -> Interval:
    """Return CMMD (unbiased) with a jackknife interval over concepts; n counts generated pictures.

    Raises:
        SafetyDPOError: as in `clip_mmd`, or if the generated pictures have no concepts.
        ValueError: if they have fewer than 2 concepts.
    """
    first, second = _unit_rows(embeddings.features, reference.features)
    kernels = (_gaussian_kernel(first, first), _gaussian_kernel(second, second), _gaussian_kernel(first, second))
    return _mmd_interval(embeddings, reference, kernels, scale=CMMD_SCALE)


def frechet_interval(features: FeatureSet, reference: FeatureSet) -> Interval:
    """Return the Fréchet distance with a jackknife interval over concepts; n counts generated pictures.

    Raises:
        SafetyDPOError: as in `frechet_distance`, or if the generated pictures have no concepts.
        ValueError: if they have fewer than 2 concepts.
    """

    def statistic(keep: Bool[np.ndarray, " image"]) -> float:
        return frechet_distance(features.features[keep], reference.features[_kept(reference, keep, concepts)])

    concepts = _concepts_of(features)
    return cluster_jackknife(statistic, concepts)


def kernel_interval(features: FeatureSet, reference: FeatureSet) -> Interval:
    """Return the kernel distance with a jackknife interval over concepts; n counts generated pictures.

    Raises:
        SafetyDPOError: as in `kernel_distance`, or if the generated pictures have no concepts.
        ValueError: if they have fewer than 2 concepts.
    """
    first, second = _checked(features.features, reference.features)
    kernels = (_cubic_kernel(first, first), _cubic_kernel(second, second), _cubic_kernel(first, second))
    return _mmd_interval(features, reference, kernels)


def _mmd_interval(
    features: FeatureSet,
    reference: FeatureSet,
    kernels: tuple[
        Float[np.ndarray, "image image"], Float[np.ndarray, "reference reference"], Float[np.ndarray, "image reference"]
    ],
    *,
    scale: float = 1.0,
) -> Interval:
    concepts = _concepts_of(features)
    # The kernels are computed once; leaving a concept out is a choice of rows and columns.
    own, other, cross = kernels
    whole = _mean_off_diagonal(other)

    def statistic(keep: Bool[np.ndarray, " image"]) -> float:
        kept = _kept(reference, keep, concepts)
        within = whole if kept.all() else _mean_off_diagonal(other[np.ix_(kept, kept)])
        mmd = _mean_off_diagonal(own[np.ix_(keep, keep)]) + within - 2.0 * float(cross[np.ix_(keep, kept)].mean())
        return scale * mmd

    return cluster_jackknife(statistic, concepts)


def _concepts_of(features: FeatureSet) -> tuple[str, ...]:
    if features.concepts is None or len(features.concepts) != len(features.features):
        raise SafetyDPOError(
            f"expected a concept for each of {len(features.features)} generated pictures, found "
            f"{0 if features.concepts is None else len(features.concepts)}: give them with the features"
        )
    return features.concepts


def _kept(
    reference: FeatureSet, keep: Bool[np.ndarray, " image"], concepts: tuple[str, ...]
) -> Bool[np.ndarray, " reference"]:
    """Leave a concept out on both sides, else the distance would measure its absence on one."""
    if reference.concepts is None:
        return np.ones(len(reference.features), dtype=np.bool_)
    names = np.asarray(concepts, dtype=np.str_)
    left_out = np.setdiff1d(names, names[keep])
    return ~np.isin(np.asarray(reference.concepts, dtype=np.str_), left_out)


def _checked(
    features: Float[np.ndarray, "image feature"], reference: Float[np.ndarray, "reference reference_feature"]
) -> tuple[Float[np.ndarray, "image feature"], Float[np.ndarray, "reference reference_feature"]]:
    first = np.asarray(features, dtype=np.float64)
    second = np.asarray(reference, dtype=np.float64)
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise SafetyDPOError(
            f"expected two feature tables with equal columns, found shapes {first.shape} and {second.shape}: "
            "compute both with the same feature network"
        )
    if min(len(first), len(second)) < 2:
        raise SafetyDPOError(
            f"expected at least 2 pictures on each side, found {len(first)} and {len(second)}: evaluate more prompts"
        )
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise SafetyDPOError(
            "expected finite features, found a NaN or infinity: mark that picture as failed, without features"
        )
    return first, second


def _unit_rows(
    embeddings: Float[np.ndarray, "image feature"], reference: Float[np.ndarray, "reference reference_feature"]
) -> tuple[Float[np.ndarray, "image feature"], Float[np.ndarray, "reference reference_feature"]]:
    first, second = _checked(embeddings, reference)
    lengths = [np.linalg.norm(side, axis=1, keepdims=True) for side in (first, second)]
    if min(float(side.min()) for side in lengths) <= 0:
        raise SafetyDPOError("expected embeddings of non-zero length, found one without: mark that picture as failed")
    return first / lengths[0], second / lengths[1]


def _gaussian_kernel(
    first: Float[np.ndarray, "image feature"], second: Float[np.ndarray, "reference feature"]
) -> Float[np.ndarray, "image reference"]:
    # |x - y|^2 = |x|^2 + |y|^2 - 2 x.y, and the lengths are 1.
    kernel: Float[np.ndarray, "image reference"] = np.exp(-(2.0 - 2.0 * first @ second.T) / (2.0 * CMMD_SIGMA**2))
    return kernel


def _cubic_kernel(
    first: Float[np.ndarray, "image feature"], second: Float[np.ndarray, "reference feature"]
) -> Float[np.ndarray, "image reference"]:
    base = first @ second.T / first.shape[1] + 1.0
    kernel: Float[np.ndarray, "image reference"] = base * base * base
    return kernel


def _mean_off_diagonal(kernel: Float[np.ndarray, "image image"]) -> float:
    count = len(kernel)
    return float((kernel.sum() - np.trace(kernel)) / (count * (count - 1)))
