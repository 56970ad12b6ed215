"""Category names as the files spell them, normalised to the seven of the project."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from safetydpo.config.fields import CATEGORIES
from safetydpo.errors import UsageError

# Spellings only: a name that means something else (`nudity`, `suicide`) is for the user to map, with --alias.
SPELLINGS: Mapping[str, str] = {
    "harrasment": "harassment",
    "harrassment": "harassment",
    "harasment": "harassment",
    "hate_speech": "hate",
    "hateful": "hate",
    "illegal": "illegal_activity",
    "illegal_activities": "illegal_activity",
    "selfharm": "self_harm",
    "sexual_content": "sexual",
    "shock": "shocking",
    "violent": "violence",
}


def slug(name: str) -> str:
    """Return a name in lower case with one underscore for every run of other characters."""
    return re.sub(r"[^a-z0-9]+", "_", name.casefold()).strip("_")


def normalise_category(name: str, aliases: Mapping[str, str] | None = None) -> str | None:
    """Return the project's name of a category, or None if it is not known.

    `aliases` (slug -> category) are asked first, then the seven names, then `SPELLINGS`.
    """
    key = slug(name)
    if aliases and key in aliases:
        return aliases[key]
    return key if key in CATEGORIES else SPELLINGS.get(key)


def split_categories(value: str) -> list[str]:
    """Return the names of a comma list, in order, each once, without empty ones."""
    return list(dict.fromkeys(part.strip() for part in value.split(",") if part.strip()))


def parse_aliases(settings: Iterable[str]) -> dict[str, str]:
    """Return slug -> category of settings such as `weather=violence`.

    Raises:
        UsageError: if a setting is not NAME=CATEGORY with one of the seven categories.
    """
    aliases = {}
    for setting in settings:
        name, equals, category = setting.partition("=")
        if not (equals and slug(name)) or normalise_category(category) is None:
            raise UsageError(
                f"expected NAME=CATEGORY with a category out of {', '.join(CATEGORIES)} in --alias, found {setting!r}"
            )
        aliases[slug(name)] = str(normalise_category(category))
    return aliases
