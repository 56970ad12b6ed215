from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from safetydpo.artifacts.adapters import LoraLayer
from safetydpo.artifacts.storage import Location, open_location
from safetydpo.config.schema import DistillConfig, LoraConfig
from safetydpo.diffusion.stable_diffusion import StableDiffusion
from safetydpo.dpo.distillation import answer_rows
from safetydpo.dpo.distiller import METRIC_NAMES, Distilled, distill, pad_rank
from safetydpo.dpo.engine import open_engine
from safetydpo.errors import SafetyDPOError
from tests.dpo.lessons import SIGNATURE, make_lessons, random_layers, small_distillation


class KilledError(Exception):
    """Stands in for SIGKILL."""


def run(
    backbone: StableDiffusion,
    config: DistillConfig,
    *,
    checkpoint: Location | None = None,
    report: Callable[[int], None] = lambda _: None,
    start_hash: str = "start",
) -> Distilled:
    data, lora = make_lessons(backbone), LoraConfig(rank=3)
    teachers = {"hate": random_layers(backbone, seed=1), "violence": random_layers(backbone, seed=2)}
    start = pad_rank(random_layers(backbone, seed=1, size=0.05), lora.rank)
    answers = answer_rows(backbone, data, teachers, signature=SIGNATURE, config=config, run_seed=5)
    engine = open_engine(backbone, config=config, lora=lora)
    try:
        return distill(
            backbone,
            data,
            answers,
            start=start,
            start_hash=start_hash,
            config=config,
            lora=lora,
            run_seed=5,
            engine=engine,
            checkpoint=checkpoint,
            report=report,
        )
    finally:
        engine.close()


def test_it_comes_to_answer_as_its_teachers_do(backbone: StableDiffusion):
    """Two experts that answer different captions, one adapter: what is left of the error is a small part."""
    done = run(backbone, small_distillation(steps=150, rows_per_step=8, decay="cosine", draws=1))
    losses = done.history[:, METRIC_NAMES.index("loss")]
    assert losses[-10:].mean() < 0.2 * losses[:3].mean()
    assert done.history.shape == (150, len(METRIC_NAMES))
    assert {layer.down.shape[0] for layer in done.layers.values()} == {3}


def test_interrupted_and_resumed_equals_uninterrupted(backbone: StableDiffusion, tmp_path: Path):
    config, checkpoint = small_distillation(), open_location(str(tmp_path / "checkpoint.safetensors"))
    whole = run(backbone, config)

    def kill(step: int) -> None:
        if step == 2:
            raise KilledError

    with pytest.raises(KilledError):
        run(backbone, config, checkpoint=checkpoint, report=kill)
    resumed = run(backbone, config, checkpoint=checkpoint)
    assert resumed.resumed_at == 2
    assert torch.equal(resumed.history, whole.history)
    for name, layer in whole.layers.items():
        assert torch.equal(layer.down, resumed.layers[name].down)
        assert torch.equal(layer.up, resumed.layers[name].up)


def test_a_checkpoint_of_other_experts_is_refused(backbone: StableDiffusion, tmp_path: Path):
    checkpoint = open_location(str(tmp_path / "checkpoint.safetensors"))
    run(backbone, small_distillation(), checkpoint=checkpoint)
    with pytest.raises(SafetyDPOError, match=r"expected a checkpoint with expert = 'distilled-other' at .*, found"):
        run(backbone, small_distillation(), checkpoint=checkpoint, start_hash="other")


def test_padding_changes_no_delta():
    """Rank 2 to rank 4: two rows and columns of zeros, the same product; fewer than there are is refused."""
    layer = LoraLayer(down=torch.tensor([[1.0, 2.0], [0.0, 1.0]]), up=torch.tensor([[1.0, 3.0]]))
    padded = pad_rank({"q": layer}, 4)["q"]
    assert padded.down.shape == (4, 2)
    assert padded.up.shape == (1, 4)
    assert (padded.up @ padded.down).tolist() == [[1.0, 5.0]]
    with pytest.raises(SafetyDPOError, match="expected at most 1 components of 'q', found 2: reduce its rank first"):
        pad_rank({"q": layer}, 1)
