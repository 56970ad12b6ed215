"""Two `safetydpo train` commands on one store: every expert is trained once, and both runs have all of them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.ray.smoke_place import PATIENCE, Place

pytestmark = [pytest.mark.slow, pytest.mark.long]
# Ten experts and more, of some seconds each: time enough for the second command to come.
CHANGES = (
    "identity.prompts.pairs_per_concept=2",
    "identity.prompts.retention_prompts=2",
    "identity.experts.group_by=concept",
    "identity.experts.small_groups=leave_out",
    "identity.dpo.steps=25",
    "identity.dpo.pairs_per_step=8",
    "execution.num_workers=1",
)


def leases(store: Path) -> list[dict[str, Any]]:
    """Who began which attempt of an expert."""
    files = [file for file in store.glob("experts/*/lease/attempt-*") if not file.suffix]
    return [{"file": str(file.relative_to(store)), **json.loads(file.read_text())} for file in files]


def test_two_commands_train_each_expert_once(tmp_path: Path) -> None:
    first = Place(tmp_path / "store", tmp_path / "run-a", changes=CHANGES)
    second = Place(first.store, tmp_path / "run-b", mark=first.mark, changes=CHANGES)
    first.run("pairs")
    commands = [
        subprocess.Popen(
            place.command("train"),
            cwd=place.root,
            env=place.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for place in (first, second)
    ]
    for command in commands:
        said, _ = command.communicate(timeout=300 * PATIENCE)
        assert command.returncode == 0, said[-3000:]
    begun = leases(first.store)
    done = sorted(file.parent.name for file in first.store.glob("experts/*/record.json"))
    assert len(done) >= 10
    assert sorted(lease["file"] for lease in begun) == [f"experts/{name}/lease/attempt-1" for name in done]
    assert len({lease["run"] for lease in begun}) == 2, "both must have trained some"
    found = [json.loads((place.run_dir / "artifacts.json").read_text())["artifacts"] for place in (first, second)]
    experts = [{name: where for name, where in one.items() if name.startswith("expert:")} for one in found]
    assert experts[0] == experts[1]
    assert len(experts[0]) == len(done)
