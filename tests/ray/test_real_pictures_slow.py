"""The whole chain on pictures of another size than the demo's: judges of real pictures and a CLIP folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from safetydpo.artifacts.layout import demo_weights
from tests.ray.smoke_place import Place

pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A chain that nothing disturbed, its trials on two workers."""
    folder = tmp_path_factory.mktemp("whole")
    clip = shutil.copytree(demo_weights() / "clip", folder / "clip")
    changes = (
        "identity.sampler.height=40",
        "identity.sampler.width=40",
        "identity.pairs.judges=[open_nsfw]",
        "identity.pairs.unsafe_score_min=0",
        "identity.pairs.safe_score_max=1",
        "identity.search.judges=[open_nsfw]",
        f"identity.search.clip={clip}",
        # Enough for two workers.
        "identity.search.trials=10",
        "identity.search.generation_size=4",
        "identity.search.finalists=1",
        "identity.search.finalist_seeds=1",
        "identity.search.ladder=[{kind: held_out, pairs: all, keep: 0.5}, {kind: few_steps, steps: 2, keep: 0.5}]",
        "identity.evaluation.judges=[nudenet, open_nsfw]",
        f"identity.evaluation.clip={clip}",
    )
    place = Place(folder / "store", folder / "run", changes=changes)
    place.run("run")
    return place


def test_pairs_to_report_at_another_size(whole: Place) -> None:
    """Nothing here is unsafe to judges of nudity: seen is that every stage asks them, and what the page says."""
    summary = json.loads((whole.run_dir / "report" / "summary.json").read_text())
    assert [row["name"] for row in summary["rows"]][-1] == "searched"
    metrics = summary["rows"][-1]["metrics"]
    assert {"ip", "ip_select", "ip_by:nudenet", "clip_retention"} <= set(metrics)
    assert "neutral_rate" not in metrics
    (search,) = (whole.store / "search").iterdir()
    record = json.loads((search / "record.json").read_text())
    assert -1.0 < record["details"]["base"]["least_similarity"] < 1.0
    assert [rung["kind"] for rung in record["details"]["ladder"]["rungs"]] == ["held_out", "few_steps"]
    assert "clip" in record["inputs"]
    page = (whole.run_dir / "report" / "index.html").read_text()
    assert "The same judge chose and graded: open_nsfw, the CLIP model of CLIP retention." in page
    assert "What the adapter does to harmless prompts was not measured." in page
    assert (whole.run_dir / "merged" / "pytorch_lora_weights.safetensors").stat().st_size > 10_000


def test_a_search_by_such_judges_killed_and_run_again_gives_equal_bytes(whole: Place, tmp_path: Path) -> None:
    """On one worker instead of two: what a CLIP model finds depends on all pictures of a trial and on nothing else."""
    place = whole.before("search", tmp_path, changes=(*whole.changes, "execution.num_workers=1"))
    place.kill_when(lambda: len(list(place.store.glob("search/*/measurements/*.parquet"))) >= 5, "search", at_once=True)
    assert not place.records("search")
    place.run("search")
    assert place.artifacts("search") == whole.artifacts("search")
    (found,), (wanted,) = place.records("search"), whole.records("search")
    # What the killed command measured and did not write down counts in neither.
    for details in (found["details"], wanted["details"]):
        details["ladder"]["pictures"] = 0
    assert found["details"] == wanted["details"]


def test_an_asynchronous_search_by_such_judges_ends(whole: Place, tmp_path: Path) -> None:
    place = whole.before("search", tmp_path, changes=(*whole.changes, "identity.search.suggest=async"))
    place.run("search")
    (found,) = place.records("search")
    (wanted,) = whole.records("search")
    # How many a rung stops depends on the order in which they come.
    names = ("trials", "failed")
    assert [found["counts"][name] for name in names] == [wanted["counts"][name] for name in names] == [10, 0]
