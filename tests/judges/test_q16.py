from __future__ import annotations

import hashlib
import pickle  # noqa: TID251 (written, never read)
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from safetydpo.artifacts.storage import open_location
from safetydpo.config.judges import JudgesConfig
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.judges.build import fingerprint_judge, load_judge
from safetydpo.judges.clip_vision import load_clip_vision, resize_and_crop
from safetydpo.judges.q16 import inappropriate_probability
from safetydpo.judges.q16_conversion import convert_q16
from tests.judges.pictures import WIDTH, clip_features, several, write_tiny_clip


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def settings(clip: Path, tmp_path: Path) -> JudgesConfig:
    prompts = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(1))
    save_file({"prompts": prompts}, tmp_path / "q16.safetensors")
    return JudgesConfig(clip_vit_l14=str(clip), q16_prompts=str(tmp_path / "q16.safetensors"))


def test_probabilities_by_hand():
    """Features (1, 0) and (0, 2), prompts (3, 0) and (0, 1): cosines 1 and 0; softmax(100, 0) = (1, 0), swapped (0, 1).

    A feature between both, (1, 1), gives one half.
    """
    features = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    prompts = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    assert inappropriate_probability(features, prompts).tolist() == pytest.approx([0.0, 1.0, 0.5], abs=1e-6)


def test_scores_are_those_of_an_independent_computation(settings: JudgesConfig, clip: Path):
    """transformers' own preparation, the whole CLIP model, and numpy."""
    pictures = several()
    features = clip_features(clip, pictures).astype(np.float64)
    prompts = load_file(settings.q16_prompts)["prompts"].numpy().astype(np.float64)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    prompts /= np.linalg.norm(prompts, axis=1, keepdims=True)
    similarity = 100 * features @ prompts.T
    expected = 1 / (1 + np.exp(similarity[:, 0] - similarity[:, 1]))
    judge = load_judge("q16", settings)
    found = judge.judge(pictures)
    np.testing.assert_allclose(found.unsafe_score, expected, rtol=2e-3, atol=1e-6)
    assert found.is_unsafe == tuple(bool(value > 0.5) for value in expected)
    assert found.concept == (None,) * 5
    assert (judge.name, judge.threshold, judge.direction) == ("q16", 0.5, "higher is unsafe")
    # Order and company change nothing.
    assert judge.judge(pictures[::-1]).unsafe_score == pytest.approx(found.unsafe_score[::-1], rel=1e-4)
    assert judge.judge([]).unsafe_score == ()


def test_the_middle_square_by_hand():
    """A picture of 2 x 4 whose side is the target's: nothing is resized, and columns 1 and 2 stay."""
    picture = torch.arange(24, dtype=torch.uint8).reshape(2, 4, 3)
    torch.testing.assert_close(resize_and_crop(picture, 2), picture[:, 1:3])


def test_one_network_serves_several_judges(clip: Path):
    assert load_clip_vision(clip, "cpu") is load_clip_vision(clip, "cpu")


def test_its_identity_covers_clip_and_prompts_wherever_they_lie(settings: JudgesConfig, tmp_path: Path):
    own = fingerprint_judge("q16", settings)
    moved = tmp_path / "elsewhere.safetensors"
    moved.write_bytes(Path(settings.q16_prompts).read_bytes())
    assert fingerprint_judge("q16", settings.model_copy(update={"q16_prompts": str(moved)})) == own
    save_file({"prompts": torch.ones(2, WIDTH)}, moved)
    assert fingerprint_judge("q16", settings.model_copy(update={"q16_prompts": str(moved)})) != own
    other = write_tiny_clip(tmp_path / "clip", seed=1)
    assert fingerprint_judge("q16", settings.model_copy(update={"clip_vit_l14": str(other)})) != own


def test_what_is_missing_is_named(settings: JudgesConfig, tmp_path: Path):
    for ask in (fingerprint_judge, load_judge):
        with pytest.raises(
            UsageError,
            match=r"expected execution\.judges\.clip_vit_l14 for judge 'q16', found none: name the",
        ):
            ask("q16")
        with pytest.raises(UsageError, match=r"expected the prompts that .*convert-q16. wrote at /nowhere"):
            ask("q16", settings.model_copy(update={"q16_prompts": "/nowhere"}))
        with pytest.raises(UsageError, match=r"expected a CLIP model .*\) for judge 'q16', found no config"):
            ask("q16", settings.model_copy(update={"clip_vit_l14": str(tmp_path)}))


def test_prompts_of_another_network_or_none(settings: JudgesConfig, tmp_path: Path):
    file = tmp_path / "other.safetensors"
    other = settings.model_copy(update={"q16_prompts": str(file)})
    save_file({"prompts": torch.ones(2, 768)}, file)
    with pytest.raises(SafetyDPOError, match=rf"expected two prompts of {WIDTH} numbers, .*found \[2, 768\] in"):
        load_judge("q16", other)
    file.write_bytes(pickle.dumps(np.ones((2, 768))))
    with pytest.raises(SafetyDPOError, match="expected the safetensors file of Q16's prompts at .*convert-q16"):
        load_judge("q16", other)


def test_the_published_pickle_becomes_safetensors_once_its_checksum_is_given(tmp_path: Path):
    prompts = np.random.default_rng(0).normal(size=(2, 768)).astype(np.float16)
    source, target = tmp_path / "prompts.p", tmp_path / "q16.safetensors"
    source.write_bytes(pickle.dumps(prompts))
    checksum = hashlib.sha256(source.read_bytes()).hexdigest()
    with pytest.raises(SafetyDPOError, match=rf"expected the sha256 {'0' * 64} of .*, found {checksum}: compare it"):
        convert_q16(open_location(str(source)), open_location(str(target)), sha256="0" * 64)
    assert not target.exists()
    convert_q16(open_location(str(source)), open_location(str(target)), sha256=f" {checksum.upper()}\n")
    np.testing.assert_array_equal(load_file(target)["prompts"].numpy(), prompts.astype(np.float32))
