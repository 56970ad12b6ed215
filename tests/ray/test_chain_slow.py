"""The whole chain on the smoke config: end to end as a submitted job, again, and killed in every stage."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from safetydpo.judges.demo_audit import AUDIT_FOLDER
from tests.cluster.heads import RAY, ray_head
from tests.ray.smoke_place import PATIENCE, ROOT, STAGE_FOLDERS, TIMES, Place, cpu_seconds_of_commands

pytestmark = pytest.mark.slow
TRIGGERS: dict[str, str] = {
    "pairs": "images/pool-*/batch-*/data/*.parquet",
    "train": "experts/*/attempt-*/checkpoint.safetensors",
    "merge": "layer_inputs/*",
    "search": "search/*/trials/*.parquet",
    "evaluate": "outcomes/pool-*/batch-*/data/*.parquet",
    "report": "picture_measures/*/batch-*/data/*.parquet",
}
"""The file whose appearance says that a stage is in the middle of its work."""
DRAWS = "The steps of all experts used 80 rows"
"""Of two experts of 5 steps of 4 pairs, and `all_single` of 10."""


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The smoke chain as a submitted job, run once for all tests; the others copy from it and run the command."""
    folder = tmp_path_factory.mktemp("whole")
    place = Place(folder / "store", folder / "run")
    with ray_head({**place.environment, "RAY_AUTH_MODE": "disabled"}) as head:
        submit = [RAY, "job", "submit", "--address", head.address, "--working-dir", str(ROOT), "--", sys.executable]
        submit += ["-m", "ray_jobs.pipeline", "configs/smoke.yaml", *place.settings]
        done = subprocess.run(
            submit, env=head.environment, capture_output=True, text=True, timeout=700 * PATIENCE, check=False
        )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    print(f"smoke chain: {place.times()}")
    assert place.is_left_alone()
    return place


def test_ray_job_submit_runs_the_chain_to_adapter_summary_and_page(finished: Place) -> None:
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
    assert list(summary["timing_seconds"]) == ["pairs", "train", "merge", "search", "evaluate"]
    assert (finished.run_dir / "merged" / "pytorch_lora_weights.safetensors").stat().st_size > 10_000
    card = (finished.run_dir / "merged" / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "| IP ↓ |" in card
    for name in ("metrics.csv", "metrics.parquet"):
        assert (finished.run_dir / "report" / name).stat().st_size > 1000
    page = (finished.run_dir / "report" / "index.html").read_text()
    for part in ("<html", "How alike the experts are", "Who won which layers: co_merge", "was not measured", DRAWS):
        assert part in page


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
    """Store, report and the times of the stages stay as they are, byte for byte.

    The seconds are of CPU time: what others do on this machine does not count.
    """
    before, times = finished.files(), finished.times()
    # The pointers of a run are written again, with the same content.
    pointers = (finished.run_dir / "artifacts.json").read_bytes()
    cpu = cpu_seconds_of_commands()
    finished.run("run")
    assert cpu_seconds_of_commands() - cpu < 20
    after = finished.files()
    assert finished.times() == times
    assert (finished.run_dir / "artifacts.json").read_bytes() == pointers
    changed = {path.name for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    assert changed <= {"artifacts.json"}


@pytest.fixture(scope="module")
def without_audit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the packages that lacks the weights of the audit judge."""
    root = tmp_path_factory.mktemp("packages")
    for package in ("safetydpo", "ray_jobs"):
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__", AUDIT_FOLDER))
    assert not list(root.rglob(AUDIT_FOLDER))
    return root


@pytest.mark.parametrize("stage", ["pairs", pytest.param("search", marks=pytest.mark.long)])
def test_neither_pairs_nor_search_needs_the_audit_judge(
    finished: Place, without_audit: Path, tmp_path: Path, stage: str
) -> None:
    """Without its weights both make what they make with them, byte for byte; the evaluation says what it lacks."""
    place = replace(finished.before(stage, tmp_path), root=without_audit)
    place.run(stage)
    assert place.artifacts(stage) == finished.artifacts(stage)
    assert place.artifacts(stage)
    assert place.pool_rows(stage) == finished.pool_rows(stage)
    refused = subprocess.run(
        place.command("evaluate"), cwd=place.root, env=place.environment, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 1
    assert f"{without_audit}/safetydpo/demo/weights/{AUDIT_FOLDER}" in refused.stderr
    assert place.is_left_alone()


def test_a_chain_that_is_killed_in_every_stage_in_turn_ends_as_undisturbed(finished: Place, tmp_path: Path) -> None:
    """One run, the same command seven times: what an earlier stage has closed is never written again."""
    place = Place(tmp_path / "store", tmp_path / "run")
    closed: dict[Path, int] = {}
    for stage, trigger in TRIGGERS.items():
        place.kill_when(partial(_is_there, place, trigger), "run", at_once=stage == "train")
        earlier = list(STAGE_FOLDERS)[: list(STAGE_FOLDERS).index(stage)]
        folders = [place.store / name for one in earlier for name in STAGE_FOLDERS[one]]
        # The first time at which a file was seen stays.
        closed = {p: time for p, time in place.files().items() if any(map(p.is_relative_to, folders))} | closed
    place.run("run")
    assert place.is_left_alone()
    for stage in STAGE_FOLDERS:
        assert place.artifacts(stage) == finished.artifacts(stage), stage
        assert place.pool_rows(stage) == finished.pool_rows(stage), stage
    assert {path: time for path, time in place.files().items() if path in closed} == closed
    assert max(record["counts"]["resumed_at"] for record in place.records("train")) > 0
    adapters = [one.run_dir / "merged" / "pytorch_lora_weights.safetensors" for one in (place, finished)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def _is_there(place: Place, pattern: str) -> bool:
    return any(place.store.glob(pattern))


@pytest.mark.long
@pytest.mark.parametrize("stage", list(STAGE_FOLDERS))
def test_killed_and_run_again_gives_equal_bytes(finished: Place, tmp_path: Path, stage: str) -> None:
    place = finished.before(stage, tmp_path)
    earlier = {path: time for path, time in place.files().items() if path.name not in TIMES}
    place.kill_when(lambda: any(place.store.glob(TRIGGERS[stage])), stage, at_once=stage == "train")
    place.run(stage)
    assert place.is_left_alone()
    wanted = finished.artifacts(stage)
    if stage == "merge":
        # The searched adapter lies among the merged ones.
        wanted = {name: value for name, value in wanted.items() if name in place.artifacts(stage)}
    assert place.artifacts(stage) == wanted
    assert wanted
    assert place.pool_rows(stage) == finished.pool_rows(stage)
    assert {path: time for path, time in place.files().items() if path in earlier} == earlier
    if stage == "report":
        assert place.report() == finished.report()
    if stage == "train":
        assert max(record["counts"]["resumed_at"] for record in place.records("train")) > 0


def test_a_report_killed_while_it_is_written_and_run_again_gives_equal_bytes(finished: Place, tmp_path: Path) -> None:
    """Killed when its summary stands and its page does not: scores, page, adapter and card are as undisturbed."""
    place = finished.before("report", tmp_path)
    shutil.copytree(finished.store / "picture_measures", place.store / "picture_measures")
    report = place.run_dir / "report"
    place.kill_when((report / "summary.json").is_file, "report")
    assert not (report / "index.html").exists()
    assert not (report / "record.json").exists()
    place.run("report")
    assert place.is_left_alone()
    wanted = finished.report()
    assert place.report() == wanted
    names = [
        "concept_rates.parquet",
        "index.html",
        "metrics.csv",
        "metrics.parquet",
        "outcomes.parquet",
        "summary.json",
    ]
    adapter = ["merged/README.md", "merged/pytorch_lora_weights.safetensors"]
    assert sorted(wanted) == [*adapter, *(f"report/{name}" for name in names)]
    inputs = [json.loads((one.run_dir / "report" / "record.json").read_text())["inputs"] for one in (place, finished)]
    assert inputs[0] == inputs[1]


def test_the_benchmark_of_the_report_times_the_whole_stage_and_leaves_no_made_up_outcome(finished: Place) -> None:
    """90 prompts at most a row, 9 rows; the store is as it was."""
    before = finished.files()
    command = [sys.executable, "-m", "benchmarks.report_stage", str(finished.config), f"store={finished.store}"]
    command += ["identity.evaluation.prompts_per_category=20", "--pictures", "100", "--side", "32"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=200 * PATIENCE, check=False, env=finished.environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    printed = json.loads(done.stdout.splitlines()[-1])
    assert printed["raw"]["pictures"] >= 100
    assert printed["raw"]["rows"] == 9
    assert printed["raw"]["page_bytes"] > 300_000
    assert finished.files() == before


def test_ctrl_c_in_the_middle_of_training_ends_it_in_one_line(finished: Place, tmp_path: Path) -> None:
    place = finished.before("train", tmp_path)
    done = place.kill_when(lambda: any(place.store.glob(TRIGGERS["train"])), "train", sent=signal.SIGINT)
    assert done.returncode == 130, done.stderr
    assert done.stderr == "stopped; the same command goes on from here\n"


@pytest.mark.long
def test_a_training_with_stored_errors_killed_while_they_are_computed_gives_the_experts_of_a_live_one(
    finished: Place, tmp_path: Path
) -> None:
    """On one processor and in passes of a step's size: equal bytes but for the hash of the settings."""
    place = finished.before("train", tmp_path, changes=("identity.dpo.reference=cached",))
    place.kill_when(lambda: any(place.store.glob("reference_errors/pool-*/batch-*/manifest.parquet")), "train")
    assert not any(place.store.glob("experts/*/record.json"))
    place.run("train")
    assert place.is_left_alone()
    live, cached = ({record["name"]: record for record in one.records("train")} for one in (finished, place))
    assert {name: record["fingerprint"] for name, record in cached.items()} == {
        name: record["fingerprint"] for name, record in live.items()
    }
    assert all(cached[name]["hash"] != live[name]["hash"] for name in live)
    rows = [
        row["error_id"]
        for file in place.store.glob("reference_errors/pool-*/batch-*/data/*.parquet")
        for row in pq.ParquetFile(file).read().to_pylist()
    ]
    assert len(rows) == len(set(rows))
    uses = {
        name: (record["counts"]["draw_uses"], record["counts"]["distinct_draws"]) for name, record in cached.items()
    }
    assert uses == {"violence": (20, 20), "shocking": (20, 20), "all_single": (40, 40)}


DISTIL = (
    "identity.merge.methods=[distill]",
    "identity.merge.distill={steps: 40, warmup_steps: 1, rows_per_step: 8, benign_rate: 0.5, processes: 2, rank: 4, "
    "start_method: regmean, checkpoint_every: 2}",
)


@pytest.mark.long
def test_a_distillation_of_two_processes_killed_and_run_again_gives_equal_bytes(
    finished: Place, tmp_path: Path
) -> None:
    """It starts from RegMean, so it needs the layer inputs as well as the experts and the pairs."""
    undisturbed, place = (finished.before("merge", tmp_path / name, changes=DISTIL) for name in ("calm", "killed"))
    undisturbed.run("merge")
    # The finished chain has no moments, which its methods do not need; once made, they are no part of what is killed.
    shutil.copytree(undisturbed.store / "layer_inputs", place.store / "layer_inputs")
    place.kill_when(lambda: any(place.store.glob("distilled/*/checkpoint.safetensors")), "merge")
    place.run("merge")
    assert place.is_left_alone()
    wanted = undisturbed.artifacts("merge")
    assert place.artifacts("merge") == wanted
    assert {name.split("/")[0] for name in wanted} == {"layer_inputs", "distilled", "merged", "diagnosis"}
    distilled = next(record for record in place.records("merge") if record["stage"] == "distilled")
    assert distilled["counts"]["resumed_at"] > 0
    assert not list(place.store.glob("distilled/*/checkpoint.safetensors"))
