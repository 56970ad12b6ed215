"""What turns a loss into an update: one small interface, so that both strategies share one loop and one loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from safetydpo.artifacts.adapters import LoraSignature
from safetydpo.config.training import LoraConfig, TrainingConfig
from safetydpo.diffusion.backbone import Backbone
from safetydpo.diffusion.targets import require_attention
from safetydpo.errors import SafetyDPOError, UsageError


@dataclass(frozen=True)
class EngineState:
    """Everything an optimizer step depends on, independent of strategy and number of processes.

    Keys are the names of the adapter's parameters; all tensors are float32 on the CPU.
    """

    step: int
    """Optimizer steps done; also AdamW's own step."""
    parameters: dict[str, Tensor]
    exp_avg: dict[str, Tensor]
    """AdamW's running mean of gradients."""
    exp_avg_sq: dict[str, Tensor]
    """AdamW's running mean of squared gradients."""


def fresh_state(parameters: dict[str, Tensor]) -> EngineState:
    """Return the state before the first step: these parameters, no memory of gradients."""
    copies = {name: tensor.detach().float().cpu().clone() for name, tensor in parameters.items()}
    return EngineState(
        step=0,
        parameters=copies,
        exp_avg={name: torch.zeros_like(tensor) for name, tensor in copies.items()},
        exp_avg_sq={name: torch.zeros_like(tensor) for name, tensor in copies.items()},
    )


class Engine(Protocol):
    """Owner of the adapter's parameters while experts are trained in one slot, one after another."""

    @property
    def world_size(self) -> int:
        """Return the number of processes that train one expert together."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Compute gradients of the mean of `loss` over processes."""
        ...

    def step(self, *, learning_rate: float) -> float:
        """Clip, update, forget the gradients; return their norm before clipping."""
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

    def close(self) -> None:
        """Release what the engine holds; the parameters keep their values."""
        ...


def open_engine(backbone: Backbone, *, config: TrainingConfig, lora: LoraConfig, world_size: int = 1) -> Engine:
    """Install an adapter slot in the backbone and return the engine of `config.strategy` for it.

    One engine serves a whole list of experts: `train_expert` loads each expert's own state first.

    Raises:
        UsageError: if the plain loop is asked for with several processes, or a choice of attention layers for a
            network that has one kind only.
    """
    require_attention(backbone.denoiser, lora.attention)
    backbone.install_adapter(lora_signature(lora))
    parameters = backbone.adapter_parameters()
    if config.strategy == "deepspeed":
        # DeepSpeed takes a second to import and is not needed by the plain loop.
        from safetydpo.dpo.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(parameters, config=config)
    if world_size != 1:
        raise UsageError(
            f"expected 1 process per expert for dpo.strategy 'single', found {world_size}: use 'deepspeed'"
        )
    return SingleEngine(parameters, config=config)


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


def make_optimizer(parameters: Sequence[Tensor], *, config: TrainingConfig) -> torch.optim.AdamW:
    """Return AdamW (betas 0.9 and 0.999) over the adapter's parameters; both strategies use this one."""
    return torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=config.weight_decay
    )


def clip_gradients(gradients: Sequence[Tensor], *, max_norm: float) -> Tensor:
    """Scale gradients in place to a joint 2-norm of at most `max_norm`; return the norm before.

    `g <- g / max(1, (norm + 1e-6) / max_norm)`, with the norm summed in float64: the arithmetic of DeepSpeed's
    ZeRO, so that both strategies give equal bits.
    """
    norms = torch.stack([torch.linalg.vector_norm(gradient.double()) for gradient in gradients])
    norm = norms.square().sum().float().sqrt()
    divisor = ((norm + 1e-6) / max_norm).clamp(min=1.0)
    for gradient in gradients:
        gradient.mul_(1.0 / divisor)
    return norm


class SingleEngine:
    """The plain loop on one process."""

    world_size = 1

    def __init__(self, parameters: Sequence[tuple[str, Tensor]], *, config: TrainingConfig) -> None:
        """Take over the named parameters of an installed adapter."""
        self._parameters = dict(parameters)
        self._max_grad_norm = config.max_grad_norm
        self._optimizer = make_optimizer(list(self._parameters.values()), config=config)
        self._step = 0

    def backward(self, loss: Tensor) -> None:
        """Compute gradients of `loss`."""
        torch.autograd.backward(loss)

    def step(self, *, learning_rate: float) -> float:
        """Clip, update, forget the gradients; return their norm before clipping."""
        gradients = [
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for parameter in self._parameters.values()
        ]
        norm = clip_gradients(gradients, max_norm=self._max_grad_norm)
        self._optimizer.param_groups[0]["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._step += 1
        return float(norm)

    def mean_over_processes(self, values: Tensor) -> Tensor:
        """Return `values`: there is one process."""
        return values

    def state(self) -> EngineState:
        """Return a copy of the full state."""

        def moment(key: str) -> dict[str, Tensor]:
            return {
                name: self._optimizer.state[parameter][key].detach().cpu().clone()
                if parameter in self._optimizer.state
                else torch.zeros_like(parameter, device="cpu").detach()
                for name, parameter in self._parameters.items()
            }

        parameters = {name: tensor.detach().cpu().clone() for name, tensor in self._parameters.items()}
        return EngineState(self._step, parameters, moment("exp_avg"), moment("exp_avg_sq"))

    def load_state(self, state: EngineState) -> None:
        """Replace parameters and moments.

        Raises:
            SafetyDPOError: if the state belongs to other parameters.
        """
        check_names(state, self._parameters)
        for name, parameter in self._parameters.items():
            with torch.no_grad():
                parameter.copy_(state.parameters[name])
            self._optimizer.state[parameter] = {
                "step": torch.tensor(float(state.step)),
                "exp_avg": state.exp_avg[name].to(parameter.device, copy=True),
                "exp_avg_sq": state.exp_avg_sq[name].to(parameter.device, copy=True),
            }
        self._optimizer.zero_grad(set_to_none=True)
        self._step = state.step

    def close(self) -> None:
        """Forget the optimizer's state."""
        self._optimizer.state.clear()


def check_names(state: EngineState, parameters: dict[str, Tensor]) -> None:
    """Refuse a state whose parameters are not exactly these, with these shapes.

    Raises:
        SafetyDPOError: naming the first difference.
    """
    for tensors in (state.parameters, state.exp_avg, state.exp_avg_sq):
        different = sorted(set(tensors) ^ set(parameters)) or sorted(
            name for name in parameters if tensors[name].shape != parameters[name].shape
        )
        if different:
            raise SafetyDPOError(
                f"expected a training state of the {len(parameters)} installed adapter parameters, found "
                f"{len(tensors)} and a first difference at {different[0]!r}: delete the checkpoint to start anew"
            )
