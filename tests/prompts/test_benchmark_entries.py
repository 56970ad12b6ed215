"""The shipped entries: complete, consistent with the readers, no invented checksum; and wrong entries refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from safetydpo.errors import UsageError
from safetydpo.prompts.benchmark_entries import describe_entry, find_entry, list_entries, read_entry
from safetydpo.prompts.formats import find_format, recognise
from tests.prompts.benchmark_samples import write_entry

ENTRIES = list_entries()
PUBLISHED = {
    "coprov2_test",
    "i2p",
    "i2p_hub",
    "ud",
    "six_cd_harm",
    "six_cd_nudity",
    "coco_10k",
    "coco_30k",
    "mma_diffusion",
    "ring_a_bell_nudity",
    "ring_a_bell_violence_k77",
    "sneakyprompt",
    "p4d",
    "unlearndiffatk_nudity",
}


def test_every_benchmark_of_the_field_is_there():
    assert set(ENTRIES) >= PUBLISHED


@pytest.mark.parametrize("name", sorted(ENTRIES))
def test_an_entry_is_named_like_its_file_and_agrees_with_its_reader(name: str, root: Path):
    entry = ENTRIES[name]
    assert entry == read_entry(root / "safetydpo" / "prompts" / "benchmarks" / f"{name}.yaml")
    assert entry.name == name
    form = find_format(entry.format)
    assert not entry.column or entry.column in form.texts
    if entry.columns:
        images = ["0000000_0.jpg"] if "image" in entry.columns else []
        assert recognise(entry.columns, images, file=name).name == entry.format
    if entry.num_texts is not None and entry.num_rows is not None:
        assert entry.num_texts <= entry.num_rows
    assert all(copy.source.startswith("https://") for copy in entry.copies)


@pytest.mark.parametrize("name", sorted(ENTRIES))
def test_a_known_checksum_has_a_revision_a_size_and_counts_and_an_unknown_one_says_so(name: str):
    entry = ENTRIES[name]
    for copy in entry.copies:
        if copy.sha256 is not None:
            assert re.fullmatch("[0-9a-f]{40}", copy.revision or "")
            assert None not in (copy.path, copy.num_bytes, entry.num_rows, entry.num_texts)
            assert entry.columns
        else:
            assert ("sha256", "unknown; computed and recorded at first use") in describe_entry(entry)


def test_checksums_are_of_different_files():
    hashes = [digest for entry in ENTRIES.values() for digest in entry.known_hashes]
    assert len(set(hashes)) == len(hashes) >= 15


def test_published_counts():
    assert (ENTRIES["coprov2_test"].num_rows, ENTRIES["coprov2_test"].num_texts) == (8000, 7942)
    assert ENTRIES["i2p"].num_rows == ENTRIES["i2p_hub"].num_rows == 4703
    assert ENTRIES["ud"].num_rows == 1434
    assert sum((ENTRIES["coprov2_test"].categories or {}).values()) == 8000


def test_an_entry_is_described_with_source_revision_checksum_licence_and_columns():
    text = dict(describe_entry(ENTRIES["coprov2_test"]))
    assert text["copy"].startswith("https://github.com/Visualignment/SafetyDPO/data/CoProv2_test.csv at 5f71f8db")
    assert len(text["sha256"]) == 64
    assert text["licence"].startswith("mit (")
    assert text["columns"] == "prompt, image, category"
    assert text["rows"] == "8,000"
    hub = dict(describe_entry(ENTRIES["mma_diffusion"]))
    assert hub["hub"].endswith("a file that --file names, revision newest")


def test_an_unknown_name_is_answered_with_the_nearest(tmp_path: Path):
    with pytest.raises(
        UsageError, match="expected a benchmark out of coco_10k, .*, found 'coprov2': did you mean 'copro"
    ):
        find_entry("coprov2")
    with pytest.raises(UsageError, match="found 'xyz': name one of them"):
        find_entry("xyz")
    file, _ = write_entry(tmp_path, "mine")
    assert find_entry(file).name == "mine"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sha": "x"}, r"mine\.yaml: expected known keys only, found 'sha'; correct or remove it"),
        ({"side": "benign"}, "expected side 'unsafe', which is known of format coprov2_test, found 'benign': correct"),
        ({"format": "coprov3"}, "expected a format out of .*, found 'coprov3'"),
        ({"copies": []}, "copies: .*at least 1 item"),
        ({"copies": [{"source": "x", "sha256": "abc"}]}, r"copies\.0\.sha256: expected a text that matches"),
        ({"name": "Not A Name"}, "name: expected a text that matches"),
        ({"licence": None}, "licence: expected a valid string, found None"),
        ({"categories": {"weather": 3}}, "categories"),
    ],
)
def test_a_wrong_entry_is_refused_naming_the_field(tmp_path: Path, changes: dict[str, object], message: str):
    file, _ = write_entry(tmp_path, "mine", wrong=changes)
    with pytest.raises(UsageError, match=message):
        find_entry(file)


def test_a_missing_entry_file_is_named(tmp_path: Path):
    with pytest.raises(
        UsageError, match=r"expected a benchmark entry at .*no\.yaml, found nothing; see docs/benchmarks"
    ):
        find_entry(str(tmp_path / "no.yaml"))
