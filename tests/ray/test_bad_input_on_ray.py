"""Bad input that only a cluster or a worker can see: the worker's words arrive as one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from ray_jobs.generate_pairs import derived_pool
from ray_jobs.places import image_pool
from safetydpo.artifacts.schemas import IMAGES, LATENTS
from safetydpo.artifacts.storage import open_location
from safetydpo.artifacts.tables import read_table
from tests.ray.closed_artifacts import all_files, close_batch, close_experts, close_pairs, close_pictures, open_run
from tests.ray.commands import Command, Seen

pytestmark = pytest.mark.slow
USAGE, FAILURE = 2, 1


@pytest.fixture
def on_cluster(command: Command, cluster: None, monkeypatch: pytest.MonkeyPatch) -> Command:
    """The command on the tests' Ray of 4 CPUs, which it leaves running."""
    monkeypatch.setattr("ray_jobs.cluster.disconnect", lambda: None)
    return command


def test_fewer_cpus_than_asked(on_cluster: Command, tmp_path: Path):
    on_cluster("pairs", "execution.num_workers=9").assert_one_line(
        "expected 10 CPUs (execution.num_workers 9 x execution.cpus_per_worker 1, and 1 that reads and writes), "
        "found 4 in the cluster: lower either, or add nodes",
        code=USAGE,
    )
    assert not (tmp_path / "store").exists()


def test_a_category_whose_pairs_are_all_filtered_away(on_cluster: Command, tmp_path: Path):
    run = open_run(on_cluster.config, on_cluster.places)
    close_pictures(run, unsafe_score_of={"violence": 0.9, "shocking": 0.1})
    on_cluster("pairs").assert_one_line(
        "expected at least 1 kept pairs per category (identity.pairs.min_kept_per_category), found shocking: 0; raise "
        "identity.prompts.pairs_per_category or leave the category out of identity.prompts.categories",
        code=FAILURE,
    )
    assert not list((tmp_path / "store" / "pairs").glob("*/record.json"))
    assert not [name for name in all_files(tmp_path) if name.endswith(".tmp")]


def test_a_truncated_table_of_a_pool(on_cluster: Command):
    run = open_run(on_cluster.config, on_cluster.places)
    file = close_batch(image_pool(run), IMAGES.empty_table())
    file.local_path.write_bytes(file.read_bytes()[:50])
    on_cluster("pairs").assert_one_line(
        f"expected a complete Parquet file at {file}, found 50 bytes that do not parse",
        f"delete the folder {file.parent.parent} and run the same command again",
        code=FAILURE,
    )


def test_a_training_worker_that_finds_a_truncated_table(on_cluster: Command, tmp_path: Path):
    """Ray Train wraps the worker's error in one of its own and tries the lane again before it gives up."""
    run = open_run(on_cluster.config, on_cluster.places)
    close_pairs(run)
    file = close_batch(derived_pool(run, "latents"), LATENTS.empty_table())
    file.local_path.write_bytes(file.read_bytes()[:50])
    on_cluster("train", "execution.num_workers=1").assert_one_line(
        f"expected a complete Parquet file at {file}, found 50 bytes that do not parse", code=FAILURE
    )
    assert not list((tmp_path / "store" / "experts").glob("*/record.json"))


def test_a_merge_worker_that_finds_a_damaged_expert(command: Command, root: Path, tmp_path: Path):
    """In a process of its own: whatever Ray prints by itself must not stand beside the line."""
    file = close_experts(open_run(command.config, [*command.places, "identity.merge.methods=[sum]"]))["shocking"]
    data = file.read_bytes()
    header = int.from_bytes(data[:8], "little")
    file.local_path.write_bytes(data[: 8 + header] + b"\xff" * (len(data) - 8 - header))
    arguments = ["merge", str(command.config), *command.places, "identity.merge.methods=[sum]"]
    done = subprocess.run(
        [sys.executable, "-m", "ray_jobs.cli", *arguments], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == FAILURE
    assert done.stderr.startswith(
        f"error: expected finite numbers in {file}, found NaN or infinity in 'unet.mid_block."
    )
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stdout
    assert not [name for name in all_files(tmp_path / "store") if name.startswith("merged")]


@pytest.mark.long
def test_a_disk_that_fills_while_pictures_are_drawn(command: Command, root: Path, small_disk: Path):
    """64 KiB do not hold 40 pictures; with room, the same command goes on and every picture is there once.

    In processes of their own: what a failed run has still under way ends with it.
    """
    places = [*command.places, f"store={small_disk}/store"]

    def pairs() -> subprocess.CompletedProcess[str]:
        arguments = [sys.executable, "-m", "ray_jobs.cli", "pairs", str(command.config), *places]
        return subprocess.run(arguments, cwd=root, capture_output=True, text=True, check=False)

    failed = pairs()
    seen = Seen(failed.returncode, failed.stdout, failed.stderr)
    seen.assert_one_line("expected", "No space left on device", "free space", code=FAILURE)
    assert not list(small_disk.glob("store/pairs/*/record.json"))
    assert not list(small_disk.glob("store/images/*/*/record.json"))
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    done = pairs()
    assert done.returncode == 0, done.stderr
    run = open_run(command.config, places)
    batches = [read_table(open_location(str(f)), IMAGES) for f in small_disk.glob("store/images/*/*/data/*.parquet")]
    ids = [image_id for batch in batches for image_id in batch.column("image_id").to_pylist()]
    assert len(ids) == len(set(ids)) == 40
    assert len(image_pool(run).list()) == 1


def test_nan_bytes_are_nan():
    """The damage of the merge test: four bytes 0xff are not a number."""
    damaged = save({"x": torch.ones(1)})[:-4] + b"\xff" * 4
    assert bool(load(damaged)["x"].isnan())
