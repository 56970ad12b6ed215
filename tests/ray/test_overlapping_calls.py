"""Two batches under way in one worker: one is drawn while the other is finished; real networks, no Ray."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from ray_jobs.evaluate import outcomes_stage
from ray_jobs.evaluation_worker import EvaluateWorker
from ray_jobs.generate_pairs import render_stage
from ray_jobs.run import Run
from ray_jobs.workers import RenderWorker
from safetydpo.artifacts.layout import demo_weights
from safetydpo.config.schema import Config
from tests.judges.vision_server import Answer, Asked, serve
from tests.ray.test_final_judges import SAFE, config_of, manifest

SECONDS = 60.0


def asking(tmp_path: Path, url: str, **execution: Any) -> Config:
    vlm = {"base_url": url, "model": "guard"}
    return config_of(tmp_path, evaluation={"judges": ["vlm"]}, judges={"vlm": vlm}, **execution)


def parts(table: pa.Table) -> list[pa.Table]:
    """Batches of three, as the sampler's."""
    return [table.slice(start, 3) for start in range(0, len(table), 3)]


def test_one_is_drawn_while_the_one_before_it_is_judged_with_equal_bytes(tmp_path: Path) -> None:
    """The judge holds back its first answers until the next batch is being drawn: that has to come."""
    worker: list[EvaluateWorker] = []
    saw: list[bool] = []

    def answer(_: Asked) -> Answer:
        until = time.monotonic() + (SECONDS if worker and not any(saw) else 0.0)
        while worker and not (drawing := worker[0]._drawing.locked()) and time.monotonic() < until:
            time.sleep(0.001)
        saw.append(bool(worker) and drawing)
        return SAFE

    with serve(answer) as server:
        config = asking(tmp_path, server.url)
        batches = parts(manifest(Run(config), 7))
        expected = [EvaluateWorker(config.model_dump(mode="json"))(batch) for batch in batches]
        saw.clear()
        worker.append(EvaluateWorker(config.model_dump(mode="json")))
        with ThreadPoolExecutor(2) as threads:
            found = list(threads.map(worker[0], batches))
    assert any(saw)
    assert [table.num_rows for table in found] == [3, 3, 1]
    assert all(table.equals(other) for table, other in zip(found, expected, strict=True))


def test_a_batch_whose_judge_stops_takes_no_other_along(tmp_path: Path) -> None:
    """The first question is refused for good; the pictures of that batch fail, those of the next are judged."""
    with serve(lambda asked: Answer("no", status=404) if refuses(asked) else SAFE) as server:
        config = asking(tmp_path, server.url)
        run = Run(config)
        batches = parts(manifest(run, 6))
        worker = EvaluateWorker(config.model_dump(mode="json"))
        refused: list[bytes] = []

        def refuses(asked: Asked) -> bool:
            refused.extend([asked.pixels.tobytes()] if not refused else [])
            return asked.pixels.tobytes() in refused

        with ThreadPoolExecutor(2) as threads:
            found = [row for table in threads.map(worker, batches) for row in table.to_pylist()]
    assert sorted(row["status"] for row in found) == ["error"] + ["ok"] * 5
    assert not worker._drawing.locked()
    assert not worker._judging.locked()


def test_pictures_of_pairs_are_equal_however_many_calls(tmp_path: Path) -> None:
    config = config_of(tmp_path, evaluation={})
    batches = parts(manifest(Run(config), 9))
    base, sampler = config.identity.base.model_dump(), config.identity.sampler.model_dump()
    expected = [RenderWorker(base, sampler)(batch) for batch in batches]
    worker = RenderWorker(base, sampler)
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(worker, batches))
    assert all(table.equals(other) for table, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("gpus", "judges", "calls"),
    [(0, ["demo_audit"], (1, 1)), (1, ["demo_audit"], (2, 2)), (0.5, ["open_nsfw"], (2, 2)), (0, ["vlm"], (1, 2))],
)
def test_where_both_would_want_the_same_cores_there_is_one(
    tmp_path: Path, gpus: float, judges: list[str], calls: tuple[int, int]
) -> None:
    """In the stages of pairs and of test pictures; a judge behind an endpoint does its work elsewhere."""
    vlm = {"vlm": {"base_url": "http://localhost:1/v1", "model": "guard"}}
    run = Run(
        config_of(
            tmp_path,
            evaluation={"judges": judges, "clip": str(demo_weights() / "clip")},
            judges=vlm,
            gpus_per_worker=gpus,
        )
    )
    assert (render_stage(run, "pictures").calls_per_worker, outcomes_stage(run).calls_per_worker) == calls
