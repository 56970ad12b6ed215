"""A user's copy of a benchmark: is it the file that others measured on, and what is in it?"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safetydpo.artifacts.json_text import parse_json
from safetydpo.artifacts.storage import Location, open_location
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.prompts.benchmark_entries import BenchmarkCopy, BenchmarkEntry, find_entry, list_entries
from safetydpo.prompts.formats import find_format
from safetydpo.prompts.importing import ImportedSet, ImportOptions, ImportSummary, import_prompts
from safetydpo.prompts.leaks import read_texts
from safetydpo.prompts.readers import CHUNK_BYTES

ENDINGS = (".csv", ".tsv", ".txt", ".jsonl", ".parquet")


@dataclass(frozen=True)
class BenchmarkFile:
    """A file read as a benchmark.

    Attributes:
        entry: What it was read as.
        imported: Its prompts as a table, and the account of them.
        copy: The known copy with the same bytes; None if there is none.
        differences: What is not as the entry says: bytes, rows, texts, categories; empty if all of it is.
    """

    entry: BenchmarkEntry
    imported: ImportedSet
    copy: BenchmarkCopy | None
    differences: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Of the file's bytes."""
        return self.imported.summary.sha256

    @property
    def state(self) -> str:
        """In one line: whether the file is known."""
        if self.differences:
            return "accepted although " + "; ".join(self.differences)
        if self.copy is None:
            return "not verified: nobody has recorded the sha256 of this benchmark yet"
        return f"verified: the bytes of {self.copy.path or 'the file'} of {self.copy.source}"


def read_benchmark(entry: BenchmarkEntry, file: Location, *, accept_other_bytes: bool = False) -> BenchmarkFile:
    """Read a file as a benchmark, and refuse one that is another.

    Raises:
        UsageError: if no file stands there.
        SafetyDPOError: if its bytes or counts are not those of the entry and `accept_other_bytes` is not set, or if it
            cannot be read in the entry's format.
    """
    digest = _sha256(file)
    copy = entry.known_hashes.get(digest)
    differences = []
    if copy is None and entry.known_hashes:
        differences.append(f"sha256 {digest} is not {' or '.join(entry.known_hashes)}")
        # Said before the file is read: another file may be of another format.
        _refuse(entry, file, differences, accept_other_bytes)
    options = ImportOptions(
        format=entry.format,
        column=entry.column,
        # Formats that know their side refuse to be told one.
        side=None if find_format(entry.format).side_is_known else entry.side,
        source=entry.name,
        split="test",
    )
    imported = import_prompts(file, options)
    differences += _count_differences(entry, imported.summary)
    _refuse(entry, file, differences, accept_other_bytes)
    return BenchmarkFile(entry, imported, copy, tuple(differences))


def _refuse(entry: BenchmarkEntry, file: Location, differences: list[str], accept: bool) -> None:
    if differences and not accept:
        raise SafetyDPOError(
            f"expected the benchmark {entry.name} in {file}, found another file: {'; '.join(differences)}; take the "
            f"copy that `safetydpo benchmarks show {entry.name}` names, or this one with --accept-other-bytes "
            "(accept_other_bytes: true in a config)"
        )


def _sha256(file: Location) -> str:
    if not file.is_file():
        found = "a folder" if file.is_folder() else "nothing"
        raise UsageError(f"expected the file of a benchmark at {file}, found {found}: name one file")
    digest = hashlib.sha256()
    with file.open_random_access() as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _count_differences(entry: BenchmarkEntry, summary: ImportSummary) -> list[str]:
    wanted: dict[str, int | None] = {"rows": entry.num_rows, "distinct texts": entry.num_texts}
    found: dict[str, int] = {"rows": rows_with_prompts(summary), "distinct texts": own_texts(summary)}
    if entry.categories is not None:
        expected: dict[str, int] = {str(name): number for name, number in entry.categories.items()}
        names = dict.fromkeys([*expected, *summary.memberships])
        wanted |= {f"rows of {name}": expected.get(name, 0) for name in names if name != "(none)"}
        found |= {f"rows of {name}": summary.memberships.get(name, (0, 0))[0] for name in names}
    return [
        f"{what} are {found[what]:,}, not {number:,}"
        for what, number in wanted.items()
        if number is not None and found[what] != number
    ]


def rows_with_prompts(summary: ImportSummary) -> int:
    """Return how many rows of a file gave prompts; a pair counts once."""
    return summary.num_rows - sum(summary.dropped.values())


def own_texts(summary: ImportSummary) -> int:
    """Return the distinct prompts of a file without the safe partners of pairs."""
    sides = summary.num_texts_by_side
    return sum(number for side, number in sides.items() if side != "safe") or summary.num_texts


def recorded(file: BenchmarkFile) -> dict[str, Any]:
    """Return what is kept beside an imported benchmark, as JSON values."""
    summary = file.imported.summary
    return {
        "benchmark": file.entry.name,
        "sha256": file.sha256,
        "verified": file.copy is not None and not file.differences,
        "state": file.state,
        "rows": rows_with_prompts(summary),
        "texts": own_texts(summary),
        "categories": {name: count for name, (count, _) in summary.memberships.items() if name != "(none)"},
    }


def record_beside(table: Location) -> Location:
    """Return the file that keeps what an imported benchmark was made from."""
    return table.parent / f"{table.name}.benchmark.json"


def check_recorded(file: BenchmarkFile, table: Location, *, accept_other_bytes: bool) -> None:
    """Refuse to replace an imported benchmark by one of other bytes: at its second use its sha256 is known.

    Raises:
        SafetyDPOError: naming both hashes.
    """
    place = record_beside(table)
    if not place.is_file():
        return
    try:
        before: Mapping[str, Any] = parse_json(place.read_bytes())
        known = (str(before["benchmark"]), str(before["sha256"]))
    except (ValueError, KeyError, TypeError) as error:
        raise SafetyDPOError(
            f"expected a record of an imported benchmark at {place}, found {error!r}: delete it and import again"
        ) from error
    if known != (file.entry.name, file.sha256) and not accept_other_bytes:
        raise SafetyDPOError(
            f"expected the benchmark {known[0]} with sha256 {known[1]}, which {table} was made from, found "
            f"{file.entry.name} with {file.sha256}: name another --out, or replace it with --accept-other-bytes"
        )


def find_file(entry: BenchmarkEntry, folder: str | None) -> Location:
    """Return the file NAME.csv, .tsv, .txt, .jsonl or .parquet of a benchmark in a folder of local copies.

    Raises:
        SafetyDPOError: if no folder is named, or it does not hold exactly one such file.
    """
    if folder is None:
        raise SafetyDPOError(
            f"expected the file of benchmark {entry.name}, found none named: write {entry.name}=FILE, or name a folder "
            f"of copies such as {entry.name}.csv in execution.benchmarks"
        )
    place = open_location(folder)
    files = [place / f"{entry.name}{ending}" for ending in ENDINGS]
    found = [file for file in files if file.is_file()]
    if len(found) != 1:
        told = f"{len(found)} of them" if found else "none"
        raise SafetyDPOError(
            f"expected one file {entry.name}{'|'.join(ENDINGS)} in {place} (execution.benchmarks), found {told}: put "
            "your copy there"
        )
    return found[0]


def read_named_texts(name: str, *, folder: str | None) -> list[str]:
    """Return the texts of what a setting names: a benchmark `NAME` or `NAME=FILE`, else any prompt file or table.

    Raises:
        UsageError: if no file stands there.
        SafetyDPOError: if the file is not the benchmark's, or of no known format.
    """
    head, equals, file = name.partition("=")
    if head not in list_entries():
        return [placed.text for placed in read_texts(open_location(name))]
    entry = find_entry(head)
    place = open_location(file) if equals else find_file(entry, folder)
    return [str(text) for text in read_benchmark(entry, place).imported.table.column("text").to_pylist()]
