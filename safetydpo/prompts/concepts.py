"""Lists of concepts, as YAML or CSV: what prompt pairs are written about, and where each concept comes from.

Reading is strict, because a list decides what a model is trained to decline: whatever is not understood is an error
that names the file and the line.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from safetydpo.artifacts.schemas import sha256_of
from safetydpo.config.fields import CATEGORIES
from safetydpo.config.safe_yaml import YamlError, compose_yaml
from safetydpo.errors import UsageError
from safetydpo.prompts.aliases import normalise_category
from safetydpo.prompts.duplicates import normalise

FIELDS = ("category", "concept", "source", "licence", "ood", "counterpart")
_REQUIRED = ("category", "concept", "source", "licence")
_LIST_DEFAULTS = ("source", "licence")
_YAML = "tag:yaml.org,2002:"


@dataclass(frozen=True)
class ConceptEntry:
    """One concept of a list.

    Attributes:
        categories: What it belongs to, the first one first; a pair written about it is a member of each.
        concept: What prompts call it.
        source: Where the concept comes from.
        licence: Under which terms it may be used.
        ood: Held out of training: experts never see its pairs, tests do.
        counterpart: What is drawn in its place; empty if the list says nothing.
        line: Where the entry begins in its file, from 1.
    """

    categories: tuple[str, ...]
    concept: str
    source: str
    licence: str
    ood: bool = False
    counterpart: str = ""
    line: int = 0

    @property
    def category(self) -> str:
        """The first category."""
        return self.categories[0]

    @property
    def key(self) -> str:
        """The concept as it is compared: one key, one concept."""
        return normalise(self.concept)


def read_concepts(path: Path) -> tuple[ConceptEntry, ...]:
    """Read a list of concepts in file order.

    Raises:
        UsageError: naming file and line of what is missing, unknown, doubled or no text.
    """
    readers = {".yaml": _yaml_rows, ".yml": _yaml_rows, ".csv": _csv_rows}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UsageError(f"expected a concept list that ends in .yaml, .yml or .csv, found {path}: rename it")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UsageError(f"expected a concept list at {path}, found nothing: correct the path") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"expected a readable UTF-8 concept list at {path}, found: {error}") from error
    entries: dict[str, ConceptEntry] = {}
    for line, row in reader(text, path):
        entry = _entry(row, line=line, where=f"{path}:{line}")
        before = entries.setdefault(entry.key, entry)
        if before is not entry:
            raise UsageError(
                f"{path}:{line}: expected each concept once, found {entry.concept!r} again (first in line "
                f"{before.line}): keep one entry and give it all its categories"
            )
    if not entries:
        raise UsageError(f"expected at least one concept in {path}, found none: add one")
    return tuple(entries.values())


def fingerprint_concepts(entries: Sequence[ConceptEntry]) -> str:
    """Return the identity of a list: of what its entries say, in any order, on any line."""
    return sha256_of(sorted(sha256_of({**asdict(entry), "line": 0}) for entry in entries))


def _entry(row: Mapping[str, str], *, line: int, where: str) -> ConceptEntry:
    unknown = [name for name in row if name not in FIELDS]
    if unknown:
        raise UsageError(
            f"{where}: expected the fields {', '.join(FIELDS)}, found {unknown[0]!r}: correct or remove it"
        )
    values = {name: " ".join(value.split()) for name, value in row.items()}
    for name in _REQUIRED:
        if not values.get(name):
            raise UsageError(f"{where}: expected a {name}, found none: every concept needs {', '.join(_REQUIRED)}")
    if not normalise(values["concept"]):
        raise UsageError(f"{where}: expected a concept with letters or digits, found {values['concept']!r}: reword it")
    return ConceptEntry(
        categories=_categories(values["category"], where),
        concept=values["concept"],
        source=values["source"],
        licence=values["licence"],
        ood=_boolean(values.get("ood", ""), where),
        counterpart=values.get("counterpart", ""),
        line=line,
    )


def _categories(written: str, where: str) -> tuple[str, ...]:
    names = []
    for part in written.split(","):
        name = normalise_category(part)
        if name is None:
            raise UsageError(
                f"{where}: expected a category among {', '.join(CATEGORIES)}, found {part.strip()!r}: correct it"
            )
        if name in names:
            raise UsageError(f"{where}: expected each category once, found {part.strip()!r} again: remove it")
        names.append(name)
    return tuple(names)


def _boolean(written: str, where: str) -> bool:
    if written.casefold() not in ("true", "false", ""):
        raise UsageError(f"{where}: expected ood to be true or false, found {written!r}: correct it")
    return written.casefold() == "true"


def _csv_rows(text: str, path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        _check_header(header, path)
        end = reader.line_num
        for row in reader:
            line, end = end + 1, reader.line_num
            if not any(field.strip() for field in row):
                continue
            if len(row) != len(header):
                raise UsageError(
                    f"{path}:{line}: expected {len(header)} fields as in the header, found {len(row)}: quote fields "
                    "that hold commas"
                )
            yield line, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise UsageError(f"{path}:{reader.line_num}: expected CSV, found: {error}; correct the quotes") from error


def _check_header(header: Sequence[str], path: Path) -> None:
    unknown = [name for name in header if name not in FIELDS]
    missing = [name for name in _REQUIRED if name not in header]
    doubled = [name for name in header if header.count(name) > 1]
    for found, names in (("an unknown", unknown), ("no", missing), ("twice", doubled)):
        if names:
            raise UsageError(
                f"{path}:1: expected a header of the columns {', '.join(FIELDS)} (the last two may be left out), "
                f"found {found} {names[0]!r}: correct the first line"
            )


def _yaml_rows(text: str, path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    try:
        root = compose_yaml(text)
    except YamlError as error:
        raise UsageError(f"expected YAML in {path}, found: {error}") from error
    if root is None:
        return
    top = _mapping(root, path, what="a mapping with `concepts`")
    unknown = [key for key in top if key not in (*_LIST_DEFAULTS, "concepts")]
    if unknown:
        raise UsageError(
            f"{path}:{_line(top[unknown[0]])}: expected the keys concepts, {', '.join(_LIST_DEFAULTS)}, found "
            f"{unknown[0]!r}: correct or remove it"
        )
    defaults = {name: _text(top[name], path, name) for name in _LIST_DEFAULTS if name in top}
    concepts = top.get("concepts")
    if not isinstance(concepts, yaml.SequenceNode):
        raise UsageError(f"{path}:{_line(root)}: expected a list below `concepts`, found none: add one")
    for node in concepts.value:
        fields = _mapping(node, path, what="an entry such as {category: hate, concept: …}")
        yield _line(node), defaults | {name: _text(value, path, name) for name, value in fields.items()}


def _mapping(node: yaml.Node, path: Path, *, what: str) -> dict[str, yaml.Node]:
    if not isinstance(node, yaml.MappingNode):
        raise UsageError(f"{path}:{_line(node)}: expected {what}, found something else: correct it")
    found: dict[str, yaml.Node] = {}
    for key, value in node.value:
        name = key.value if isinstance(key, yaml.ScalarNode) else "a key that is no text"
        if name in found:
            raise UsageError(f"{path}:{_line(key)}: expected each key once, found {name!r} again: remove one")
        found[name] = value
    return found


def _text(node: yaml.Node, path: Path, name: str) -> str:
    """Return a scalar as it is written, so that a concept called `no` or `911` stays a text; null is empty."""
    if isinstance(node, yaml.SequenceNode) and name == "category":
        return ", ".join(_text(item, path, "category, one of a list") for item in node.value)
    if not isinstance(node, yaml.ScalarNode):
        raise UsageError(f"{path}:{_line(node)}: expected a text as {name}, found something else: correct it")
    return "" if node.tag == f"{_YAML}null" else str(node.value)


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
