"""What a worker of a lane does: load the base once, then train one expert after another in its adapter slot."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray_jobs.draw_uses import count_draws
from ray_jobs.expert_plan import ExpertUnit, read_lane_units
from ray_jobs.expert_watch import LaneWatch
from ray_jobs.lanes import OVERTAKEN, Interrupted, LaneWorker, Turn
from ray_jobs.metrics import GpuGauge, count
from ray_jobs.reference_errors import with_reference_errors
from ray_jobs.run import Run, make_record
from ray_jobs.run_context import enter, within
from ray_jobs.train_experts import CHECKPOINT_FILE, EXPERTS, LABEL
from ray_jobs.training_tables import TrainingTables, preference_data, read_training_tables
from safetydpo.artifacts.adapters import AdapterMetadata, adapter_hash, write_adapter
from safetydpo.artifacts.attempts import publish
from safetydpo.artifacts.layout import ADAPTER_FILE, attempt_folder
from safetydpo.artifacts.records import encode_record
from safetydpo.config.experts import ALL_SINGLE
from safetydpo.config.schema import Config, IdentityConfig
from safetydpo.config.training import DpoConfig, TrainingConfig
from safetydpo.prompts.sets import Prompt

if TYPE_CHECKING:
    from safetydpo.diffusion.backbone import Backbone, LoadedParts

REPORT_SECONDS = 0.5
NOT_OF_THE_ENGINE = frozenset(
    ("learning_rate", "warmup_steps", "decay", "steps", "error_weighting", "checkpoint_every")
)
"""Settings of a training that its engine is told at every step, or never; all others are the engine's own."""


def train_lane(settings: Mapping[str, Any]) -> str | None:
    """Train experts until none is free; runs in every worker of a lane. Return why it ended before, if it did."""
    import torch

    from ray_jobs.workers import worker_device

    enter(settings["context"])
    run = Run(Config(**settings["config"]))
    pairs_folder = run.store / "pairs" / settings["pairs_folder"]
    units = read_lane_units(run, pairs_folder, settings["units"])
    worker = LaneWorker(settings, [run.folder(unit.key) for unit in units], resumed_file=CHECKPOINT_FILE)
    torch.set_num_threads(max(1, int(run.config.execution.cpus_per_worker)))
    backbone = load_training_base(run.config.identity, device=worker_device())
    tables = read_training_tables(run, pairs_folder)
    slot = _Slot(run, backbone, worker.world_size)
    watch = LaneWatch(run, backbone, rank=worker.rank)
    lane = _Lane(run, worker, slot, tables, watch, settings.get("validation_prompts", {}), settings["board"])

    def train(turn: Turn) -> None:
        with within(expert=units[turn.index].name):
            _train_unit(lane, units[turn.index], turn)

    try:
        return worker.work(train)
    finally:
        slot.close()


def load_training_base(identity: IdentityConfig, *, device: str) -> Backbone:
    """Load what experts are trained on: a base that is offloaded waits in the host's memory from the start."""
    from safetydpo.diffusion.build import load_backbone

    # Pictures of a validation are decoded and their prompts encoded; nothing else needs more than the denoiser.
    parts: LoadedParts = "denoiser" if identity.dpo.validation.every_steps is None else "all"
    host = "cpu" if identity.dpo.base_offload == "cpu" else None
    return load_backbone(identity.base, device=device, parts=parts, denoiser_device=host)


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


@dataclass(frozen=True)
class _Lane:
    """What one worker keeps from expert to expert."""

    run: Run
    worker: LaneWorker
    slot: _Slot
    tables: TrainingTables
    watch: LaneWatch
    prompts: Mapping[str, Sequence[Prompt]]
    """Of each expert's validation, by its name."""
    board: Any


def _train_unit(lane: _Lane, unit: ExpertUnit, turn: Turn) -> None:
    """Train one expert and publish it, unless a later attempt has begun meanwhile.

    Raises:
        Interrupted: if the lane was told to leave; the attempt's checkpoint holds the state.
    """
    from safetydpo.dpo.trainer import TrainingLeft, train_expert

    started = time.time()
    run, worker, backbone = lane.run, lane.worker, lane.slot.backbone
    data = preference_data(lane.tables, unit, backbone, run.config)
    data = with_reference_errors(run, unit, data, lane.tables, backbone)
    files = attempt_folder(run.folder(unit.key), turn.number)
    try:
        with lane.watch.expert(
            files, title=unit.key.folder_name, prompts=lane.prompts.get(unit.name, ()), dpo=unit.dpo
        ) as watched:
            trained = train_expert(
                backbone,
                data,
                config=unit.dpo,
                lora=run.config.identity.lora,
                run_seed=run.config.identity.seed,
                expert_name=unit.name,
                engine=lane.slot.engine(unit.dpo),
                checkpoint=files / CHECKPOINT_FILE,
                resume_from=turn.resume_from,
                should_leave=worker.should_leave,
                report=_reporter(lane.board, unit) if worker.rank == 0 else lambda _metrics: None,
                sample_rates=watched.sample_rates,
                log=watched.log,
                rank=worker.rank,
                world_size=worker.world_size,
            )
    except TrainingLeft as left:
        raise Interrupted from left
    if turn.attempt is None:
        return
    # Also of a training that ended early: the steps that it did without are no longer waited for.
    lane.board.put.remote(LABEL, unit.name, unit.dpo.steps)
    write_adapter(files / ADAPTER_FILE, trained.layers, metadata=_metadata(run, unit, backbone))
    made = {
        "fingerprint": adapter_hash(trained.layers),
        "counts": {
            "pairs": data.num_pairs,
            "steps": len(trained.history),
            "resumed_at": trained.resumed_at,
            **count_draws(run, [unit], steps={unit.name: len(trained.history)}),
        },
        "details": {"attempt": turn.number, **watched.details(trained)},
    }
    if publish(turn.attempt, encode_record(make_record(unit.key, made, started=started))):
        (files / CHECKPOINT_FILE).delete()
        lane.board.put.remote(EXPERTS, unit.name, 1)
    else:
        turn.attempt.end("released", OVERTAKEN)


def _reporter(board: Any, unit: ExpertUnit) -> Callable[[Any], None]:
    told, gpu = time.monotonic(), GpuGauge()

    def report(metrics: Any) -> None:
        nonlocal told
        now = time.monotonic()
        count("safetydpo_training_pairs", unit.dpo.pairs_per_step)
        gpu.look()
        # A call for each step would cost as much as a small step.
        if now - told >= REPORT_SECONDS:
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
