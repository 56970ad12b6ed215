"""FID and KID of Inception features by torchmetrics, whose own feature network needs packages that ours does not.

torch and torchmetrics (extra `metrics`) are imported where they are used. Axes: image = one generated picture;
reference = one picture it is compared with; feature = one number of the feature network.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.evaluation.distances import FeatureSet, frechet_distance
from safetydpo.statistics import Interval, cluster_jackknife

JACKKNIFE_GROUPS = 10
"""Groups of concepts that are left out of FID one at a time: each costs a root of a covariance of 2048 features."""


def fid_refusal(features: FeatureSet, reference: FeatureSet) -> str | None:
    """Return why FID of these sets would say nothing, with what to use instead; None if it can be computed."""
    pictures, num_features = min(len(features.features), len(reference.features)), features.features.shape[1]
    if pictures > num_features:
        return None
    return (
        f"expected more pictures than features for FID, found {pictures} of {num_features}: a covariance of so few has "
        "no full rank, and FID's bias is larger than what it measures; read kid_inception or cmmd, which have none"
    )


def fid_by_torchmetrics(
    features: Float[np.ndarray, "image feature"], reference: Float[np.ndarray, "reference feature"]
) -> float:
    """Return the Fréchet inception distance of two sets of features, as torchmetrics computes it.

    Raises:
        SafetyDPOError: if a side has no more pictures than features.
        UsageError: if torchmetrics is not installed.

    Source: Heusel et al. 2017 (arXiv 1706.08500), equation 6.
    """
    refused = fid_refusal(FeatureSet(features), FeatureSet(reference))
    if refused is not None:
        raise SafetyDPOError(refused)
    metric = _torchmetrics("FrechetInceptionDistance")(feature=_stored_features(features.shape[1]))
    return float(_updated(metric, features, reference).compute())


def kid_by_torchmetrics(
    features: Float[np.ndarray, "image feature"],
    reference: Float[np.ndarray, "reference feature"],
    *,
    subset_size: int,
    subsets: int = 100,
    seed: int = 0,
) -> tuple[float, float]:
    """Return mean and deviation of the kernel inception distance over random subsets, as torchmetrics computes it.

    For numbers that are compared with published ones, which are means over 100 subsets of 1000; the report's come from
    `distances.kernel_interval`, over the whole sets. Subsets are drawn from `seed`; torch's own state stays as it was.

    Raises:
        SafetyDPOError: if a side has fewer pictures than a subset.
        UsageError: if torchmetrics is not installed.

    Source: Bińkowski et al. 2018 (arXiv 1801.01401), section 4.
    """
    import torch

    if min(len(features), len(reference)) < subset_size:
        raise SafetyDPOError(
            f"expected at least {subset_size} pictures on each side, a subset of KID, found {len(features)} and "
            f"{len(reference)}: lower subset_size"
        )
    distance = _torchmetrics("KernelInceptionDistance")
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # That it keeps all features in memory is said of every set, also of a small one.
        warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance` will save", category=UserWarning)
        torch.manual_seed(seed)
        metric = distance(feature=_stored_features(features.shape[1]), subsets=subsets, subset_size=subset_size)
        mean, deviation = _updated(metric, features, reference).compute()
    return float(mean), float(deviation)


def fid_interval(features: FeatureSet, reference: FeatureSet) -> Interval:
    """Return FID by torchmetrics with a jackknife interval over groups of concepts; n counts generated pictures.

    Raises:
        SafetyDPOError: as in `fid_by_torchmetrics`, or if the generated pictures have no concepts.
        ValueError: if they have fewer than 2 concepts.
    """
    value = fid_by_torchmetrics(features.features, reference.features)
    names = np.asarray(features.concepts, dtype=np.str_)
    distinct = np.unique(names)
    groups = [str(np.searchsorted(distinct, name) % JACKKNIFE_GROUPS) for name in names]

    def statistic(keep: Bool[np.ndarray, " image"]) -> float:
        # Our own form of the same distance: its root of a symmetric matrix is several times faster.
        if keep.all():
            return value
        left_out = np.setdiff1d(distinct, names[keep])
        kept = reference.features
        if reference.concepts is not None:
            kept = kept[~np.isin(np.asarray(reference.concepts, dtype=np.str_), left_out)]
        return frechet_distance(features.features[keep], kept)

    return cluster_jackknife(statistic, groups)


def _torchmetrics(name: str) -> Any:
    try:
        from torchmetrics.image import fid, kid
    except ImportError as error:
        raise UsageError(
            f"expected torchmetrics for FID and KID, found none ({error}): pip install 'safetydpo[metrics]'"
        ) from error
    return getattr(fid if name == "FrechetInceptionDistance" else kid, name)


def _stored_features(num_features: int) -> Any:
    """Return the network that torchmetrics asks for features: what it is shown are features already."""
    import torch

    network: Any = torch.nn.Identity()
    network.num_features = num_features
    return network


def _updated(metric: Any, features: Any, reference: Any) -> Any:
    import torch

    for table, is_real in ((reference, True), (features, False)):
        metric.update(torch.from_numpy(np.asarray(table, dtype=np.float64)), real=is_real)
    return metric
