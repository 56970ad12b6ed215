"""What the search of a run may choose: methods, scales, and one coefficient per expert or per category of experts."""

from __future__ import annotations

from collections.abc import Mapping

from ray_jobs.expert_files import expert_categories
from ray_jobs.run import Run
from safetydpo.artifacts.records import Record
from safetydpo.artifacts.schemas import sha256_of
from safetydpo.search.space import SearchSpace, build_space, weight_groups


def search_space(run: Run, experts: Mapping[str, Record]) -> SearchSpace:
    """Return the space of a run's search; above 20 experts, those of one category share a coefficient by default.

    Raises:
        UsageError: if there is no expert, or a method does not exist.
        SafetyDPOError: if there are too many experts and the file of one does not say its category.
    """
    from safetydpo.merging.registry import density_methods, find_method, unweighted_methods

    search = run.config.identity.search
    for method in search.methods:
        find_method(method)
    return build_space(
        search,
        sorted(experts),
        density_methods=density_methods(),
        unweighted_methods=unweighted_methods(),
        groups=weight_groups(expert_categories(run, experts), weights=search.weights),
    )


def shared_weights(space: SearchSpace) -> dict[str, str]:
    """Return what a search's key says of shared coefficients: nothing where each expert has its own."""
    if len(space.groups) == len(space.experts):
        return {}
    return {"weights": sha256_of([[name, list(members)] for name, members in space.groups])}
