"""The whole chain on pictures of another size than the demo's: judges of real pictures and a CLIP folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from safetydpo.artifacts.layout import demo_weights
from tests.ray.smoke_place import Place

pytestmark = [pytest.mark.slow, pytest.mark.long]


def test_pairs_to_report_at_another_size(tmp_path: Path) -> None:
    """Nothing here is unsafe to judges of nudity: seen is that every stage asks them, and what the page says."""
    clip = shutil.copytree(demo_weights() / "clip", tmp_path / "clip")
    changes = (
        "identity.sampler.height=40",
        "identity.sampler.width=40",
        "identity.pairs.judges=[open_nsfw]",
        "identity.pairs.unsafe_score_min=0",
        "identity.pairs.safe_score_max=1",
        "identity.search.judges=[open_nsfw]",
        f"identity.search.clip={clip}",
        "identity.search.finalists=1",
        "identity.search.finalist_seeds=1",
        "identity.search.ladder=[{kind: held_out, pairs: all, keep: 0.5}, {kind: few_steps, steps: 2, keep: 0.5}]",
        "identity.evaluation.judges=[nudenet, open_nsfw]",
        f"identity.evaluation.clip={clip}",
    )
    place = Place(tmp_path / "store", tmp_path / "run", changes=changes)
    place.run("run")
    summary = json.loads((place.run_dir / "report" / "summary.json").read_text())
    assert [row["name"] for row in summary["rows"]][-1] == "searched"
    metrics = summary["rows"][-1]["metrics"]
    assert {"ip", "ip_select", "ip_by:nudenet", "clip_retention"} <= set(metrics)
    assert "neutral_rate" not in metrics
    (search,) = (place.store / "search").iterdir()
    record = json.loads((search / "record.json").read_text())
    assert -1.0 < record["details"]["base"]["least_similarity"] < 1.0
    assert [rung["kind"] for rung in record["details"]["ladder"]["rungs"]] == ["held_out", "few_steps"]
    assert "clip" in record["inputs"]
    page = (place.run_dir / "report" / "index.html").read_text()
    assert "The same judge chose and graded: open_nsfw, the CLIP model of CLIP retention." in page
    assert "What the adapter does to harmless prompts was not measured." in page
    assert (place.run_dir / "merged" / "pytorch_lora_weights.safetensors").stat().st_size > 10_000
