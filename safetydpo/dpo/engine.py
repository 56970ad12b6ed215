"""What turns a loss into an update: one small interface, so that all strategies share one loop and one loss."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from safetydpo.artifacts.adapters import LoraSignature
from safetydpo.config.training import LoraConfig, TrainingConfig
from safetydpo.diffusion.backbone import Backbone
from safetydpo.diffusion.targets import require_attention
from safetydpo.dpo.loss_scale import LossScale, initial_loss_scale
from safetydpo.dpo.optimizers import OptimizerState
from safetydpo.errors import UsageError


@dataclass(frozen=True)
class EngineState:
    """Everything an optimizer step depends on, independent of strategy and number of processes.

    Names are those of the adapter's parameters; all tensors are on the CPU.
    """

    step: int
    """Optimizer steps done."""
    parameters: dict[str, Tensor]
    """float32."""
    optimizer: OptimizerState = field(default_factory=OptimizerState)
    average: dict[str, Tensor] = field(default_factory=dict)
    """Running mean of the parameters, float32; empty if none is kept."""
    loss_scale: LossScale | None = None
    """None if the loss is not scaled."""


def fresh_state(parameters: dict[str, Tensor]) -> EngineState:
    """Return the state before the first step: these parameters, no memory of gradients."""
    return EngineState(0, {name: tensor.detach().float().cpu().clone() for name, tensor in parameters.items()})


class Engine(Protocol):
    """Owner of the adapter's parameters while experts are trained in one slot, one after another."""

    @property
    def world_size(self) -> int:
        """Return the number of processes that train one expert together."""
        ...

    @property
    def loss_scale(self) -> LossScale | None:
        """Return by what the loss is multiplied, None if by nothing."""
        ...

    def accumulate(self, loss: Tensor) -> None:
        """Add the gradients of a part of the step's loss to those of its other parts; `backward` takes the last."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Compute gradients of the mean of `loss` over processes, and add those of its accumulated parts."""
        ...

    def step(self, *, learning_rate: float) -> float:
        """Clip, update, forget the gradients; return their norm before clipping.

        If the norm is not finite, nothing is updated, and the loss scale, if there is one, is halved.
        """
        ...

    def abandon(self) -> None:
        """Remember that a step was broken off: the next `load_state` starts without what it left of gradients."""
        ...

    def mean_over_processes(self, values: Tensor) -> Tensor:
        """Return the mean of `values` over processes, equal on all of them."""
        ...

    def state(self) -> EngineState:
        """Return the full state; every process must call it."""
        ...

    def load_state(self, state: EngineState) -> None:
        """Replace the full state; every process must call it."""
        ...

    def published(self) -> AbstractContextManager[None]:
        """Hold in the adapter, inside this context, what is to be published: the running mean, if one is kept."""
        ...

    def close(self) -> None:
        """Release what the engine holds; the parameters keep their values."""
        ...


def open_engine(backbone: Backbone, *, config: TrainingConfig, lora: LoraConfig, world_size: int = 1) -> Engine:
    """Install an adapter slot in the backbone and return the engine of `config.strategy` for it.

    One engine serves a whole list of experts: `train_expert` loads each expert's own state first.

    Raises:
        UsageError: if the plain loop is asked for with several processes, the optimizer's package is missing, or a
            choice of attention layers is asked of a network that has one kind only.
        SafetyDPOError: if the strategy needs a process group and there is none.
    """
    require_attention(backbone.denoiser, lora.attention)
    backbone.install_adapter(lora_signature(lora))
    backbone.set_activation_checkpointing(config.activation_checkpointing)
    backbone.compute_adapter_in(config.adapter_compute)
    parameters = backbone.adapter_parameters()
    frozen = next(parameter for parameter in backbone.network.parameters() if not parameter.requires_grad)
    loss_scale = initial_loss_scale(config.loss_scaling, frozen.dtype)
    if config.strategy == "deepspeed":
        # DeepSpeed takes a second to import and is not needed by the others.
        if config.zero_stage == 3:
            from safetydpo.dpo.sharded_engine import ShardedEngine

            return ShardedEngine(backbone.network, parameters, config=config, loss_scale=loss_scale)
        from safetydpo.dpo.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(parameters, config=config, loss_scale=loss_scale)
    from safetydpo.dpo.plain_engine import DdpEngine, SingleEngine

    if config.strategy == "ddp":
        return DdpEngine(parameters, config=config, loss_scale=loss_scale)
    if world_size != 1:
        raise UsageError(
            f"expected 1 process per expert for dpo.strategy 'single', found {world_size}: use 'ddp' or 'deepspeed'"
        )
    return SingleEngine(parameters, config=config, loss_scale=loss_scale)


def lora_signature(lora: LoraConfig) -> LoraSignature:
    """Return the signature of a LoRA configuration; alpha defaults to the rank."""
    return LoraSignature(lora.rank, float(lora.rank if lora.alpha is None else lora.alpha), lora.layer_targets)


def learning_rate_at(step: int, *, peak: float, warmup_steps: int, steps: int, decay: str = "constant") -> float:
    """Return the learning rate of optimizer step `step`, counted from 0.

    `lr = peak * min(1, (step + 1) / warmup_steps)`; with `cosine` decay, after the warm-up
    `lr = peak * (1 + cos(pi * t)) / 2`, `t = (step - warmup_steps) / (steps - warmup_steps)`. A step is an optimizer
    step on any number of processes.

    Source: Loshchilov and Hutter 2017, "SGDR" (arXiv 1608.03983), eq. 5, without restarts.
    """
    if step < warmup_steps or decay == "constant":
        return peak * min(1.0, (step + 1) / max(1, warmup_steps))
    progress = (step - warmup_steps) / (steps - warmup_steps)
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
