"""What is looked at when every expert stands already; trainings are in `test_chain_slow`."""

from __future__ import annotations

from ray_jobs.train_experts import CHECKPOINT_FILE, train_experts
from tests.ray.closed_artifacts import close_experts, close_pairs, open_run
from tests.ray.commands import Command


def test_a_checkpoint_that_a_killed_lane_left_behind_is_removed(command: Command) -> None:
    """Killed between the record and the removal; the same command finds the expert closed and clears up."""
    run = open_run(command.config, command.places)
    files = close_experts(run)
    left = files["shocking"].parent / CHECKPOINT_FILE
    left.write_bytes(b"state of a finished training")
    records = train_experts(run, *close_pairs(run))
    assert set(records) == set(files)
    assert not left.exists()
    assert files["shocking"].exists()
