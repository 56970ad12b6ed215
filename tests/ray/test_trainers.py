"""What a train function's end means, on a real local Ray."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_jobs.run import Run
from ray_jobs.state_folder import ray_state_folder
from ray_jobs.trainers import train_on_workers
from safetydpo.config.schema import Config
from safetydpo.errors import SafetyDPOError, UsageError
from tests.ray.toy_loops import attempt

pytestmark = pytest.mark.slow


def run_loop(config: Config, folder: Path, end: str) -> int:
    """Run the toy loop; return how often it was called."""
    with ray_state_folder() as state:
        train_on_workers(Run(config), attempt, {"folder": str(folder), "end": end}, name="toy", state=state)
    return len(list(folder.iterdir()))


def test_bad_data_ends_the_training_at_once(cluster: None, small: Config, tmp_path: Path) -> None:
    with pytest.raises(SafetyDPOError, match="^expected light, found none: switch it on$"):
        run_loop(small, tmp_path, "failure")
    assert len(list(tmp_path.iterdir())) == 1


def test_a_bad_request_stays_one(cluster: None, small: Config, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="^expected a switch, found none: name one$"):
        run_loop(small, tmp_path, "usage")


def test_a_worker_that_dies_is_started_again(cluster: None, small: Config, tmp_path: Path) -> None:
    assert run_loop(small, tmp_path, "die once") == 2
