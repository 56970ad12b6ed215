"""Stage 3: merges without a search, and what some of them need: layer inputs of the base, a distilled adapter."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray

from ray_jobs.cluster import connect
from ray_jobs.expert_files import (
    INPUTS_FILE,
    MERGE_RECIPE_VERSION,
    MOMENTS_FILE,
    MergeAids,
    check_expert_files,
    expert_folders,
    load_experts,
    read_aids,
)
from ray_jobs.prompt_tables import needed_prompts, split_prompts, spread_prompts
from ray_jobs.run import Run
from ray_jobs.workers import worker_device
from safetydpo.artifacts.adapters import adapter_hash, write_adapter
from safetydpo.artifacts.layout import ADAPTER_FILE
from safetydpo.artifacts.records import ArtifactKey, Record, find_closed
from safetydpo.artifacts.schemas import sha256_of
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import fingerprint_rows
from safetydpo.config.experts import ALL_SINGLE
from safetydpo.config.schema import Config
from safetydpo.merging.moments import BENIGN
from safetydpo.merging.registry import MergeMethod
from safetydpo.seeding import derive_seed

INPUTS_RECIPE_VERSION = 2
BENIGN_FACTOR = 2
"""Neutral prompts behind the benign moment, as a multiple of the unsafe ones of one category."""


def merge_experts(run: Run, experts: Mapping[str, Record], pairs: Record, pairs_folder: Location) -> dict[str, Record]:
    """Make or find one merged adapter per method of `merge.methods`; return their records by method."""
    from safetydpo.merging.registry import find_method

    check_expert_files(run, experts)
    merge = run.config.identity.merge
    methods = [find_method(name) for name in merge.methods]
    aids = merge_aids(run, experts, pairs, pairs_folder, methods=methods)
    members = {name: record for name, record in experts.items() if name != ALL_SINGLE}
    records: dict[str, Record] = {}
    for method in methods:
        settings = {
            "method": method.name,
            "weights": None,
            "global_scale": merge.global_scale,
            "density": merge.density if method.uses_density else None,
            "output_rank": merge.output_rank,
        }
        records[method.name] = merged_artifact(run, method.name, settings, members, aids=aids)
    return records


def merge_aids(
    run: Run, experts: Mapping[str, Record], pairs: Record, pairs_folder: Location, *, methods: Sequence[MergeMethod]
) -> MergeAids:
    """Make or find what these methods need beside the experts, and what the start of a distillation needs."""
    from ray_jobs.distill_experts import distill_experts
    from safetydpo.merging.registry import find_method

    distils = any(method.needs_distilled for method in methods)
    start = [find_method(run.config.identity.merge.distill.start_method)] if distils else []
    needs_base = any(method.needs_base for method in (*methods, *start))
    aids = MergeAids(layer_inputs=collect_layer_inputs(run) if needs_base else None)
    if not distils:
        return aids
    distilled = distill_experts(run, experts, pairs, pairs_folder, aids=aids.needed_by(start))
    return replace(aids, distilled=distilled)


def merged_artifact(
    run: Run, pointer: str, settings: Mapping[str, Any], experts: Mapping[str, Record], *, aids: MergeAids
) -> Record:
    """Make or find the merged adapter of one method, scale and set of weights; `aids` may hold more than it needs."""
    from safetydpo.merging.registry import find_method

    needed = aids.needed_by([find_method(str(settings["method"]))])
    key = ArtifactKey(
        stage="merged",
        name=str(settings["method"]),
        identity={**settings, "seed": run.config.identity.seed},
        inputs={
            "experts": fingerprint_rows((name, record.fingerprint) for name, record in experts.items()),
            **needed.fingerprints(),
        },
        recipe_version=MERGE_RECIPE_VERSION,
    )

    def make(folder: Location) -> Mapping[str, Any]:
        connect(run.config)
        task = _merge_task.options(num_cpus=run.config.execution.cpus_per_worker)
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


@ray.remote
def _merge_task(
    config: dict[str, Any], folders: dict[str, str], settings: dict[str, Any], aids: dict[str, str], target: str
) -> dict[str, Any]:
    import torch

    from safetydpo.merging.merge import merge_prepared, prepare_experts

    run = Run(Config.model_validate(config))
    torch.set_num_threads(max(1, int(run.config.execution.cpus_per_worker)))
    prepared = prepare_experts(load_experts(run, folders), **read_aids(run, aids, methods=[settings["method"]]))
    result = merge_prepared(
        prepared,
        method=settings["method"],
        weights=settings["weights"],
        global_scale=settings["global_scale"],
        density=settings["density"] or 1.0,
        output_rank=settings["output_rank"],
        seed=run.config.identity.seed,
        **({"block_weights": settings["block_weights"]} if "block_weights" in settings else {}),
    )
    write_adapter(
        Location(run.store.filesystem, target) / ADAPTER_FILE, result.layers, metadata=result.metadata(prepared)
    )
    return {
        "fingerprint": adapter_hash(result.layers),
        "counts": {"experts": len(folders), "rank": max(layer.down.shape[0] for layer in result.layers.values())},
        "details": {
            "recipe": result.recipe,
            "shares": result.shares,
            "truncation_error": result.overall_truncation_error,
        },
    }


def collect_layer_inputs(run: Run) -> Record:
    """Make or find the layer inputs of the base model on unsafe training prompts of all categories.

    Their second moments per category are kept too, and those of as many neutral training prompts as unsafe ones of
    one category.
    """
    identity = run.config.identity
    setting = "identity.merge.activation_prompts_per_category"
    count = identity.merge.activation_prompts_per_category
    training = needed_prompts(identity.prompts, "train", "unsafe", setting=setting)
    unsafe = [
        prompt
        for category in identity.prompts.categories
        for prompt in spread_prompts(
            [row for row in training if row.category == category],
            count,
            seed=identity.seed,
            purpose="activations",
        )
    ]
    neutral = split_prompts(identity.prompts, "train", "neutral")
    benign = spread_prompts(neutral, count * BENIGN_FACTOR, seed=identity.seed, purpose="activations")
    prompts = [(prompt.category, prompt.text) for prompt in unsafe] + [(BENIGN, prompt.text) for prompt in benign]
    key = ArtifactKey(
        stage="layer_inputs",
        name=run.config.name,
        identity={
            "seed": identity.seed,
            "base": identity.base.model_dump(mode="json"),
            "sampler": identity.sampler.model_dump(mode="json"),
            "targets": list(identity.lora.layer_targets),
            "timesteps": list(identity.merge.activation_timesteps),
        },
        inputs={"base": run.base_fingerprint, "prompts": sha256_of(prompts)},
        recipe_version=INPUTS_RECIPE_VERSION,
    )

    def make(folder: Location) -> Mapping[str, Any]:
        connect(run.config)
        task = _collect_task.options(
            num_cpus=run.config.execution.cpus_per_worker, num_gpus=run.config.execution.gpus_per_worker
        )
        made: Mapping[str, Any] = ray.get(task.remote(run.config.model_dump(mode="json"), prompts, folder.path))
        return made

    if find_closed(run.store, key) is None:
        run.folder(key).make_folder()
    return run.build("layer_inputs", key, make)


@ray.remote
def _collect_task(config: dict[str, Any], prompts: Sequence[tuple[str, str]], target: str) -> dict[str, Any]:
    import torch

    from safetydpo.diffusion.build import load_backbone
    from safetydpo.merging.activations import collect_inputs, inputs_to_bytes
    from safetydpo.merging.moments import MomentSums, moments_to_bytes

    run = Run(Config.model_validate(config))
    identity = run.config.identity
    torch.set_num_threads(max(1, int(run.config.execution.cpus_per_worker)))
    backbone = load_backbone(identity.base, device=worker_device())
    sums = MomentSums([group for group, _ in prompts])
    inputs = collect_inputs(
        backbone,
        prompts=[text for _, text in prompts],
        seeds=[derive_seed(identity.seed, "activation_noise", text) for _, text in prompts],
        timesteps=identity.merge.activation_timesteps,
        targets=identity.lora.layer_targets,
        sampler=identity.sampler,
        observe=sums,
    )
    # Votes are cast on unsafe prompts; the benign ones come last and count for the moments only.
    votes = sum(group != BENIGN for group, _ in prompts) * len(identity.merge.activation_timesteps)
    files = {
        INPUTS_FILE: inputs_to_bytes(
            {name: values[:votes] for name, values in inputs.items()}, base_fingerprint=backbone.fingerprint
        ),
        MOMENTS_FILE: moments_to_bytes(sums.means(), base_fingerprint=backbone.fingerprint),
    }
    for name, data in files.items():
        (Location(run.store.filesystem, target) / name).write_bytes(data)
    return {
        "fingerprint": sha256_of([hashlib.sha256(data).hexdigest() for data in files.values()]),
        "counts": {"layers": len(inputs), "prompts": len(prompts)},
    }
