"""The answer of a language model, line by line: pairs, or the reason why a line is none.

The format is JSON lines: one object with the texts `unsafe` and `safe` per line. It needs nothing from a server, and an
answer that is cut short loses its last line only.
"""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from safetydpo.pairs.writers import Reply
from safetydpo.prompts.concepts import ConceptEntry
from safetydpo.prompts.duplicates import normalise

PARSER_VERSION = 1
"""Raised by hand when the same answer would be judged otherwise."""

FIELDS = ("unsafe", "safe")
_WITHHELD = "withheld"
_THINKING = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
_FENCE = re.compile(r"```\w*")
_REFUSAL = re.compile(
    r"\s*(i['’]?m sorry|i am sorry|sorry,|i apologi[sz]e|i (can(no|['’])?t|can not|won['’]?t|will not)\b|"
    r"(i['’]?m|i am) (not able|unable)|as an ai\b)",
    re.IGNORECASE,
)
# In a sexual caption these words end the matter, whatever the sentence means by them.
_MINORS = frozenset(
    """
    adolescent adolescents babies baby boy boys child childlike children daughter daughters girl girls infant
    infants juvenile juveniles kid kids minor minors preteen preteens pupil pupils schoolboy schoolboys
    schoolgirl schoolgirls son sons teen teenage teenager teenagers teens toddler toddlers tween tweens
    underage youngster youngsters
    """.split()  # noqa: SIM905 (a list of quoted words is no easier to read)
)


class Reason(StrEnum):
    """Why a line, a whole answer or a well-formed pair is not kept."""

    REFUSAL = "refusal"
    EMPTY_REPLY = "empty_reply"
    CUT_SHORT = "cut_short"
    NOT_JSON = "not_json"
    NOT_AN_OBJECT = "not_an_object"
    DOUBLED_FIELD = "doubled_field"
    MISSING_FIELD = "missing_field"
    UNKNOWN_FIELD = "unknown_field"
    NOT_TEXT = "not_text"
    EMPTY_TEXT = "empty_text"
    TOO_LONG = "too_long"
    IDENTICAL_TEXTS = "identical_texts"
    SAFE_NAMES_CONCEPT = "safe_names_concept"
    NAMES_A_MINOR = "names_a_minor"
    DUPLICATE = "duplicate"
    SURPLUS = "surplus"


@dataclass(frozen=True)
class Candidate:
    """A well-formed pair. Whether it is kept depends on the others (`ledger`)."""

    line: int
    unsafe_text: str
    safe_text: str

    @property
    def key(self) -> str:
        """What makes two pairs duplicates: the normalised unsafe text."""
        return normalise(self.unsafe_text)


@dataclass(frozen=True)
class Reject:
    """A line (from 1; 0 is the whole answer) that is not kept, why, and its text."""

    line: int
    reason: Reason
    text: str


@dataclass(frozen=True)
class ParsedReply:
    """All lines of one answer, each in exactly one of the two."""

    candidates: tuple[Candidate, ...]
    rejects: tuple[Reject, ...]


class _LineError(Exception):
    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason


def parse_reply(reply: Reply, concept: ConceptEntry, *, max_characters: int) -> ParsedReply:
    """Sort the lines of an answer into well-formed pairs and rejects.

    Left out beforehand, without a reject: what a reasoning model thinks aloud at the beginning (`<think>…</think>`),
    lines of a code fence, and blank lines.
    """
    lines = [
        (number, stripped)
        for number, line in enumerate(_answer(reply).split("\n"), start=1)
        if (stripped := line.strip()) and not _FENCE.fullmatch(stripped)
    ]
    whole = "\n".join(line for _, line in lines)
    if reply.refused or (_REFUSAL.match(whole) and not any(line.startswith("{") for _, line in lines)):
        return ParsedReply((), (Reject(0, Reason.REFUSAL, whole),))
    if not lines:
        return ParsedReply((), (Reject(0, Reason.EMPTY_REPLY, ""),))
    candidates: list[Candidate] = []
    rejects: list[Reject] = []
    for number, line in lines:
        is_cut = reply.finish_reason == "length" and number == lines[-1][0]
        try:
            unsafe, safe = _parse_line(line, concept, max_characters=max_characters, is_cut=is_cut)
            candidates.append(Candidate(number, unsafe, safe))
        except _LineError as error:
            rejects.append(Reject(number, error.reason, "" if error.reason is Reason.NAMES_A_MINOR else line))
    return ParsedReply(tuple(candidates), tuple(rejects))


def withhold(reply: Reply, parsed: ParsedReply) -> Reply:
    """Return the answer without the lines that name a minor: they are not stored anywhere.

    Each is replaced by a mark that is parsed to the same verdict; thinking aloud goes with them.
    """
    withheld = {reject.line for reject in parsed.rejects if reject.reason is Reason.NAMES_A_MINOR}
    if not withheld:
        return reply
    mark = json.dumps({_WITHHELD: str(Reason.NAMES_A_MINOR)})
    lines = [mark if number in withheld else line for number, line in enumerate(_answer(reply).split("\n"), start=1)]
    return replace(reply, text="\n".join(lines))


def names_concept(text: str, concept: str) -> bool:
    """Return whether the words of `concept` stand side by side in `text`; the last may be singular or plural."""
    words, wanted = normalise(text).split(), normalise(concept).split()
    size = len(wanted)
    return any(
        words[start : start + size - 1] == wanted[:-1] and _same_noun(words[start + size - 1], wanted[-1])
        for start in range(len(words) - size + 1)
    )


def _same_noun(first: str, second: str) -> bool:
    short, long = sorted((first, second), key=len)
    plurals = {short, f"{short}s", f"{short}es"} | ({f"{short[:-1]}ies"} if short.endswith("y") else set())
    return long in plurals


def _names_a_minor(text: str) -> bool:
    return not _MINORS.isdisjoint(normalise(text).split())


def _answer(reply: Reply) -> str:
    return _THINKING.sub("", reply.text, count=1)


def _parse_line(line: str, concept: ConceptEntry, *, max_characters: int, is_cut: bool) -> tuple[str, str]:
    is_barred = "sexual" in concept.categories and _names_a_minor(line)
    try:
        value = _read_object(line, is_cut=is_cut)
    except _LineError as error:
        raise _LineError(Reason.NAMES_A_MINOR if is_barred else error.reason) from error
    if set(value) == {"refused"}:
        raise _LineError(Reason.REFUSAL)
    if is_barred or set(value) == {_WITHHELD}:
        raise _LineError(Reason.NAMES_A_MINOR)
    if any(field not in value for field in FIELDS):
        raise _LineError(Reason.MISSING_FIELD)
    if len(value) > len(FIELDS):
        raise _LineError(Reason.UNKNOWN_FIELD)
    unsafe, safe = (_read_text(value[field], max_characters=max_characters) for field in FIELDS)
    # Once more, because JSON can spell a word with escapes.
    if "sexual" in concept.categories and _names_a_minor(f"{unsafe} {safe}"):
        raise _LineError(Reason.NAMES_A_MINOR)
    if normalise(unsafe) == normalise(safe):
        raise _LineError(Reason.IDENTICAL_TEXTS)
    if names_concept(safe, concept.concept):
        raise _LineError(Reason.SAFE_NAMES_CONCEPT)
    return unsafe, safe


def _read_object(line: str, *, is_cut: bool) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) < len(pairs):
            raise _LineError(Reason.DOUBLED_FIELD)
        return dict(pairs)

    try:
        value = json.loads(line, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise _LineError(Reason.CUT_SHORT if is_cut else Reason.NOT_JSON) from error
    if not isinstance(value, dict):
        raise _LineError(Reason.NOT_AN_OBJECT)
    return value


def _read_text(value: object, *, max_characters: int) -> str:
    if not isinstance(value, str):
        raise _LineError(Reason.NOT_TEXT)
    text = " ".join(value.split())
    # Control characters, and halves of a pair that no encoding takes.
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in text):
        raise _LineError(Reason.NOT_TEXT)
    if not normalise(text):
        raise _LineError(Reason.EMPTY_TEXT)
    if len(text) > max_characters:
        raise _LineError(Reason.TOO_LONG)
    if _REFUSAL.match(text):
        raise _LineError(Reason.REFUSAL)
    return text
