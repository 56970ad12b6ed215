from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import train_memory
from benchmarks.harness import alternate, ratio_of_medians
from benchmarks.public_trainers import public_step
from benchmarks.sd15_models import SD15_PROPORTION, operations, sd15_unet, sd15_vae
from benchmarks.train_best import ACCELERATIONS, COMPILED, LOW, STACKED, measure_best, our_way
from benchmarks.train_memory import SMALL, our_peak
from benchmarks.train_ways import (
    DPO,
    LORA,
    OurTraining,
    StackedLora,
    bare_passes,
    clip_each_expert,
    encode_once,
    make_pairs,
    stacked_experts,
)
from safetydpo.config.schema import BaseModelConfig
from safetydpo.diffusion.backbone import Backbone
from safetydpo.diffusion.build import load_backbone
from safetydpo.errors import SafetyDPOError


def test_ratio_by_hand() -> None:
    """Medians 4 and 2: twice as fast; one slow round of ours does not matter."""
    assert ratio_of_medians([4.0, 3.0, 9.0], [2.0, 1.0, 50.0]) == 2.0


def test_ways_alternate_and_the_warm_up_does_not_count() -> None:
    calls: list[str] = []
    times = alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2)
    assert calls == ["b", "a", "a", "b", "b", "a"]
    assert {name: len(rows) for name, rows in times.items()} == {"a": 2, "b": 2}
    assert all(one.wall_seconds >= 0 for rows in times.values() for one in rows)


def test_the_proportion_of_work_is_that_of_sd15() -> None:
    """Counted on the meta device, where nothing is computed: 1.12 and 0.80 TFLOP."""
    with torch.device("meta"):
        unet = operations(sd15_unet(), torch.empty(1, 4, 64, 64), torch.empty(1), torch.empty(1, 77, 768))
        encoder = operations(sd15_vae().encoder, torch.empty(1, 3, 512, 512))
    assert unet / 1e12 == pytest.approx(0.80, abs=0.01)
    assert encoder / unet == pytest.approx(SD15_PROPORTION, rel=0.02)


def test_the_accelerations_that_helped_are_measured_together(tiny_folder: Path) -> None:
    """Each alone against `live`, and whatever was above 1 in one way, against the public one in the same type."""
    names = tuple(name for name in ACCELERATIONS if name != COMPILED)
    ratios, raw = measure_best(tiny_folder, rounds=1, steps=1, picture=32, accelerations=names)
    assert set(ratios) == {"pairs_per_second_vs_public_best", *(f"{name} vs live" for name in names)}
    helped = [name for name in names if ratios[f"{name} vs live"] > 1]
    assert raw["best_is"] == (helped or ["live"])
    assert raw["best_dtype"] == ("bfloat16" if LOW in helped else "float32")
    wall = raw["wall_seconds_of_a_step"]
    assert ratios["pairs_per_second_vs_public_best"] == wall["public"][0] / wall["best"][0] > 0


@pytest.mark.parametrize("left_out", [COMPILED, pytest.param(None, marks=[pytest.mark.slow, pytest.mark.long])])
def test_all_accelerations_take_a_step_together(tiny_folder: Path, left_out: str | None) -> None:
    data = encode_once(load_backbone(BaseModelConfig(model=str(tiny_folder))), make_pairs(32))
    step, times = our_way(tiny_folder, data, [name for name in ACCELERATIONS if name != left_out])
    step()
    assert times == STACKED


def test_each_stacked_expert_is_clipped_by_itself() -> None:
    """Norms 5 and 0.5 with a limit of 1: the first is scaled to 1, the second left."""
    layer = StackedLora(torch.nn.Linear(1, 1), experts=2, rank=1)
    layer.down.grad, layer.up.grad = torch.tensor([[[3.0]], [[0.3]]]), torch.tensor([[[4.0]], [[0.4]]])
    clip_each_expert([layer], max_norm=1.0)
    assert layer.down.grad.flatten().tolist() == pytest.approx([0.6, 0.3])
    assert layer.up.grad.flatten().tolist() == pytest.approx([0.8, 0.4])


def test_memory_is_measured_of_a_step_of_the_product(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the small model: its denoiser alone is loaded from files, and its adapter has moved after the step."""
    SMALL.write(tmp_path)
    loaded: list[Backbone] = []

    def load(*arguments: Any, **named: Any) -> Backbone:
        loaded.append(load_backbone(*arguments, **named))
        return loaded[-1]

    monkeypatch.setattr(train_memory, "load_backbone", load)
    our_peak(SMALL, tmp_path, checkpointing=True)
    assert all(float(tensor.detach().abs().max()) > 0 for _, tensor in loaded[0].adapter_parameters())
    with pytest.raises(SafetyDPOError, match="found one loaded with parts='denoiser'"):
        loaded[0].encode_prompts(["a caption"])


def test_every_way_takes_steps_on_a_real_model(tiny_folder: Path) -> None:
    base = BaseModelConfig(model=str(tiny_folder))
    pairs = make_pairs(32)
    data = encode_once(load_backbone(base), pairs)
    live, cached = OurTraining(load_backbone(base), data), OurTraining(load_backbone(base), data, cached=True)
    settings = {"rank": LORA.rank, "targets": LORA.targets, "pairs_per_step": DPO.pairs_per_step, "beta": DPO.beta}
    settings |= {"learning_rate": DPO.learning_rate, "max_grad_norm": DPO.max_grad_norm, "dtype": torch.float32}
    live.step()
    cached.step()
    for one, other in zip(live.backbone.adapter_parameters(), cached.backbone.adapter_parameters(), strict=True):
        assert torch.allclose(one[1], other[1], atol=1e-6)
    ways = [
        bare_passes(live, with_reference=True),
        stacked_experts(load_backbone(base), data, experts=2),
        *(public_step(tiny_folder, kind, pairs, **settings) for kind in ("public", "script")),  # type: ignore[arg-type]
    ]
    for take_step in ways:
        take_step()
