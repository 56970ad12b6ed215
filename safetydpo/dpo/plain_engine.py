"""Engines in which every process holds the whole optimizer: one process, or several that average their gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from safetydpo.config.training import TrainingConfig
from safetydpo.dpo.base_engine import AdapterModule, BaseEngine, require_process_group
from safetydpo.dpo.engine import EngineState
from safetydpo.dpo.loss_scale import LossScale
from safetydpo.dpo.optimizers import OptimizerState, make_optimizer, read_optimizer, write_optimizer


def clip_gradients(gradients: Sequence[Tensor], *, max_norm: float) -> Tensor:
    """Scale gradients in place to a joint 2-norm of at most `max_norm`; return the norm before.

    `g <- g / max(1, (norm + 1e-6) / max_norm)`, with the norm summed in float64: the arithmetic of DeepSpeed's
    ZeRO, so that all strategies give equal bits.
    """
    norms = torch.stack([torch.linalg.vector_norm(gradient.double()) for gradient in gradients])
    norm = norms.square().sum().float().sqrt()
    divisor = ((norm + 1e-6) / max_norm).clamp(min=1.0)
    for gradient in gradients:
        gradient.mul_(1.0 / divisor)
    return norm


class SingleEngine(BaseEngine):
    """The plain loop on one process."""

    def __init__(
        self, parameters: Sequence[tuple[str, Tensor]], *, config: TrainingConfig, loss_scale: LossScale | None = None
    ) -> None:
        """Take over the named parameters of an installed adapter.

        Raises:
            UsageError: if the optimizer's package is missing.
        """
        super().__init__(parameters, config=config, loss_scale=loss_scale)
        self._optimizer = make_optimizer(list(self._parameters.values()), config=config)

    def accumulate(self, loss: Tensor) -> None:
        """Add the gradients of a part of the loss."""
        torch.autograd.backward(self._scaled(loss))

    def backward(self, loss: Tensor) -> None:
        """Compute gradients of `loss`."""
        torch.autograd.backward(self._scaled(loss))

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss if self.loss_scale is None else loss * self.loss_scale.value

    def _descend(self, learning_rate: float) -> float:
        gradients = [
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for parameter in self._parameters.values()
        ]
        if self.loss_scale is not None:
            for gradient in gradients:
                gradient.div_(self.loss_scale.value)
        norm = float(clip_gradients(gradients, max_norm=self._config.max_grad_norm))
        if math.isfinite(norm):
            self._optimizer.param_groups[0]["lr"] = learning_rate
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def _optimizer_state(self) -> OptimizerState:
        return read_optimizer(self._optimizer, self._parameters)

    def _load(self, state: EngineState) -> None:
        self._overwrite(state.parameters)
        write_optimizer(self._optimizer, self._parameters, state.optimizer)
        self._optimizer.zero_grad(set_to_none=True)

    def _start_afresh(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def close(self) -> None:
        """Forget the optimizer's state."""
        self._optimizer.state.clear()


class DdpEngine(SingleEngine):
    """torch's DistributedDataParallel over the adapter's parameters; every process takes the same step.

    It wraps the parameters and not the denoiser, because a step calls the denoiser several times, with the adapter on
    and off, and through the backbone: its reducer hangs on the parameters' gradients and does not care who used them.
    """

    def __init__(
        self, parameters: Sequence[tuple[str, Tensor]], *, config: TrainingConfig, loss_scale: LossScale | None = None
    ) -> None:
        """Take over the named parameters of an installed adapter; every process must call it.

        Raises:
            SafetyDPOError: if there is no process group.
            UsageError: if the optimizer's package is missing.
        """
        require_process_group("ddp")
        super().__init__(parameters, config=config, loss_scale=loss_scale)
        self.world_size = dist.get_world_size()
        self._module = self._wrapped()

    def _wrapped(self) -> DistributedDataParallel:
        return DistributedDataParallel(AdapterModule(list(self._parameters.values())))

    def _start_afresh(self) -> None:
        super()._start_afresh()
        # Its reducer may have stopped in the middle of a way back.
        self._module = self._wrapped()

    def accumulate(self, loss: Tensor) -> None:
        """Add the gradients of a part of the loss on this process alone."""
        with self._module.no_sync():
            super().accumulate(self._module(loss))

    def backward(self, loss: Tensor) -> None:
        """Compute gradients of the mean of `loss` over processes."""
        super().backward(self._module(loss))
