"""The whole chain on the smoke config: end to end, again, killed in every stage, and as a submitted job."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
STAGE_FOLDERS = {
    "pairs": ("images", "verdicts", "latents", "captions", "pairs"),
    "train": ("experts",),
    "merge": ("layer_inputs", "merged"),
    "search": ("search",),
    "evaluate": ("outcomes",),
}
TRIGGERS: dict[str, str] = {
    "pairs": "images/*/batch-*/data/*.parquet",
    "train": "experts/*/checkpoint.safetensors",
    "merge": "layer_inputs/*",
    "search": "search/*/trials/*.parquet",
    "evaluate": "outcomes/pool-*/batch-*/data/*.parquet",
}


@dataclass(frozen=True)
class Place:
    store: Path
    run_dir: Path

    def command(self, stage: str) -> list[str]:
        places = [f"store={self.store}", f"run_dir={self.run_dir}"]
        return [sys.executable, "-m", "ray_jobs.cli", stage, str(ROOT / "configs" / "smoke.yaml"), *places]

    def run(self, stage: str, *, seconds: int = 600) -> float:
        started = time.time()
        done = subprocess.run(
            self.command(stage), cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return time.time() - started

    def fingerprints(self, folders: tuple[str, ...]) -> dict[str, str]:
        found = {}
        for folder in folders:
            for record in sorted((self.store / folder).glob("*/record.json")):
                content = json.loads(record.read_text())
                found[f"{folder}/{record.parent.name}"] = content["fingerprint"]
            for adapter in sorted((self.store / folder).glob("*/*.safetensors")):
                found[f"{folder}/{adapter.parent.name}/{adapter.name}"] = str(hash(adapter.read_bytes()))
        return found


def _wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], *, seconds: float) -> bool:
    deadline = time.time() + seconds
    while time.time() < deadline:
        if condition():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.05)
    return False


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("whole")
    place = Place(folder / "store", folder / "run")
    seconds = place.run("run")
    print(f"smoke chain: {seconds:.0f} s")
    return place


def test_the_chain_ends_with_adapter_summary_and_page(finished: Place) -> None:
    summary = json.loads((finished.run_dir / "report" / "summary.json").read_text())
    names = [row["name"] for row in summary["rows"]]
    assert names == [
        "base",
        "expert:violence",
        "expert:shocking",
        "all_single",
        "average",
        "sum",
        "ties",
        "co_merge",
        "searched",
    ]
    assert (finished.run_dir / "merged" / "pytorch_lora_weights.safetensors").stat().st_size > 10_000
    assert "<html" in (finished.run_dir / "report" / "index.html").read_text()


def test_a_plain_diffusers_script_loads_the_merged_adapter(finished: Place) -> None:
    """No import of ours: base pictures and pictures with the adapter differ, and unloading brings the base back."""
    script = f"""
import numpy as np, torch
from diffusers import StableDiffusionPipeline
pipeline = StableDiffusionPipeline.from_pretrained("safetydpo/demo/weights/base")
def draw():
    generator = torch.Generator().manual_seed(0)
    return np.asarray(pipeline("bomb on white", num_inference_steps=4, generator=generator).images[0]).astype(int)
base = draw()
pipeline.load_lora_weights({str(finished.run_dir / "merged")!r}, weight_name="pytorch_lora_weights.safetensors")
merged = draw()
pipeline.unload_lora_weights()
assert abs(base - merged).max() > 0 and (base == draw()).all()
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_again_does_nothing_in_twenty_seconds(finished: Place) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.store.rglob("*") if path.is_file()}
    assert finished.run("run") < 20
    assert {path: path.stat().st_mtime_ns for path in finished.store.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("stage", list(STAGE_FOLDERS))
def test_killed_and_run_again_gives_equal_bytes(finished: Place, tmp_path: Path, stage: str) -> None:
    place = Place(tmp_path / "store", tmp_path / "run")
    for earlier in list(STAGE_FOLDERS)[: list(STAGE_FOLDERS).index(stage)]:
        for folder in STAGE_FOLDERS[earlier]:
            shutil.copytree(finished.store / folder, place.store / folder, dirs_exist_ok=True)
    if stage == "search":
        shutil.rmtree(place.store / "merged")
    process = subprocess.Popen(
        place.command(stage), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    reached = _wait_for(lambda: any(place.store.glob(TRIGGERS[stage])), process, seconds=240)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert reached
    place.run(stage)
    folders = STAGE_FOLDERS[stage]
    wanted = finished.fingerprints(folders)
    found = place.fingerprints(folders)
    if stage == "merge":
        wanted = {name: value for name, value in wanted.items() if name in found}
    assert found == wanted
    assert found


def test_ray_job_submit_runs_the_chain(tmp_path: Path) -> None:
    """`ray start --head` on loopback, then the documented command, on a store of its own."""
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    ray = str(Path(sys.executable).parent / "ray")
    start = [ray, "start", "--head", "--num-cpus=8", "--port=16379", "--dashboard-port=18265", "--block"]
    start += ["--dashboard-host=127.0.0.1", "--object-store-memory=400000000", "--disable-usage-stats"]
    head = subprocess.Popen(
        start, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    address = ["--address", "http://127.0.0.1:18265"]
    try:
        submit = [ray, "job", "submit", *address, "--working-dir", str(ROOT), "--", sys.executable]
        submit += [
            "-m",
            "ray_jobs.pipeline",
            "configs/smoke.yaml",
            f"store={tmp_path}/store",
            f"run_dir={tmp_path}/run",
        ]
        deadline = time.time() + 90
        while True:
            listed = subprocess.run([ray, "job", "list", *address], env=environment, capture_output=True, check=False)
            if listed.returncode == 0 or time.time() > deadline:
                break
            time.sleep(2)
        done = subprocess.run(submit, env=environment, capture_output=True, text=True, timeout=700, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
        assert (tmp_path / "run" / "report" / "summary.json").is_file()
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        head.wait(timeout=60)
