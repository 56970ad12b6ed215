from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safetydpo.artifacts.journal import Journal
from safetydpo.errors import SafetyDPOError, UsageError


def test_what_is_appended_is_read_back_in_order(tmp_path: Path):
    path = tmp_path / "new" / "a.jsonl"
    with Journal(path) as journal:
        assert journal.rows == []
        journal.append({"a": 1})
        journal.append({"b": "ü\u2028\n"})
    with Journal(path) as journal:
        assert journal.rows == [{"a": 1}, {"b": "ü\u2028\n"}]
        journal.append({"c": None})
    assert path.read_text(encoding="utf-8") == '{"a":1}\n{"b":"ü\u2028\\n"}\n{"c":null}\n'


def test_only_its_owner_reads_it(tmp_path: Path):
    with Journal(tmp_path / "a.jsonl"):
        assert stat.S_IMODE((tmp_path / "a.jsonl").stat().st_mode) == 0o600


@given(cut=st.integers(0, 23))
def test_a_file_cut_anywhere_keeps_its_whole_lines_and_goes_on(tmp_path_factory: pytest.TempPathFactory, cut: int):
    """Two lines of 12 bytes: cut inside the second, the first is left; cut inside the first, nothing is."""
    path = tmp_path_factory.mktemp("cut") / "a.jsonl"
    path.write_bytes((b'{"n":"one"}\n' + b'{"n":"two"}\n')[:cut])
    with Journal(path) as journal:
        assert journal.rows == [{"n": "one"}][: cut // 12]
        journal.append({"n": "new"})
    with Journal(path) as journal:
        assert journal.rows == [*[{"n": "one"}][: cut // 12], {"n": "new"}]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b"{", "expected JSON in line 2 of .*, found: .*; remove that line"),
        (b"[1]", "expected a JSON object in line 2 of .*, found a list"),
        (b"\xff", "expected JSON in line 2 of"),
    ],
)
def test_a_damaged_whole_line_is_named_and_nothing_is_taken_off(tmp_path: Path, line: bytes, told: str):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{}\n" + line + b"\n{}\n")
    with pytest.raises(SafetyDPOError, match=told):
        Journal(path)
    assert path.read_bytes() == b"{}\n" + line + b"\n{}\n"


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    code = f"from safetydpo.artifacts.journal import Journal\nfrom pathlib import Path\nJournal(Path({str(path)!r}))"
    with Journal(path):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "UsageError: expected " in done.stderr
        assert "to be free, found another process that writes to it" in done.stderr
        with pytest.raises(UsageError, match="found another process"):
            Journal(path)
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_place_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(SafetyDPOError, match="expected to open the journal .*, found: .*; choose another folder"):
        Journal(tmp_path / "file" / "a.jsonl")


def test_a_full_disk(tmp_path: Path):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with Journal(tmp_path / "a.jsonl") as journal:
        journal._file.close()
        with open("/dev/full", "wb", buffering=0) as full:
            journal._file = full
            with pytest.raises(
                SafetyDPOError, match="expected to append to .*No space left on device; free space, then"
            ):
                journal.append({"a": 1})
