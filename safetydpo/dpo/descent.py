"""One optimizer step of any adapter's training, and the state that it starts from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from safetydpo.artifacts.adapters import LoraLayer
from safetydpo.artifacts.storage import Location
from safetydpo.config.training import TrainingConfig
from safetydpo.diffusion.backbone import Backbone
from safetydpo.dpo.checkpoint import TrainingIdentity, TrainingState, decode_checkpoint, empty_history
from safetydpo.dpo.engine import Engine, fresh_state, learning_rate_at
from safetydpo.errors import SafetyDPOError


@dataclass(frozen=True)
class Descent:
    """What one optimizer step did."""

    measured: tuple[float, ...]
    """The step's numbers before its update, means over processes."""
    gradient_norm: float
    """2-norm of the whole gradient before clipping."""
    learning_rate: float


def descend(
    engine: Engine,
    loss: Float[Tensor, ""],
    numbers: Float[Tensor, " metric"],
    *,
    config: TrainingConfig,
    step: int,
    who: str,
    advice: str,
) -> Descent:
    """Take optimizer step `step` (from 0) down `loss`; `numbers` holds the loss first and whatever is to be watched.

    Raises:
        SafetyDPOError: if loss or gradient is not finite; on every process and before a checkpoint could hold it, a
            loss before the weights are touched.
    """
    measured = tuple(engine.mean_over_processes(numbers).tolist())
    if not math.isfinite(measured[0]):
        raise SafetyDPOError(f"{who}: expected a finite loss at step {step}, found {measured[0]}: {advice}")
    engine.backward(loss)
    learning_rate = learning_rate_at(
        step, peak=config.learning_rate, warmup_steps=config.warmup_steps, steps=config.steps, decay=config.decay
    )
    norm = engine.step(learning_rate=learning_rate)
    if not math.isfinite(norm):
        raise SafetyDPOError(f"{who}: expected a finite gradient norm at step {step}, found {norm}: {advice}")
    return Descent(measured, norm, learning_rate)


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

    Raises:
        SafetyDPOError: if the checkpoint belongs to something else, or the engine does not own the installed slot.
    """
    # Also when a checkpoint replaces it: loading sets the slot's scale, which an evaluation may have changed.
    backbone.load_adapter(layers)
    if checkpoint is not None and checkpoint.exists():
        state = decode_checkpoint(checkpoint.read_bytes(), expected=identity, where=str(checkpoint))
    else:
        state = TrainingState(fresh_state(dict(backbone.adapter_parameters())), 0, empty_history(num_metrics))
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
