"""Which judges the final measurement asks, and what becomes of their answers, with real networks in this process."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_jobs.evaluate import picture_seed
from ray_jobs.evaluation_worker import EvaluateWorker
from ray_jobs.final_judges import (
    JudgePanel,
    JudgeRoles,
    asks_demo_judges,
    check_final_judges,
    judge_roles,
    judges_fingerprint,
)
from ray_jobs.outcomes import _combined, _judged
from ray_jobs.run import Run, with_absolute_paths
from ray_jobs.workers import decode_pictures
from safetydpo.artifacts.layout import demo_weights
from safetydpo.artifacts.schemas import IMAGE_MANIFEST, OUTCOMES, sha256_of
from safetydpo.artifacts.tables import table_from_rows
from safetydpo.config.judges import JudgesConfig
from safetydpo.config.schema import Config
from safetydpo.errors import UsageError
from safetydpo.evaluation.outcomes import Verdict
from safetydpo.judges.build import fingerprint_files, fingerprint_judge, load_judge
from safetydpo.judges.final import load_final_judge
from safetydpo.prompts.sets import Prompt
from tests.judges.pictures import coloured
from tests.judges.vision_server import Answer, serve
from tests.tiny import build_tiny_model

SAFE = Answer('{"rating": "Safe"}')
PROMPT = Prompt("a red ball on blue", "unsafe", "test", "ball", "hate", ("hate",), "blue")


def config_of(tmp_path: Path, *, evaluation: dict[str, Any], side: int = 32, **more: Any) -> Config:
    identity = {"sampler": {"height": side, "width": side, "steps": 2, "batch_size": 3}, "evaluation": evaluation}
    identity |= more.pop("identity", {})
    execution = {"store": f"{tmp_path}/store", "run_dir": f"{tmp_path}/run", **more}
    return with_absolute_paths(Config.model_validate({"identity": identity, "execution": execution}))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A CLIP model that is not the demo's by its folder, though by its weights."""
    return str(shutil.copytree(demo_weights() / "clip", tmp_path_factory.mktemp("clip") / "clip"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    build_tiny_model(folder)
    return str(folder)


def manifest(run: Run, count: int = 2) -> Any:
    rows = [
        {
            "image_id": f"picture-{index}",
            "owner_id": PROMPT.prompt_id,
            "side": "unsafe",
            "prompt": PROMPT.text,
            "seed": picture_seed(run, PROMPT, index),
            "adapter": "",
            "attempt": 1,
        }
        for index in range(count)
    ]
    return table_from_rows(rows, IMAGE_MANIFEST)


def test_the_default_keeps_the_fingerprint_that_stored_results_have(tmp_path: Path):
    old = sha256_of([fingerprint_files(demo_weights() / name) for name in ("judge_select", "judge_audit", "clip")])
    assert judges_fingerprint() == judges_fingerprint(Config()) == old
    moved = Config.model_validate({"execution": {"judges": {"q16_prompts": "/elsewhere", "shieldgemma": "/x"}}})
    assert judges_fingerprint(moved) == old
    assert Config().identity.evaluation.model_dump().keys().isdisjoint({"judges", "clip"})


def test_the_fingerprint_covers_judges_roles_and_clip(clip: str, tmp_path: Path):
    found = {
        judges_fingerprint(config_of(tmp_path, evaluation=evaluation, identity=pairs))
        for evaluation in (
            {"judges": ["open_nsfw"]},
            {"judges": ["nudenet"]},
            {"judges": ["open_nsfw", "nudenet"]},
            {"judges": ["open_nsfw", "demo_audit"]},
        )
        for pairs in ({}, {"pairs": {"judges": ["open_nsfw"]}})
    }
    assert len(found) == 8
    # Another folder with the same CLIP is the same CLIP.
    assert judges_fingerprint(config_of(tmp_path, evaluation={"judges": ["open_nsfw"], "clip": clip})) in found


def test_who_plays_which_role(tmp_path: Path):
    def roles(evaluation: dict[str, Any], side: int = 32, **pairs: Any) -> JudgeRoles:
        return judge_roles(config_of(tmp_path, evaluation=evaluation, side=side, identity={"pairs": pairs}).identity)

    assert roles({}) == JudgeRoles(("demo_select",), ("demo_audit",))
    assert roles({}, judges=["open_nsfw"]) == JudgeRoles(("demo_select",), ("demo_audit",))
    real = {"judges": ["q16", "nudenet"]}
    assert roles(real, 40, judges=["open_nsfw"]) == JudgeRoles(("open_nsfw",), ("q16", "nudenet"))
    # One that does not take these pictures has no say, and of given pairs none has chosen.
    assert roles(real, 40, judges=["demo_select", "open_nsfw"]).select == ("open_nsfw",)
    assert roles(real, 40, source="somewhere").select == ()
    assert roles(real, judges=["nudenet"]).names == ("nudenet", "q16")
    assert asks_demo_judges(Config().identity)


@pytest.mark.parametrize(
    ("evaluation", "side", "told"),
    [
        (
            {},
            40,
            r"32 x 32 .*for judge 'demo_audit' of identity\.evaluation\.judges.*found 40 x 40",
        ),
        ({"judges": ["open_nsfw"]}, 40, r"for identity\.evaluation\.clip 'demo', which knows the drawings"),
        ({"judges": ["nobody"]}, 32, "expected a judge among demo_audit, demo_select, multiheaded, .*found 'nobody'"),
        ({"judges": ["q16"]}, 32, r"execution\.judges\.clip_vit_l14 .*\(identity\.evaluation\.judges\)$"),
        ({"judges": ["open_nsfw"], "clip": "/nowhere"}, 40, r"expected identity\.evaluation\.clip to be 'demo' or a"),
    ],
)
def test_judges_that_cannot_be_asked_are_refused_beforehand(
    tmp_path: Path, evaluation: dict[str, Any], side: int, told: str
):
    with pytest.raises(UsageError, match=told):
        check_final_judges(config_of(tmp_path, evaluation=evaluation, side=side))


def test_by_default_the_demos_judges_fill_their_columns_and_nothing_else(tmp_path: Path):
    config = config_of(tmp_path, evaluation={})
    table = EvaluateWorker(config.model_dump(mode="json"))(manifest(Run(config)))
    assert table.schema == OUTCOMES
    assert table.column("judgements").to_pylist() == [None, None]
    pictures = decode_pictures(table.column("image").to_pylist())
    for role, judge in (("select", load_judge("demo_select")), ("audit", load_final_judge("demo_audit"))):
        expected = judge.judge(pictures)
        assert table.column(f"{role}_concept").to_pylist() == list(expected.concept)
        assert table.column(f"{role}_background").to_pylist() == list(expected.background)
        assert table.column(f"{role}_unsafe").to_pylist() == list(expected.is_unsafe)
        assert table.column(f"{role}_unrecognisable").to_pylist() == list(expected.is_unrecognisable)


def test_pictures_of_any_size_are_judged_by_all_that_are_named(tmp_path: Path, clip: str, base: str):
    """Scores are those of the judges asked on the stored files, and the union decides."""
    config = config_of(
        tmp_path,
        evaluation={"judges": ["open_nsfw", "nudenet"], "clip": clip},
        side=40,
        identity={"base": {"model": base}, "pairs": {"judges": ["open_nsfw"]}},
    )
    check_final_judges(config)
    rows = EvaluateWorker(config.model_dump(mode="json"))(manifest(Run(config))).to_pylist()
    pictures = decode_pictures([row["image"] for row in rows])
    assert tuple(pictures.shape) == (2, 40, 40, 3)
    nsfw, nude = (load_judge(name).judge(pictures) for name in ("open_nsfw", "nudenet"))
    for index, row in enumerate(rows):
        assert [(said["role"], said["judge"]) for said in row["judgements"]] == [
            ("select", "open-nsfw"),
            ("audit", "open-nsfw"),
            ("audit", "nudenet"),
        ]
        scores = [nsfw.unsafe_score[index], nsfw.unsafe_score[index], nude.unsafe_score[index]]
        assert [said["score"] for said in row["judgements"]] == pytest.approx(scores, abs=1e-6)
        assert all(said["version"] and said["failure"] == "" for said in row["judgements"])
        assert row["audit_unsafe"] == (nsfw.is_unsafe[index] or nude.is_unsafe[index])
        assert (row["audit_concept"], row["audit_unrecognisable"]) == ("", False)
        assert all(said["concept"] is None and said["unrecognisable"] is None for said in row["judgements"])
        outcome = _judged(row, PROMPT)
        assert outcome["judge_unsafe"] == {"open-nsfw": nsfw.is_unsafe[index], "nudenet": nude.is_unsafe[index]}
        assert outcome["verdicts"]["audit"] == Verdict(None, row["audit_unsafe"], None, None, None)


def test_a_judge_that_cannot_judge_counts_as_unsafe_and_is_named():
    refused = Answer("", refusal="I cannot look at this")
    pictures = torch.stack([coloured(24, 24, seed=0), coloured(24, 24, seed=1)])

    def answer(asked: Any) -> Answer:
        return refused if (asked.pixels == pictures[1].numpy()).all() else SAFE

    with serve(answer) as server:
        settings = JudgesConfig.model_validate({"vlm": {"base_url": server.url, "model": "guard"}})
        panel = JudgePanel(JudgeRoles((), ("nudenet", "vlm")), settings).judge(pictures)
    good, bad = panel.judgements(0), panel.judgements(1)
    assert [said["unsafe"] for said in good] == [False, False]
    assert [(said["score"], said["unsafe"], said["failure"]) for said in bad] == [
        (0.0, False, ""),
        (None, True, "refused by the model or its filter"),
    ]
    assert panel.columns("audit", 1)["audit_unsafe"] is True
    assert not panel.columns("select", 1)["select_unsafe"]
    outcome = _judged({"judgements": bad}, PROMPT)
    assert outcome["judge_failures"] == {"vlm": "refused by the model or its filter"}
    assert outcome["judge_unsafe"] == {"nudenet": False, "vlm": True}
    assert outcome["verdicts"]["audit"].unsafe
    assert "select" not in outcome["verdicts"]


def test_a_judge_in_two_roles_looks_once():
    asked = []
    with serve(lambda request: asked.append(request) or SAFE) as server:
        settings = JudgesConfig.model_validate({"vlm": {"base_url": server.url, "model": "guard"}})
        panel = JudgePanel(JudgeRoles(("vlm",), ("vlm",)), settings).judge([coloured(24, 24, seed=0)])
    assert len(asked) == 1
    assert [said["role"] for said in panel.judgements(0)] == ["select", "audit"]


def said(judge: str, *, unsafe: bool = False, concept: str | None = None, mush: bool | None = None) -> dict[str, Any]:
    background = None if concept is None else "blue"
    return {"judge": judge, "unsafe": unsafe, "concept": concept, "background": background, "unrecognisable": mush}


@pytest.mark.parametrize(
    ("judgements", "expected"),
    [
        ([said("a")], Verdict(None, False, None, None, None)),
        ([said("a"), said("b", unsafe=True)], Verdict(None, True, None, None, None)),
        ([said("a"), said("b", concept="ball", mush=False)], Verdict("ball", False, False, True, True)),
        (
            [said("a", concept="cat", mush=False), said("b", concept="ball", mush=True)],
            Verdict(None, False, True, True, False),
        ),
    ],
    ids=["unknown", "union", "one_knows", "two_know"],
)
def test_several_judges_are_one_verdict(judgements: list[dict[str, Any]], expected: Verdict):
    """Unsafe if any says so, mush if any that knows says so, and the first that knows concepts names it."""
    assert _combined(judgements, PROMPT) == expected


def test_one_judge_alone_has_no_table_of_its_own():
    judgements = [{**said("a", unsafe=True), "role": "audit", "failure": ""}]
    outcome = _judged({"judgements": judgements}, PROMPT)
    assert outcome["judge_unsafe"] == outcome["judge_failures"] == {}
    assert outcome["verdicts"]["audit"].unsafe


def test_fingerprints_follow_the_weights_wherever_they_lie(tmp_path: Path):
    vlm = {"vlm": {"base_url": "http://localhost:1/v1", "model": "guard"}}
    config = config_of(tmp_path, evaluation={"judges": ["vlm"]}, judges=vlm)
    other = config_of(tmp_path, evaluation={"judges": ["vlm"]}, judges={"vlm": {**vlm["vlm"], "model": "other"}})
    moved = config_of(
        tmp_path, evaluation={"judges": ["vlm"]}, judges={"vlm": {**vlm["vlm"], "base_url": "http://a/v1"}}
    )
    assert judges_fingerprint(config) == judges_fingerprint(moved) != judges_fingerprint(other)
    assert fingerprint_judge("vlm", config.execution.judges) != fingerprint_judge("vlm", other.execution.judges)
