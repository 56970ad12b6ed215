from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from safetydpo.artifacts.adapters import LoraLayer
from safetydpo.artifacts.storage import Location, open_location
from safetydpo.config.training import DistillConfig, LoraConfig
from safetydpo.diffusion.adapter import initial_adapter
from safetydpo.diffusion.stable_diffusion import StableDiffusion
from safetydpo.dpo.distillation import answer_rows
from safetydpo.dpo.distiller import METRIC_NAMES, Distilled, distill, pad_rank
from safetydpo.dpo.engine import lora_signature, open_engine
from safetydpo.errors import SafetyDPOError
from tests.dpo.lessons import SIGNATURE, make_lessons, random_layers, small_distillation


class KilledError(Exception):
    """Stands in for SIGKILL."""


def fresh_layers(backbone: StableDiffusion, lora: LoraConfig) -> dict[str, LoraLayer]:
    return initial_adapter(
        backbone.named_linear_layers(lora.targets),
        lora_signature(lora),
        base_fingerprint=backbone.fingerprint,
        run_seed=5,
        init="shared",
        expert_name="distilled",
    )


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
    start = pad_rank(random_layers(backbone, seed=1, size=0.05), fresh_layers(backbone, lora))
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
    """Rank 2 to rank 4: two rows of the fresh A beside columns of zeros, the same product; fewer rows are refused."""
    layer = LoraLayer(down=torch.tensor([[1.0, 2.0], [0.0, 1.0]]), up=torch.tensor([[1.0, 3.0]]))
    fresh = LoraLayer(down=torch.arange(8.0).reshape(4, 2), up=torch.zeros(1, 4))
    padded = pad_rank({"q": layer}, {"q": fresh})["q"]
    assert padded.down.tolist() == [[1.0, 2.0], [0.0, 1.0], [4.0, 5.0], [6.0, 7.0]]
    assert padded.up.tolist() == [[1.0, 3.0, 0.0, 0.0]]
    assert (padded.up @ padded.down).tolist() == [[1.0, 5.0]]
    small = LoraLayer(down=torch.ones(1, 2), up=torch.zeros(1, 1))
    with pytest.raises(SafetyDPOError, match="expected at most 1 components of 'q', found 2: reduce its rank first"):
        pad_rank({"q": layer}, {"q": small})


def test_added_components_learn(backbone: StableDiffusion):
    """A start of rank 2 in an adapter of rank 3: after training the third component is no longer dead."""
    done = run(backbone, small_distillation(steps=3))
    assert all(layer.up.shape[1] == 3 for layer in done.layers.values())
    assert sum(float(layer.up[:, 2].abs().sum()) for layer in done.layers.values()) > 0
