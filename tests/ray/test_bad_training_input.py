"""Trainings that must not go on: one line that names the field, and nothing overwritten."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from ray_jobs.generate_pairs import derived_pool
from ray_jobs.train_experts import CHECKPOINT_FILE, plan_experts
from ray_jobs.training_tables import read_training_tables
from safetydpo.artifacts.layout import RECORD_FILE
from safetydpo.artifacts.schemas import LATENTS
from safetydpo.artifacts.storage import open_location
from safetydpo.artifacts.tables import read_table, table_from_rows, write_table
from tests.ray.closed_artifacts import close_pairs, close_training_data, open_run
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


@pytest.mark.parametrize("pool", ["latents", "captions"])
def test_latents_and_features_of_another_base_are_refused(command: Command, pool: str) -> None:
    """Of the same shape and under the same name: their batch says which base they are of, and nothing is begun."""
    run = open_run(command.config, command.places)
    run.open()
    close_training_data(run)
    other = "f" * 64
    record = derived_pool(run, pool) / "batch-by-hand" / RECORD_FILE
    record.write_bytes(json.dumps({"inputs": {"base": other}}).encode())
    before = contents(command.folder / "store")
    command("train").assert_one_line(f"computed with base {run.base_fingerprint} in", f"found base {other}", code=1)
    assert contents(command.folder / "store") == before


def test_a_batch_of_this_base_and_one_that_says_nothing_are_read(command: Command) -> None:
    """Every batch of an earlier version says nothing."""
    run = open_run(command.config, command.places)
    _, folder = close_training_data(run)
    before = read_training_tables(run, folder)
    record = derived_pool(run, "latents") / "batch-by-hand" / RECORD_FILE
    record.write_bytes(json.dumps({"inputs": {"base": run.base_fingerprint}}).encode())
    assert read_training_tables(run, folder).latents.keys() == before.latents.keys()


@pytest.mark.slow
def test_latents_that_are_not_finite_are_refused_by_the_command(command: Command) -> None:
    """All latents are NaN: each expert says so, none is published, and pairs and pools stay as they are."""
    settings = ["identity.dpo.strategy=single", "execution.expert_attempts=1", "execution.num_workers=1"]
    run = open_run(command.config, [*command.places, *settings])
    run.open()
    close_training_data(run)
    file = derived_pool(run, "latents") / "batch-by-hand" / "data" / "part.parquet"
    table = read_table(file, LATENTS)
    rows = table.to_pylist()
    broken = [{**row, "latent": np.full(len(row["latent"]) // 2, np.nan, np.float16).tobytes()} for row in rows]
    write_table(file, table_from_rows(broken, LATENTS))
    before = contents(command.folder / "store")
    command("train", *settings).assert_one_line(
        "found NaN or infinity in the latent of picture", "trained experts", code=1
    )
    after = contents(command.folder / "store")
    assert {name: after[name] for name in before} == before
    assert not [name for name in after if name.startswith("experts/") and name.endswith(RECORD_FILE)]
