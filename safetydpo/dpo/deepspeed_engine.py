"""The DeepSpeed strategy: ZeRO stage 1 or 2 over the adapter's parameters, any number of processes.

The process group must stand already (Ray Train makes it). State goes in and out through DeepSpeed's public
getters and setters; its own checkpoints are pickles and are never written or read.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from safetydpo.config.training import TrainingConfig
from safetydpo.dpo.engine import EngineState, check_names, make_optimizer
from safetydpo.errors import SafetyDPOError

MOMENTS = ("exp_avg", "exp_avg_sq")


class _AdapterModule(torch.nn.Module):
    """The adapter's parameters as a module of their own, so that ZeRO never sees the frozen network."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__()
        self.adapter = torch.nn.ParameterList(parameters)

    def forward(self, loss: Tensor) -> Tensor:
        # The network has run already; DeepSpeed only needs to see the loss pass by to prepare its hooks.
        return loss


def _import_deepspeed(device: torch.device) -> Any:
    # DeepSpeed reads its accelerator from the environment, once, at import.
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Ray Train and torchrun set this; a bare process has one rank per machine.
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed
    import deepspeed.ops

    # Without this, DeepSpeed compiles a shared-memory all-reduce with g++ at start (half a minute, and a killed
    # build hangs every later one on its lock). Only its inference engine calls it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed


class DeepSpeedEngine:
    """ZeRO with a client AdamW, so that no fused optimizer is compiled either."""

    def __init__(self, parameters: Sequence[tuple[str, Tensor]], *, config: TrainingConfig) -> None:
        """Take over the named parameters of an installed adapter; every process must call it.

        Raises:
            SafetyDPOError: if there is no process group.
        """
        if not dist.is_initialized():
            raise SafetyDPOError(
                "expected an initialised torch.distributed process group for dpo.strategy 'deepspeed', found none: "
                "train through Ray Train, or set dpo.strategy to 'single'"
            )
        self._parameters = dict(parameters)
        tensors = list(self._parameters.values())
        deepspeed = _import_deepspeed(tensors[0].device)
        self._optimizer = make_optimizer(tensors, config=config)
        self._engine, *_ = deepspeed.initialize(
            model=_AdapterModule(tensors),
            optimizer=self._optimizer,
            config=_zero_config(config, sum(tensor.numel() for tensor in tensors)),
        )
        self.world_size = dist.get_world_size()
        self._step = 0
        self._make_moments()

    def _make_moments(self) -> None:
        # ZeRO makes and links AdamW's moments in the first step only; one step with zero gradients at learning
        # rate 0 makes them without moving anything, so that `load_state` can set them.
        self.backward(torch.stack([(parameter * 0.0).sum() for parameter in self._parameters.values()]).sum())
        self.step(learning_rate=0.0)
        self._set_adam_step(0)
        self._step = 0

    def _set_adam_step(self, step: int) -> None:
        # The getters and setters of DeepSpeed leave out AdamW's own step.
        for state in self._optimizer.state.values():
            state["step"].fill_(step)

    def backward(self, loss: Tensor) -> None:
        """Compute gradients of the mean of `loss` over processes."""
        self._engine.backward(self._engine(loss))

    def step(self, *, learning_rate: float) -> float:
        """Clip, update, forget the gradients; return their norm before clipping."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        self._step += 1
        return float(self._engine.get_global_grad_norm())

    def mean_over_processes(self, values: Tensor) -> Tensor:
        """Return the mean of `values` over processes, equal on all of them."""
        total = values.clone()
        dist.all_reduce(total)
        return total / self.world_size

    def state(self) -> EngineState:
        """Return the full state; every process must call it."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        def moment(key: str) -> dict[str, Tensor]:
            return {
                name: safe_get_full_optimizer_state(parameter, key).detach().cpu().clone()
                for name, parameter in self._parameters.items()
            }

        parameters = {
            name: safe_get_full_fp32_param(parameter).detach().cpu().clone()
            for name, parameter in self._parameters.items()
        }
        return EngineState(self._step, parameters, *(moment(key) for key in MOMENTS))

    def load_state(self, state: EngineState) -> None:
        """Replace parameters and moments; every process must call it.

        Raises:
            SafetyDPOError: if the state belongs to other parameters.
        """
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        check_names(state, self._parameters)
        for name, parameter in self._parameters.items():
            value = state.parameters[name].to(parameter.device)
            safe_set_full_fp32_param(parameter, value)
            # ZeRO trains a copy; the network itself reads the parameter.
            with torch.no_grad():
                parameter.copy_(value)
            safe_set_full_optimizer_state(parameter, state.exp_avg[name].to(parameter.device), "exp_avg")
            safe_set_full_optimizer_state(parameter, state.exp_avg_sq[name].to(parameter.device), "exp_avg_sq")
        self._set_adam_step(state.step)
        self._step = state.step

    def close(self) -> None:
        """Destroy the DeepSpeed engine; engines that are only dropped leak their buffers."""
        self._engine.destroy()
        for parameter in self._parameters.values():
            # Until now each parameter was a view into ZeRO's flat buffer.
            parameter.data = parameter.data.clone()


def _zero_config(config: TrainingConfig, num_parameters: int) -> dict[str, Any]:
    # The default buckets hold 500 million numbers, allocated up front; the whole adapter fits in one of its size.
    bucket = 2 * ((num_parameters + 1) // 2)
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm,
        "steps_per_print": 1_000_000_000,
        "zero_optimization": {
            "stage": config.zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "overlap_comm": False,
        },
    }
