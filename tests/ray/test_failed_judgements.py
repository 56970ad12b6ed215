"""A picture on which a judge or CLIP finds no number, from the worker to the summary: real networks, no Ray."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from ray_jobs.evaluate import OUTCOMES_FILE, EvaluatedRow, build_manifest, evaluation_prompts, outcomes_key
from ray_jobs.evaluation_worker import EvaluateWorker
from ray_jobs.outcomes import read_outcomes
from ray_jobs.run import Run
from safetydpo.artifacts.schemas import IMAGE_MANIFEST, OUTCOMES
from safetydpo.artifacts.tables import table_from_rows, write_table
from safetydpo.evaluation.rows import RowSource, build_rows, list_failures
from safetydpo.evaluation.summary import Summary, build_summary
from tests.ray.test_final_judges import config_of

COUNTS = {"prompts_per_category": 1, "ood_prompts": 1, "neutral_prompts": 2, "neighbour_prompts": 1}
BASE = EvaluatedRow(RowSource("base", "base"), "", ("unsafe", "ood", "neutral", "neighbour"))
LARGEST = float(np.finfo(np.float32).max)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(config_of(tmp_path_factory.mktemp("run"), evaluation=COUNTS))


@pytest.fixture(scope="module")
def manifest(run: Run) -> pa.Table:
    return table_from_rows(build_manifest(run, [BASE], evaluation_prompts(run)), IMAGE_MANIFEST)


@pytest.fixture(scope="module")
def undisturbed(run: Run, manifest: pa.Table) -> list[dict[str, Any]]:
    return draw(worker_of(run), manifest)


def worker_of(run: Run) -> EvaluateWorker:
    return EvaluateWorker(run.config.model_dump(mode="json"))


def draw(worker: EvaluateWorker, manifest: pa.Table) -> list[dict[str, Any]]:
    """Call the worker with a batch of three after another, as the pool does."""
    return [row for start in range(0, len(manifest), 3) for row in worker(manifest.slice(start, 3)).to_pylist()]


def overflow_for_one(values: torch.Tensor) -> tuple[int, float, int]:
    """Return (unit, weight, picture): that unit, times that weight, is infinite for that picture and no other."""
    for unit in range(values.shape[1]):
        sizes, order = values[:, unit].abs().sort(descending=True)
        if sizes[0] > 1.05 * sizes[1] > 0:
            return unit, LARGEST / float((sizes[0] * sizes[1]).sqrt()), int(order[0])
    raise AssertionError("no unit is largest for one picture alone")


def inputs_of(layer: torch.nn.Module, worker: EvaluateWorker, manifest: pa.Table) -> torch.Tensor:
    """Return what a layer is given for each picture."""
    seen: list[torch.Tensor] = []
    hook = layer.register_forward_hook(lambda _, given, __: seen.append(given[0].clone()))
    draw(worker, manifest)
    hook.remove()
    # Batches are filled up to three.
    return torch.cat(seen)[: len(manifest)]


def summarise(run: Run, outcomes: list[dict[str, Any]], name: str) -> Summary:
    """Store outcomes as the stage does and read them as the report does."""
    key = outcomes_key(run, [{"image_id": name, "prompt": ""}])

    def make(folder: Any) -> dict[str, Any]:
        write_table(folder / OUTCOMES_FILE, table_from_rows(outcomes, OUTCOMES))
        return {"fingerprint": name}

    found = read_outcomes(run, run.make(key, make), [BASE])
    rows = build_rows(found.outcomes, [BASE.source], run_seed=0, categories=run.config.identity.prompts.categories)
    return build_summary(
        rows, list_failures(found.outcomes), timing_seconds={}, config_hash="0" * 64, versions={"python": "3"}
    )


def without(rows: list[dict[str, Any]], place: int) -> list[dict[str, Any]]:
    return [row for index, row in enumerate(rows) if index != place]


def test_an_infinite_embedding_fails_its_picture_and_no_other(
    run: Run, manifest: pa.Table, undisturbed: list[dict[str, Any]]
) -> None:
    worker = worker_of(run)
    projection = worker._clip._model.visual_projection
    unit, weight, place = overflow_for_one(inputs_of(projection, worker, manifest))
    with torch.no_grad():
        projection.weight[0].zero_()
        projection.weight[0, unit] = weight
    rows = draw(worker, manifest)
    assert [index for index, row in enumerate(rows) if row["status"] != "ok"] == [place]
    assert "expected a CLIP embedding of finite, non-zero length, found inf" in rows[place]["error"]
    assert rows[place]["image"] is None
    assert [row["image"] for row in without(rows, place)] == [row["image"] for row in without(undisturbed, place)]
    summary = summarise(run, rows, "infinite")
    (failed,) = summary["failed_images"]
    assert failed["row"] == "base"
    assert failed["reason"] == rows[place]["error"]


@pytest.mark.parametrize(("role", "name"), [("demo_audit", "demo-audit"), ("demo_select", "demo-select")])
def test_a_score_of_a_demo_judge_that_is_no_number_is_named(
    run: Run, manifest: pa.Table, undisturbed: list[dict[str, Any]], role: str, name: str
) -> None:
    worker = worker_of(run)
    head: Any = worker._panel._judges[role]._judge.network.concept_head  # type: ignore[attr-defined]
    unit, weight, place = overflow_for_one(inputs_of(head, worker, manifest))
    with torch.no_grad():
        head.weight[0].zero_()
        head.weight[0, unit] = weight
    rows = draw(worker, manifest)
    assert [index for index, row in enumerate(rows) if row["status"] != "ok"] == [place]
    assert rows[place]["error"] == f"judge {name}: its score is not a number"
    summary = summarise(run, rows, f"nan-{role}")
    (failed,) = summary["failed_images"]
    assert failed["reason"] == rows[place]["error"]
    # It stays in the number of pictures, and counts as unsafe.
    metrics = summary["rows"][0]["metrics"]
    shown = [row["audit_unsafe"] or row["status"] != "ok" for row in rows]
    unsafe = [side == "unsafe" for side in manifest.column("side").to_pylist()]
    assert metrics["ip"]["n"] == sum(unsafe)
    hits = sum(seen for seen, counts in zip(shown, unsafe, strict=True) if counts)
    assert metrics["ip"]["value"] == pytest.approx(hits / sum(unsafe))


@pytest.mark.parametrize(("value", "length"), [(np.inf, "inf"), (np.nan, "nan"), (0.0, "0.0")])
def test_what_was_stored_before_is_a_failed_picture_too(
    run: Run, undisturbed: list[dict[str, Any]], value: float, length: str
) -> None:
    embedding = [value] * len(undisturbed[0]["clip_embedding"])
    rows = [{**undisturbed[0], "clip_embedding": embedding}, *undisturbed[1:]]
    (failed,) = summarise(run, rows, f"stored-{length}")["failed_images"]
    assert failed["reason"] == f"its CLIP embedding has the length {length}"


def test_undisturbed_nothing_fails(run: Run, undisturbed: list[dict[str, Any]]) -> None:
    assert summarise(run, undisturbed, "good")["failed_images"] == []
