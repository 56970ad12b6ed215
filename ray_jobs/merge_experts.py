"""Stage 3: merges without a search."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray

from ray_jobs.cluster import connect
from ray_jobs.expert_files import (
    MERGE_RECIPE_VERSION,
    MergeAids,
    check_expert_files,
    expert_folders,
    load_experts,
    read_aids,
)
from ray_jobs.layer_inputs import Content, collect_layer_inputs, find_layer_inputs
from ray_jobs.merge_settings import merge_request, requested_methods, run_merge
from ray_jobs.resources import task_options
from ray_jobs.run import Run
from safetydpo.artifacts.adapters import adapter_hash, write_adapter
from safetydpo.artifacts.layout import ADAPTER_FILE, WINNERS_FILE
from safetydpo.artifacts.records import ArtifactKey, Record, find_closed
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import fingerprint_rows
from safetydpo.config.experts import ALL_SINGLE
from safetydpo.config.schema import Config
from safetydpo.merging.method import MergeMethod


def merge_experts(run: Run, experts: Mapping[str, Record], pairs: Record, pairs_folder: Location) -> dict[str, Record]:
    """Make or find one merged adapter per method of `merge.methods`; return their records by method."""
    from safetydpo.merging.registry import find_method

    check_expert_files(run, experts)
    merge = run.config.identity.merge
    methods = [find_method(name) for name in merge.methods]
    aids = merge_aids(run, experts, pairs, pairs_folder, methods=plain_methods(run))
    members = {name: record for name, record in experts.items() if name != ALL_SINGLE}
    records: dict[str, Record] = {}
    for method in methods:
        records[method.name] = merged_artifact(run, method.name, merge_request(merge, method), members, aids=aids)
    return records


def plain_methods(run: Run) -> list[MergeMethod]:
    """Return the methods that take part in the plain merges of a run, that within categories too."""
    from safetydpo.merging.registry import find_method

    merge = run.config.identity.merge
    levels = [] if merge.within_category is None else [merge.within_category.method]
    return [find_method(name) for name in (*merge.methods, *levels)]


def merge_aids(
    run: Run, experts: Mapping[str, Record], pairs: Record, pairs_folder: Location, *, methods: Sequence[MergeMethod]
) -> MergeAids:
    """Make or find what these methods need beside the experts, and what the start of a distillation needs."""
    from ray_jobs.distill_experts import distill_experts

    start = _start_methods(run, methods)
    needs_base = any(method.needs_base for method in (*methods, *start))
    aids = MergeAids(layer_inputs=collect_layer_inputs(run, wanted_content(run, methods)) if needs_base else None)
    if not start:
        return aids
    distilled = distill_experts(run, experts, pairs, pairs_folder, aids=aids.needed_by(start))
    return replace(aids, distilled=distilled)


def find_aids(
    run: Run, experts: Mapping[str, Record], pairs: Record, pairs_folder: Location, *, methods: Sequence[MergeMethod]
) -> MergeAids | None:
    """Find what `merge_aids` would make or find; None if a part of it is not closed. Nothing is made."""
    from ray_jobs.distill_experts import distilled_key

    start = _start_methods(run, methods)
    aids = MergeAids()
    if any(method.needs_base for method in (*methods, *start)):
        aids = MergeAids(layer_inputs=find_layer_inputs(run, wanted_content(run, methods)))
        if aids.layer_inputs is None:
            return None
    if not start:
        return aids
    key = distilled_key(run, experts, pairs, pairs_folder, aids=aids.needed_by(start))
    distilled = find_closed(run.store, key)
    return None if distilled is None else replace(aids, distilled=distilled)


def wanted_content(run: Run, methods: Sequence[MergeMethod]) -> Content:
    """Return what is collected for these methods and all others that the run itself merges by.

    A run asks for one content at every stage, so that what it has merged keeps its key when the search comes.
    """
    from ray_jobs.search_judges import can_search
    from safetydpo.merging.registry import find_method

    identity = run.config.identity
    searched = [find_method(name) for name in identity.search.methods] if can_search(identity) else []
    every = [*methods, *plain_methods(run), *searched]
    needs_moments = any(method.needs_moments for method in (*every, *_start_methods(run, every)))
    return Content.INPUTS_AND_MOMENTS if needs_moments else Content.INPUTS


def _start_methods(run: Run, methods: Sequence[MergeMethod]) -> list[MergeMethod]:
    """Return what a distillation starts from, if one of the methods needs one."""
    from safetydpo.merging.registry import find_method

    distils = any(method.needs_distilled for method in methods)
    return [find_method(run.config.identity.merge.distill.start_method)] if distils else []


def merged_artifact(
    run: Run, pointer: str, settings: Mapping[str, Any], experts: Mapping[str, Record], *, aids: MergeAids
) -> Record:
    """Make or find the merged adapter of one request (`merge_request`); `aids` may hold more than it needs."""
    needed = aids.needed_by(requested_methods(settings))
    key = merged_key(run, settings, experts, aids=aids)

    def make(folder: Location) -> Mapping[str, Any]:
        connect(run.config)
        task = _merge_task.options(**task_options(run.config.execution, with_gpu=False))
        made: Mapping[str, Any] = ray.get(
            task.remote(
                run.config.model_dump(mode="json"),
                expert_folders(run, experts),
                dict(settings),
                needed.folders(run),
                folder.path,
            )
        )
        return made

    return run.build(f"merged:{pointer}", key, make)


def merged_key(run: Run, settings: Mapping[str, Any], experts: Mapping[str, Record], *, aids: MergeAids) -> ArtifactKey:
    """Return the key of the merged adapter of one request; `aids` may hold more than it needs."""
    return ArtifactKey(
        stage="merged",
        name=str(settings["method"]),
        identity={**settings, "seed": run.config.identity.seed},
        inputs={
            "experts": fingerprint_rows((name, record.fingerprint) for name, record in experts.items()),
            **aids.needed_by(requested_methods(settings)).fingerprints(),
        },
        recipe_version=MERGE_RECIPE_VERSION,
    )


@ray.remote
def _merge_task(
    config: dict[str, Any], folders: dict[str, str], settings: dict[str, Any], aids: dict[str, str], target: str
) -> dict[str, Any]:
    import torch

    run = Run(Config.model_validate(config))
    torch.set_num_threads(max(1, int(run.config.execution.cpus_per_worker)))
    needs = read_aids(run, aids, methods=[method.name for method in requested_methods(settings)])
    result, prepared, parts = run_merge(settings, load_experts(run, folders), needs, seed=run.config.identity.seed)
    place = Location(run.store.filesystem, target)
    write_adapter(place / ADAPTER_FILE, result.layers, metadata=result.metadata(prepared))
    if result.won is not None:
        (place / WINNERS_FILE).write_bytes(json.dumps(result.won, indent=1, sort_keys=True).encode() + b"\n")
    return {
        "fingerprint": adapter_hash(result.layers),
        "counts": {"experts": len(folders), "rank": max(layer.down.shape[0] for layer in result.layers.values())},
        "details": {
            "recipe": result.recipe,
            "shares": result.shares,
            "suppliers": result.num_suppliers,
            "truncation_error": result.overall_truncation_error,
            **({"categories": parts} if parts else {}),
        },
    }
