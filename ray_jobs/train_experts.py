"""Stage 2: one safety expert per group of pairs, trained by Ray Train with DeepSpeed, several at once.

Experts are shared out to lanes. A lane is one TorchTrainer whose workers load the base model once and train a
list of experts one after another; an expert is published by closing its artifact, so that a lane that is killed
and started again skips what is done and goes on from the last checkpoint of what is not.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from ray_jobs.cluster import connect, ray_state_folder, workers_for
from ray_jobs.expert_plan import ExpertUnit, plan_experts, unit_from_json, unit_to_json
from ray_jobs.expert_watch import LaneWatch
from ray_jobs.progress import progress_bar
from ray_jobs.reference_errors import count_draws, make_reference_errors, with_reference_errors
from ray_jobs.run import Run
from ray_jobs.trainers import train_on_workers
from ray_jobs.training_tables import TrainingTables, preference_data, read_training_tables
from safetydpo.artifacts.adapters import AdapterMetadata, write_adapter
from safetydpo.artifacts.layout import ADAPTER_FILE
from safetydpo.artifacts.records import Record, find_closed, read_record
from safetydpo.artifacts.storage import Location
from safetydpo.config.experts import ALL_SINGLE
from safetydpo.config.schema import Config
from safetydpo.errors import SafetyDPOError

CHECKPOINT_FILE = "checkpoint.safetensors"
PASSES_PER_STEP = 2
"""A training step costs about as much as this many passes through the denoiser when sampling."""


def train_experts(run: Run, pairs: Record, pairs_folder: Location) -> dict[str, Record]:
    """Make or find every expert of a run; return their records by name, `all_single` among them if wanted."""
    units = plan_experts(run, pairs, pairs_folder)
    pending = [unit for unit in units if find_closed(run.store, unit.key) is None]
    if pending:
        make_reference_errors(run, pending, pairs_folder)
        _train(run, pending, pairs_folder)
        run.made.extend(unit.key.folder_name for unit in pending)
    records: dict[str, Record] = {}
    for unit in units:
        record = find_closed(run.store, unit.key)
        if record is None:
            raise SafetyDPOError(
                f"expected a finished expert {unit.name!r} in {run.folder(unit.key)}, found none: run the command again"
            )
        # Killed between the record and this, a lane leaves it behind, and nothing else would ever look.
        (run.folder(unit.key) / CHECKPOINT_FILE).delete()
        records[unit.name] = run.build(f"expert:{unit.name}", unit.key, lambda _folder: {})
    return records


def _train(run: Run, units: Sequence[ExpertUnit], pairs_folder: Location) -> None:
    connect(run.config)
    execution = run.config.execution
    steps = max(unit.dpo.steps for unit in units)
    num_lanes = workers_for(execution, tasks=len(units), passes_per_task=steps * PASSES_PER_STEP)
    # Longest first, dealt round, so that the lanes end together.
    ordered = sorted(units, key=lambda unit: (-unit.dpo.steps, unit.name))
    lanes = [ordered[index::num_lanes] for index in range(num_lanes)]
    total = sum(unit.dpo.steps for unit in units)
    errors: list[BaseException] = []
    with progress_bar("expert steps", total=total) as board, ray_state_folder() as state:
        threads = [
            # Daemons: Ctrl-C reaches the main thread alone, which must not wait for lanes that lost their Ray.
            threading.Thread(target=_run_lane, args=(run, index, lane, pairs_folder, board, state, errors), daemon=True)
            for index, lane in enumerate(lanes)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]


def _run_lane(
    run: Run,
    index: int,
    units: Sequence[ExpertUnit],
    pairs_folder: Location,
    board: Any,
    state: str,
    errors: list[BaseException],
) -> None:
    settings = {
        "config": run.config.model_dump(mode="json"),
        "units": [unit_to_json(unit) for unit in units],
        "pairs_folder": pairs_folder.name,
        "board": board,
    }
    try:
        train_on_workers(run, train_lane, settings, name=f"lane-{index}", state=state)
    except Exception as error:  # a thread's error must reach the thread that started it
        errors.append(error)


def train_lane(settings: Mapping[str, Any]) -> None:
    """Train the units of one lane, one after another; runs in every worker of a TorchTrainer."""
    import ray.train
    import torch

    from ray_jobs.workers import worker_device
    from safetydpo.diffusion.build import load_backbone
    from safetydpo.dpo.engine import open_engine

    config = Config(**settings["config"])
    run = Run(config)
    context = ray.train.get_context()
    torch.set_num_threads(max(1, int(config.execution.cpus_per_worker)))
    identity = config.identity
    backbone = load_backbone(identity.base, device=worker_device(), parts="denoiser")
    pairs_folder = run.store / "pairs" / settings["pairs_folder"]
    tables = read_training_tables(run, pairs_folder)
    world_size = context.get_world_size()
    watch = LaneWatch(run, backbone, rank=context.get_world_rank())
    for content in settings["units"]:
        unit = unit_from_json(content)
        if read_record(run.folder(unit.key)) is not None:
            continue
        engine = open_engine(backbone, config=unit.dpo, lora=identity.lora, world_size=world_size)
        try:
            _train_unit(run, unit, backbone, engine, tables, watch, settings["board"], rank=context.get_world_rank())
        finally:
            engine.close()


def _train_unit(
    run: Run,
    unit: ExpertUnit,
    backbone: Any,
    engine: Any,
    tables: TrainingTables,
    watch: LaneWatch,
    board: Any,
    *,
    rank: int,
) -> None:
    from safetydpo.dpo.trainer import train_expert

    data = preference_data(tables, unit, backbone, run.config)
    data = with_reference_errors(run, unit, data, tables, backbone)
    folder = run.folder(unit.key)

    def make(_folder: Location) -> Mapping[str, Any]:
        title = unit.key.folder_name
        with watch.expert(folder, title=title, categories=unit.categories, dpo=unit.dpo) as watched:
            trained = train_expert(
                backbone,
                data,
                config=unit.dpo,
                lora=run.config.identity.lora,
                run_seed=run.config.identity.seed,
                expert_name=unit.name,
                engine=engine,
                checkpoint=folder / CHECKPOINT_FILE,
                report=lambda _metrics: board.add.remote("expert steps", 1),
                sample_rates=watched.sample_rates,
                log=watched.log,
                rank=rank,
                world_size=engine.world_size,
            )
        metadata = AdapterMetadata(
            base_fingerprint=backbone.fingerprint,
            denoiser=backbone.denoiser,
            signature=_signature(run.config),
            init_seed=run.config.identity.seed,
            training_hash=unit.key.hash,
            kind="all_single" if unit.name == ALL_SINGLE else "expert",
            categories=unit.categories,
        )
        if rank == 0:
            write_adapter(folder / ADAPTER_FILE, trained.layers, metadata=metadata)
        from safetydpo.artifacts.adapters import adapter_hash

        return {
            "fingerprint": adapter_hash(trained.layers),
            "counts": {
                "pairs": data.num_pairs,
                "steps": len(trained.history),
                "resumed_at": trained.resumed_at,
                **count_draws(run, [unit]),
            },
            "details": watched.details(trained),
        }

    if rank == 0:
        run.make(unit.key, make)
        (folder / CHECKPOINT_FILE).delete()
    else:
        make(folder)


def _signature(config: Config) -> Any:
    from safetydpo.dpo.engine import lora_signature

    return lora_signature(config.identity.lora)
