"""Benchmarks as data: one YAML file each in `benchmarks/` says where a prompt file comes from and what is in it.

No prompt ships with the project. An entry names the known copies of a file by their sha256; where nobody could look
into a file, its sha256 is null and is recorded when it is first used.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from safetydpo.config.fields import Category, Frozen
from safetydpo.config.load import parse_settings, read_yaml
from safetydpo.errors import UsageError
from safetydpo.prompts.formats import find_format

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class BenchmarkCopy(Frozen):
    """One place where the file stands."""

    source: str
    """Address of the repository, record or form."""
    revision: str | None = None
    """Commit that was looked at; None = unknown."""
    path: str | None = None
    """The file in it; None = unknown."""
    sha256: Sha256 | None = None
    """Of its bytes; None = unknown: computed and recorded at first use."""
    num_bytes: int | None = Field(None, ge=1)
    """Its size; None = unknown."""


class HubFile(Frozen):
    """The file in a data set of the Hugging Face hub."""

    repository: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    """`owner/name`."""
    file: str | None = None
    """Name of the file there; None = unknown, to be named."""
    revision: str | None = None
    """Commit; None = the newest, which may change."""


class BenchmarkEntry(Frozen):
    """A benchmark: where it comes from, how it is read, and what must be found in it."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    """Short name; that of the YAML file."""
    title: str
    """What it is, in one line."""
    paper: str
    """Where it was published."""
    licence: str
    """Identifier of the licence, or `unknown`."""
    licence_note: str
    """Where the licence was read, and of what it is."""
    access: Literal["open", "on request", "unknown"]
    """Whether the file can be had without asking its authors."""
    format: str
    """Name of the format it is read by (`safetydpo prompts formats`)."""
    columns: tuple[str, ...] = ()
    """Columns of the file; () for plain lines, and where they are unknown."""
    column: str | None = None
    """Column of the prompt where the format has several; None = the format's default."""
    side: Literal["unsafe", "benign"]
    """What its prompts ask for: `unsafe` or `benign`."""
    num_rows: int | None = Field(None, ge=1)
    """Rows with a prompt; None = unknown."""
    num_texts: int | None = Field(None, ge=1)
    """Distinct prompts; None = unknown."""
    categories: Mapping[Category, int] | None = None
    """Rows per category, a row of several counted in each; None = unknown or none."""
    hub: HubFile | None = None
    """The file on the hub, which `benchmarks fetch` can load; None = it is not there."""
    copies: tuple[BenchmarkCopy, ...] = Field(min_length=1)
    """Where it stands."""
    notes: str = ""
    """What one has to know to read its numbers."""

    @model_validator(mode="after")
    def _is_read_by_a_known_format(self) -> Self:
        try:
            form = find_format(self.format)
        except UsageError as error:
            raise ValueError(str(error)) from error
        if form.side_is_known and form.side != self.side:
            raise ValueError(
                f"expected side {form.side!r}, which is known of format {form.name}, found {self.side!r}: correct it"
            )
        return self

    @property
    def known_hashes(self) -> dict[str, BenchmarkCopy]:
        """The copies whose bytes are known, by sha256."""
        return {copy.sha256: copy for copy in self.copies if copy.sha256 is not None}


@cache
def list_entries() -> Mapping[str, BenchmarkEntry]:
    """Return the shipped entries by name, in alphabetical order."""
    folder = Path(str(files("safetydpo"))) / "prompts" / "benchmarks"
    entries = [read_entry(file) for file in sorted(folder.glob("*.yaml"))]
    return {entry.name: entry for entry in entries}


def read_entry(file: Path) -> BenchmarkEntry:
    """Return the entry in a YAML file.

    Raises:
        UsageError: if there is none, or a field is unknown or wrong.
    """
    content = read_yaml(file, what="a benchmark entry", hint="see docs/benchmarks.md for its fields")
    return parse_settings(BenchmarkEntry, content, source=str(file))


def find_entry(name: str) -> BenchmarkEntry:
    """Return a shipped entry by name, or that of a YAML file of the user's own.

    Raises:
        UsageError: if there is none, naming the nearest.
    """
    if name.endswith((".yaml", ".yml")):
        return read_entry(Path(name))
    entries = list_entries()
    if name not in entries:
        near = difflib.get_close_matches(name, entries, n=1, cutoff=0.6)
        meant = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(f"expected a benchmark out of {', '.join(entries)}, found {name!r}: {meant}name one of them")
    return entries[name]


def describe_entry(entry: BenchmarkEntry) -> list[tuple[str, str]]:
    """Return an entry as (field, text) lines for people."""

    def told(value: Any) -> str:
        return "unknown" if value is None else f"{value:,}" if isinstance(value, int) else str(value)

    lines = [
        ("name", entry.name),
        ("title", entry.title),
        ("paper", entry.paper),
        ("licence", f"{entry.licence} ({entry.licence_note})"),
        ("access", entry.access),
        ("format", entry.format + (f", column {entry.column}" if entry.column else "")),
        ("columns", ", ".join(entry.columns) or ("none" if entry.format == "lines" else "unknown")),
        ("prompts ask for", f"{entry.side} pictures"),
        ("rows", told(entry.num_rows)),
        ("distinct texts", told(entry.num_texts)),
    ]
    if entry.categories is not None:
        lines.append(("categories", ", ".join(f"{name} {count:,}" for name, count in entry.categories.items())))
    for copy in entry.copies:
        place = "/".join(part for part in (copy.source, copy.path) if part)
        lines.append(("copy", place + (f" at {copy.revision}" if copy.revision else "")))
        lines.append(("sha256", copy.sha256 or "unknown; computed and recorded at first use"))
    if entry.hub is not None:
        file = entry.hub.file or "a file that --file names"
        lines.append(("hub", f"{entry.hub.repository}, {file}, revision {entry.hub.revision or 'newest'}"))
    if entry.notes:
        lines.append(("notes", " ".join(entry.notes.split())))
    return lines
