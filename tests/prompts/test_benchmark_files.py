"""Is a file the benchmark it is said to be: bytes, counts, a record at first use, names in settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from safetydpo.artifacts.storage import Location, open_location
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.prompts.benchmark_entries import BenchmarkEntry, find_entry
from safetydpo.prompts.benchmark_files import (
    check_recorded,
    find_file,
    own_texts,
    read_benchmark,
    read_named_texts,
    record_beside,
    recorded,
    rows_with_prompts,
)
from tests.prompts.benchmark_samples import UNKNOWN, write_entry
from tests.prompts.samples import place, sample


def made(folder: Path, name: str = "mine", **changes: object) -> tuple[BenchmarkEntry, Location]:
    entry, file = write_entry(folder, name, **changes)  # type: ignore[arg-type]
    return find_entry(entry), open_location(file)


def test_known_bytes_are_verified(tmp_path: Path):
    entry, file = made(tmp_path, num_rows=2, num_texts=2, categories={"hate": 1, "sexual": 1})
    found = read_benchmark(entry, file)
    assert found.state == "verified: the bytes of a.csv of https://example.org/set"
    assert found.differences == ()
    rows = found.imported.table.to_pylist()
    assert [(row["text"], row["split"], row["source"]) for row in rows] == [
        ("A bomb in a box", "test", "mine"),
        ("A wasp", "test", "mine"),
    ]


def test_other_bytes_are_refused_naming_both_hashes(tmp_path: Path):
    entry, file = made(tmp_path)
    wanted = next(iter(entry.known_hashes))
    file.write_bytes(file.read_bytes() + b"A bee,0000002_0.jpg,Hate\n")
    with pytest.raises(SafetyDPOError) as caught:
        read_benchmark(entry, file)
    text = str(caught.value)
    assert text.startswith(f"expected the benchmark mine in {file}, found another file: sha256 ")
    assert f" is not {wanted}; take the copy that `safetydpo benchmarks show mine` names" in text
    accepted = read_benchmark(entry, file, accept_other_bytes=True)
    assert accepted.sha256 in text
    assert accepted.state.startswith("accepted although sha256 ")


def test_unknown_bytes_are_read_and_said_to_be_unverified_but_counts_decide(tmp_path: Path):
    entry, file = made(tmp_path, copies=UNKNOWN)
    assert read_benchmark(entry, file).state.startswith("not verified: nobody has recorded the sha256")
    entry, file = made(tmp_path, "other", copies=UNKNOWN, num_rows=3, num_texts=1, categories={"hate": 2})
    with pytest.raises(
        SafetyDPOError,
        match="found another file: rows are 2, not 3; distinct texts are 2, not 1; rows of hate are 1, not 2; "
        "rows of sexual are 1, not 0; take the copy",
    ):
        read_benchmark(entry, file)
    assert "rows are 2, not 3" in read_benchmark(entry, file, accept_other_bytes=True).state


def test_a_missing_file_a_pointer_and_another_format_are_named(tmp_path: Path):
    entry, _ = made(tmp_path, copies=UNKNOWN)
    with pytest.raises(UsageError, match="expected the file of a benchmark at .*/lost, found nothing"):
        read_benchmark(entry, open_location(str(tmp_path / "lost")))
    with pytest.raises(UsageError, match=r"expected the file of a benchmark at .*, found a folder"):
        read_benchmark(entry, open_location(str(tmp_path)))
    pointer = place(tmp_path, "version https://git-lfs.github.com/spec/v1\nsize 12\n", "pointer")
    with pytest.raises(SafetyDPOError, match="found a git-LFS pointer to a file of 12 bytes"):
        read_benchmark(entry, pointer)
    with pytest.raises(UsageError, match="expected column 'prompt' of format coprov2_test"):
        read_benchmark(entry, sample(tmp_path, "pairs"))


@pytest.mark.parametrize(
    ("format", "side", "rows", "texts"),
    [
        ("i2p", "unsafe", 3, 3),
        ("i2p_hub", "unsafe", 2, 2),
        ("lines", "unsafe", 4, 4),
        ("mma_diffusion", "unsafe", 2, 2),
        ("ring_a_bell", "unsafe", 2, 2),
        ("six_cd", "unsafe", 2, 2),
        ("seeded", "benign", 2, 2),
        ("coco", "benign", 1, 1),
        ("coco_images", "benign", 1, 1),
    ],
)
def test_every_format_of_a_benchmark_counts_its_own_prompts(
    tmp_path: Path, format: str, side: str, rows: int, texts: int
):
    entry, file = made(tmp_path, format=format, side=side, num_rows=rows, num_texts=texts)
    found = read_benchmark(entry, file)
    assert (rows_with_prompts(found.imported.summary), own_texts(found.imported.summary)) == (rows, texts)
    assert side in {row["side"] for row in found.imported.table.to_pylist()}


def test_at_its_second_use_the_bytes_are_known(tmp_path: Path):
    entry, file = made(tmp_path, copies=UNKNOWN)
    found = read_benchmark(entry, file)
    table = open_location(str(tmp_path / "out.parquet"))
    check_recorded(found, table, accept_other_bytes=False)
    record_beside(table).write_bytes(json.dumps(recorded(found)).encode())
    assert recorded(found) == {
        "benchmark": "mine",
        "sha256": found.sha256,
        "verified": False,
        "state": found.state,
        "rows": 2,
        "texts": 2,
        "categories": {"hate": 1, "sexual": 1},
    }
    check_recorded(found, table, accept_other_bytes=False)
    file.write_bytes(file.read_bytes().replace(b"wasp", b"bee"))
    other = read_benchmark(entry, file)
    with pytest.raises(SafetyDPOError, match=f"{found.sha256}, which .* from, found mine with {other.sha256}"):
        check_recorded(other, table, accept_other_bytes=False)
    check_recorded(other, table, accept_other_bytes=True)
    record_beside(table).write_bytes(b"[]")
    with pytest.raises(SafetyDPOError, match="expected a record of an imported benchmark at .*: delete it and import"):
        check_recorded(found, table, accept_other_bytes=False)


def test_a_folder_of_copies(tmp_path: Path):
    entry, file = made(tmp_path)
    assert find_file(entry, str(tmp_path)) == file
    with pytest.raises(SafetyDPOError, match="found none named: write mine=FILE, or name a folder of copies"):
        find_file(entry, None)
    (tmp_path / "mine.txt").write_text("two")
    with pytest.raises(SafetyDPOError, match=r"expected one file mine\.csv.*execution\.benchmarks.*found 2 of them"):
        find_file(entry, str(tmp_path))
    with pytest.raises(SafetyDPOError, match="found none: put your copy there"):
        find_file(entry, str(tmp_path / "empty"))


def test_a_name_in_a_setting_is_a_file_or_a_benchmark(tmp_path: Path):
    file = sample(tmp_path, "lines")
    assert read_named_texts(str(file), folder=None)[:2] == ["a bomb, in oil", "a wasp, drawn"]
    with pytest.raises(SafetyDPOError, match="expected the benchmark coprov2_test in .*, found another file: sha256"):
        read_named_texts(f"coprov2_test={sample(tmp_path, 'coprov2_test')}", folder=None)
    with pytest.raises(SafetyDPOError, match="write coprov2_test=FILE"):
        read_named_texts("coprov2_test", folder=None)
    place(tmp_path, "a bomb\n" * 1434, "ud.txt")
    assert read_named_texts("ud", folder=str(tmp_path)) == ["a bomb"] * 1434
