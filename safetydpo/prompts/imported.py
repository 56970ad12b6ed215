"""An imported prompt table as the prompts and pairs that the stages ask for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from safetydpo.artifacts.layout import (
    MEMBERSHIPS_FILE,
    PROMPT_PAIRS_FILE,
    PROMPT_REJECTS_FILE,
    PROMPTS_FILE,
    WRITTEN_PROMPTS_FILE,
)
from safetydpo.artifacts.parquet_files import BrokenParquet, open_parquet
from safetydpo.artifacts.schemas import IMPORTED_PROMPTS
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import read_table
from safetydpo.errors import SafetyDPOError, shown
from safetydpo.prompts.sets import Prompt, PromptPair

OTHER_WRITTEN_TABLES = (PROMPT_PAIRS_FILE, MEMBERSHIPS_FILE, PROMPT_REJECTS_FILE)


def is_imported(location: Location) -> bool:
    """Whether an imported table, or a folder of such, stands here.

    In a folder nothing else may stand beside them, but for the other tables of `safetydpo prompts write`. One with
    `prompt_pairs.parquet` and `prompts.parquet` is a folder of three tables, whatever else it holds.
    """
    if location.is_file():
        return _has_columns(location)
    files = _tables(location)
    names = {file.name for file in files}
    if PROMPT_PAIRS_FILE in names and (WRITTEN_PROMPTS_FILE not in names or PROMPTS_FILE in names):
        return False
    return bool(files) and all(map(_has_columns, _prompt_tables(files)))


def read_imported(location: Location) -> pa.Table:
    """Return all rows of an imported table, or of the tables of a folder in name order.

    Raises:
        SafetyDPOError: if a file is truncated.
    """
    files = _tables(location)
    if not any(file.name == WRITTEN_PROMPTS_FILE for file in files):
        return read_table(location, IMPORTED_PROMPTS)
    return pa.concat_tables(read_table(file, IMPORTED_PROMPTS) for file in _prompt_tables(files))


def _tables(location: Location) -> list[Location]:
    return [file for file in location.list() if file.path.endswith(".parquet")] if location.is_folder() else []


def _prompt_tables(files: list[Location]) -> list[Location]:
    is_written = any(file.name == WRITTEN_PROMPTS_FILE for file in files)
    return [file for file in files if not (is_written and file.name in OTHER_WRITTEN_TABLES)]


def _has_columns(location: Location) -> bool:
    with location.open_random_access() as stream:
        if bytes(stream.read(4)) != b"PAR1":
            return False
        try:
            return bool(open_parquet(stream).schema_arrow.names == IMPORTED_PROMPTS.names)
        except BrokenParquet:
            return False


def read_pairs(location: Location) -> list[PromptPair]:
    """Return the pairs of the training split, in file order; a pair of two categories, or in two rows, is one pair.

    Raises:
        SafetyDPOError: if a file is truncated, or a pair has one side only.
    """
    texts: dict[str, dict[str, str]] = {}
    members: dict[str, dict[str, None]] = {}
    first: dict[str, Mapping[str, Any]] = {}
    for row in _rows(location):
        if row["pair_id"] and row["split"] == "train":
            texts.setdefault(row["pair_id"], {})[row["side"]] = row["text"]
            first.setdefault(row["pair_id"], row)
            named = members.setdefault(row["pair_id"], {})
            named.update({row["category"]: None} if row["category"] else {})
    alone = next((pair_id for pair_id, sides in texts.items() if not {"safe", "unsafe"} <= set(sides)), None)
    if alone is not None:
        raise SafetyDPOError(
            f"expected an unsafe and a safe text of pair {shown(alone)} in {location}, found one: import its file again"
        )
    return [
        PromptPair(
            unsafe_text=texts[pair_id]["unsafe"],
            safe_text=texts[pair_id]["safe"],
            category=next(iter(categories), ""),
            categories=tuple(categories),
            concept=first[pair_id]["concept"],
            source=first[pair_id]["source"],
        )
        for pair_id, categories in members.items()
    ]


def read_prompts(location: Location, split: str, prompt_set: str) -> list[Prompt]:
    """Return the prompts of a split and a set, in file order; one text is one prompt with all its categories."""
    members: dict[str, dict[str, None]] = {}
    first: dict[str, Mapping[str, Any]] = {}
    for row in _rows(location):
        if row["split"] == split and row["prompt_set"] == prompt_set:
            first.setdefault(row["prompt_id"], row)
            named = members.setdefault(row["prompt_id"], {})
            named.update({row["category"]: None} if row["category"] else {})
    return [
        Prompt(
            text=first[prompt_id]["text"],
            prompt_set=prompt_set,
            split=split,
            concept=first[prompt_id]["concept"],
            category=next(iter(categories), ""),
            categories=tuple(categories),
            background="",
        )
        for prompt_id, categories in members.items()
    ]


def _rows(location: Location) -> Iterator[Mapping[str, Any]]:
    yield from read_imported(location).to_pylist()
