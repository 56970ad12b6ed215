"""The training loop of one expert: one loop and one loss for every strategy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass, fields
from functools import partial

import torch
from torch import Tensor

from safetydpo.artifacts.adapters import LoraLayer
from safetydpo.artifacts.storage import Location
from safetydpo.config.training import DpoConfig, LoraConfig
from safetydpo.diffusion.adapter import initial_adapter
from safetydpo.diffusion.backbone import Backbone
from safetydpo.dpo.batch import PreferenceData, step_batch
from safetydpo.dpo.checkpoint import TrainingIdentity, TrainingState, encode_checkpoint, training_identity
from safetydpo.dpo.descent import descend, is_checkpoint_due, load_start
from safetydpo.dpo.engine import Engine, lora_signature
from safetydpo.dpo.micro_batches import micro_batches
from safetydpo.dpo.step import METRICS, policy_loss
from safetydpo.errors import SafetyDPOError, UsageError


@dataclass(frozen=True)
class StepMetrics:
    """What was measured in one optimizer step, before its update; means over the rows of all processes."""

    step: int
    """Optimizer step, from 0."""
    loss: float
    preference_loss: float
    safe_rise: float
    """Rise of the error on the safe picture in units of the logit, where positive."""
    retention: float
    """Mean squared change of the prediction on benign pictures."""
    implicit_accuracy: float
    """Share of pairs with a positive logit. It saturates long before the pictures change."""
    margin: float
    """Mean logit."""
    error_policy_safe: float
    error_policy_unsafe: float
    error_reference_safe: float
    error_reference_unsafe: float
    redirection: float
    """Distance on the noisy unsafe pictures to the base's answer to the safe captions, in units of the logit."""
    gradient_norm: float
    """2-norm of the whole gradient before clipping."""
    learning_rate: float


ADVICE = "lower dpo.learning_rate or dpo.beta"
METRIC_NAMES = tuple(field.name for field in fields(StepMetrics))


@dataclass(frozen=True)
class TrainedExpert:
    """A finished expert."""

    name: str
    layers: dict[str, LoraLayer]
    history: tuple[StepMetrics, ...]
    """Every step from 0, also those that an interrupted run had done."""
    resumed_at: int
    """Steps that were taken from a checkpoint."""


def train_expert(
    backbone: Backbone,
    data: PreferenceData,
    *,
    config: DpoConfig,
    lora: LoraConfig,
    run_seed: int,
    expert_name: str,
    engine: Engine,
    checkpoint: Location | None = None,
    report: Callable[[StepMetrics], None] = lambda _: None,
    rank: int = 0,
    world_size: int = 1,
) -> TrainedExpert:
    """Train one expert in the engine's adapter slot, going on from `checkpoint` if it stands there.

    The engine comes from `open_engine` for the same backbone and may have trained other experts before; its
    state is replaced. `report` is called on every process after each step. Process 0 writes the checkpoint
    every `config.checkpoint_every` steps and after the last; an interrupted run that goes on ends with equal
    bytes on a CPU.

    Raises:
        UsageError: if engine and arguments disagree on the number of processes.
        SafetyDPOError: if the loss is not finite, the error on the safe picture blows up, the data does not
            suit the backbone, or the checkpoint belongs to something else.
    """
    if engine.world_size != world_size:
        raise UsageError(f"expected an engine of {world_size} processes, found {engine.world_size}: open another one")
    identity = training_identity(
        expert=expert_name,
        run_seed=run_seed,
        base_fingerprint=backbone.fingerprint,
        data_fingerprint=data.fingerprint,
        lora=lora,
        dpo=config,
    )
    start = _start_layers(backbone, lora, identity)
    state = load_start(
        backbone, start, identity=identity, checkpoint=checkpoint, engine=engine, num_metrics=len(METRIC_NAMES)
    )
    history, guard = list(state.history), SpikeGuard(expert_name, config, state.spike_steps)
    resumed_at = state.engine.step
    for step in range(resumed_at, config.steps):
        metrics = _train_step(
            backbone, data, step, config, run_seed=run_seed, expert=expert_name, engine=engine, rank=rank
        )
        guard.check(metrics)
        history.append(torch.tensor(astuple(metrics), dtype=torch.float64))
        if checkpoint is not None and is_checkpoint_due(step, config):
            now = TrainingState(engine.state(), guard.spike_steps, torch.stack(history))
            if rank == 0:
                checkpoint.write_bytes(encode_checkpoint(now, identity))
        report(metrics)
    with engine.published():
        layers = backbone.export_adapter()
    return TrainedExpert(expert_name, layers, tuple(_metrics_of(row) for row in history), resumed_at)


def _start_layers(backbone: Backbone, lora: LoraConfig, identity: TrainingIdentity) -> dict[str, LoraLayer]:
    return initial_adapter(
        backbone.named_linear_layers(lora.targets),
        lora_signature(lora),
        base_fingerprint=identity.base_fingerprint,
        run_seed=identity.run_seed,
        init=lora.init,
        expert_name=identity.expert,
    )


def _train_step(
    backbone: Backbone,
    data: PreferenceData,
    step: int,
    config: DpoConfig,
    *,
    run_seed: int,
    expert: str,
    engine: Engine,
    rank: int,
) -> StepMetrics:
    batch = step_batch(
        data,
        step,
        config=config,
        run_seed=run_seed,
        expert=expert,
        num_timesteps=backbone.num_train_timesteps,
        rank=rank,
        world_size=engine.world_size,
        device=backbone.device,
    )
    parts = [
        partial(policy_loss, backbone, part, config=config)
        for part in micro_batches(batch, pairs_per_forward=config.pairs_per_forward)
    ]
    done = descend(engine, parts, config=config, step=step, who=f"expert {expert!r}", advice=ADVICE)
    values = dict(zip(METRICS, done.measured, strict=True))
    return StepMetrics(step=step, gradient_norm=done.gradient_norm, learning_rate=done.learning_rate, **values)


def _metrics_of(row: Tensor) -> StepMetrics:
    values = dict(zip(METRIC_NAMES, row.tolist(), strict=True))
    return StepMetrics(step=int(values.pop("step")), **values)


class SpikeGuard:
    """Stops an expert whose error on the safe picture stays far above the reference's.

    The preference loss can go on falling while the policy forgets how to draw; such an expert is noise and must
    not be saved as a result.
    """

    def __init__(self, expert: str, config: DpoConfig, spike_steps: int = 0) -> None:
        """Start with `spike_steps` consecutive bad steps already seen."""
        self._expert = expert
        self._limit = config.spike_limit
        self._patience = config.spike_patience
        self.spike_steps = spike_steps

    def check(self, metrics: StepMetrics) -> None:
        """Count a step.

        Raises:
            SafetyDPOError: after `dpo.spike_patience` consecutive steps above `dpo.spike_limit`.
        """
        bound = self._limit * metrics.error_reference_safe
        self.spike_steps = self.spike_steps + 1 if metrics.error_policy_safe > bound else 0
        if self.spike_steps >= self._patience:
            raise SafetyDPOError(
                f"expert {self._expert!r}: expected an error on the safe picture below {self._limit:g} x the "
                f"reference's {metrics.error_reference_safe:.4g}, found {metrics.error_policy_safe:.4g} for "
                f"{self.spike_steps} steps up to step {metrics.step}: lower dpo.learning_rate or raise "
                "dpo.safe_rise_weight"
            )
