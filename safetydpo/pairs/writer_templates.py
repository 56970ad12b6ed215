"""Prompt pairs from templates: no model, no tokens; for tests, demos and dry runs of a concept list."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter

from safetydpo.artifacts.schemas import sha256_of
from safetydpo.config.safe_yaml import YamlError, parse_yaml
from safetydpo.errors import SafetyDPOError, UsageError, shown
from safetydpo.pairs.writers import Reply, WriteRequest


@dataclass(frozen=True)
class TemplatePair:
    """An unsafe template with `{concept}` and a safe one with `{counterpart}`."""

    unsafe: str
    safe: str


def _alike(*templates: str) -> tuple[TemplatePair, ...]:
    return tuple(
        TemplatePair(text.replace("{it}", "{concept}"), text.replace("{it}", "{counterpart}")) for text in templates
    )


DEFAULT_TEMPLATES = _alike(
    "{it} on a wooden table",
    "drawing of {it} on white paper",
    "{it} in front of a blue wall",
    "a small {it} on the grass of a park",
    "poster with {it} in the middle",
    "{it} beside a window in morning light",
    "watercolour of {it}",
    "{it} on a shelf, seen from below",
)


def read_templates(path: Path) -> tuple[TemplatePair, ...]:
    """Read a YAML list of {unsafe: a text with {concept}, safe: a text with {counterpart}}.

    Raises:
        UsageError: naming the first entry that is something else.
    """
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"expected templates at {path}, found nothing: correct the path") from error
    except (OSError, UnicodeDecodeError, YamlError) as error:
        raise UsageError(f"expected templates as YAML in {path}, found: {' '.join(str(error).split())}") from error
    if not isinstance(content, list) or not content:
        raise UsageError(f"expected a list of templates in {path}, found {type(content).__name__}: see docs")
    return tuple(_template(item, f"{path}, entry {number}") for number, item in enumerate(content, start=1))


def _template(item: object, where: str) -> TemplatePair:
    if not isinstance(item, dict) or set(item) != {"unsafe", "safe"}:
        raise UsageError(f"{where}: expected the two keys unsafe and safe, found {shown(item)}: correct it")
    for side, name in (("unsafe", "concept"), ("safe", "counterpart")):
        try:
            fields = [field for _, field, _, _ in Formatter().parse(str(item[side])) if field is not None]
        except ValueError as error:
            raise UsageError(
                f"{where}: expected a template as {side}, found: {error}; double braces that are meant"
            ) from error
        if fields != [name]:
            raise UsageError(f"{where}: expected {{{name}}} once in {side}, found {shown(item[side])}: correct it")
    return TemplatePair(str(item["unsafe"]), str(item["safe"]))


class TemplateWriter:
    """Fills templates in order: request k of m pairs takes templates k·m to (k + 1)·m - 1; after the last, none."""

    def __init__(self, templates: Sequence[TemplatePair] = DEFAULT_TEMPLATES) -> None:
        self._templates = tuple(templates)

    @property
    def settings(self) -> Mapping[str, str | int | float | bool | None]:
        """Kind and templates."""
        texts = [[template.unsafe, template.safe] for template in self._templates]
        return {"writer": "templates", "templates_sha256": sha256_of(texts)}

    async def write(self, request: WriteRequest) -> Reply:
        """Fill this request's templates.

        Raises:
            SafetyDPOError: if the concept list names no counterpart.
        """
        concept = request.concept
        if not concept.counterpart:
            raise SafetyDPOError(
                f"expected a counterpart of {concept.concept!r} (line {concept.line} of the concept list) for the "
                "template writer, found none: add one, or use another writer"
            )
        start = request.attempt * request.num_pairs
        lines = [
            json.dumps(
                {
                    "unsafe": template.unsafe.format(concept=concept.concept),
                    "safe": template.safe.format(counterpart=concept.counterpart),
                },
                ensure_ascii=False,
            )
            for template in self._templates[start : start + request.num_pairs]
        ]
        return Reply("\n".join(lines), prompt_tokens=0, completion_tokens=0, model="templates")

    async def close(self) -> None:
        """Nothing to give back."""
