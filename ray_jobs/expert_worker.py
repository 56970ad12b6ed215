"""What a worker of a lane does: load the base once, then train one expert after another in its adapter slot."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from ray_jobs.lanes import Interrupted, LaneWorker, Turn
from ray_jobs.run import Run, make_record
from ray_jobs.train_experts import (
    ALL_SINGLE,
    CHECKPOINT_FILE,
    LABEL,
    ExpertUnit,
    TrainingTables,
    preference_data,
    read_training_tables,
    unit_from_json,
)
from safetydpo.artifacts.adapters import AdapterMetadata, adapter_hash, write_adapter
from safetydpo.artifacts.attempts import publish
from safetydpo.artifacts.layout import ADAPTER_FILE, attempt_folder
from safetydpo.artifacts.records import encode_record
from safetydpo.config.schema import Config
from safetydpo.config.training import DpoConfig, TrainingConfig

HISTORY_FILE = "training.jsonl"
REPORT_SECONDS = 0.5
NOT_OF_THE_ENGINE = frozenset(
    ("learning_rate", "warmup_steps", "decay", "steps", "error_weighting", "checkpoint_every")
)
"""Settings of a training that its engine is told at every step, or never; all others are the engine's own."""


def train_lane(settings: Mapping[str, Any]) -> str | None:
    """Train experts until none is free; runs in every worker of a lane. Return why it ended before, if it did."""
    import torch

    from ray_jobs.workers import worker_device
    from safetydpo.diffusion.build import load_backbone

    run = Run(Config(**settings["config"]))
    units = [unit_from_json(content) for content in settings["units"]]
    worker = LaneWorker(settings, [run.folder(unit.key) for unit in units], resumed_file=CHECKPOINT_FILE)
    torch.set_num_threads(max(1, int(run.config.execution.cpus_per_worker)))
    backbone = load_backbone(run.config.identity.base, device=worker_device())
    tables = read_training_tables(run, run.store / "pairs" / settings["pairs_folder"])
    slot = _Slot(run, backbone, worker.world_size)

    def train(turn: Turn) -> None:
        _train_unit(run, units[turn.index], turn, worker, slot=slot, tables=tables, board=settings["board"])

    try:
        return worker.work(train)
    finally:
        slot.close()


class _Slot:
    """The base's adapter slot, and the engine that owns it, opened again only for other settings of an engine."""

    def __init__(self, run: Run, backbone: Any, world_size: int) -> None:
        self.backbone = backbone
        self._run, self._world_size = run, world_size
        self._engine: Any = None
        self._settings: dict[str, Any] = {}

    def engine(self, dpo: DpoConfig) -> Any:
        """Return an engine for these settings; the state of an earlier expert is in it until a new one is loaded."""
        from safetydpo.dpo.engine import open_engine

        settings = dpo.model_dump(mode="json", include=set(TrainingConfig.model_fields) - NOT_OF_THE_ENGINE)
        if self._engine is None or settings != self._settings:
            self.close()
            lora = self._run.config.identity.lora
            self._engine = open_engine(self.backbone, config=dpo, lora=lora, world_size=self._world_size)
            self._settings = settings
        return self._engine

    def close(self) -> None:
        """Close the engine, if there is one."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None


def _train_unit(
    run: Run, unit: ExpertUnit, turn: Turn, worker: LaneWorker, *, slot: _Slot, tables: TrainingTables, board: Any
) -> None:
    """Train one expert and publish it, unless a later attempt has begun meanwhile.

    Raises:
        Interrupted: if the lane was told to leave; the attempt's checkpoint holds the state.
    """
    from safetydpo.dpo.trainer import TrainingLeft, train_expert

    started = time.time()
    data = preference_data(tables, unit, slot.backbone, run.config)
    files = attempt_folder(run.folder(unit.key), turn.number)
    try:
        trained = train_expert(
            slot.backbone,
            data,
            config=unit.dpo,
            lora=run.config.identity.lora,
            run_seed=run.config.identity.seed,
            expert_name=unit.name,
            engine=slot.engine(unit.dpo),
            checkpoint=files / CHECKPOINT_FILE,
            resume_from=turn.resume_from,
            should_leave=worker.should_leave,
            report=_reporter(board, unit) if worker.rank == 0 else lambda _metrics: None,
            rank=worker.rank,
            world_size=worker.world_size,
        )
    except TrainingLeft as left:
        raise Interrupted from left
    if turn.attempt is None:
        return
    lines = [json.dumps(asdict(step), sort_keys=True) for step in trained.history]
    (files / HISTORY_FILE).write_bytes("\n".join(lines).encode() + b"\n")
    write_adapter(files / ADAPTER_FILE, trained.layers, metadata=_metadata(run, unit, slot.backbone))
    made = {
        "fingerprint": adapter_hash(trained.layers),
        "counts": {"pairs": data.num_pairs, "steps": unit.dpo.steps, "resumed_at": trained.resumed_at},
        "details": {"attempt": turn.number},
    }
    if publish(turn.attempt, encode_record(make_record(unit.key, made, started=started))):
        (files / CHECKPOINT_FILE).delete()


def _reporter(board: Any, unit: ExpertUnit) -> Callable[[Any], None]:
    told = time.monotonic()

    def report(metrics: Any) -> None:
        nonlocal told
        now = time.monotonic()
        # A call for each step would cost as much as a small step.
        if now - told >= REPORT_SECONDS or metrics.step + 1 == unit.dpo.steps:
            board.put.remote(LABEL, unit.name, metrics.step + 1)
            told = now

    return report


def _metadata(run: Run, unit: ExpertUnit, backbone: Any) -> AdapterMetadata:
    from safetydpo.dpo.engine import lora_signature

    return AdapterMetadata(
        base_fingerprint=backbone.fingerprint,
        denoiser=backbone.denoiser,
        signature=lora_signature(run.config.identity.lora),
        init_seed=run.config.identity.seed,
        training_hash=unit.key.hash,
        kind="all_single" if unit.name == ALL_SINGLE else "expert",
        categories=unit.categories,
    )
