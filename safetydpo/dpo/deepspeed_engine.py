"""The DeepSpeed strategy: ZeRO stage 1 or 2 over the adapter's parameters, any number of processes.

The process group must stand already (Ray Train makes it). State goes in and out through DeepSpeed's public
getters and setters; its own checkpoints are pickles and are never written or read.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from safetydpo.config.training import TrainingConfig
from safetydpo.dpo.base_engine import AdapterModule, BaseEngine, require_process_group
from safetydpo.dpo.engine import EngineState
from safetydpo.dpo.loss_scale import LossScale
from safetydpo.dpo.optimizers import OptimizerState, make_optimizer
from safetydpo.errors import UsageError

MOMENTS = ("exp_avg", "exp_avg_sq")


def import_deepspeed(device: torch.device) -> Any:
    """Return the library, told on which device it works."""
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


class DeepSpeedEngine(BaseEngine):
    """ZeRO with a client AdamW, so that no fused optimizer is compiled either."""

    def __init__(
        self, parameters: Sequence[tuple[str, Tensor]], *, config: TrainingConfig, loss_scale: LossScale | None = None
    ) -> None:
        """Take over the named parameters of an installed adapter; every process must call it.

        Raises:
            SafetyDPOError: if there is no process group.
            UsageError: if another optimizer than AdamW is asked for.
        """
        super().__init__(parameters, config=config, loss_scale=loss_scale)
        if config.optimizer != "adamw":
            raise UsageError(
                f"expected dpo.optimizer 'adamw' for dpo.strategy 'deepspeed', found {config.optimizer!r}: "
                "use strategy 'single' or 'ddp' with it"
            )
        require_process_group("deepspeed")
        self._deepspeed = import_deepspeed(next(iter(self._parameters.values())).device)
        self.world_size = dist.get_world_size()
        self._open()

    def _open(self) -> None:
        tensors = list(self._parameters.values())
        self._optimizer = make_optimizer(tensors, config=self._config)
        settings = zero_config(self._config, num_parameters=sum(tensor.numel() for tensor in tensors))
        settings["zero_optimization"] |= self._zero_settings()
        self._engine, *_ = self._deepspeed.initialize(
            model=self._module(settings), optimizer=self._optimizer, config=settings
        )
        self._apply_loss_scale()
        self._make_moments()

    def _start_afresh(self) -> None:
        # ZeRO keeps parts of a gradient in half a dozen places and has no way to forget them but a step, which needs
        # a way back that came to its end.
        self.close()
        # When the old engine is collected, later, it destroys itself once more, and with it what the new one has
        # linked to the same parameters.
        self._engine.optimizer = None
        self._open()

    def _zero_settings(self) -> dict[str, Any]:
        """Return what this engine adds to the settings of ZeRO."""
        return {}

    def _module(self, settings: Mapping[str, Any]) -> nn.Module:  # noqa: ARG002
        """Return what DeepSpeed takes for the model."""
        return AdapterModule(list(self._parameters.values()))

    def _make_moments(self) -> None:
        # ZeRO makes and links AdamW's moments in the first step only; one step with zero gradients at learning
        # rate 0 makes them without moving anything, so that `load_state` can set them.
        self.backward(torch.stack([(parameter * 0.0).sum() for parameter in self._parameters.values()]).sum())
        self._descend(0.0)
        self._set_adam_step(0)

    def _set_adam_step(self, step: int) -> None:
        # The getters and setters of DeepSpeed leave out AdamW's own step.
        for state in self._optimizer.state.values():
            state["step"].fill_(step)

    def _apply_loss_scale(self) -> None:
        # DeepSpeed's own dynamic scale is for parameters in float16; the adapter's are float32.
        if self.loss_scale is not None:
            self._engine.optimizer.override_loss_scale(self.loss_scale.value)

    def accumulate(self, loss: Tensor) -> None:
        """Add the gradients of a part of the loss."""
        self._engine.set_gradient_accumulation_boundary(False)
        self._engine.backward(self._engine(loss))

    def backward(self, loss: Tensor) -> None:
        """Compute gradients of the mean of `loss` over processes."""
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.backward(self._engine(loss))

    def _descend(self, learning_rate: float) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        # With gradients that are not finite, ZeRO forgets them and says that their norm is infinite.
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def _values(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        return {
            name: safe_get_full_fp32_param(parameter).detach().cpu().clone().view(shape_of(parameter))
            for name, parameter in self._parameters.items()
        }

    def _optimizer_state(self) -> OptimizerState:
        from deepspeed.utils import safe_get_full_optimizer_state

        tensors = {
            key: {
                name: safe_get_full_optimizer_state(parameter, key).detach().cpu().clone().view(shape_of(parameter))
                for name, parameter in self._parameters.items()
            }
            for key in MOMENTS
        }
        # As AdamW itself keeps it, so that the state is the same as that of a plain loop.
        tensors["step"] = {name: torch.tensor(float(self._step)) for name in self._parameters}
        return OptimizerState(tensors)

    def _load(self, state: EngineState) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        for name, parameter in self._parameters.items():
            value = state.parameters[name].to(parameter.device)
            safe_set_full_fp32_param(parameter, value)
            for key in MOMENTS:
                # A fresh state has no moments.
                moment = state.optimizer.tensors[key][name] if state.step else torch.zeros_like(value)
                safe_set_full_optimizer_state(parameter, moment.to(parameter.device), key)
        # ZeRO trains a copy; the network itself reads the parameters.
        self._overwrite(state.parameters)
        self._set_adam_step(state.step)

    def close(self) -> None:
        """Destroy the DeepSpeed engine; engines that are only dropped leak their buffers."""
        self._engine.destroy()
        for parameter in self._parameters.values():
            # Until now each parameter was a view into ZeRO's flat buffer.
            parameter.data = parameter.data.clone()


def shape_of(parameter: Tensor) -> torch.Size:
    """Return the shape of a parameter, also of one that is shared out (then its own is empty)."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def zero_config(config: TrainingConfig, *, num_parameters: int) -> dict[str, Any]:
    """Return DeepSpeed's settings for an adapter of `num_parameters` numbers."""
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
