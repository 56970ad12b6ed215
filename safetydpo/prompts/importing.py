"""From a prompt file of any format to one table of prompts, with an account of what was found in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import pyarrow as pa

from safetydpo.artifacts.schemas import IMPORTED_PROMPTS, make_prompt_id
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import table_from_rows
from safetydpo.config.fields import CATEGORIES
from safetydpo.errors import SafetyDPOError
from safetydpo.prompts.aliases import normalise_category, slug
from safetydpo.prompts.duplicates import NEAR, group_texts
from safetydpo.prompts.formats import PromptFormat, Side, check_forced, find_format, recognise
from safetydpo.prompts.readers import RawTable, read_prompt_file
from safetydpo.prompts.rows import SET_OF_SIDE, Choices, Extraction, FilePrompt, extract_prompts
from safetydpo.seeding import derive_seed

Split = Literal["auto", "train", "validation", "test"]
SPLIT_CHOICES: tuple[Split, ...] = ("auto", "train", "validation", "test")
SPLIT_SEED = 0
"""One seed for everybody, so that one file has one split."""
NO_CATEGORY = "(none)"


@dataclass(frozen=True)
class ImportOptions:
    """What the user may say about a file."""

    format: str | None = None
    """Name of the format; None = recognised by columns."""
    column: str | None = None
    """Column of the text; None = the format's default."""
    side: Side | None = None
    """Side of rows whose side the format does not know; None = the format's own."""
    source: str | None = None
    """Name of the set; None = the format's name."""
    split: Split | None = None
    """Split of rows that name none; `auto` spreads them; None = the format's default."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Further category names, slug -> category."""
    keep_unknown_categories: bool = False
    """Whether a category of no known name is kept under its own instead of being an error."""


@dataclass(frozen=True)
class ImportSummary:
    """What was found in a file."""

    file: str
    sha256: str
    format: str
    kind: str
    num_rows: int
    num_prompts: int
    """Rows used; the two texts of one row count as two."""
    num_pairs_in_file: int
    """Pairs as the file counts them: by image number, or by row."""
    num_pair_ids: int
    num_texts: int
    num_texts_by_side: Mapping[str, int]
    num_memberships: int
    memberships: Mapping[str, tuple[int, int]]
    """Category -> (memberships as the file counts pairs or prompts, distinct pair or prompt ids)."""
    spellings: Mapping[str, tuple[str, ...]]
    """Category -> how the file spells it."""
    splits: Mapping[str, int]
    """Split -> prompts."""
    duplicates: Mapping[str, int]
    dropped: Mapping[str, int]
    notes: Mapping[str, int]


@dataclass(frozen=True)
class ImportedSet:
    """A prompt file as a table of `IMPORTED_PROMPTS`, one row per (row, side, category), and the account of it."""

    table: pa.Table
    summary: ImportSummary


def import_prompts(
    location: Location, options: ImportOptions | None = None, *, partner: Location | None = None
) -> ImportedSet:
    """Read a prompt file of any known format.

    Raises:
        UsageError: if an option does not go with the file.
        SafetyDPOError: if the file is of no known format, broken, or holds an unknown category.
    """
    options = options or ImportOptions()
    table, form = read_as(location, options.format)
    other = None
    if partner is not None:
        other, second = read_as(partner, options.format)
        if second.name != form.name:
            raise SafetyDPOError(f"expected format {form.name} in {partner} too, found {second.name}")
    found = extract_prompts(table, form, Choices(options.column, options.side), partner=other)
    if not found.prompts:
        why = ", ".join(f"{reason}: {count}" for reason, count in found.dropped.items()) or "no row below the header"
        raise SafetyDPOError(f"expected prompts in {location}, found none ({why}): name another file")
    found.notes.update(table.notes)
    for name in form.unknown(table.columns):
        found.notes[f"column left out: {name}"] = len(table.rows)
    members = _name_categories(found.prompts, table.file, options)
    splits = assign_splits(found.prompts, options.split or form.split)
    rows = prompt_rows(
        found.prompts,
        members,
        splits,
        source=options.source or form.name,
        format_name=form.name,
        file_sha256=table.sha256,
    )
    return ImportedSet(
        table_from_rows(rows, IMPORTED_PROMPTS), _summarise(found, members, splits, table, form, options.side)
    )


def read_as(location: Location, name: str | None) -> tuple[RawTable, PromptFormat]:
    """Read a prompt file and say which format it has, or check that it has the format of that name.

    Raises:
        UsageError: if there is no such format, or the file lacks one of its columns.
        SafetyDPOError: if the format is not recognised.
    """
    forced = find_format(name) if name else None
    table = read_prompt_file(location, as_lines=forced is not None and forced.shape == "lines")
    if forced is not None and table.kind != "lines":
        check_forced(forced, table.columns, file=table.file)
        return table, forced
    if table.kind == "lines":
        if forced is not None and forced.shape != "lines":
            first = table.rows[0][1]["line"]
            check_forced(forced, [f"{str(first)[:40]} …"], file=table.file)
        return table, find_format("lines")
    return table, recognise(table.columns, [row.get("image") for _, row in table.rows], file=table.file)


def _name_categories(prompts: Sequence[FilePrompt], file: str, options: ImportOptions) -> list[list[tuple[str, str]]]:
    """Return, for each prompt, its (category, as the file spells it); one empty one if it has none."""
    unknown: Counter[str] = Counter()
    known: dict[str, str] = {}
    members = []
    for prompt in prompts:
        named: dict[str, str] = {}
        for original in prompt.categories:
            if original not in known:
                category = normalise_category(original, options.aliases)
                known[original] = category or (slug(original) if options.keep_unknown_categories else "")
            unknown[original] += not known[original]
            named.setdefault(known[original], original)
        members.append(list(named.items()) or [("", "")])
    unknown = +unknown
    if unknown:
        found = ", ".join(f"{name!r} ({count} rows)" for name, count in sorted(unknown.items()))
        raise SafetyDPOError(
            f"expected categories out of {', '.join(CATEGORIES)} (or a known spelling) in {file}, found {found}: name "
            "what they are with --alias NAME=CATEGORY, or take them as they are with --keep-unknown-categories"
        )
    return members


def assign_splits(prompts: Sequence[FilePrompt], split: Split) -> list[str]:
    """Return the split of each prompt: the file's own, else `split`.

    `auto` spreads prompts over train, validation and test like 8 : 1 : 1. What is the same goes together: the two
    texts of a pair, equal and near texts, and chains of such are one group, and a hash of the group's smallest text
    decides. So no prompt of one split is a near duplicate of one of another.
    """
    if split != "auto":
        return [prompt.split or split for prompt in prompts]
    pairs: dict[str, int] = {}
    links = [(pairs.setdefault(prompt.pair_id, place), place) for place, prompt in enumerate(prompts) if prompt.pair_id]
    texts = [prompt.text for prompt in prompts]
    groups = group_texts(texts, links, near=NEAR)
    first: dict[int, str] = {}
    for group, text in zip(groups, texts, strict=True):
        # The smallest text, not the first row: the order of a file must not matter.
        first[group] = min(first.get(group, text), text)
    chosen = {group: _tenth(text) for group, text in first.items()}
    return [prompt.split or chosen[group] for prompt, group in zip(prompts, groups, strict=True)]


def _tenth(text: str) -> str:
    tenth = derive_seed(SPLIT_SEED, "prompt_split", make_prompt_id(text)) % 10
    return "test" if tenth == 0 else "validation" if tenth == 1 else "train"


def prompt_rows(
    prompts: Sequence[FilePrompt],
    members: Sequence[Sequence[tuple[str, str]]],
    splits: Sequence[str],
    *,
    source: str,
    format_name: str,
    file_sha256: str,
) -> list[dict[str, object]]:
    """Return the rows of `IMPORTED_PROMPTS`: one per prompt and (category, as the file spells it)."""
    return [
        {
            "row": prompt.row,
            "prompt_id": prompt_id,
            "text": prompt.text,
            "side": prompt.side,
            "pair_id": prompt.pair_id,
            "category": category,
            "category_original": original,
            "concept": prompt.concept,
            "split": split,
            "prompt_set": prompt.prompt_set or SET_OF_SIDE[prompt.side],
            "seed": prompt.seed,
            "guidance": prompt.guidance,
            "width": prompt.width,
            "height": prompt.height,
            "winner": prompt.winner,
            "row_name": prompt.row_name,
            "source": source,
            "format": format_name,
            "file_sha256": file_sha256,
        }
        for prompt, named, split in zip(prompts, members, splits, strict=True)
        for prompt_id in (make_prompt_id(prompt.text),)
        for category, original in named
    ]


def _summarise(
    found: Extraction,
    members: Sequence[Sequence[tuple[str, str]]],
    splits: Sequence[str],
    table: RawTable,
    form: PromptFormat,
    side: Side | None,
) -> ImportSummary:
    prompts = found.prompts
    pairs = {(prompt.pair_name, prompt.pair_id) for prompt in prompts if prompt.pair_id}
    in_file: dict[str, set[str]] = {}
    distinct: dict[str, set[str]] = {}
    spellings: dict[str, dict[str, None]] = {}
    for prompt, named in zip(prompts, members, strict=True):
        for category, original in named:
            # One pair, however many rows spell it out, is one member of a category.
            name = category or NO_CATEGORY
            in_file.setdefault(name, set()).add(prompt.pair_name if prompt.pair_id else f"row {prompt.row}")
            distinct.setdefault(name, set()).add(prompt.pair_id or prompt.text)
            spellings.setdefault(name, {})[original] = None
    by_side: dict[str, set[str]] = {}
    for prompt in prompts:
        by_side.setdefault(prompt.side, set()).add(prompt.text)
    texts = {prompt.text for prompt in prompts}
    assumed = found.notes.pop("prompts whose side the file does not say", 0)
    if assumed:
        found.notes[f"prompts taken as {side or form.side}, which the file does not say (--side)"] = assumed
    return ImportSummary(
        file=table.file,
        sha256=table.sha256,
        format=form.name,
        kind=table.kind,
        num_rows=len(table.rows),
        num_prompts=len(prompts),
        num_pairs_in_file=len(pairs),
        num_pair_ids=len({pair_id for _, pair_id in pairs}),
        num_texts=len(texts),
        num_texts_by_side={name: len(values) for name, values in by_side.items()},
        num_memberships=sum(len(values) for values in in_file.values()),
        memberships={name: (len(in_file[name]), len(distinct[name])) for name in _in_order(in_file)},
        spellings={name: tuple(spellings[name]) for name in _in_order(spellings)},
        splits=dict(Counter(splits)),
        duplicates=_duplicates(prompts, form, len(pairs), texts),
        dropped=dict(found.dropped),
        notes=dict(found.notes),
    )


def _duplicates(prompts: Sequence[FilePrompt], form: PromptFormat, num_pairs: int, texts: set[str]) -> dict[str, int]:
    counts = {
        "prompts whose text occurs before": len(prompts) - len(texts),
        "pairs whose two texts occur before": num_pairs - len({prompt.pair_id for prompt in prompts if prompt.pair_id}),
    }
    if form.shape in ("named", "preference"):
        names = Counter(prompt.row_name for prompt in prompts if prompt.row_name)
        counts["image names in several rows"] = sum(count > 1 for count in names.values())
    return {name: count for name, count in counts.items() if count}


def _in_order(names: Mapping[str, object]) -> list[str]:
    """Return categories in the project's order, then others by name, then none."""
    others = sorted(set(names) - {*CATEGORIES, NO_CATEGORY})
    return [name for name in (*CATEGORIES, *others, NO_CATEGORY) if name in names]
