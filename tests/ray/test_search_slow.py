"""Searches on the smoke config with everything on: killed, stopped at a budget, gone on with."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.ray.smoke_place import PATIENCE, ROOT, Place

pytestmark = [pytest.mark.slow, pytest.mark.long]
VALIDATED = (
    "identity.dpo.validation={every_steps: 5, held_out_rate: 0.25, unsafe_prompts_per_category: 1, neutral_prompts: 1, "
    "neighbour_prompts: 1}"
)
LADDER = (
    "identity.search.ladder=[{kind: held_out, keep: 0.5, benign_pictures: 4, num_pairs: 4}, {kind: few_steps, "
    "keep: 0.5, steps: 2, prompts_per_category: 1, neutral_prompts: 2, neighbour_prompts: 2}]"
)
FINALISTS = ("identity.search.finalists=2", "identity.search.finalist_seeds=2")
FEW_EXPERTS = "identity.experts.all_single=false"
MERGE = "identity.merge.methods=[sum]"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Pairs, experts that held pairs out, and what merges need."""
    folder = tmp_path_factory.mktemp("trained")
    place = Place(folder / "store", folder / "run", changes=(VALIDATED, FEW_EXPERTS, MERGE))
    place.run("merge", seconds=600)
    assert place.is_left_alone()
    return place


LADDERED = (LADDER, *FINALISTS, "identity.search.trials=8", "identity.search.generation_size=4")


@pytest.fixture(scope="module")
def laddered(trained: Place, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A search with a ladder and finalists that nothing disturbed."""
    place = copy(trained, tmp_path_factory.mktemp("laddered"), *LADDERED)
    place.run("search")
    return place


def copy(trained: Place, folder: Path, *changes: str) -> Place:
    place = Place(folder / "store", folder / "run", changes=(*trained.changes, *changes))
    shutil.copytree(trained.store, place.store)
    return place


def rows(place: Place, log: str) -> list[dict[str, Any]]:
    """Rows of a log of the only search."""
    files = sorted(place.store.glob(f"search/*/{log}/*.parquet"))
    return [row for file in files for row in pq.ParquetFile(file).read().to_pylist()]


def record(place: Place) -> dict[str, Any]:
    (found,) = place.records("search")
    return found


def test_async_killed_and_run_again_runs_no_finished_trial_again(trained: Place, tmp_path: Path) -> None:
    place = copy(trained, tmp_path, "identity.search.suggest=async", "identity.search.trials=6")
    place.kill_when(lambda: len(list(place.store.glob("search/*/trials/*.parquet"))) >= 3, "search", at_once=True)
    before = rows(place, "trials")
    files = {file: file.stat().st_mtime_ns for file in place.store.glob("search/*/trials/*.parquet")}
    assert 3 <= len(before) < 6
    place.run("search")
    after = rows(place, "trials")
    assert [row for row in after if row in before] == before
    assert {file: file.stat().st_mtime_ns for file in files} == files
    assert [row["trial"] for row in after] == list(range(6))
    measured = [row["candidate_hash"] for row in rows(place, "measurements")]
    assert len(measured) == len(set(measured))
    assert record(place)["counts"] == {"trials": 6, "failed": 0}


def details_but_pictures(place: Place) -> dict[str, Any]:
    """What a ladder's search found; a command that was cut off draws some pictures again."""
    found: dict[str, Any] = record(place)["details"]
    return {**found, "ladder": {**found["ladder"], "pictures": 0}}


def test_a_ladder_with_finalists_killed_and_run_again_gives_equal_bytes(
    trained: Place, laddered: Place, tmp_path: Path
) -> None:
    """Nothing is measured twice, the same candidates are stopped, and the finalists are the same to the last digit."""
    place = copy(trained, tmp_path, *LADDERED, "execution.num_workers=1")
    place.kill_when(lambda: len(list(place.store.glob("search/*/measurements/*.parquet"))) >= 7, "search", at_once=True)
    place.run("search")
    assert rows(place, "trials") == rows(laddered, "trials")
    assert place.artifacts("search") == laddered.artifacts("search")
    assert details_but_pictures(place) == details_but_pictures(laddered)
    wanted = record(laddered)["details"]
    measured = [(row["candidate_hash"], row["rung"]) for row in rows(place, "measurements")]
    assert len(measured) == len(set(measured))
    assert [rung["measured"] for rung in wanted["ladder"]["rungs"]] == [8, 4]
    assert wanted["ladder"]["pictures"] < wanted["ladder"]["pictures_of_full_evaluation"]
    assert len(wanted["finalists"]) == 2
    assert any(one["on_front"] for one in wanted["finalists"])


def search(place: Place, *settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*place.command("search"), *settings],
        cwd=ROOT,
        env=place.environment,
        capture_output=True,
        text=True,
        timeout=400 * PATIENCE,
        check=False,
    )


def test_a_budget_stops_the_command_cleanly_and_a_larger_one_ends_like_none(
    trained: Place, laddered: Place, tmp_path: Path
) -> None:
    place = copy(trained, tmp_path, *LADDERED)
    spent = sum(row["seconds"] for row in rows(laddered, "measurements"))
    price = "price_per_cpu_hour: 3600"
    # How much a budget buys depends on what else the machine does meanwhile: begin low, go on until a trial has ended.
    budget = spent / 4
    while not rows(place, "trials"):
        done = search(place, f"execution.search={{cost_budget: {budget}, {price}, max_concurrent_trials: 1}}")
        assert done.returncode == 0, done.stderr
        budget *= 1.5
    output = " ".join(done.stdout.split())
    assert "search stopped at its cost budget of" in output
    assert "trials have ended" in output
    # How far half of the cost goes is the machine's business: maybe to the cheap rungs of some trials only.
    has_measured = any(row["status"] == "ok" for row in rows(place, "trials"))
    assert ("best so far:" in output) == has_measured
    assert "the same command with a larger budget goes on" in output
    assert not place.records("search")
    ended = len(rows(place, "trials"))
    assert 0 < ended < 8
    assert len(rows(place, "measurements")) < len(rows(laddered, "measurements"))
    watched = search(place, "--watch")
    assert f"{ended} of 8" in watched.stdout, watched.stderr
    done = search(place, f"execution.search={{cost_budget: {1000 * spent}, {price}}}")
    assert done.returncode == 0, done.stderr
    assert place.artifacts("search") == laddered.artifacts("search")
    found, wanted = (json.dumps(details_but_pictures(one), sort_keys=True) for one in (place, laddered))
    assert found == wanted


def test_known_points_and_ranks_are_searched_and_an_unreachable_floor_is_told(trained: Place, tmp_path: Path) -> None:
    benchmark = tmp_path / "benchmark.txt"
    benchmark.write_text("a completely different prompt about tea\n")
    place = copy(
        trained,
        tmp_path,
        "identity.search.first_trials=known",
        "identity.search.output_ranks=[2, 4]",
        "identity.search.trials=7",
        "identity.search.neutral_floor=1.0",
        "identity.search.neighbour_floor=1.0",
        f"identity.search.benchmarks=[{benchmark}, {tmp_path}/lost.csv]",
        f"identity.evaluation.benchmarks=[{{name: i2p, file: {tmp_path}/i2p.csv}}]",
    )
    done = search(place)
    assert done.returncode == 0, done.stderr
    candidates = [json.loads(row["candidate"]) for row in rows(place, "trials")]
    assert [one["method"] for one in candidates[:5]] == ["sum", "sum", "sum", "average", "ties"]
    assert [sorted(one["weights"].values()) for one in candidates[:3]] == [[0.0, 0.0], [0.0, 1.0], [0.0, 1.0]]
    assert {one.get("rank") for one in candidates[6:]} <= {2, 4}
    details = record(place)["details"]
    # The base is a trial whose rates were measured before; chosen is a merge, and it is told if that is no better.
    (base,) = [row for row in rows(place, "trials") if row["trial"] == 0]
    assert json.loads(base["metrics"]) == details["base"]
    assert base["candidate_hash"] not in [row["candidate_hash"] for row in rows(place, "measurements")]
    assert any(json.loads(details["candidate"])["weights"].values())
    assert details["benchmarks"]["checked"] == {str(benchmark): 1}
    assert list(details["benchmarks"]["unchecked"]) == [f"{tmp_path}/lost.csv", f"i2p={tmp_path}/i2p.csv"]
    output = " ".join(done.stdout.split())
    assert ("chosen trial" if "base_is_better" not in details else "nearest: trial") in output
    assert ("the base without an adapter is the better choice" in output) == ("base_is_better" in details)
    assert f"not checked against i2p={tmp_path}/i2p.csv" in output
    assert f"not checked against {tmp_path}/lost.csv" in output
