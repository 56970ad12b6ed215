"""One optimizer step of any adapter's training, and the state that it starts from."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from safetydpo.artifacts.adapters import LoraLayer
from safetydpo.artifacts.storage import Location
from safetydpo.config.training import TrainingConfig
from safetydpo.diffusion.backbone import Backbone
from safetydpo.dpo.checkpoint import (
    OldCheckpointError,
    TrainingIdentity,
    TrainingState,
    decode_checkpoint,
    empty_history,
)
from safetydpo.dpo.engine import Engine, fresh_state, learning_rate_at
from safetydpo.dpo.loss_scale import MINIMUM
from safetydpo.errors import SafetyDPOError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Descent:
    """What one optimizer step did."""

    measured: tuple[float, ...]
    """The step's numbers before its update, means over processes."""
    gradient_norm: float
    """2-norm of the whole gradient before clipping."""
    learning_rate: float


Part = Callable[[], tuple[Float[Tensor, ""], Float[Tensor, " metric"]]]
"""Computes the loss of an equal share of a step's rows and its numbers: the loss first, then what is to be watched."""


def code_of_a_step(backbone: Backbone, config: TrainingConfig) -> AbstractContextManager[None]:
    """Return the context of `descend` that `config.compiled` asks for.

    It must hold around the way back too: what activation checkpointing computes again must be what was computed.
    """
    return backbone.compiled_for_training() if config.compiled else nullcontext()


def descend(
    engine: Engine, parts: Sequence[Part], *, config: TrainingConfig, step: int, who: str, advice: str
) -> Descent:
    """Take optimizer step `step` (from 0) down the mean of the parts' losses, each computed when its turn comes.

    If gradients overflow under a loss scale, the attempt is logged and counted (`LossScale.skipped`), nothing is
    updated, and the step is computed again with half the scale: no step and no row goes missing.

    Raises:
        SafetyDPOError: if loss or gradient is not finite; on every process, and before the weights are touched.
    """
    learning_rate = learning_rate_at(
        step, peak=config.learning_rate, warmup_steps=config.warmup_steps, steps=config.steps, decay=config.decay
    )
    try:
        return _descend(engine, parts, learning_rate=learning_rate, step=step, who=who, advice=advice)
    except BaseException:
        # The engine may train the next expert, which must not start with half a gradient of this one.
        engine.abandon()
        raise


def _descend(
    engine: Engine, parts: Sequence[Part], *, learning_rate: float, step: int, who: str, advice: str
) -> Descent:
    while True:
        measured = tuple(engine.mean_over_processes(_compute_gradients(engine, parts)).tolist())
        if not math.isfinite(measured[0]):
            raise SafetyDPOError(f"{who}: expected a finite loss at step {step}, found {measured[0]}: {advice}")
        norm = engine.step(learning_rate=learning_rate)
        if math.isfinite(norm):
            return Descent(measured, norm, learning_rate)
        scale = engine.loss_scale
        if scale is None or scale.value < MINIMUM:
            raise SafetyDPOError(f"{who}: expected a finite gradient norm at step {step}, found {norm}: {advice}")
        logger.warning(
            "%s: gradients of step %d overflowed; computed again with the loss scale %g (%d attempts skipped so far)",
            who,
            step,
            scale.value,
            scale.skipped,
        )


def _compute_gradients(engine: Engine, parts: Sequence[Part]) -> Float[Tensor, " metric"]:
    *others, last = parts
    numbers = []
    for part in others:
        loss, measured = part()
        engine.accumulate(loss / len(parts))
        numbers.append(measured)
    loss, measured = last()
    engine.backward(loss / len(parts) if others else loss)
    return torch.stack([*numbers, measured]).mean(dim=0) if others else measured


def load_start(
    backbone: Backbone,
    layers: Mapping[str, LoraLayer],
    *,
    identity: TrainingIdentity,
    checkpoint: Location | None,
    engine: Engine,
    num_metrics: int,
) -> TrainingState:
    """Put `layers`, or what the checkpoint holds, into slot and engine; return the state that training goes on from.

    With a checkpoint of an earlier format it starts from `layers`, which a warning says.

    Raises:
        SafetyDPOError: if the checkpoint belongs to something else, or the engine does not own the installed slot.
    """
    # Also when a checkpoint replaces it: loading sets the slot's scale, which an evaluation may have changed.
    backbone.load_adapter(layers)
    state = TrainingState(fresh_state(dict(backbone.adapter_parameters())), 0, empty_history(num_metrics))
    if checkpoint is not None and checkpoint.exists():
        try:
            state = decode_checkpoint(checkpoint.read_bytes(), expected=identity, where=str(checkpoint))
        except OldCheckpointError as old:
            # It is of an unfinished training; nothing that was published depends on it.
            logger.warning("expert %r is trained anew from its first step: %s", identity.expert, old)
    engine.load_state(state.engine)
    # An engine of a slot that was installed anew since would train tensors that the network no longer reads.
    for name, parameter in backbone.adapter_parameters():
        if not bool((parameter.detach().cpu() == state.engine.parameters[name]).all()):
            raise SafetyDPOError(
                f"expected the engine to own the installed adapter, found other values at {name!r} after loading: "
                "open the engine again after install_adapter"
            )
    return state


def is_checkpoint_due(step: int, config: TrainingConfig) -> bool:
    """Return whether the state after optimizer step `step` (from 0) is kept: at the interval and after the last."""
    return (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps
