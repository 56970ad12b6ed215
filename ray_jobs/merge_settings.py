"""A merge as plain data: what of `identity.merge` decides it, as part of an artifact's key and as a worker's orders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from safetydpo.config.merge import MergeConfig
from safetydpo.config.schema import IdentityConfig
from safetydpo.errors import UsageError
from safetydpo.merging.blocks import assign_blocks
from safetydpo.merging.levels import Level, category_groups, merge_in_levels
from safetydpo.merging.merge import Expert, MergeResult, MergeSettings, PreparedExperts, merge_with, prepare_experts
from safetydpo.merging.method import MergeMethod, MethodOptions
from safetydpo.merging.registry import find_method
from safetydpo.search.space import Candidate

WITHIN = "within_category"


def merge_request(merge: MergeConfig, method: MergeMethod) -> dict[str, Any]:
    """Return what decides the merge by one method; settings that change nothing are left out, weights None."""
    request: dict[str, Any] = {
        "method": method.name,
        "weights": dict(merge.weights) or None,
        "global_scale": merge.global_scale,
        "density": merge.density if method.uses_density else None,
        "output_rank": merge.output_rank,
    }
    if merge.rank_growth:
        request["rank_growth"] = merge.rank_growth
    if merge.block_weights or merge.expert_block_weights:
        names = ("blocks", "block_weights", "expert_block_weights")
        request |= {name: merge.model_dump(mode="json").get(name, {}) for name in names}
    within = None if merge.within_category is None else find_method(merge.within_category.method)
    if within is not None and merge.within_category is not None:
        request[WITHIN] = merge.within_category.model_dump(mode="json")
    used = {name for one in (method, within) if one is not None for name in one.options}
    if used:
        request["options"] = {name: getattr(merge, name) for name in sorted(used)}
    return request


def candidate_request(merge: MergeConfig, candidate: Candidate) -> dict[str, Any]:
    """Return what decides the merge of a search's candidate: its own numbers and, where it has none, the run's.

    Levels and `expert_block_weights` are not searched: candidates have neither.
    """
    request: dict[str, Any] = {
        "method": candidate.method,
        "weights": dict(candidate.weights),
        "global_scale": candidate.global_scale,
        "density": candidate.density,
        "output_rank": merge.output_rank if candidate.rank is None else candidate.rank,
    }
    if merge.rank_growth and candidate.rank is None:
        request["rank_growth"] = merge.rank_growth
    if candidate.block_weights:
        request["block_weights"] = dict(candidate.block_weights)
        request |= {"blocks": merge.model_dump(mode="json")["blocks"]} if merge.blocks else {}
    options = find_method(candidate.method).options
    if options:
        request["options"] = {name: getattr(merge, name) for name in sorted(options)}
    return request


def searched_settings(identity: IdentityConfig) -> dict[str, Any]:
    """Return the settings of `identity.merge` that candidates of this search are merged with, for the search's key.

    Nothing where all have their defaults, so that searches of before keep their keys.
    """
    merge, search = identity.merge, identity.search
    options = {name for method in search.methods for name in find_method(method).options}
    found: dict[str, Any] = {name: getattr(merge, name) for name in sorted(options)}
    found |= {"rank_growth": merge.rank_growth} if merge.rank_growth else {}
    found |= {"blocks": merge.model_dump(mode="json")["blocks"]} if merge.blocks and search.block_groups else {}
    return {"merge": found} if found else {}


def requested_methods(request: Mapping[str, Any]) -> list[MergeMethod]:
    """Return the methods that take part in a merge."""
    levels = [request[WITHIN]["method"]] if request.get(WITHIN) else []
    return [find_method(str(name)) for name in (request["method"], *levels)]


def check_merge_settings(identity: IdentityConfig) -> None:
    """Refuse settings of merges that do not go together.

    Raises:
        UsageError: if a method does not exist or takes no part in levels, or weights are given to one that takes none.
    """
    merge = identity.merge
    methods = [find_method(name) for name in merge.methods]
    if merge.within_category is not None:
        try:
            within = find_method(merge.within_category.method)
        except UsageError as error:
            raise UsageError(f"{error}: correct identity.merge.within_category.method") from error
        for method in (*methods, within):
            if method.needs_distilled:
                raise UsageError(
                    f"expected methods that can merge categories in identity.merge.methods, found {method.name!r}, "
                    "which is fitted to all experts at once: take it out, or leave out identity.merge.within_category"
                )
    given = any(weight != 1 for weight in merge.weights.values()) or merge.expert_block_weights
    unweighted = [method.name for method in methods if not method.takes_weights]
    if given and unweighted:
        raise UsageError(
            f"expected no identity.merge.weights or expert_block_weights beside the method {unweighted[0]!r}, whose "
            "result does not depend on them, found some: take out one or the other"
        )


def check_blocks(identity: IdentityConfig, layers: Sequence[str]) -> None:
    """Refuse factors of blocks that hold none of an adapter's layers, before hours of training.

    Raises:
        UsageError: naming the setting and the first such block, or a layer in two blocks.
    """
    merge = identity.merge
    in_merges = {*merge.block_weights, *(block for row in merge.expert_block_weights.values() for block in row)}
    in_search = {block for members in identity.search.block_groups.values() for block in members}
    for setting, wanted in (("merge", in_merges), ("search.block_groups", in_search)):
        try:
            assign_blocks(layers, wanted, merge.blocks)
        except UsageError as error:
            raise UsageError(f"identity.{setting}: {error}") from error


def run_merge(
    request: Mapping[str, Any], experts: Sequence[Expert], aids: Mapping[str, Any], *, seed: int
) -> tuple[MergeResult, PreparedExperts, dict[str, Any]]:
    """Merge as asked; return the result, the experts of the last level, and what is known of the categories' merges.

    `aids` are the arguments of `prepare_experts`.

    Raises:
        UsageError: if weights name experts that there are not, and as `merge_with`.
        SafetyDPOError: as `prepare_experts` and `merge_with`.
    """
    if not request.get(WITHIN):
        names = [expert.name for expert in experts]
        settings = request_settings(request, seed=seed, names=names)
        prepared = prepare_experts(experts, **aids)
        return merge_with(prepared, settings), prepared, {}
    groups = category_groups(experts)
    names = [name for members in groups.values() for name in members]
    within = {**request[WITHIN], "weights": request["weights"], "blocks": request.get("blocks", {})}
    within |= {"expert_block_weights": request.get("expert_block_weights", {}), "options": request.get("options", {})}
    above = {**request, "weights": None, "expert_block_weights": {}}
    merged = merge_in_levels(
        experts,
        [Level(groups, _settings(within, seed=seed, names=names, blocks={}))],
        _settings(above, seed=seed, names=sorted(groups), blocks=request.get("block_weights", {})),
        inputs=aids["inputs"],
        moments=aids["moments"],
    )
    parts = {
        name: {"shares": part.shares, "truncation_error": part.overall_truncation_error}
        for (_, name), part in merged.parts.items()
    }
    return merged.result, merged.prepared, parts


def request_settings(request: Mapping[str, Any], *, seed: int, names: Sequence[str]) -> MergeSettings:
    """Return the settings of a merge without levels; `names` are its experts'."""
    return _settings(request, seed=seed, names=names, blocks=request.get("block_weights", {}))


def _settings(
    request: Mapping[str, Any], *, seed: int, names: Sequence[str], blocks: Mapping[str, float]
) -> MergeSettings:
    weights = request["weights"]
    unknown = sorted(set(weights or {}) - set(names))
    if unknown:
        raise UsageError(
            f"expected weights of {', '.join(sorted(names))} (identity.merge.weights), found one of {unknown[0]!r}: "
            "correct its name"
        )
    return MergeSettings(
        method=request["method"],
        weights=None if weights is None else {name: weights.get(name, 1.0) for name in names},
        global_scale=request["global_scale"],
        density=request["density"] or 1.0,
        output_rank=request["output_rank"],
        rank_growth=request.get("rank_growth", 0.0),
        blocks=request.get("blocks") or None,
        block_weights=blocks,
        expert_block_weights=request.get("expert_block_weights", {}),
        options=MethodOptions(**request.get("options", {})),
        seed=seed,
    )
