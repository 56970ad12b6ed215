"""`safetydpo prompts` as a person uses it; it starts no Ray and loads no network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.prompts.samples import TEXTS, place, sample
from tests.ray.commands import Command

LIGHT = """
import sys
from ray_jobs import cli
sys.argv = ["safetydpo", "prompts", *sys.argv[1:]]
try:
    cli.main()
except SystemExit as stop:
    assert not stop.code, stop.code
heavy = {"ray", "torch", "diffusers", "transformers", "scipy", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize(
    "arguments", [["import", "{file}", "--out", "{out}"], ["check", "{file}", "--against", "{file}"]]
)
def test_neither_ray_nor_torch_is_imported(tmp_path: Path, root: Path, arguments: list[str]):
    places = {"file": sample(tmp_path, "pairs").path, "out": f"{tmp_path}/out.parquet"}
    filled = [argument.format_map(places) for argument in arguments]
    done = subprocess.run([sys.executable, "-c", LIGHT, *filled], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "a bomb" in done.stdout or "pairs" in done.stdout


def test_an_import_prints_what_it_found(command: Command, tmp_path: Path):
    file, out = sample(tmp_path, "coprov2_train"), tmp_path / "new" / "prompts.parquet"
    seen = command.raw("prompts", "import", file.path, "--out", str(out))
    assert seen.code == 0, seen.err
    for name, number in (
        ("format coprov2_train (csv)", ""),
        ("rows", "7"),
        ("pairs as the file counts them", "2"),
        ("distinct pair ids (of the two texts)", "2"),
        ("distinct texts", "5"),
        ("memberships", "4"),
        ("duplicate: image names in several rows", "2"),
        ("dropped", "0"),
        ("note: prompts without a partner", "1"),
        ("harassment", "Harrasment"),
    ):
        assert any(name in line and line.rstrip().endswith(number) for line in seen.out.splitlines()), name
    assert f"7 rows are in {out}" in seen.out
    assert pq.read_table(out).num_rows == 7


def test_options_reach_the_import(command: Command, tmp_path: Path):
    file, out = place(tmp_path, "prompt,category,colour\na bomb,rain,red\n"), tmp_path / "o.parquet"
    options = ["--format", "prompts", "--alias", "rain=hate", "--source", "mine", "--split", "test", "--side", "unsafe"]
    assert command.raw("prompts", "import", file.path, "--out", str(out), *options).code == 0
    (row,) = pq.read_table(out).to_pylist()
    assert [row[name] for name in ("category", "category_original", "source", "split", "side")] == [
        "hate",
        "rain",
        "mine",
        "test",
        "unsafe",
    ]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--format", "i3p"], "expected a format out of coprov2_train"),
        (["--format", "i2p"], "expected column 'prompt' of format i2p in"),
        (["--side", "red"], "expected one of unsafe, benign for --side, found 'red'"),
        (["--split", "dev"], "expected one of auto, train, validation, test for --split, found 'dev'"),
        (["--alias", "x"], "expected NAME=CATEGORY"),
        (["--out", "prompts.csv"], "expected a name that ends in .parquet for --out, found 'prompts.csv'"),
    ],
)
def test_requests_that_cannot_be_met(command: Command, tmp_path: Path, options: list[str], told: str):
    file = sample(tmp_path, "pairs")
    out = [] if "--out" in options else ["--out", f"{tmp_path}/o.parquet"]
    command.raw("prompts", "import", file.path, *out, *options).assert_one_line(told, code=2)
    assert not (tmp_path / "o.parquet").exists()


def test_a_folder_as_target_is_refused(command: Command, tmp_path: Path):
    (tmp_path / "o.parquet").mkdir()
    seen = command.raw("prompts", "import", sample(tmp_path, "pairs").path, "--out", f"{tmp_path}/o.parquet")
    seen.assert_one_line("expected a file or nothing at", "(--out), found a folder: name a file in it", code=2)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("version https://git-lfs.github.com/spec/v1\nsize 9\n", "found a git-LFS pointer to a file of 9 bytes"),
        ("", "found an empty file (0 bytes)"),
        ("colour,size\nred,9\n", "expected the columns of a known format in"),
        ("prompt,category\na bomb,rain\n", "found 'rain' (1 rows): name what they are with --alias"),
    ],
)
def test_a_refused_file_leaves_what_stood_there(command: Command, tmp_path: Path, content: str, told: str):
    out = tmp_path / "o.parquet"
    out.write_text("mine")
    command.raw("prompts", "import", place(tmp_path, content).path, "--out", str(out)).assert_one_line(told, code=1)
    assert out.read_text() == "mine"


def test_a_check_counts_and_lists(command: Command, tmp_path: Path):
    """Against the pairs `a bomb` is exact and `A Wasp!` the same after normalisation; COCO has neither."""
    file = place(tmp_path, "a bomb\nA Wasp!\na bomb\na tree\n", "test")
    train, coco = place(tmp_path, TEXTS["pairs"], "train"), place(tmp_path, TEXTS["coco"], "coco")
    out = tmp_path / "leaks.csv"
    arguments = ["prompts", "check", file.path, "--against", train.path, coco.path, "--out", str(out)]
    seen = command.raw(*arguments)
    assert seen.code == 0, seen.err
    assert "4 rows, 3 distinct texts" in seen.out
    assert "2 / 1" in seen.out
    assert "3 / 2" in seen.out
    assert f"exact       row 1, 3: 'a bomb'  ({train.path} row 1)" in seen.out
    assert f"normalised  row 2: 'A Wasp!' ~ 'a wasp'  ({train.path} row 2)" in seen.out
    assert len(out.read_text().splitlines()) == 3
    assert "… and 1 more" in command.raw(*arguments, "--show", "1").out


def test_a_leak_fails_only_when_asked(command: Command, tmp_path: Path):
    file, other = sample(tmp_path, "pairs"), place(tmp_path, TEXTS["coco"], "coco")
    seen = command.raw("prompts", "check", file.path, "--against", file.path, "--fail-on-leak")
    seen.assert_one_line(f"expected no prompt of {file.path} in another set (--fail-on-leak), found 4 in", code=1)
    assert command.raw("prompts", "check", file.path, "--against", other.path, "--fail-on-leak").code == 0


def test_a_threshold_that_is_none(command: Command, tmp_path: Path):
    file = sample(tmp_path, "pairs").path
    seen = command.raw("prompts", "check", file, "--against", file, "--near", "1.5")
    seen.assert_one_line("expected a Jaccard index above 0 and up to 1 for --near, found 1.5", code=2)


def test_the_formats_are_listed(command: Command):
    seen = command.raw("prompts", "formats")
    assert seen.code == 0
    assert all(name in seen.out for name in TEXTS)
