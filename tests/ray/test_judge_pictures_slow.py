"""The whole `safetydpo judge` on a local Ray: twice, after changes, and on the pool of an evaluation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from ray_jobs.evaluate import OUTCOMES_FILE, EvaluatedRow, evaluate_rows, outcomes_pool
from ray_jobs.evaluation_summary import write_summary
from ray_jobs.expert_files import record_folder
from ray_jobs.judge_pictures import judge_pictures
from ray_jobs.pools import MANIFEST_FILE
from ray_jobs.run import Run, with_absolute_paths
from safetydpo.artifacts.layout import demo_weights, summary_file
from safetydpo.artifacts.schemas import JUDGED_PICTURES, OUTCOMES
from safetydpo.artifacts.storage import open_location
from safetydpo.artifacts.tables import read_table
from safetydpo.config.schema import Config
from safetydpo.errors import SafetyDPOError
from safetydpo.evaluation.rows import RowSource
from safetydpo.prompts.picture_prompts import PicturePrompt
from tests.judges.vision_server import Answer, serve
from tests.ray.test_judge_pictures import write_pictures
from tests.tiny import build_tiny_model

pytestmark = pytest.mark.slow


def judged_ids(pools: Path) -> list[str]:
    """Return the ids of every batch that was ever begun: what was judged twice stands there twice."""
    files = sorted(pools.glob(f"*/batch-*/{MANIFEST_FILE}"))
    return [row for file in files for row in pq.read_table(file).column("picture_id").to_pylist()]


def test_what_is_judged_is_not_judged_again(cluster: None, small: Config, tmp_path: Path):
    folder, out = write_pictures(tmp_path / "pictures"), tmp_path / "verdicts.parquet"
    names = [*(f"{index}.png" for index in range(5)), "lost.png"]
    prompts = {name: PicturePrompt("a drawing", "hate") for name in names}

    def run() -> list[dict[str, object]]:
        places = open_location(str(folder)), open_location(str(out))
        judge_pictures(places[0], ["open_nsfw", "nudenet"], out=places[1], prompts=prompts, config=small)
        return read_table(places[1], JUDGED_PICTURES).to_pylist()

    first = run()
    assert len(first) == 2 * 8
    assert {row["picture"]: row["picture_failure"][:7] for row in first if row["picture_failure"]} == {
        "empty.png": "corrupt",
        "cut.jpg": "corrupt",
        "lost.png": "missing",
    }
    assert all(row["unsafe"] for row in first if row["picture_failure"])
    before = judged_ids(out.parent / "verdicts.parquet.pools")
    assert len(before) == 2 * 7
    assert run() == first
    assert judged_ids(out.parent / "verdicts.parquet.pools") == before
    # One picture changes and one is new: two more verdicts of each judge.
    shutil.copy(folder / "1.png", folder / "0.png")
    Image.new("RGB", (50, 50), "green").save(folder / "new.png")
    again = run()
    assert len(again) == 2 * 9
    assert len(judged_ids(out.parent / "verdicts.parquet.pools")) == len(before) + 2 * 2
    scores = {(row["picture"], row["judge"]): row["score"] for row in again}
    assert scores["0.png", "open-nsfw"] == pytest.approx(scores["1.png", "open-nsfw"], abs=1e-6)


def test_a_judge_that_judges_nothing_ends_the_command(cluster: None, small: Config, tmp_path: Path):
    folder = write_pictures(tmp_path / "pictures")
    with serve(lambda _: Answer("hm")) as server:
        vlm = {"vlm": {"base_url": server.url, "model": "guard"}}
        config = Config.model_validate({"name": "test", "execution": {**small.execution.model_dump(), "judges": vlm}})
        out = open_location(str(tmp_path / "v.parquet"))
        with pytest.raises(SafetyDPOError, match="expected verdicts of judge 'vlm' on 7 pictures, found none; most"):
            judge_pictures(open_location(str(folder)), ["vlm"], out=out, prompts=None, config=config)
    # Five good pictures, asked about once by each of three attempts.
    assert len(server.asked) == 3 * 5


def test_real_pictures_are_evaluated_and_their_pool_can_be_judged(cluster: None, small: Config, tmp_path: Path):
    """A tiny Stable Diffusion draws 40 x 40 pictures; two real judges and a CLIP folder measure them."""
    build_tiny_model(tmp_path / "base")
    clip = shutil.copytree(demo_weights() / "clip", tmp_path / "clip")
    config = with_absolute_paths(
        Config.model_validate(
            {
                "name": "test",
                "identity": {
                    "base": {"model": str(tmp_path / "base")},
                    "sampler": {"height": 40, "width": 40, "steps": 2, "batch_size": 8},
                    "prompts": {"categories": ["hate", "violence"]},
                    "pairs": {"judges": ["open_nsfw"]},
                    "evaluation": {
                        "judges": ["open_nsfw", "nudenet"],
                        "clip": str(clip),
                        "prompts_per_category": 3,
                        "neutral_prompts": 4,
                        "neighbour_prompts": 2,
                        "ood_prompts": 2,
                    },
                },
                "execution": {
                    **small.execution.model_dump(),
                    "store": f"{tmp_path}/store",
                    "run_dir": f"{tmp_path}/run",
                },
            }
        )
    )
    run = Run(config)
    rows = [EvaluatedRow(RowSource("base", "base"), "", ("unsafe", "ood", "neutral", "neighbour"))]
    record = evaluate_rows(run, rows)
    assert record.counts["pictures"] == 14
    summary = write_summary(run, record, rows)
    metrics = summary["rows"][0]["metrics"]
    assert metrics["ip"]["n"] == 6
    # Nobody knows concepts, backgrounds or broken pictures: those rates are absent, not zero.
    assert {"ip", "ip_select", "ood_ip", "clip_score"} <= set(metrics)
    assert set(metrics).isdisjoint({"neutral_rate", "safe_and_intact_rate", "unrecognisable_rate", "kid"})
    assert json.loads(summary_file(run.run_dir).read_bytes())["rows"][0]["name"] == "base"
    # Found closed the second time.
    assert evaluate_rows(run, rows).fingerprint == record.fingerprint
    out = open_location(str(tmp_path / "verdicts.parquet"))
    judged = judge_pictures(outcomes_pool(run), ["open_nsfw"], out=out, prompts=None, config=config)
    assert judged.table.num_rows == 14
    stored = read_table(record_folder(run, record) / OUTCOMES_FILE, OUTCOMES)
    scores = {
        row["image_id"]: next(said["score"] for said in row["judgements"] if said["judge"] == "open-nsfw")
        for row in stored.to_pylist()
    }
    for row in judged.table.to_pylist():
        assert row["score"] == pytest.approx(scores[row["picture"]], abs=1e-5)
