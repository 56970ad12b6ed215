"""`safetydpo export-pairs` as a person calls it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ray_jobs.places import image_pool_of
from safetydpo.artifacts.records import check_run_identity, write_pointer
from safetydpo.artifacts.storage import Location, open_location
from safetydpo.config.load import identity_of, load_config
from tests.pairs.stored_pairs import MadePair, close_batch, close_pairs, image_row
from tests.ray.commands import Command

WITHOUT_RAY = """
import sys
sys.modules["ray"] = None  # any import of it raises
from ray_jobs import cli
sys.argv = ["safetydpo", *sys.argv[1:]]
try:
    cli.main()
finally:
    assert "torch" not in sys.modules
"""
PAIRS = [
    MadePair(1),
    MadePair(2, "moss", ("hate", "violence")),
    MadePair(3, kept=False, reason="unsafe picture is not unsafe"),
]


@pytest.fixture
def store(command: Command) -> Location:
    """The command's store with closed pairs and their pictures, and a run folder that points to them."""
    store, run_dir = open_location(f"{command.folder}/store"), open_location(f"{command.folder}/run")
    _, record, key = close_pairs(store, PAIRS)
    pool = image_pool_of(store, record).name
    close_batch(store, "batch-1", [image_row(pair, side) for pair in PAIRS for side in ("unsafe", "safe")], pool=pool)
    # The same ids with other bytes, as another compute type leaves them: not this run's.
    other = [image_row(pair, side) | {"image": b"other"} for pair in PAIRS for side in ("unsafe", "safe")]
    close_batch(store, "batch-1", other, pool="pool-000000000000")
    check_run_identity(run_dir, identity_of(load_config(command.config)))
    write_pointer(run_dir, "pairs", key)
    return store


def test_it_writes_and_counts_without_ray_or_torch(command: Command, store: Location, tmp_path: Path):
    arguments = ["export-pairs", str(command.config), *command.places, "--out", f"{tmp_path}/out", "--licence", "mit"]
    done = subprocess.run([sys.executable, "-c", WITHOUT_RAY, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"2 kept pairs of 3 are in {tmp_path}/out, shards: 1",
        "  hate                       1 kept       0 dropped",
        "  violence                   2 kept       1 dropped",
    ]
    assert sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*")) == [
        "README.md",
        "data/train-00000-of-00001.parquet",
    ]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "\nlicense: mit\n" in card
    assert "safetydpo export-pairs" in card
    assert "# smoke-pairs" in card


def test_name_layout_and_no_pictures(command: Command, store: Location, tmp_path: Path):
    seen = command(
        "export-pairs", "--out", f"{tmp_path}/out", "--no-pictures", "--layout", "diffusion-dpo", "--name", "x y"
    )
    assert seen.code == 0, seen.err
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# x y" in card
    assert "| `caption` |" in card
    assert "jpg_0" not in card
    assert "**The pictures themselves are left out**" in card


@pytest.mark.parametrize("made", ["nothing", "an open artifact"])
def test_a_run_without_closed_pairs(command: Command, tmp_path: Path, made: str, request: pytest.FixtureRequest):
    where = "run"
    if made != "nothing":
        store = request.getfixturevalue("store")
        (pairs,) = (store / "pairs").list()
        (pairs / "record.json").delete()
        where = f"store/pairs/{pairs.name}"
    command("export-pairs", "--out", f"{tmp_path}/out").assert_one_line(
        f"expected the closed pairs of run 'smoke', found none in {command.folder}/{where}: run `safetydpo pairs` with "
        "the same config first",
        code=1,
    )
    assert not (tmp_path / "out").exists()


def test_a_run_folder_of_another_config(command: Command, store: Location, tmp_path: Path):
    command("export-pairs", "identity.seed=5", "--out", f"{tmp_path}/out").assert_one_line(
        "was started with, found other values of identity.seed (0 -> 5)", code=2
    )


def test_a_place_that_is_taken(command: Command, store: Location, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    command("export-pairs", "--out", f"{tmp_path}/out").assert_one_line(
        f"expected nothing or an empty folder at {tmp_path}/out, found 1 files; choose another folder", code=2
    )


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--layout", "wide", "expected --layout preference or diffusion-dpo, found 'wide'"),
        ("--licence", "All rights reserved", "expected --licence as the hub writes it, such as cc-by-4.0"),
        ("--out", "s3://KEY:hush@bucket/x", "found more in front of the bucket's first slash: credentials belong into"),
    ],
)
def test_words_that_nobody_knows(command: Command, tmp_path: Path, option: str, value: str, message: str):
    seen = command("export-pairs", "--out", f"{tmp_path}/out", option, value)
    seen.assert_one_line(message, code=2)
    assert "hush" not in seen.err
