"""What every part of the demo build shares: the learning rate, checkpoints, the moving average, measured numbers.

Checkpoints are safetensors plus JSON and hold the optimizer too; batches are drawn by step number, so that an
interrupted part goes on as if it had not stopped.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from safetydpo.artifacts.json_text import parse_json
from safetydpo.artifacts.layout import demo_weights
from safetydpo.seeding import derive_torch

logger = logging.getLogger(__name__)

BUILD_SEED = 20
"""The run seed of everything the build draws."""
TRAIN_DRAW_SEEDS = tuple(range(6))
HELD_OUT_DRAW_SEEDS = tuple(range(1000, 1004))
DEFAULT_WORK = Path("runs/demo-build")
"""Where checkpoints stand; nothing in it is needed once the weights are written."""
MEASURED_FILE = "measured.json"


def scheduled_rate(step: int, *, num_steps: int, num_warmup_steps: int, peak: float) -> float:
    """Give the learning rate of a step: linear warm-up to `peak`, then half a cosine down to zero.

    rate = peak * (step + 1) / num_warmup_steps, then peak * (1 + cos(pi * progress)) / 2.
    """
    if step < num_warmup_steps:
        return peak * (step + 1) / num_warmup_steps
    progress = (step - num_warmup_steps) / max(1, num_steps - num_warmup_steps)
    return peak * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def draw_batch(stage: str, step: int, *, num_rows: int, batch_size: int) -> Tensor:
    """Draw the row numbers of a step's batch; they depend on (stage, step) only."""
    generator = derive_torch(BUILD_SEED, stage, f"batch/{step}")
    return torch.randint(num_rows, (batch_size,), generator=generator)


class MovingAverage:
    """Keep an exponential moving average of a module's parameters: average += (1 - decay) * (value - average)."""

    def __init__(self, module: nn.Module, *, decay: float) -> None:
        self.decay = decay
        self.values = {name: value.detach().clone() for name, value in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average towards the module's present parameters."""
        averages, values = [], []
        for name, value in module.named_parameters():
            averages.append(self.values[name])
            values.append(value.detach())
        torch._foreach_lerp_(averages, values, 1.0 - self.decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Write the average into the module."""
        for name, value in module.named_parameters():
            value.copy_(self.values[name])


@dataclass
class Progress:
    """Log a running mean of the loss and the speed every `every` steps."""

    part: str
    num_steps: int
    every: int = 100
    _losses: list[float] = field(default_factory=list)
    _started: float = field(default_factory=time.monotonic)

    def add(self, step: int, loss: float) -> None:
        """Note one step."""
        self._losses.append(loss)
        if (step + 1) % self.every == 0 or step + 1 == self.num_steps:
            seconds = (time.monotonic() - self._started) / len(self._losses)
            mean = sum(self._losses) / len(self._losses)
            logger.info("%s step %d/%d loss %.5f, %.3f s/step", self.part, step + 1, self.num_steps, mean, seconds)
            self._losses, self._started = [], time.monotonic()


def save_checkpoint(
    folder: Path, step: int, *, module: nn.Module, optimizer: torch.optim.Optimizer, average: MovingAverage | None
) -> None:
    """Write module, optimizer and moving average after `step` steps; the JSON comes last and closes it."""
    tensors = {f"module/{name}": value.detach() for name, value in module.state_dict().items()}
    for row, state in optimizer.state_dict()["state"].items():
        tensors.update({f"optimizer/{row}/{name}": torch.as_tensor(value) for name, value in state.items()})
    if average is not None:
        tensors.update({f"average/{name}": value for name, value in average.values.items()})
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "checkpoint.safetensors.part"
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, str(temporary))
    os.replace(temporary, folder / "checkpoint.safetensors")
    (folder / "checkpoint.json").write_text(json.dumps({"step": step}))


def load_checkpoint(
    folder: Path, *, module: nn.Module, optimizer: torch.optim.Optimizer, average: MovingAverage | None
) -> int:
    """Load what `save_checkpoint` wrote and return the number of steps done; 0 where there is none."""
    if not (folder / "checkpoint.json").is_file():
        return 0
    tensors = load_file(str(folder / "checkpoint.safetensors"))
    module.load_state_dict(_below(tensors, "module/"))
    saved = optimizer.state_dict()
    saved["state"] = {}
    for name, value in _below(tensors, "optimizer/").items():
        row, key = name.split("/")
        saved["state"].setdefault(int(row), {})[key] = value
    optimizer.load_state_dict(saved)
    if average is not None:
        average.values = _below(tensors, "average/")
    return int(parse_json((folder / "checkpoint.json").read_text())["step"])


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def save_half(module: Any, folder: Path) -> None:
    """Save a diffusers or transformers model as fp16 safetensors, and turn it back to fp32.

    transformers notes the stored type in `config.json` and loads in it; the U-Net and the autoencoder load in fp32, and
    a plain pipeline needs one type. So the config asks for fp32.
    """
    module.half().save_pretrained(str(folder), safe_serialization=True)
    module.float()
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))


def record_measurement(part: str, values: Mapping[str, Any], *, weights: Path | None = None) -> None:
    """Write a part's measured quality into `measured.json`, leaving the other parts as they are."""
    path = (weights or demo_weights()) / MEASURED_FILE
    measured = parse_json(path.read_text()) if path.is_file() else {}
    measured[part] = dict(values)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(measured, indent=2, sort_keys=True) + "\n")
    logger.info("%s measured: %s", part, json.dumps(measured[part], sort_keys=True))


def count_parameters(parameters: Iterable[nn.Parameter]) -> int:
    """Count the numbers in a list of parameters."""
    return sum(parameter.numel() for parameter in parameters)
