"""Optimizers of well-kept libraries, and their state as named tensors and numbers."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from safetydpo.config.training import TrainingConfig
from safetydpo.errors import UsageError

BETAS = (0.9, 0.999)
EXTRA = "optimizers"


@dataclass(frozen=True)
class OptimizerState:
    """What an optimizer remembers of the steps so far; empty before the first one."""

    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Key of the optimizer (such as `exp_avg`) -> name of the parameter -> tensor on the CPU."""
    numbers: dict[str, dict[str, float]] = field(default_factory=dict)
    """The same for plain numbers (such as `step`)."""
    shared: dict[str, float] = field(default_factory=dict)
    """Numbers of all parameters together (Prodigy's step size)."""


def make_optimizer(parameters: Sequence[Tensor], *, config: TrainingConfig) -> torch.optim.Optimizer:
    """Return the optimizer of `config` over the adapter's parameters; all strategies use this one.

    Raises:
        UsageError: if its package is not installed, naming it.
    """
    common: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    optimizer: torch.optim.Optimizer
    if config.optimizer == "adamw":
        optimizer = torch.optim.AdamW(parameters, betas=BETAS, eps=1e-8, **common)
    elif config.optimizer == "adafactor":
        # Not torch's, which always scales the step by the size of the parameter: B starts at 0 and would hardly move,
        # and the learning rate would not be the one asked for. This is how the released SDXL launcher calls it.
        from transformers.optimization import Adafactor

        optimizer = Adafactor(parameters, scale_parameter=False, relative_step=False, **common)
    elif config.optimizer == "prodigy":
        # Its author's advice for adapters and for a learning rate that warms up.
        prodigy = _package("prodigyopt", config).Prodigy
        # It greets whoever makes it, on the standard output.
        with contextlib.redirect_stdout(io.StringIO()):
            optimizer = prodigy(parameters, betas=BETAS, use_bias_correction=True, safeguard_warmup=True, **common)
    else:
        optimizer = _package("bitsandbytes", config).optim.AdamW8bit(parameters, betas=BETAS, eps=1e-8, **common)
    return optimizer


def _package(name: str, config: TrainingConfig) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(
            f"expected the package {name!r} for dpo.optimizer {config.optimizer!r}, found none: "
            f"pip install 'safetydpo[{EXTRA}]'"
        ) from error


def read_optimizer(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> OptimizerState:
    """Return a copy of the optimizer's state, by the names of its parameters."""
    tensors: dict[str, dict[str, Tensor]] = {}
    numbers: dict[str, dict[str, float]] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors.setdefault(key, {})[name] = value.detach().to("cpu", copy=True)
            elif value is not None:
                numbers.setdefault(key, {})[name] = value
    return OptimizerState(tensors, numbers, _shared_numbers(optimizer))


def write_optimizer(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor], state: OptimizerState) -> None:
    """Replace the optimizer's state; an empty one makes it as new."""
    optimizer.state.clear()
    for key, named in state.tensors.items():
        for name, tensor in named.items():
            # torch's AdamW keeps its step on the CPU, wherever the parameter stands.
            device = "cpu" if key == "step" else parameters[name].device
            optimizer.state[parameters[name]][key] = tensor.to(device, copy=True)
    for key, values in state.numbers.items():
        for name, number in values.items():
            optimizer.state[parameters[name]][key] = number
    group = optimizer.param_groups[0]
    group.update({key: state.shared.get(key, start) for key, start in _counted(optimizer).items()})


def _shared_numbers(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    group = optimizer.param_groups[0]
    return {key: group[key] for key, start in _counted(optimizer).items() if group[key] != start}


def _counted(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Return the optimizer's own numbers as they were when it was made; the learning rate is set in every step."""
    return {
        key: value
        for key, value in optimizer.defaults.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and key != "lr"
    }
