"""What experts are when nothing disturbs their training: in a process of their own, without Ray or a checkpoint."""

from __future__ import annotations

import torch

from ray_jobs.expert_plan import plan_experts
from ray_jobs.run import Run
from ray_jobs.training_tables import preference_data, read_training_tables
from safetydpo.artifacts.adapters import adapter_hash
from safetydpo.artifacts.records import Record
from safetydpo.artifacts.storage import Location
from safetydpo.config.schema import Config
from safetydpo.diffusion.build import load_backbone
from safetydpo.dpo.engine import open_engine
from safetydpo.dpo.trainer import train_expert
from tests.ray.fresh_process import in_fresh_process


def undisturbed_experts(run: Run, pairs: Record, folder: Location) -> dict[str, str]:
    """Return {expert name: hash of its adapter's bytes}, trained on as many threads as a lane's worker has."""
    found: dict[str, str] = in_fresh_process(_train, run.config.model_dump(mode="json"), pairs, folder)
    return found


def _train(config: dict[str, object], pairs: Record, folder: Location) -> dict[str, str]:
    run = Run(Config.model_validate(config))
    torch.set_num_threads(max(1, int(run.config.execution.cpus_per_worker)))
    identity = run.config.identity
    backbone = load_backbone(identity.base)
    tables = read_training_tables(run, folder)
    found = {}
    for unit in plan_experts(run, pairs, folder):
        trained = train_expert(
            backbone,
            preference_data(tables, unit, backbone, run.config),
            config=unit.dpo,
            lora=identity.lora,
            run_seed=identity.seed,
            expert_name=unit.name,
            engine=open_engine(backbone, config=unit.dpo, lora=identity.lora),
        )
        found[unit.name] = adapter_hash(trained.layers)
    return found
