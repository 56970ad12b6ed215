"""Trainings that must not go on: one line that names the field, and nothing overwritten."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from ray_jobs.train_experts import CHECKPOINT_FILE, plan_experts
from safetydpo.artifacts.storage import open_location
from tests.ray.closed_artifacts import close_pairs, open_run
from tests.ray.commands import Command

USAGE = 2


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.parametrize(
    ("setting", "field"),
    [
        ("identity.dpo.beta=7", "identity.dpo.beta (100.0 -> 7.0)"),
        ("identity.lora.rank=2", "identity.lora.rank (4 -> 2)"),
        ("identity.dpo.validation={every_steps: 2, patience: 3}", "identity.dpo.validation ('<absent>' -> {"),
    ],
)
def test_a_config_changed_in_mid_training_is_refused_by_name(command: Command, setting: str, field: str) -> None:
    """The run folder was begun with another one and holds a checkpoint: both stay as they are."""
    run = open_run(command.config, command.places)
    run.open()
    pairs, folder = close_pairs(run)
    for unit in plan_experts(run, pairs, folder):
        (run.folder(unit.key) / CHECKPOINT_FILE).write_bytes(b"the state of a training that was interrupted")
    before = contents(command.folder)
    command("train", setting).assert_one_line(
        f"other values of {field}", "choose another execution.run_dir", code=USAGE
    )
    assert contents(command.folder) == before


def test_an_interrupted_training_is_not_touched_by_another_run(command: Command) -> None:
    """Another setting is another key and so another folder in the same store."""
    run = open_run(command.config, command.places)
    other = open_run(command.config, [*command.places, "identity.dpo.beta=7", f"run_dir={command.folder}/other"])
    folders = [{str(one.folder(unit.key)) for unit in plan_experts(one, *close_pairs(one))} for one in (run, other)]
    assert folders[0].isdisjoint(folders[1])
    assert {str(open_location(folder).parent) for folder in folders[0] | folders[1]} == {
        f"{command.folder}/store/experts"
    }


def test_workers_that_cannot_train_together_are_refused_before_anything_is_made(command: Command) -> None:
    """The rules themselves are in `tests/config/test_training_rules.py`."""
    seen = command("train", "identity.dpo.strategy=single", "execution.workers_per_expert=2")
    seen.assert_one_line("identity.dpo.strategy 'single'", "execution.workers_per_expert 1, found 2", code=USAGE)
    assert not any(command.folder.iterdir())
