"""What `safetydpo import-pairs` does: take files of given preferences into a folder for runs. Needs no Ray."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence

from safetydpo.artifacts.records import Record
from safetydpo.artifacts.storage import Location, open_location
from safetydpo.config.fields import CATEGORIES
from safetydpo.errors import SafetyDPOError, UsageError


def import_pairs(
    files: Sequence[str],
    *,
    out: str,
    category: str | None,
    categories_from: str | None,
    concept: str | None,
    source: str,
    max_bad_rate: float,
) -> None:
    """Write the preferences of Parquet files to the folder `out` and say what was found.

    Raises:
        UsageError: if something stands at `out`, a file is not there, or nothing says the rows' categories.
        SafetyDPOError: if a file cannot be read, or too many rows have a fault.
    """
    from rich.progress import Progress

    from ray_jobs.terminal import TextConsole
    from safetydpo.pairs.preference_store import write_preferences
    from safetydpo.pairs.preferences import count_rows, has_categories

    locations = [open_location(file) for file in files]
    target = open_location(out)
    for location in (*locations, target):
        location.check_reachable()
    num_rows = sum(count_rows(location) for location in locations)
    silent = next((str(file) for file in locations if not has_categories(file)), None)
    find = _category_finder(category, categories_from, concept, silent=silent)
    console = TextConsole(highlight=False, soft_wrap=True)
    with Progress(console=console, transient=True, disable=not sys.stdout.isatty()) as progress:
        task = progress.add_task("rows", total=num_rows)
        record = write_preferences(
            target,
            locations,
            categories_of=find,
            source=source,
            max_bad_rate=max_bad_rate,
            report=lambda rows: progress.advance(task, rows),
        )
    for line in summary_lines(record, target):
        console.print(line)


def summary_lines(record: Record, target: Location) -> list[str]:
    """Return what a person should know of an import."""
    counts = record.counts
    return [
        f"{counts['preferences']} preferences of {counts['rows']} rows are in {target}, "
        f"pictures: {counts['pictures']}, rows with one caption: {counts['one_caption']}",
        "  sizes of pictures: " + ", ".join(f"{size}: {count}" for size, count in record.details["sizes"].items()),
        *(f"  left out: {reason}: {count}" for reason, count in record.details["left_out"].items()),
        *(f"  bad row: {fault}" for fault in record.details["faults"]),
        f"train on them: safetydpo train CONFIG identity.pairs.source={target} identity.prompts.retention_prompts=0",
    ]


def _category_finder(
    category: str | None, categories_from: str | None, concept: str | None, *, silent: str | None
) -> Callable[..., tuple[tuple[str, ...], str]]:
    """Return what says a row's categories and concept: itself, its caption's row in a prompt table, or one for all."""
    from safetydpo.pairs.preferences import GivenPreference
    from safetydpo.prompts.aliases import normalise_category

    if category is not None and normalise_category(category) is None:
        raise UsageError(f"expected --category out of {', '.join(CATEGORIES)}, found {category!r}")
    if silent is not None and category is None and categories_from is None:
        raise UsageError(
            f"expected the category of every row, found no column categories or category in {silent}: say it with "
            "--category for all rows, or with --categories-from FILE, a prompt table that `safetydpo prompts import` "
            "made of the captions"
        )
    known = _categories_by_caption(categories_from) if categories_from is not None else {}

    def find(row: GivenPreference) -> tuple[tuple[str, ...], str]:
        by_caption, its_concept = known.get(row.unsafe_text, known.get(row.safe_text, ((), "")))
        names = row.categories or by_caption or ((category,) if category is not None else ())
        categories = tuple(dict.fromkeys(found for name in names if (found := normalise_category(name)) is not None))
        return categories, row.concept or its_concept or (concept or "")

    return find


def _categories_by_caption(path: str) -> Mapping[str, tuple[tuple[str, ...], str]]:
    from safetydpo.prompts.imported import is_imported, read_imported

    place = open_location(path)
    place.check_reachable()
    if not place.exists() or not is_imported(place):
        found = "another file" if place.exists() else "nothing"
        raise UsageError(
            f"expected a prompt table in --categories-from, found {found} at {path}: make it of the captions file with "
            "`safetydpo prompts import`"
        )
    table = read_imported(place).select(["text", "category", "concept"])
    names: dict[str, dict[str, None]] = {}
    concepts: dict[str, str] = {}
    for row in table.to_pylist():
        names.setdefault(row["text"], {}).update({row["category"]: None} if row["category"] else {})
        concepts.setdefault(row["text"], row["concept"])
    if not any(names.values()):
        raise SafetyDPOError(f"expected categories in {path}, found none: name a prompt table whose rows have some")
    return {text: (tuple(found), concepts[text]) for text, found in names.items()}
