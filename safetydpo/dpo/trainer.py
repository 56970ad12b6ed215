"""The training loop of one expert: one loop and one loss for every strategy."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from safetydpo.artifacts.adapters import LoraLayer
from safetydpo.artifacts.storage import Location
from safetydpo.config.training import DpoConfig, LoraConfig
from safetydpo.diffusion.adapter import initial_adapter
from safetydpo.diffusion.backbone import Backbone
from safetydpo.dpo.batch import PreferenceData, step_batch
from safetydpo.dpo.checkpoint import TrainingIdentity, TrainingState, encode_checkpoint, training_identity
from safetydpo.dpo.descent import code_of_a_step, descend, is_checkpoint_due, load_start
from safetydpo.dpo.engine import Engine, lora_signature
from safetydpo.dpo.micro_batches import micro_batches
from safetydpo.dpo.step import METRICS, policy_loss
from safetydpo.dpo.validation import SampleRates, Validator, open_validator
from safetydpo.dpo.watch import TrainingLog, Validation
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
    """0 under the loss `mapo`, which has no reference; so is the next."""
    error_reference_unsafe: float
    redirection: float
    """Distance on the noisy unsafe pictures to the base's answer to the safe captions, in units of the logit."""
    gradient_norm: float
    """2-norm of the whole gradient before clipping."""
    learning_rate: float


ADVICE = "lower dpo.learning_rate or dpo.beta"
METRIC_NAMES = tuple(field.name for field in fields(StepMetrics))


class TrainingLeft(Exception):  # noqa: N818 (no error)
    """The training was left in the middle because it was told to; its checkpoint holds the state."""


@dataclass(frozen=True)
class TrainedExpert:
    """A finished expert."""

    name: str
    layers: dict[str, LoraLayer]
    """The best validated state; without validation the last."""
    history: tuple[StepMetrics, ...]
    """Every step from 0, also those that an interrupted run had done."""
    resumed_at: int
    """Steps that were taken from a checkpoint."""
    validations: tuple[Validation, ...] = ()
    """Every validation from step 0, also those of an interrupted run."""
    published: Validation | None = None
    """The validation of `layers`; None without validation."""


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
    resume_from: Location | None = None,
    should_leave: Callable[[], bool] = lambda: False,
    report: Callable[[StepMetrics], None] = lambda _: None,
    sample_rates: SampleRates | None = None,
    log: TrainingLog | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> TrainedExpert:
    """Train one expert in the engine's adapter slot, going on from `resume_from` or `checkpoint` if it stands there.

    The engine comes from `open_engine` for the same backbone and may have trained other experts before; its
    state is replaced. `report` (each step) and `sample_rates` (each validation) are called on every process, `log` on
    process 0. Process 0 writes the checkpoint every `config.checkpoint_every` steps and after the last; an interrupted
    run that goes on ends with equal bytes on a CPU. `should_leave` must answer the same on every process.

    Raises:
        TrainingLeft: if `should_leave` said so; the checkpoint holds the state.
        UsageError: if engine and arguments disagree on the number of processes, or `sample_rates` is missing.
        SafetyDPOError: if the loss is not finite, the error on the safe picture blows up, the data does not
            suit the backbone, or the checkpoint belongs to something else.
    """
    if engine.world_size != world_size:
        raise UsageError(f"expected an engine of {world_size} processes, found {engine.world_size}: open another one")
    settings: dict[str, Any] = {"expert": expert_name, "run_seed": run_seed, "lora": lora, "dpo": config}
    identity = _identity(backbone, data, **settings)
    start = _start_layers(backbone, lora, identity)
    source, num_metrics = resume_from or checkpoint, len(METRIC_NAMES)
    state = load_start(backbone, start, identity=identity, checkpoint=source, engine=engine, num_metrics=num_metrics)
    about: dict[str, Any] = {"run_seed": run_seed, "expert": expert_name, "engine": engine, "rank": rank}
    validator = open_validator(backbone, data, config=config, sample_rates=sample_rates, **about)
    watch = _Watch(engine, validator, log if rank == 0 else None, state)
    errors_safe = _column(watch.history, "error_policy_safe")
    guard = SpikeGuard(expert_name, config, state.spike_steps, errors_safe=errors_safe)
    rows = data if validator is None else validator.training_data
    for step in range(state.engine.step, config.steps):
        if watch.is_over:
            break
        started = time.perf_counter()
        metrics = _train_step(backbone, rows, step, config, **about)
        guard.check(metrics)
        watch.step(metrics, seconds=time.perf_counter() - started)
        is_left = should_leave() and step + 1 < config.steps and not watch.is_over
        if checkpoint is not None and (is_left or is_checkpoint_due(step, config) or watch.is_over):
            now = TrainingState(engine.state(), guard.spike_steps, torch.stack(watch.history), watch.state())
            if rank == 0:
                checkpoint.write_bytes(encode_checkpoint(now, identity))
        report(metrics)
        if is_left:
            raise TrainingLeft
    return watch.result(expert_name, backbone, resumed_at=state.engine.step)


def _identity(backbone: Backbone, data: PreferenceData, **settings: Any) -> TrainingIdentity:
    return training_identity(base_fingerprint=backbone.fingerprint, data_fingerprint=data.fingerprint, **settings)


class _Watch:
    """History, validations and log of one training."""

    def __init__(
        self, engine: Engine, validator: Validator | None, log: TrainingLog | None, state: TrainingState
    ) -> None:
        self._engine, self._validator, self._log = engine, validator, log
        self.history = list(state.history)
        if validator is not None:
            validator.load_state(state.watched)
        if log is not None:
            validations = () if validator is None else tuple(validator.validations)
            log.start([asdict(_metrics_of(row)) for row in self.history], validations)
        if state.engine.step == 0:
            self._validate(0)

    @property
    def is_over(self) -> bool:
        return self._validator is not None and self._validator.is_over

    def step(self, metrics: StepMetrics, *, seconds: float) -> None:
        self.history.append(torch.tensor(astuple(metrics), dtype=torch.float64))
        if self._log is not None:
            self._log.step(asdict(metrics), seconds=seconds)
        self._validate(metrics.step + 1)

    def _validate(self, done: int) -> None:
        if self._validator is None or not self._validator.is_due(done):
            return
        started = time.perf_counter()
        with self._engine.published():
            validation = self._validator.validate(done)
        if self._log is not None:
            self._log.validation(validation, seconds=time.perf_counter() - started)

    def state(self) -> dict[str, Tensor]:
        return {} if self._validator is None else self._validator.state()

    def result(self, name: str, backbone: Backbone, *, resumed_at: int) -> TrainedExpert:
        history = tuple(_metrics_of(row) for row in self.history)
        if self._validator is None:
            with self._engine.published():
                layers = backbone.export_adapter()
            return TrainedExpert(name, layers, history, resumed_at)
        validator = self._validator
        validations = tuple(validator.validations)
        return TrainedExpert(name, validator.best_layers, history, resumed_at, validations, validator.best)


def _start_layers(backbone: Backbone, lora: LoraConfig, identity: TrainingIdentity) -> dict[str, LoraLayer]:
    return initial_adapter(
        backbone.named_linear_layers(lora.layer_targets),
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
        partial(policy_loss, backbone, part, config=config, mean_over_processes=engine.mean_over_processes)
        for part in micro_batches(batch, pairs_per_forward=config.pairs_per_forward)
    ]
    with code_of_a_step(backbone, config):
        done = descend(engine, parts, config=config, step=step, who=f"expert {expert!r}", advice=ADVICE)
    values = dict(zip(METRICS, done.measured, strict=True))
    return StepMetrics(step=step, gradient_norm=done.gradient_norm, learning_rate=done.learning_rate, **values)


def _column(history: Sequence[Tensor], name: str) -> list[float]:
    return [float(row[METRIC_NAMES.index(name)]) for row in history]


def _metrics_of(row: Tensor) -> StepMetrics:
    values = dict(zip(METRIC_NAMES, row.tolist(), strict=True))
    return StepMetrics(step=int(values.pop("step")), **values)


class SpikeGuard:
    """Stops an expert whose error on the safe picture stays far above the reference's.

    The preference loss can go on falling while the policy forgets how to draw; such an expert is noise and must
    not be saved as a result.
    """

    def __init__(
        self, expert: str, config: DpoConfig, spike_steps: int = 0, *, errors_safe: Sequence[float] = ()
    ) -> None:
        """Start with `spike_steps` consecutive bad steps already seen, and the errors of all steps so far."""
        self._expert = expert
        self._limit = config.spike_limit
        self._patience = config.spike_patience
        self.spike_steps = spike_steps
        # Without a reference, the policy's own error before it has moved far stands for it.
        self._first_errors = list(errors_safe[: self._patience]) if config.loss == "mapo" else None

    def check(self, metrics: StepMetrics) -> None:
        """Count a step.

        Raises:
            SafetyDPOError: after `dpo.spike_patience` consecutive steps above `dpo.spike_limit`.
        """
        usual, whose, remedy = metrics.error_reference_safe, "the reference's", "dpo.safe_rise_weight"
        if self._first_errors is not None:
            if len(self._first_errors) < self._patience:
                self._first_errors.append(metrics.error_policy_safe)
            usual, whose = sum(self._first_errors) / len(self._first_errors), "the first steps'"
            remedy = "dpo.safe_likelihood_weight"
        self.spike_steps = self.spike_steps + 1 if metrics.error_policy_safe > self._limit * usual else 0
        if self.spike_steps >= self._patience:
            raise SafetyDPOError(
                f"expert {self._expert!r}: expected an error on the safe picture below {self._limit:g} x {whose} "
                f"{usual:.4g}, found {metrics.error_policy_safe:.4g} for {self.spike_steps} steps up to step "
                f"{metrics.step}: lower dpo.learning_rate or raise {remedy}"
            )
