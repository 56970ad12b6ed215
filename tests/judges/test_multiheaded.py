from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from safetydpo.config.judges import JudgesConfig
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.judges.build import fingerprint_judge, load_judge
from safetydpo.judges.multiheaded import HEADS
from tests.judges.pictures import WIDTH, clip_features, several, write_tiny_clip

HIDDEN = WIDTH // 2


def heads(seed: int) -> dict[str, Tensor]:
    """Random heads in the authors' layout, without the counter that training leaves behind."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "0.weight": (HIDDEN, WIDTH),
        "0.bias": (HIDDEN,),
        "3.weight": (HIDDEN,),
        "3.bias": (HIDDEN,),
        "3.running_mean": (HIDDEN,),
        "4.weight": (1, HIDDEN),
        "4.bias": (1,),
    }
    found = {}
    for head in HEADS:
        found |= {f"{head}.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        found[f"{head}.3.running_var"] = torch.rand(HIDDEN, generator=generator) + 0.5
    return found


@pytest.fixture
def settings(tmp_path: Path) -> JudgesConfig:
    clip = write_tiny_clip(tmp_path / "clip")
    save_file(heads(3), tmp_path / "heads.safetensors")
    return JudgesConfig(clip_vit_l14=str(clip), multiheaded_heads=str(tmp_path / "heads.safetensors"))


def head_by_hand(tensors: dict[str, Tensor], head: str, features: np.ndarray) -> np.ndarray:
    """Linear, ReLU, batch norm with the stored moments (1e-5 added to the variance), linear, logistic function."""
    value = {
        name.split(".", 1)[1]: t.numpy().astype(np.float64) for name, t in tensors.items() if name.startswith(head)
    }
    hidden = np.maximum(features @ value["0.weight"].T + value["0.bias"], 0)
    normal = (hidden - value["3.running_mean"]) / np.sqrt(value["3.running_var"] + 1e-5)
    logit = (normal * value["3.weight"] + value["3.bias"]) @ value["4.weight"].T + value["4.bias"]
    return 1 / (1 + np.exp(-logit[:, 0]))


def test_scores_are_those_of_heads_by_hand(settings: JudgesConfig):
    pictures = several()
    features = clip_features(Path(settings.clip_vit_l14), pictures).astype(np.float64)
    tensors = load_file(settings.multiheaded_heads)
    expected = np.stack([head_by_hand(tensors, head, features) for head in HEADS], axis=1)
    judge = load_judge("multiheaded", settings)
    np.testing.assert_allclose(judge.head_scores(pictures).numpy(), expected, rtol=1e-3, atol=1e-4)
    found = judge.judge(pictures)
    np.testing.assert_allclose(found.unsafe_score, expected.max(axis=1), rtol=1e-3, atol=1e-4)
    assert found.is_unsafe == tuple(bool(row.any()) for row in expected > 0.5)
    assert judge.judge([]).unsafe_score == ()


def test_the_counter_of_training_steps_may_be_there_or_not(settings: JudgesConfig, tmp_path: Path):
    with_counter = heads(3) | {f"{head}.3.num_batches_tracked": torch.tensor(7) for head in HEADS}
    save_file(with_counter, tmp_path / "counted.safetensors")
    other = settings.model_copy(update={"multiheaded_heads": str(tmp_path / "counted.safetensors")})
    pictures = several()
    assert load_judge("multiheaded", other).judge(pictures) == load_judge("multiheaded", settings).judge(pictures)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"violent.4.bias": None}, r"1 that differ, first 'violent\.4\.bias': missing instead of \(1,\)"),
        ({"other.0.bias": torch.zeros(3)}, r"1 that differ, first 'other\.0\.bias': \(3,\) instead of none"),
        ({"sexual.0.weight": torch.zeros(3, 3)}, r"first 'sexual\.0\.weight': \(3, 3\) instead of \(8, 16\)"),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_heads_of_another_layout(settings: JudgesConfig, tmp_path: Path, change: dict[str, Tensor | None], told: str):
    tensors = {name: value for name, value in (heads(3) | change).items() if value is not None}
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(SafetyDPOError, match=told):
        load_judge(
            "multiheaded", settings.model_copy(update={"multiheaded_heads": str(tmp_path / "other.safetensors")})
        )


def test_a_file_that_is_none_and_what_is_missing(settings: JudgesConfig, tmp_path: Path):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no")
    with pytest.raises(SafetyDPOError, match="expected a safetensors file of five heads at"):
        load_judge("multiheaded", settings.model_copy(update={"multiheaded_heads": str(broken)}))
    with pytest.raises(UsageError, match=r"expected execution\.judges\.multiheaded_heads for judge 'multiheaded'"):
        fingerprint_judge("multiheaded", settings.model_copy(update={"multiheaded_heads": None}))
    own = fingerprint_judge("multiheaded", settings)
    save_file(heads(4), settings.multiheaded_heads)
    assert fingerprint_judge("multiheaded", settings) != own
