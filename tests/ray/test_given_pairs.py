"""Imported preferences as a run takes them, and the command that imports them; without Ray."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from ray_jobs.export_command import export_pairs
from ray_jobs.given_pairs import GivenLatentWorker, check_given, given_key
from ray_jobs.pipeline import check_request
from ray_jobs.run import Run
from safetydpo.artifacts.records import ArtifactKey, write_pointer
from safetydpo.artifacts.schemas import IMAGES, MEMBERSHIPS
from safetydpo.artifacts.storage import open_location
from safetydpo.artifacts.tables import read_table, table_from_rows, write_table
from safetydpo.config.schema import BaseModelConfig
from safetydpo.diffusion.given_pictures import fit_picture
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.pairs.preference_store import open_preferences
from tests.pairs.given_files import draw, row, write_file
from tests.ray.closed_artifacts import open_run
from tests.ray.commands import Command
from tests.ray.test_export_command import WITHOUT_RAY

SETTINGS = ("identity.prompts.categories=[violence]", "identity.prompts.retention_prompts=0")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Six rows and a tie."""
    rows = [row(number, label=number % 2) for number in range(6)] + [row(9, label=0.5)]
    return write_file(tmp_path / "given.parquet", rows)


@pytest.fixture
def given(command: Command, files: Path, tmp_path: Path) -> Path:
    """Those rows, imported."""
    seen = command.raw("import-pairs", str(files), "--out", f"{tmp_path}/given", "--category", "Violence")
    assert seen.code == 0, seen.err
    return tmp_path / "given"


def run_on(command: Command, given: Path, *settings: str) -> Run:
    return open_run(command.config, [*command.places, *SETTINGS, f"identity.pairs.source={given}", *settings])


def test_it_imports_and_counts_without_ray_or_torch(files: Path, tmp_path: Path):
    arguments = ["import-pairs", str(files), "--out", f"{tmp_path}/out", "--category", "violence"]
    done = subprocess.run([sys.executable, "-c", WITHOUT_RAY, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"6 preferences of 7 rows are in {tmp_path}/out, pictures: 12, rows with one caption: 6",
        "  sizes of pictures: 40 x 32: 12",
        "  left out: tie (label_0 is 0.5): 1",
        f"train on them: safetydpo train CONFIG identity.pairs.source={tmp_path}/out "
        "identity.prompts.retention_prompts=0",
    ]


def test_categories_come_from_the_row_then_its_caption_then_the_option(command: Command, tmp_path: Path):
    captions = tmp_path / "captions.csv"
    lines = ["prompt,image,category"]
    for number, name in ((1, "Hate"), (1, "self-harm"), (2, "Illegal Activity")):
        lines.append(f"a disc number {number},u_idx_000000{number}_0.jpg,{name}")
    captions.write_text("\n".join(lines) + "\n")
    table = tmp_path / "captions.parquet"
    assert command.raw("prompts", "import", str(captions), "--out", str(table)).code == 0
    rows = [row(0, category="Shocking"), *(row(number, category=None) for number in (1, 2, 3))]
    path = write_file(tmp_path / "a.parquet", rows)
    options = ("--categories-from", str(table), "--category", "sexual", "--concept", "disc", "--source", "made-up")
    assert command.raw("import-pairs", str(path), "--out", f"{tmp_path}/out", *options).code == 0
    members = read_table(open_location(f"{tmp_path}/out/memberships.parquet"), MEMBERSHIPS).to_pylist()
    found = [one["category"] for one in members]
    assert found == ["shocking", "hate", "self_harm", "illegal_activity", "sexual"]
    assert {(one["concept"], one["source"]) for one in members} == {("disc", "made-up")}


def test_an_import_that_cannot_be_is_refused_in_one_line(command: Command, files: Path, tmp_path: Path):
    out = ("--out", f"{tmp_path}/out")
    for arguments, code, said in (
        ((str(files), *out), 2, "expected the category of every row, found no column categories or category in"),
        ((str(files), *out, "--category", "weather"), 2, "expected --category out of hate, sexual"),
        ((f"{tmp_path}/no.parquet", *out, "--category", "hate"), 2, "found nothing: name its files"),
        (
            (str(files), *out, "--categories-from", f"{tmp_path}/no"),
            2,
            "a prompt table in --categories-from, found nothing",
        ),
        ((str(files), *out, "--categories-from", str(files)), 2, "in --categories-from, found another file"),
    ):
        command.raw("import-pairs", *arguments).assert_one_line(said, code=code)
    assert not (tmp_path / "out").exists()


def test_a_table_without_categories_says_nothing(command: Command, files: Path, tmp_path: Path):
    (tmp_path / "lines.txt").write_text("a plain line\nanother one\n")
    assert command.raw("prompts", "import", f"{tmp_path}/lines.txt", "--out", f"{tmp_path}/t.parquet").code == 0
    arguments = (str(files), "--out", f"{tmp_path}/out", "--categories-from", f"{tmp_path}/t.parquet")
    command.raw("import-pairs", *arguments).assert_one_line("expected categories in", code=1)


def test_a_run_needs_no_prompts_to_train_on_given_pairs(command: Command, given: Path):
    run = run_on(command, given, "identity.prompts.source=/nowhere", "identity.pairs.judges=[open_nsfw]")
    check_request(run, last="train")
    with pytest.raises(UsageError, match=r"expected a folder of prompts at /nowhere"):
        check_request(run, last="merge")
    with pytest.raises(UsageError, match=r"expected a folder of prompts at /nowhere"):
        check_request(
            run_on(command, given, "identity.prompts.source=/nowhere", "identity.prompts.retention_prompts=1")
        )


def test_what_given_pairs_cannot_be_is_refused(command: Command, given: Path, tmp_path: Path):
    for setting, said in (
        ("identity.prompts.categories=[violence,hate]", "found hate: 0; raise .* were imported: "),
        ("identity.pairs.min_kept_per_category=7", "at least 7 kept pairs per category"),
        (
            "identity.dpo.redirection_weight=1",
            r"a safe caption for identity.dpo.redirection_weight \(1.0\), found 6 with",
        ),
        ("identity.experts.groups={a: {concept: [x]}}", "found 'x'; known here: none"),
        ("identity.experts.group_by=concept", "expected a concept of every kept pair .*, found 6 of 6 without"),
        (f"identity.pairs.source={tmp_path}", "found another at"),
        ("identity.pairs.latents=mean_and_deviation", "expected an autoencoder with a posterior"),
    ):
        with pytest.raises(SafetyDPOError, match=said):
            check_given(run_on(command, given, setting).config.identity)


def test_a_key_is_of_the_content_wherever_it_stands(command: Command, given: Path, tmp_path: Path):
    record = open_preferences(open_location(str(given)))
    keys = [
        given_key(run_on(command, place, *settings), record, []).hash
        for place, settings in (
            (given, ()),
            (tmp_path / "elsewhere", ()),
            (given, ("identity.prompts.categories=[hate]",)),
            (given, ("identity.sampler.height=64",)),
            (given, ("identity.pairs.latents=mean_and_deviation",)),
        )
    ]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 4


def test_pictures_of_any_size_are_encoded_at_the_runs():
    """A latent is that of the fitted picture; two of them in a pass, padded or not."""
    pictures = [draw(1), draw(2, size=(90, 50), kind="PNG"), draw(3, size=(20, 70), kind="WEBP")]
    worker = GivenLatentWorker(BaseModelConfig().model_dump(), 2, with_deviation=False, height=32, width=32)
    table = pa.table({"image_id": ["a", "b", "c"], "image": pictures})
    rows = worker(table).to_pylist()
    fitted = np.stack([fit_picture(data, height=32, width=32) for data in pictures])
    assert fitted.shape == (3, 32, 32, 3)
    assert [(one["image_id"], one["channels"], one["height"], one["width"]) for one in rows] == [
        (name, rows[0]["channels"], rows[0]["height"], rows[0]["height"]) for name in "abc"
    ]
    import torch

    expected = worker._backbone.encode_images(torch.from_numpy(fitted)).to(torch.float16).numpy()
    found = np.stack([np.frombuffer(one["latent"], np.float16).reshape(expected.shape[1:]) for one in rows])
    # Other batch sizes change the last bits on a CPU.
    assert np.abs(found.astype(np.float32) - expected.astype(np.float32)).max() < 0.01


def test_imported_pairs_are_not_exported_as_drawn_ones(command: Command, given: Path, tmp_path: Path):
    run = run_on(command, given)
    key = ArtifactKey("pairs", "smoke", {}, {"base": "b"}, 1)
    run.make(key, lambda folder: write_table(folder / "x.parquet", table_from_rows([], IMAGES)) or made(given))
    write_pointer(run.run_dir, "pairs", key)
    settings = [*command.places, *SETTINGS, f"identity.pairs.source={given}"]
    with pytest.raises(UsageError, match="expected pairs that this run has drawn, found imported ones"):
        export_pairs(
            command.config,
            settings,
            out=f"{tmp_path}/o",
            layout="preference",
            with_pictures=True,
            name=None,
            licence="mit",
        )


def made(given: Path) -> dict[str, object]:
    return {"fingerprint": "f", "details": {"given": {"folder": str(given)}}}
