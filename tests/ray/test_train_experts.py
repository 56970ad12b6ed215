"""What is looked at when every expert stands already; trainings are in `test_chain_slow`."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

from ray_jobs.expert_files import check_expert_files, expert_folders, load_experts
from ray_jobs.expert_plan import benign_fingerprint, plan_experts
from ray_jobs.generate_pairs import derived_pool
from ray_jobs.train_experts import CHECKPOINT_FILE, _failed, train_experts
from ray_jobs.training_tables import read_training_tables
from safetydpo.artifacts.layout import ADAPTER_FILE, RECORD_FILE
from safetydpo.artifacts.schemas import IMAGE_MANIFEST, PROMPT_PAIRS, TEXT_EMBEDDINGS, caption_sha256
from safetydpo.artifacts.tables import read_table, table_from_rows, write_table
from tests.ray.closed_artifacts import close_batch, close_experts, close_pairs, open_run
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


def test_a_picture_that_failed_is_left_out_for_good(command: Command) -> None:
    """Its row is not read, although a later run may have drawn it into the pool; and the experts' keys know it."""
    run = open_run(command.config, [*command.places, "identity.dpo.retention_weight=1"])
    pairs, folder = close_pairs(run)
    row = {"owner_id": "o", "side": "benign", "prompt": "a dog", "seed": 1, "adapter": "", "attempt": 1}
    rows = [{"image_id": image_id, **row, "owner_id": image_id} for image_id in ("good", "bad")]
    write_table(folder / "images.parquet", table_from_rows(rows, IMAGE_MANIFEST))
    failed = replace(pairs, failed_units=("bad",))
    before = {unit.name: unit.key.hash for unit in plan_experts(run, pairs, folder)}
    after = {unit.name: unit.key.hash for unit in plan_experts(run, failed, folder)}
    assert all(before[name] != after[name] for name in before)
    assert benign_fingerprint(pairs, folder) == pairs.inputs["retention_prompts"] != benign_fingerprint(failed, folder)
    assert set(read_training_tables(run, folder).images) == {("good", "benign"), ("bad", "benign")}
    (folder / RECORD_FILE).write_bytes(json.dumps(asdict(failed)).encode())
    assert set(read_training_tables(run, folder).images) == {("good", "benign")}


def test_captions_of_other_runs_are_not_read(command: Command) -> None:
    run = open_run(command.config, command.places)
    _, folder = close_pairs(run)
    row = {"owner_id": "o", "side": "benign", "prompt": "a dog", "seed": 1, "adapter": "", "attempt": 1}
    write_table(folder / "images.parquet", table_from_rows([{"image_id": "i", **row}], IMAGE_MANIFEST))
    pair = read_table(folder / "prompt_pairs.parquet", PROMPT_PAIRS).to_pylist()[0]
    own = ["", "a dog", pair["unsafe_text"], pair["safe_text"]]
    rest = {"embedding": b"\0\0", "tokens": 1, "width": 1, "pooled": None, "pooled_width": None}
    rows = [{"caption_sha256": caption_sha256(text), **rest} for text in [*own, "a text of another run"]]
    close_batch(derived_pool(run, "captions"), table_from_rows(rows, TEXT_EMBEDDINGS))
    assert set(read_training_tables(run, folder).embeddings) == {caption_sha256(text) for text in own}


def test_experts_with_and_without_attempts_are_found(command: Command) -> None:
    """One closed by this version, one by an earlier one; what a lost attempt left goes, once the expert is closed."""
    run = open_run(command.config, command.places)
    files = close_experts(run)
    folder = files["shocking"].parent
    (folder / "attempt-2" / ADAPTER_FILE).write_bytes(files["shocking"].read_bytes())
    files["shocking"].delete()
    record = json.loads((folder / RECORD_FILE).read_bytes())
    (folder / RECORD_FILE).write_bytes(json.dumps({**record, "details": {"attempt": 2}}).encode())
    for left in ("attempt-1/checkpoint.safetensors", "attempt-2/checkpoint.safetensors", "failed.json"):
        (folder / left).write_bytes(b"left behind")
    records = train_experts(run, *close_pairs(run))
    check_expert_files(run, records)
    folders = expert_folders(run, records)
    assert folders["shocking"] == f"{folder.path}/attempt-2"
    assert folders["violence"] == files["violence"].parent.path
    assert {expert.name for expert in load_experts(run, folders)} == set(files)
    assert [file.path.removeprefix(folder.path) for file in folder.walk()] == [
        f"/attempt-2/{ADAPTER_FILE}",
        "/record.json",
    ]


def test_the_error_of_a_command_tells_which_experts_failed_and_why() -> None:
    assert str(_failed({"b": "no light", "a": "no sound"}, 9)) == (
        "expected 9 trained experts, found 2 that failed: a (no sound); b (no light); the others are closed. Mend the "
        "cause, then run the same command again, which tries these anew"
    )
    assert "4 (why) and 3 more; the others" in str(_failed(dict.fromkeys("01234567", "why"), 9))
