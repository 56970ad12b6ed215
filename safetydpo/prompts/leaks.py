"""Which prompts of one set occur in another: exactly, after normalisation, nearly (the leak check)."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from safetydpo.artifacts.csv_cells import text_cell
from safetydpo.artifacts.storage import Location
from safetydpo.errors import UsageError
from safetydpo.prompts.duplicates import NEAR, find_near, normalised_key
from safetydpo.prompts.imported import is_imported, read_imported
from safetydpo.prompts.importing import ImportOptions, import_prompts

Likeness = Literal["exact", "normalised", "near"]
LIKENESSES: tuple[Likeness, ...] = ("exact", "normalised", "near")


@dataclass(frozen=True)
class PlacedText:
    """A text and the row of its file."""

    row: int
    text: str


@dataclass(frozen=True)
class Leak:
    """A distinct text of a set that occurs in another one, with its best partner there."""

    rows: tuple[int, ...]
    text: str
    other_row: int
    other_text: str
    likeness: Likeness
    jaccard: float
    """Of the two word sets, in [0, 1]; 1 if they are equal."""


@dataclass(frozen=True)
class LeakReport:
    """What one set has in common with another."""

    num_rows: int
    num_texts: int
    leaks: tuple[Leak, ...]
    """In the order of the rows; each distinct text once, with its strongest likeness."""

    def rows(self, likeness: Likeness) -> int:
        """Return how many rows leak in this way and in no stronger one."""
        return sum(len(leak.rows) for leak in self.leaks if leak.likeness == likeness)

    def texts(self, likeness: Likeness) -> int:
        """Return how many distinct texts leak in this way and in no stronger one."""
        return sum(leak.likeness == likeness for leak in self.leaks)


def read_texts(location: Location) -> list[PlacedText]:
    """Return the texts of an imported table, a folder of such, or a prompt file of any format; both sides of a pair.

    Raises:
        UsageError: if nothing stands there.
        SafetyDPOError: if the file is of no known format.
    """
    if is_imported(location):
        table = read_imported(location)
    elif location.is_folder():
        raise UsageError(f"expected a prompt file or imported tables at {location}, found a folder without such")
    else:
        table = import_prompts(location, ImportOptions(split="train", keep_unknown_categories=True)).table
    columns = zip(*(table.column(name).to_pylist() for name in ("file_sha256", "row", "side", "text")), strict=True)
    # A row of two categories stands in the table twice and is one row.
    return [PlacedText(row, text) for _, row, _, text in dict.fromkeys(columns)]


def find_leaks(texts: Sequence[PlacedText], others: Sequence[PlacedText], *, near: float = NEAR) -> LeakReport:
    """Compare a set with another one.

    `exact`: the same characters, without white space at the ends. `normalised`: the same after `duplicates.normalise`
    (no case, no punctuation). `near`: word sets without articles whose Jaccard index is at least `near`. A text without
    a letter or digit leaks exactly or not at all.
    """
    rows: dict[str, list[int]] = {}
    for placed in texts:
        rows.setdefault(placed.text, []).append(placed.row)
    distinct = list(rows)
    exact = _first_rows((other.text, other) for other in others)
    same = _first_rows((key, other) for other in others if (key := normalised_key(other.text)))
    candidates = list(exact.values())
    best: dict[int, tuple[float, PlacedText]] = {}
    for pair in find_near(distinct, [other.text for other in candidates], near=near):
        if pair.left not in best or pair.jaccard > best[pair.left][0]:
            best[pair.left] = (pair.jaccard, candidates[pair.right])
    leaks = []
    for place, text in enumerate(distinct):
        likeness: Likeness = "exact"
        jaccard, other = 1.0, exact.get(text)
        if other is None:
            likeness, other = "normalised", same.get(normalised_key(text))
        if other is None and place in best:
            likeness, (jaccard, other) = "near", best[place]
        if other is not None:
            leaks.append(Leak(tuple(rows[text]), text, other.row, other.text, likeness, jaccard))
    return LeakReport(len(texts), len(distinct), tuple(leaks))


def _first_rows(placed: Iterable[tuple[str, PlacedText]]) -> dict[str, PlacedText]:
    first: dict[str, PlacedText] = {}
    for key, other in placed:
        first.setdefault(key, other)
    return first


def leaks_as_csv(reports: Iterable[tuple[str, LeakReport]]) -> bytes:
    """Return the lists of several comparisons, (name of the other set, report), as one CSV file in UTF-8."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["likeness", "jaccard", "rows", "text", "against", "against_row", "against_text"])
    for name, report in reports:
        for leak in report.leaks:
            shown = " ".join(map(str, leak.rows))
            writer.writerow(
                [
                    leak.likeness,
                    f"{leak.jaccard:.3f}",
                    shown,
                    text_cell(leak.text),
                    text_cell(name),
                    leak.other_row,
                    text_cell(leak.other_text),
                ]
            )
    return text.getvalue().encode()
