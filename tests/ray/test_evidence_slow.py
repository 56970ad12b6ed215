"""Two rows of one seed of the smoke config, measured for real: records, pages, killed and run again."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from safetydpo.evaluation.evidence import parse_unit
from safetydpo.evaluation.evidence_page import BEGIN, END
from tests.ray.smoke_place import PATIENCE

pytestmark = [pytest.mark.slow, pytest.mark.long]
ROOT = Path(__file__).resolve().parents[2]


def _run(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "ray_jobs.cli", "evidence", str(ROOT / "configs" / "smoke.yaml")]
    command += [f"store={folder}/store", f"run_dir={folder}/run", "evidence.seeds=[1]", "execution.num_workers=1"]
    command += [f"evidence.results={folder}/results", f"evidence.page={folder}/page.md"]
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_two_rows_of_one_seed(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(f"{BEGIN}\n{END}\n")
    assert "no table is written" in _run(tmp_path, "--row", "all_single")
    assert "unit 1 of 1: base, seed 1: 12 pictures" in _run(tmp_path, "--row", "base")
    units = {
        name: parse_unit((tmp_path / "results" / f"{name}-seed1.json").read_text(), source=name)
        for name in ("base", "all_single")
    }
    assert units["base"].config_hash == units["all_single"].config_hash
    assert units["base"].measured["metrics"]["ip"]["n"] == 4
    assert set(units["all_single"].stage_seconds) == {"pairs", "train"}
    # The base's pictures were drawn beside the first row, and are not drawn again for its own.
    batches = list((tmp_path / "store" / "outcomes").glob("pool-*/batch-*/record.json"))
    assert [json.loads(record.read_text())["rows"] for record in batches] == [24]
    started = time.time()
    assert "1 of 1 units are done, 0 to do" in _run(tmp_path, "--row", "base")
    assert time.time() - started < 60 * PATIENCE
    assert "`sum` 0 of 1 seeds" in (tmp_path / "page.md").read_text()
