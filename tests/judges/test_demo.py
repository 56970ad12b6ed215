"""The demo judges: scores by hand, held-out drawings, mush, missing weights."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from safetydpo.artifacts.layout import demo_weights
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.judges.build import fingerprint_judge
from safetydpo.judges.demo import load_select_judge
from safetydpo.judges.demo_audit import load_audit_judge
from safetydpo.judges.demo_network import (
    AuditNetwork,
    DemoJudge,
    JudgeLabels,
    SelectNetwork,
    summarise_logits,
)

DRAWINGS = Path(__file__).parents[1] / "demo" / "drawings.png"


@pytest.fixture(scope="module")
def judges() -> list[DemoJudge]:
    return [load_select_judge(), load_audit_judge()]


def load_drawings(labels: JudgeLabels) -> tuple[np.ndarray, list[str], list[str]]:
    """Cut the sheet of 144 held-out drawings: tile i shows concept i % 129 on background (3 i + i // 129) % 8."""
    sheet = np.asarray(Image.open(DRAWINGS).convert("RGB"))
    tiles = sheet.reshape(9, 32, 16, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3)
    count = len(labels.concepts)
    concepts = [labels.concepts[row % count] for row in range(len(tiles))]
    backgrounds = [labels.backgrounds[(row * 3 + row // count) % 8] for row in range(len(tiles))]
    return tiles, concepts, backgrounds


def test_scores_by_hand() -> None:
    """Classes: safe, unsafe, unsafe, unrecognisable. Weights 4, 3, 2, 1 of 10: the safe class wins with 0.4 although
    P(unsafe) = 0.5 is larger; weights 1, 3, 1, 1 of 6: the first unsafe class wins, P(unsafe) = 4/6."""
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 3.0, 1.0, 1.0]]).log()
    scores = summarise_logits(logits, torch.tensor([[0.0, 1.0], [1.0, 0.0]]), (False, True, True))
    assert scores.concept_index.tolist() == [0, 1]
    assert scores.background_index.tolist() == [1, 0]
    assert scores.is_unsafe.tolist() == [False, True]
    np.testing.assert_allclose(scores.concept_probability, [0.4, 0.5], atol=1e-6)
    np.testing.assert_allclose(scores.unsafe, [0.5, 4 / 6], atol=1e-6)
    np.testing.assert_allclose(scores.unrecognisable, [0.1, 1 / 6], atol=1e-6)


def test_labels_translate_both_ways() -> None:
    labels = JudgeLabels(concepts=("dog", "bomb"), unsafe=(False, True), backgrounds=("blue",))
    assert labels.find_concepts(["bomb", "dog", "unrecognisable"]).tolist() == [1, 0, 2]
    assert labels.name_concept(2) == "unrecognisable"
    assert labels.find_backgrounds(["blue"]).tolist() == [0]
    with pytest.raises(SafetyDPOError, match="expected a concept that the judge knows, found 'cat'"):
        labels.find_concepts(["cat"])


def test_both_judges_know_held_out_drawings(judges: list[DemoJudge]) -> None:
    for judge in judges:
        pictures, concepts, backgrounds = load_drawings(judge.labels)
        scores = judge.score(pictures)
        assert (scores.concept_index == judge.labels.find_concepts(concepts)).mean() >= 0.97, judge.name
        assert (scores.background_index == judge.labels.find_backgrounds(backgrounds)).mean() >= 0.97, judge.name


def test_both_judges_call_mush_unrecognisable(judges: list[DemoJudge]) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (32, 32, 32, 3), generator=generator, dtype=torch.uint8)
    plain = torch.full((4, 32, 32, 3), 120, dtype=torch.uint8)
    for judge in judges:
        scores = judge.score(torch.cat([noise, plain]))
        assert (scores.concept_index == judge.labels.unrecognisable_index).mean() >= 0.95, judge.name
        assert not scores.is_unsafe[scores.concept_index == judge.labels.unrecognisable_index].any()


def test_judges_differ_in_all_but_their_labels(judges: list[DemoJudge]) -> None:
    select, audit = judges
    assert isinstance(select.network, SelectNetwork)
    assert isinstance(audit.network, AuditNetwork)
    assert (select.name, audit.name) == ("demo-select", "demo-audit")
    assert select.weights_sha256 != audit.weights_sha256
    assert select.labels == audit.labels


def test_arrays_and_tensors_score_alike_and_batches_do_not_matter(judges: list[DemoJudge]) -> None:
    pictures, _, _ = load_drawings(judges[0].labels)
    for judge in judges:
        whole, part = judge.score(pictures), judge.score(torch.from_numpy(pictures[:5].copy()))
        np.testing.assert_allclose(whole.unsafe[:5], part.unsafe, atol=1e-5)
        assert all(math.isclose(value, 1.0, abs_tol=1e-6) or value < 1 for value in whole.concept_probability)


def test_no_picture_gives_no_score(judges: list[DemoJudge]) -> None:
    assert judges[0].score(np.zeros((0, 32, 32, 3), dtype=np.uint8)).concept_index.shape == (0,)


def test_wrong_size_is_refused(judges: list[DemoJudge]) -> None:
    with pytest.raises(SafetyDPOError, match=r"expected bytes of shape \(n, 32, 32, 3\), found torch.uint8 of shape"):
        judges[0].score(np.zeros((1, 64, 64, 3), dtype=np.uint8))


def test_missing_weights_say_what_to_do(tmp_path: Path) -> None:
    for load, name in ((load_select_judge, "judge_select"), (load_audit_judge, "judge_audit")):
        with pytest.raises(SafetyDPOError, match=f"found no labels.json. Run `python -m safetydpo.demo.build {name}`"):
            load(tmp_path / name)
        shutil.copytree(demo_weights() / name, tmp_path / name)
        (tmp_path / name / "model.safetensors").unlink()
        with pytest.raises(SafetyDPOError, match="found no model.safetensors"):
            load(tmp_path / name)


def test_labels_are_those_of_the_world() -> None:
    from safetydpo.demo.concepts import BACKGROUNDS, CONCEPTS

    for name in ("judge_select", "judge_audit"):
        labels = json.loads((demo_weights() / name / "labels.json").read_text())
        assert labels["concepts"] == [concept.key for concept in CONCEPTS]
        assert labels["unsafe"] == [concept.role == "unsafe" for concept in CONCEPTS]
        assert labels["backgrounds"] == list(BACKGROUNDS)


def test_fingerprint_follows_the_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shipped = fingerprint_judge("demo_select")
    monkeypatch.setattr("safetydpo.judges.build.demo_weights", lambda: tmp_path)
    with pytest.raises(SafetyDPOError, match="expected the weights of judge 'judge_select' in .*, found none"):
        fingerprint_judge("demo_select")
    (tmp_path / "judge_select").mkdir()
    (tmp_path / "judge_select" / "model.safetensors").write_bytes(b"other")
    other = fingerprint_judge("demo_select")
    assert other != shipped
    # Labels decide verdicts as weights do.
    (tmp_path / "judge_select" / "labels.json").write_text("{}")
    assert fingerprint_judge("demo_select") != other
    with pytest.raises(UsageError, match="expected a judge among demo_select, .*open_nsfw, .*found 'nobody'"):
        fingerprint_judge("nobody")
