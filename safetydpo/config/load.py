"""Read a config: one safe YAML file plus `key.path=value` overrides, nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from safetydpo.config.schema import Config
from safetydpo.errors import UsageError

_SHORT_PATHS = {"run_dir": "execution.run_dir", "store": "execution.store"}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Return the config of `path` with `overrides` such as `identity.dpo.steps=200` or `run_dir=runs/x` applied.

    Raises:
        UsageError: if the file is missing, is not YAML, has an unknown key or a value of the wrong type.
    """
    content = _read_yaml(Path(path))
    for override in overrides:
        _apply_override(content, override)
    return parse_config(content, source=str(path))


def parse_config(content: dict[str, Any], *, source: str) -> Config:
    """Return the config of an already parsed mapping.

    Raises:
        UsageError: naming the first key that is unknown or has a wrong value.
    """
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "config"
        if first["type"] == "extra_forbidden":
            known = ", ".join(_known_keys(first["loc"]))
            raise UsageError(f"{source}: expected known keys only, found {where!r}; known here: {known}") from error
        # A rule of ours says itself what it found; one about several fields names them.
        found = "" if first["type"] == "value_error" else f", found {first['input']!r}"
        setting = "key.path" if first["type"] == "value_error" and isinstance(first["input"], dict) else where
        message = first["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
        raise UsageError(
            f"{source}: {where}: {message}{found}; correct it in the file or by {setting}=VALUE"
        ) from error


def identity_of(config: Config) -> dict[str, Any]:
    """Return the identity half as plain JSON values."""
    return config.identity.model_dump(mode="json")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UsageError(f"expected a config file at {path}, found nothing; shipped ones are in configs/") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"expected a readable UTF-8 config file at {path}, found: {error}") from error
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"expected YAML in {path}, found: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UsageError(f"expected a mapping of settings in {path}, found {type(content).__name__}")
    return content


def _apply_override(content: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UsageError(f"expected key.path=value, found {override!r}, for example identity.dpo.steps=200")
    parts = _SHORT_PATHS.get(key, key).split(".")
    node = content
    for part in parts[:-1]:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise UsageError(f"expected a path of settings, found {override!r}: {part!r} is a value, not a group")
        node = child
    try:
        node[parts[-1]] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"expected a YAML value in {override!r}, found: {' '.join(str(error).split())}") from error


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    fields = Config.model_fields
    for part in location[:-1]:
        annotation = fields[str(part)].annotation if str(part) in fields else None
        fields = getattr(annotation, "model_fields", {})
    return sorted(fields)
