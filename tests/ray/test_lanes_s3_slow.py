"""`safetydpo train` with its store and its run folder on a real S3 server: leases, checkpoints, logs and records."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from ray_jobs.expert_plan import plan_experts
from safetydpo.artifacts.storage import Location
from tests.ray.closed_artifacts import close_training_data, open_run
from tests.ray.smoke_place import PATIENCE, ROOT, SMOKE
from tests.ray.undisturbed import undisturbed_experts
from tests.s3_server import ACCESS_KEY, SECRET_KEY

pytestmark = [pytest.mark.slow, pytest.mark.long]
SETTINGS = (
    "identity.prompts.pairs_per_category=4",
    "identity.experts.all_single=false",
    "identity.dpo.strategy=single",
    "identity.dpo.steps=3",
    "identity.dpo.checkpoint_every=1",
    "execution.num_workers=1",
)


def test_experts_on_s3_are_those_of_this_process(s3_store: Location) -> None:
    """Two experts in one lane; then the same command again, which starts no Ray and makes nothing."""
    places = [f"store=s3://{s3_store.path}", f"run_dir=s3://{s3_store.path}-run"]
    run = open_run(SMOKE, [*places, *SETTINGS])
    pairs, folder = close_training_data(run)
    command = [sys.executable, "-m", "ray_jobs.cli", "train", str(SMOKE), *places, *SETTINGS]
    for _ in range(2):
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=200 * PATIENCE,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    units = plan_experts(run, pairs, folder)
    assert len(units) == 2
    wanted = undisturbed_experts(run, pairs, folder)
    for unit in units:
        place = run.folder(unit.key)
        record = json.loads((place / "record.json").read_bytes())
        assert record["fingerprint"] == wanted[unit.name]
        names = [file.path.removeprefix(f"{place.path}/") for file in place.walk()]
        assert [name for name in names if name.startswith("lease/")] == ["lease/attempt-1"]
        assert {"record.json", "attempt-1/training.jsonl"} <= set(names)
        assert not any("checkpoint" in name or "failed" in name for name in names)
    pointers = json.loads((run.run_dir / "artifacts.json").read_bytes())["artifacts"]
    assert set(pointers) == {"pairs", *(f"expert:{unit.name}" for unit in units)}
    for file in s3_store.parent.walk():
        content = file.read_bytes()
        assert ACCESS_KEY.encode() not in content
        assert SECRET_KEY.encode() not in content
