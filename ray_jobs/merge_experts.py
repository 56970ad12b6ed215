"""Stage 3: merges without a search, and the layer inputs of the base model that Co-Merge votes on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import ray

from ray_jobs.cluster import connect
from ray_jobs.prompt_tables import split_prompts, spread_prompts
from ray_jobs.run import Run
from ray_jobs.train_experts import ALL_SINGLE
from ray_jobs.workers import worker_device
from safetydpo.artifacts.adapters import adapter_hash, read_adapter, read_adapter_metadata, write_adapter
from safetydpo.artifacts.layout import ADAPTER_FILE
from safetydpo.artifacts.records import ArtifactKey, Record, artifact_folder, find_closed
from safetydpo.artifacts.schemas import sha256_of
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import fingerprint_rows
from safetydpo.config.schema import Config
from safetydpo.errors import SafetyDPOError
from safetydpo.merging.moments import BENIGN
from safetydpo.seeding import derive_seed

RECIPE_VERSION = 1
INPUTS_RECIPE_VERSION = 2
BENIGN_FACTOR = 2
"""Neutral prompts behind the benign moment, as a multiple of the unsafe ones of one category."""
INPUTS_FILE = "layer_inputs.safetensors"
MOMENTS_FILE = "moments.safetensors"


def merge_experts(run: Run, experts: Mapping[str, Record]) -> dict[str, Record]:
    """Make or find one merged adapter per method of `merge.methods`; return their records by method."""
    from safetydpo.merging.registry import find_method

    check_expert_files(run, experts)
    merge = run.config.identity.merge
    methods = [find_method(name) for name in merge.methods]
    inputs = collect_layer_inputs(run) if any(method.needs_base for method in methods) else None
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
        records[method.name] = merged_artifact(
            run, method.name, settings, members, inputs=inputs if method.needs_base else None
        )
    return records


def check_expert_files(run: Run, experts: Mapping[str, Record]) -> None:
    """Refuse a damaged or foreign adapter before workers are started; only headers are read.

    Raises:
        SafetyDPOError: if an adapter's file is missing or cut short, or was trained for another base model.
    """
    for name, record in experts.items():
        location = record_folder(run, record) / ADAPTER_FILE
        found = read_adapter_metadata(location).base_fingerprint
        if found != run.base_fingerprint:
            raise SafetyDPOError(
                f"expected expert {name!r} of base model {run.base_fingerprint[:12]}, found one of base model "
                f"{found[:12] or 'unknown'} in {location}: delete its folder and run the same command again, "
                "which trains it"
            )


def merged_artifact(
    run: Run, pointer: str, settings: Mapping[str, Any], experts: Mapping[str, Record], *, inputs: Record | None
) -> Record:
    """Make or find the merged adapter of one method, scale and set of weights."""
    key = ArtifactKey(
        stage="merged",
        name=str(settings["method"]),
        identity={**settings, "seed": run.config.identity.seed},
        inputs={
            "experts": fingerprint_rows((name, record.fingerprint) for name, record in experts.items()),
            "layer_inputs": inputs.fingerprint if inputs is not None else "",
        },
        recipe_version=RECIPE_VERSION,
    )

    def make(folder: Location) -> Mapping[str, Any]:
        connect(run.config)
        source = inputs_folder(run, inputs).path if inputs is not None else None
        task = _merge_task.options(num_cpus=run.config.execution.cpus_per_worker)
        made: Mapping[str, Any] = ray.get(
            task.remote(
                run.config.model_dump(mode="json"), expert_folders(run, experts), dict(settings), source, folder.path
            )
        )
        return made

    return run.build(f"merged:{pointer}", key, make)


def expert_folders(run: Run, experts: Mapping[str, Record]) -> dict[str, str]:
    """Return {expert name: path of its artifact folder}."""
    return {name: artifact_folder(run.store, _key_of(record)).path for name, record in experts.items()}


def _key_of(record: Record) -> ArtifactKey:
    return ArtifactKey(record.stage, record.name, record.identity, record.inputs, record.recipe_version)


def record_folder(run: Run, record: Record) -> Location:
    """Return the folder in which a record's artifact stands."""
    return artifact_folder(run.store, _key_of(record))


def inputs_folder(run: Run, record: Record) -> Location:
    """Return the folder of the layer inputs."""
    return record_folder(run, record)


def load_experts(run: Run, folders: Mapping[str, str]) -> list[Any]:
    """Read expert adapters from their artifact folders."""
    from safetydpo.merging.merge import Expert

    experts = []
    for name, path in folders.items():
        layers, metadata = read_adapter(Location(run.store.filesystem, path) / ADAPTER_FILE)
        experts.append(Expert(name, adapter_hash(layers), layers, metadata))
    return experts


def read_inputs(run: Run, path: str | None) -> Any:
    """Read the layer inputs of the base model, or None."""
    from safetydpo.merging.activations import inputs_from_bytes

    if path is None:
        return None
    location = Location(run.store.filesystem, path) / INPUTS_FILE
    return inputs_from_bytes(location.read_bytes(), source=str(location), base_fingerprint=run.base_fingerprint)


def read_moments(run: Run, path: str | None) -> Any:
    """Read the second moments of layer inputs of the base model, or None."""
    from safetydpo.merging.moments import moments_from_bytes

    if path is None:
        return None
    location = Location(run.store.filesystem, path) / MOMENTS_FILE
    return moments_from_bytes(location.read_bytes(), source=str(location), base_fingerprint=run.base_fingerprint)


@ray.remote
def _merge_task(
    config: dict[str, Any], folders: dict[str, str], settings: dict[str, Any], inputs: str | None, target: str
) -> dict[str, Any]:
    import torch

    from safetydpo.merging.merge import merge_prepared, prepare_experts
    from safetydpo.merging.registry import find_method

    run = Run(Config.model_validate(config))
    torch.set_num_threads(max(1, int(run.config.execution.cpus_per_worker)))
    method = find_method(settings["method"])
    prepared = prepare_experts(
        load_experts(run, folders),
        inputs=read_inputs(run, inputs if method.needs_inputs else None),
        moments=read_moments(run, inputs if method.needs_moments else None),
    )
    result = merge_prepared(
        prepared,
        method=settings["method"],
        weights=settings["weights"],
        global_scale=settings["global_scale"],
        density=settings["density"] or 1.0,
        output_rank=settings["output_rank"],
        seed=run.config.identity.seed,
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
    count = identity.merge.activation_prompts_per_category
    unsafe = [
        prompt
        for category in identity.prompts.categories
        for prompt in spread_prompts(
            [row for row in split_prompts(identity.prompts, "train", "unsafe") if row.category == category],
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
            "targets": list(identity.lora.targets),
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
        targets=identity.lora.targets,
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
