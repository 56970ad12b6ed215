"""What is the same in every engine: count of steps, loss scale, running mean, and the checked state."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from safetydpo.config.training import TrainingConfig
from safetydpo.dpo.average import update_average
from safetydpo.dpo.engine import EngineState
from safetydpo.dpo.loss_scale import LossScale
from safetydpo.dpo.optimizers import OptimizerState
from safetydpo.errors import SafetyDPOError


class BaseEngine(ABC):
    """An engine but for its gradients and its optimizer."""

    world_size = 1

    def __init__(
        self, parameters: Sequence[tuple[str, Tensor]], *, config: TrainingConfig, loss_scale: LossScale | None = None
    ) -> None:
        """Take over the named parameters of an installed adapter."""
        self._parameters = dict(parameters)
        self._config = config
        self._step = 0
        self._average: dict[str, Tensor] = {}
        self._is_abandoned = False
        self._initial_scale = self.loss_scale = loss_scale

    @abstractmethod
    def _descend(self, learning_rate: float) -> float:
        """Divide the gradients by the loss scale, clip, update and forget them; return their norm before clipping.

        If that is not finite, only forget them.
        """

    @abstractmethod
    def _optimizer_state(self) -> OptimizerState:
        """Return a copy of the optimizer's state after at least one step."""

    @abstractmethod
    def _load(self, state: EngineState) -> None:
        """Replace parameters and optimizer state."""

    @abstractmethod
    def _start_afresh(self) -> None:
        """Get rid of whatever a step that was broken off has left; parameters and optimizer state may be lost."""

    def _values(self) -> dict[str, Tensor]:
        """Return copies of the parameters on the CPU."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self._parameters.items()}

    def _apply_loss_scale(self) -> None:  # noqa: B027
        """Tell the owner of the gradients, if that is somebody else, of a changed loss scale."""

    def step(self, *, learning_rate: float) -> float:
        """Clip, update, forget the gradients; return their norm before clipping."""
        norm = self._descend(learning_rate)
        if not math.isfinite(norm):
            self._set_loss_scale(None if self.loss_scale is None else self.loss_scale.after_overflow())
            return norm
        self._set_loss_scale(None if self.loss_scale is None else self.loss_scale.after_step())
        if self._config.ema_decay is not None:
            update_average(self._average, self._parameters, num_updates=self._step, decay=self._config.ema_decay)
        self._step += 1
        return norm

    def _set_loss_scale(self, loss_scale: LossScale | None) -> None:
        self.loss_scale = loss_scale
        self._apply_loss_scale()

    def abandon(self) -> None:
        """Remember that a step was broken off."""
        # Nothing is done here: on the way out of an error other processes may wait for this one, or be gone.
        self._is_abandoned = True

    def state(self) -> EngineState:
        """Return a copy of the full state; every process must call it."""
        optimizer = self._optimizer_state() if self._step else OptimizerState()
        average = {name: tensor.cpu().clone() for name, tensor in self._average.items()}
        return EngineState(self._step, self._values(), optimizer, average, self.loss_scale)

    def load_state(self, state: EngineState) -> None:
        """Replace the full state; every process must call it.

        Raises:
            SafetyDPOError: if the state belongs to other parameters.
        """
        check_names(state, self._parameters)
        if self._is_abandoned:
            self._start_afresh()
            self._is_abandoned = False
        self._load(state)
        self._step = state.step
        if self._config.ema_decay is not None:
            # A fresh state holds none: the mean then starts with the first step.
            start = state.average or state.parameters
            self._average = {
                name: start[name].to(parameter.device, copy=True) for name, parameter in self._parameters.items()
            }
        self._set_loss_scale(self._initial_scale if state.loss_scale is None else state.loss_scale)

    @contextmanager
    def published(self) -> Iterator[None]:
        """Hold the running mean in the adapter inside this context, if one is kept."""
        kept = {name: self._parameters[name].detach().clone() for name in self._average}
        self._overwrite(self._average)
        try:
            yield
        finally:
            self._overwrite(kept)

    @torch.no_grad()
    def _overwrite(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self._parameters[name].copy_(value)

    def mean_over_processes(self, values: Tensor) -> Tensor:
        """Return the mean of `values` over processes, equal on all of them."""
        if self.world_size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total / self.world_size


def check_names(state: EngineState, parameters: Mapping[str, Tensor]) -> None:
    """Refuse a state whose parameters are not exactly these, with these shapes.

    Raises:
        SafetyDPOError: naming the first difference.
    """
    of_all = [state.parameters, *([state.average] if state.average else [])]
    for tensors in [*of_all, *state.optimizer.tensors.values()]:
        # An optimizer may keep some things of some parameters only (8-bit moments of large ones).
        is_of_all = any(tensors is one for one in of_all)
        different = sorted(set(tensors) ^ set(parameters) if is_of_all else set(tensors) - set(parameters))
        if is_of_all and not different:
            different = sorted(name for name in parameters if tensors[name].shape != parameters[name].shape)
        if different:
            raise SafetyDPOError(
                f"expected a training state of the {len(parameters)} installed adapter parameters, found "
                f"{len(tensors)} and a first difference at {different[0]!r}: delete the checkpoint to start anew"
            )


def require_process_group(strategy: str) -> None:
    """Check that processes can talk to each other, even if there is only one.

    Raises:
        SafetyDPOError: if there is no process group.
    """
    if not dist.is_initialized():
        raise SafetyDPOError(
            f"expected an initialised torch.distributed process group for dpo.strategy {strategy!r}, found none: "
            "train through Ray Train, or set dpo.strategy to 'single'"
        )


class AdapterModule(torch.nn.Module):
    """The adapter's parameters as a module of their own, so that a library never sees the frozen network.

    Both libraries hook gradients of the parameters themselves, so it does not matter to them that the parameters were
    used elsewhere: they only need to see the loss pass by, to prepare their hooks for the way back.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        """Take the parameters."""
        super().__init__()
        self.adapter = torch.nn.ParameterList(parameters)

    def forward(self, loss: Tensor) -> Tensor:
        """Return the loss."""
        return loss
