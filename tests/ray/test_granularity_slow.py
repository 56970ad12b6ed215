"""Chains of other experts than one per category, and of imported preferences, on the demo model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from safetydpo.evaluation.summary import parse_summary
from safetydpo.pairs.groups import concept_group_name
from tests.pairs.given_files import draw, row, write_file
from tests.ray.smoke_place import ROOT, Place

pytestmark = [pytest.mark.slow, pytest.mark.long]
FEW = (
    "identity.prompts.categories=[violence]",
    "identity.prompts.pairs_per_concept=3",
    "identity.prompts.retention_prompts=2",
    "identity.experts.small_groups=leave_out",
    "identity.dpo.steps=2",
    "identity.search.trials=2",
    "identity.merge.methods=[sum,co_merge]",
    "identity.evaluation.expert_prompts_per_category=1",
)


def test_a_chain_of_one_expert_per_concept(tmp_path: Path) -> None:
    """Five concepts, two of them in a group: every stage up to the report, with the expert x category matrix."""
    changes = (*FEW, "identity.experts.group_by=concept", "identity.experts.groups={blades: {concept: [axe, dagger]}}")
    place = Place(tmp_path / "store", tmp_path / "run", changes=changes)
    place.run("run", seconds=600)
    summary = parse_summary((place.run_dir / "report" / "summary.json").read_text())
    own = {row["name"]: row.get("categories") for row in summary["rows"] if row["kind"] == "expert"}
    assert own["expert:blades"] == ["violence"]
    assert own[f"expert:{concept_group_name('bomb')}"] == ["violence"]
    assert len(own) > 3
    page = (place.run_dir / "report" / "index.html").read_text()
    assert "blades" in page
    weights = json.loads(place.records("search")[0]["details"]["candidate"])["weights"]
    assert {f"expert:{name}" for name in weights} == set(own)
    # One more group: the experts that stand are found, and one is trained.
    before = place.artifacts("train")
    more = (*changes[:-1], "identity.experts.groups={blades: {concept: [axe, dagger]}, fire: {text: [house]}}")
    again = Place(place.store, tmp_path / "run-more", changes=more)
    again.run("train", seconds=600)
    new = {name for name in again.artifacts("train") if name not in before}
    assert {name.split("/")[1].rsplit("-", 1)[0] for name in new} == {"fire"}


def test_experts_train_on_imported_preferences(tmp_path: Path) -> None:
    rows = [
        row(number, caption) | {"jpg_0": draw(number, size=(48, 40)), "jpg_1": draw(50 + number, size=(32, 64))}
        for number in range(6)
        for caption in (f"bomb {number} on blue", f"balloon {number} on blue")
    ]
    file = write_file(tmp_path / "given.parquet", rows)
    command = [sys.executable, "-m", "ray_jobs.cli", "import-pairs", str(file), "--out", f"{tmp_path}/given"]
    done = subprocess.run([*command, "--category", "violence"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    changes = (
        "identity.prompts.categories=[violence]",
        "identity.prompts.source=/nowhere",
        "identity.prompts.retention_prompts=0",
        f"identity.pairs.source={tmp_path}/given",
    )
    place = Place(tmp_path / "store", tmp_path / "run", changes=changes)
    place.run("train")
    counts = {record["name"]: record["counts"] for record in place.records("train")}
    assert counts["violence"]["pairs"] == counts["all_single"]["pairs"] == 12
    (pairs,) = [record for record in place.records("pairs") if record["stage"] == "pairs"]
    assert pairs["details"]["given"]["base"] == "unknown"
    assert pairs["counts"] == {"pairs": 12, "kept": 12, "pictures": 12, "violence": 12}
    # Nothing was drawn or judged.
    assert not (place.store / "images").exists()
    assert not (place.store / "verdicts").exists()
    assert place.artifacts("train")
