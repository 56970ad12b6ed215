"""What the rows of each format become: prompts with a side, a pair, categories, a seed (pure)."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from safetydpo.artifacts.schemas import make_pair_id
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.prompts.aliases import split_categories
from safetydpo.prompts.formats import PAIR_IMAGE, SIDES, PromptFormat, Side
from safetydpo.prompts.readers import RawTable, Row

SPLITS = ("train", "validation", "test")
SIDE_OF_SET: Mapping[str, Side] = {
    "unsafe": "unsafe",
    "ood": "unsafe",
    "safe": "safe",
    "neutral": "benign",
    "neighbour": "benign",
}
SET_OF_SIDE: Mapping[Side, str] = {"unsafe": "unsafe", "safe": "neighbour", "benign": "neutral"}


@dataclass(frozen=True)
class FilePrompt:
    """One prompt of a file: of a pair, one side."""

    row: int
    text: str
    side: Side
    pair_id: str = ""
    pair_name: str = ""
    """What ties the sides of a pair together in the file: the number in the image names, or the row."""
    categories: tuple[str, ...] = ()
    """As the file spells them."""
    concept: str = ""
    split: str = ""
    """Split that the file names; empty if none."""
    prompt_set: str = ""
    seed: int | None = None
    guidance: float | None = None
    width: int | None = None
    height: int | None = None
    winner: str = ""
    """Of a preference: `jpg_0` or `jpg_1`."""
    row_name: str = ""
    """What the file calls the row: image name, case number."""


@dataclass
class Extraction:
    """The prompts of a file, and the rows left out, counted by reason."""

    prompts: list[FilePrompt] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Choices:
    """What the user chose about a file's rows."""

    column: str | None = None
    """Column of the text; None = the format's default."""
    side: Side | None = None
    """Side of the rows of a format that does not know it; None = the format's own guess."""


def extract_prompts(table: RawTable, form: PromptFormat, choices: Choices, *, partner: RawTable | None) -> Extraction:
    """Return the prompts of a table read as `form`; `partner` holds the safe texts of an aligned second file.

    Raises:
        UsageError: if a choice does not go with the format.
        SafetyDPOError: if a row's value cannot be what its column says.
    """
    column = _text_column(table, form, choices)
    if choices.side is not None and form.side_is_known:
        raise UsageError(f"expected no --side for format {form.name}, whose sides are known, found {choices.side!r}")
    found = Extraction()
    partners = _aligned(table, partner, form) if partner is not None else {}
    for number, row in table.rows:
        reader = _RowReader(table.file, number, row)
        text = reader.text(column)
        if not text:
            found.dropped["no text"] += 1
        elif form.shape == "pair" or partner is not None:
            safe = partners[number] if partner is not None else reader.text(form.partner)
            _add_pair(found, reader.prompt(form, text, "unsafe"), safe, form)
        elif form.shape == "named":
            _add_named(found, reader, form, text)
        elif form.shape == "preference":
            _add_preference(found, reader, form, text, choices.side)
        else:
            _add_single(found, reader, form, text, choices.side)
    if form.shape in ("named", "preference"):
        found.prompts = _join_by_name(found, table.file)
    return found


def _text_column(table: RawTable, form: PromptFormat, choices: Choices) -> str:
    if choices.column is None:
        return form.texts[0]
    allowed = table.columns if form.any_column else form.texts
    if choices.column not in allowed:
        raise UsageError(
            f"expected a --column out of {', '.join(allowed)} for format {form.name}, found {choices.column!r}"
        )
    return choices.column


@dataclass(frozen=True)
class _RowReader:
    """Typed access to the values of one row; an error names file, row and column."""

    file: str
    number: int
    row: Row

    def text(self, column: str) -> str:
        """Return the text of a column without white space around it; empty if the row has none."""
        value = self.row.get(column)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise self._unexpected(column, "text", value)
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise self._unexpected(column, "text of whole characters", value) from error
        return value.strip()

    def name(self, column: str) -> str:
        """Return what names the row, as text: numbers are taken, bytes of a picture are not."""
        value = self.row.get(column)
        return str(value).strip() if isinstance(value, str | int | float) else ""

    def number_of(self, column: str) -> float | None:
        """Return the finite number of a column, or None if it is empty."""
        value = self.row.get(column)
        if value is None or value == "":
            return None
        try:
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                raise ValueError
            number = float(value)
        except (ValueError, OverflowError):
            raise self._unexpected(column, "a number", value) from None
        if not math.isfinite(number):
            raise self._unexpected(column, "a finite number", value)
        return number

    def integer(self, column: str, *, bits: int) -> int | None:
        """Return the whole number of a column (0 to 2^bits - 1), or None if it is empty."""
        number = self.number_of(column)
        if number is None:
            return None
        # A float holds whole numbers up to 2^53 only; a seed may be longer.
        whole = re.fullmatch(r"\d+", str(self.row[column]).strip())
        value = int(whole[0]) if whole else int(number)
        if (not whole and value != number) or not 0 <= value < 2**bits:
            raise self._unexpected(column, f"a whole number from 0 to 2^{bits} - 1", self.row[column])
        return value

    def one_of(self, column: str, allowed: Sequence[str]) -> str:
        """Return one of the words allowed, or nothing if the column is empty."""
        value = self.text(column)
        if value and value not in allowed:
            raise self._unexpected(column, f"one of {', '.join(allowed)}", value)
        return value

    def categories(self, form: PromptFormat) -> tuple[str, ...]:
        """Return the names in the category column, a comma list or a list; each once."""
        names: dict[str, None] = {}
        for column in dict.fromkeys((form.category, "category", "categories")):
            value = self.row.get(column) if form.category else None
            parts = value if isinstance(value, list) else [value]
            for part in parts:
                if not (part is None or isinstance(part, str)):
                    raise self._unexpected(column, "text", part)
                names.update(dict.fromkeys(split_categories(part or "")))
        return tuple(names)

    def prompt(self, form: PromptFormat, text: str, side: Side) -> FilePrompt:
        """Return the prompt of this row with all that its columns say beside the text."""
        return FilePrompt(
            row=self.number,
            text=text,
            side=side,
            categories=self.categories(form),
            concept=next((found for column in form.concepts if (found := self.text(column))), ""),
            split=self.one_of("split", SPLITS) if "split" in form.optional else "",
            seed=self.integer(form.seed, bits=63) if form.seed else None,
            guidance=self.number_of(form.guidance) if form.guidance else None,
            width=self.integer("sd_image_width", bits=31),
            height=self.integer("sd_image_height", bits=31),
            row_name=self.name(form.row_name) if form.row_name else "",
        )

    def _unexpected(self, column: str, expected: str, value: object) -> SafetyDPOError:
        return SafetyDPOError(
            f"expected {expected} in column {column!r}, row {self.number} of {self.file}, found {str(value)[:60]!r}"
        )


def _add_pair(found: Extraction, unsafe: FilePrompt, safe: str, form: PromptFormat) -> None:
    if not safe and form.partner_required:
        found.dropped["no safe text"] += 1
    elif not safe:
        found.prompts.append(unsafe)
        found.notes["prompts without a partner"] += 1
    elif safe == unsafe.text:
        found.dropped["unsafe and safe text are the same"] += 1
    else:
        unsafe = replace(unsafe, pair_id=make_pair_id(unsafe.text, safe), pair_name=str(unsafe.row))
        found.prompts += [unsafe, replace(unsafe, text=safe, side="safe")]


def _add_single(found: Extraction, reader: _RowReader, form: PromptFormat, text: str, side: Side | None) -> None:
    prompt_set = reader.one_of("prompt_set", tuple(SIDE_OF_SET)) if "prompt_set" in form.optional else ""
    told = reader.one_of("side", SIDES) if "side" in form.optional else ""
    if prompt_set and told and SIDE_OF_SET[prompt_set] != told:
        raise SafetyDPOError(
            f"expected side {SIDE_OF_SET[prompt_set]!r} with prompt_set {prompt_set!r} in row {reader.number} of "
            f"{reader.file}, found {told!r}: correct one"
        )
    known = SIDE_OF_SET.get(prompt_set) or next((name for name in SIDES if name == told), None)
    # A target named in the row makes it a malicious one.
    if known is None and not (form.name == "six_cd" and reader.text("target")):
        found.notes["prompts whose side the file does not say"] += not form.side_is_known
        known = side
    prompt = reader.prompt(form, text, known or form.side)
    found.prompts.append(replace(prompt, prompt_set=prompt_set))


def _add_named(found: Extraction, reader: _RowReader, form: PromptFormat, text: str) -> None:
    image = reader.name(form.row_name).rsplit("/", 1)[-1]
    if not re.fullmatch(PAIR_IMAGE, image):
        raise SafetyDPOError(
            f"expected an image name such as u_idx_0000000_0.jpg in row {reader.number} of {reader.file}, found "
            f"{image!r}: test captions belong into a file of their own"
        )
    prompt = reader.prompt(form, text, "unsafe" if image.startswith("u") else "safe")
    found.prompts.append(replace(prompt, row_name=image, pair_name=image[1:]))


def _add_preference(found: Extraction, reader: _RowReader, form: PromptFormat, text: str, side: Side | None) -> None:
    label = reader.number_of("label_0")
    if label == 0.5:
        found.dropped["tie"] += 1
        return
    if label not in (0.0, 1.0):
        raise SafetyDPOError(
            f"expected label_0 of 1, 0 or 0.5 (a tie) in row {reader.number} of {reader.file}, found "
            f"{reader.row.get('label_0')!r}"
        )
    winner = "jpg_0" if label == 1.0 else "jpg_1"
    image = reader.name("image").rsplit("/", 1)[-1]
    if re.fullmatch(PAIR_IMAGE, image):
        prompt = reader.prompt(form, text, "unsafe" if image.startswith("u") else "safe")
        found.prompts.append(replace(prompt, row_name=image, pair_name=image[1:], winner=winner))
    elif side is not None:
        found.notes["prompts whose side the file does not say"] += 1
        found.prompts.append(replace(reader.prompt(form, text, side), winner=winner))
    else:
        raise SafetyDPOError(
            f"expected an image name such as u_idx_0000000_0.jpg in column 'image', row {reader.number} of "
            f"{reader.file}, found {image[:60]!r}: without it a caption's side is not known; give --side"
        )


def _join_by_name(found: Extraction, file: str) -> list[FilePrompt]:
    """Give every prompt the id of the pair that its image name belongs to; what has no partner stays single.

    Raises:
        SafetyDPOError: if one image name stands beside two different texts.
    """
    text_of: dict[tuple[str, Side], FilePrompt] = {}
    for prompt in found.prompts:
        if prompt.pair_name:
            first = text_of.setdefault((prompt.pair_name, prompt.side), prompt)
            if first.text != prompt.text:
                raise SafetyDPOError(
                    f"expected one text for image {prompt.row_name!r} in {file}, found two in rows {first.row} and "
                    f"{prompt.row}: correct one"
                )
    joined = []
    for prompt in found.prompts:
        unsafe, safe = (text_of.get((prompt.pair_name, side)) for side in ("unsafe", "safe"))  # type: ignore[arg-type]
        if unsafe is not None and safe is not None and unsafe.text != safe.text:
            joined.append(replace(prompt, pair_id=make_pair_id(unsafe.text, safe.text)))
        elif unsafe is not None and safe is not None:
            found.dropped["unsafe and safe text are the same"] += 1
        else:
            found.notes["prompts without a partner"] += 1
            joined.append(replace(prompt, pair_name=""))
    return joined


def _aligned(table: RawTable, partner: RawTable, form: PromptFormat) -> dict[int, str]:
    """Return row number -> safe text of the row of the same case number in the second file.

    Raises:
        UsageError: if the format has no aligned files.
        SafetyDPOError: if a case number is missing, doubled, or has another seed.
    """
    if form.name != "six_cd":
        raise UsageError(f"expected format six_cd with --partner, found {form.name}: import the two files one by one")
    by_case: dict[str, _RowReader] = {}
    for number, row in partner.rows:
        reader = _RowReader(partner.file, number, row)
        if by_case.setdefault(reader.name("case_number"), reader) is not reader:
            raise SafetyDPOError(
                f"expected each case number once in {partner.file}, found {reader.name('case_number')!r} twice"
            )
    safe: dict[int, str] = {}
    for number, row in table.rows:
        reader = _RowReader(table.file, number, row)
        case = reader.name("case_number")
        other = by_case.get(case)
        if other is None or other.integer(form.seed, bits=63) != reader.integer(form.seed, bits=63):
            differs = "no such row" if other is None else "another seed"
            raise SafetyDPOError(
                f"expected case {case!r} of {table.file} with its seed in {partner.file}, found {differs}: the two "
                "files are not of one set"
            )
        safe[number] = other.text("prompt")
    return safe
