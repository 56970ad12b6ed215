"""The shared parts of the build: learning rate, moving average, checkpoints, measured numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import nn

from safetydpo.demo.training import (
    MovingAverage,
    draw_batch,
    load_checkpoint,
    record_measurement,
    save_checkpoint,
    scheduled_rate,
)


def test_rate_by_hand() -> None:
    """Warm-up of 4: 1/4, 2/4, .. of the peak; half-way down the cosine (step 4 + 8/2 = 8) it is peak / 2."""
    rates = [scheduled_rate(step, num_steps=12, num_warmup_steps=4, peak=2.0) for step in range(13)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == 2.0
    assert math.isclose(rates[8], 1.0)
    assert math.isclose(rates[12], 0.0, abs_tol=1e-12)


def test_moving_average_by_hand() -> None:
    """From 0 with decay 0.9 towards 1: 0.1, then 0.1 + 0.1 x (1 - 0.1) = 0.19."""
    layer = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(layer.weight)
    average = MovingAverage(layer, decay=0.9)
    nn.init.ones_(layer.weight)
    average.update(layer)
    average.update(layer)
    average.copy_to(layer)
    assert math.isclose(layer.weight.item(), 0.19, rel_tol=1e-6)


def train(layer: nn.Module, optimizer: torch.optim.Optimizer, average: MovingAverage, steps: range) -> None:
    for step in steps:
        rows = draw_batch("test", step, num_rows=8, batch_size=4).float()
        loss = (layer(rows[:, None]) - 3.0).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update(layer)


def make_part() -> tuple[nn.Module, torch.optim.Optimizer, MovingAverage]:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    return layer, torch.optim.AdamW(layer.parameters(), lr=0.01), MovingAverage(layer, decay=0.9)


def test_interrupted_training_equals_uninterrupted(tmp_path: Path) -> None:
    layer, optimizer, average = make_part()
    train(layer, optimizer, average, range(6))
    first = make_part()
    train(*first, range(3))
    save_checkpoint(tmp_path, 3, module=first[0], optimizer=first[1], average=first[2])
    again = make_part()
    assert load_checkpoint(tmp_path, module=again[0], optimizer=again[1], average=again[2]) == 3
    train(*again, range(3, 6))
    for name, value in layer.state_dict().items():
        assert torch.equal(value, again[0].state_dict()[name]), name
    for name, value in average.values.items():
        assert torch.equal(value, again[2].values[name]), name


def test_no_checkpoint_means_step_zero(tmp_path: Path) -> None:
    layer, optimizer, average = make_part()
    assert load_checkpoint(tmp_path, module=layer, optimizer=optimizer, average=average) == 0


def test_measurements_of_other_parts_stay(tmp_path: Path) -> None:
    record_measurement("vae", {"squared_error": 0.01}, weights=tmp_path)
    record_measurement("unet", {"num_steps": 5}, weights=tmp_path)
    record_measurement("vae", {"squared_error": 0.02}, weights=tmp_path)
    measured = json.loads((tmp_path / "measured.json").read_text())
    assert measured == {"vae": {"squared_error": 0.02}, "unet": {"num_steps": 5}}
