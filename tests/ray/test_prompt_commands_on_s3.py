"""Commands that take in or write prompts and preferences, from S3 to S3: the same bytes as from disk to disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from safetydpo.artifacts.storage import Location, open_location
from tests.pairs.given_files import row, write_file
from tests.prompts.samples import TEXTS
from tests.ray.commands import Command
from tests.ray.test_write_command import CONCEPTS


@pytest.fixture(params=["from disk", "from S3"])
def source(request: pytest.FixtureRequest, tmp_path: Path, s3_store: Location) -> Location:
    """Where the files to read stand."""
    return open_location(str(tmp_path)) / "in" if request.param == "from disk" else s3_store / "in"


def run(command: Command, *arguments: str) -> str:
    seen = command.raw(*arguments)
    assert seen.code == 0, seen.err
    return seen.out


def files_of(folder: Location) -> dict[str, bytes]:
    """Every file below a folder: {its path from there: bytes}; a record says when, and so is left out."""
    names = {file.path.removeprefix(folder.path): file for file in folder.walk()}
    return {name: file.read_bytes() for name, file in names.items() if file.name != "record.json"}


def test_an_import_and_its_check(command: Command, source: Location, s3_store: Location, tmp_path: Path):
    file, other = source / "train.csv", source / "other.csv"
    file.write_bytes(TEXTS["coprov2_train"].encode())
    other.write_bytes(b"prompt\na wasp by the door\na tree\n")
    for out in (f"{tmp_path}/out.parquet", f"s3://{s3_store.path}/out.parquet"):
        assert f"7 rows are in {out}" in run(command, "prompts", "import", str(file), "--out", out)
    tables = [place / "out.parquet" for place in (open_location(str(tmp_path)), s3_store)]
    assert tables[0].read_bytes() == tables[1].read_bytes()
    listed = f"s3://{s3_store.path}/leaks.csv"
    said = run(command, "prompts", "check", str(tables[1]), "--against", str(other), "--out", listed)
    assert "'A wasp by the door'" in said
    assert f"all of them are in {listed}" in said
    (_, leak) = (s3_store / "leaks.csv").read_bytes().decode().splitlines()
    assert "A wasp by the door" in leak


def test_pairs_for_a_list_of_concepts(command: Command, s3_store: Location, tmp_path: Path):
    options = ("--writer", "templates", "--per-concept", "2", "--per-request", "2")
    words = ("prompts", "write", str(CONCEPTS), *options)
    run(command, *words, "--out", f"{tmp_path}/out", "--journal", f"{tmp_path}/journal")
    on_s3 = f"s3://{s3_store.path}/out"
    run(command, *words, "--out", on_s3, "--journal", f"{tmp_path}/another")
    local, remote = files_of(open_location(f"{tmp_path}/out")), files_of(s3_store / "out")
    assert "/prompt_pairs.parquet" in local
    assert local == remote
    # What stands there is finished: nothing is asked for again.
    before = (s3_store / "out" / "record.json").read_bytes()
    run(command, *words, "--out", on_s3, "--journal", f"{tmp_path}/another")
    assert (s3_store / "out" / "record.json").read_bytes() == before


def test_given_preferences(command: Command, source: Location, s3_store: Location, tmp_path: Path):
    file = source / "given.parquet"
    file.write_bytes(
        write_file(tmp_path / "given.parquet", [row(number, label=number % 2) for number in range(6)]).read_bytes()
    )
    for out in (f"{tmp_path}/out", f"s3://{s3_store.path}/out"):
        said = run(command, "import-pairs", str(file), "--out", out, "--category", "Violence")
        assert f"6 preferences of 6 rows are in {out}, pictures: 12" in said
    local, remote = files_of(open_location(f"{tmp_path}/out")), files_of(s3_store / "out")
    assert local
    assert local == remote
