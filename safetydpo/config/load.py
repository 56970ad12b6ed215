"""Read a config: one safe YAML file plus `key.path=value` overrides, nothing else."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from safetydpo.config.gate import GatePolicy
from safetydpo.config.safe_yaml import YamlError, parse_yaml
from safetydpo.config.schema import Config
from safetydpo.errors import UsageError, shown

Settings = TypeVar("Settings", bound=BaseModel)

_SHORT_PATHS = {"run_dir": "execution.run_dir", "store": "execution.store"}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Return the config of `path` with `overrides` such as `identity.dpo.steps=200` or `run_dir=runs/x` applied.

    Raises:
        UsageError: if the file is missing, is not YAML, has an unknown key or a value of the wrong type.
    """
    content = read_yaml(Path(path), what="a config file", hint="shipped ones are in configs/")
    for override in overrides:
        _apply_override(content, override)
    return parse_config(content, source=str(path))


def config_of_settings(overrides: Sequence[str]) -> Config:
    """Return the default config with `overrides` applied, for commands that need no file.

    Raises:
        UsageError: if a key is unknown or a value of the wrong type.
    """
    content: dict[str, Any] = {}
    for override in overrides:
        _apply_override(content, override)
    return parse_config(content, source="settings")


def parse_config(content: dict[str, Any], *, source: str) -> Config:
    """Return the config of an already parsed mapping.

    Raises:
        UsageError: naming the first key that is unknown or has a wrong value.
    """
    return parse_settings(Config, content, source=source)


def load_policy(path: str | Path | None, given: Mapping[str, Any]) -> GatePolicy:
    """Return the policy of a gate: the file's thresholds, if there is one, and those `given` in place of its own.

    Raises:
        UsageError: if the file is missing, is not YAML, has an unknown key or a value of the wrong type.
    """
    content = {} if path is None else read_yaml(Path(path), what="a policy file", hint="name one with --policy")
    return parse_settings(GatePolicy, {**content, **given}, source="the gate" if path is None else str(path))


def parse_settings(group: type[Settings], content: Any, *, source: str) -> Settings:
    """Return the settings of an already parsed mapping.

    Raises:
        UsageError: naming the first key that is unknown or has a wrong value.
    """
    try:
        return group.model_validate(content)
    except ValidationError as error:
        raise UsageError(f"{source}: {_explain(error, group)}") from error


def _explain(error: ValidationError, group: type[BaseModel]) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        meant = _similar(where, group)
        return (
            f"expected known keys only, found {shown(where)}; "
            + (f"did you mean {meant}? " if meant else "correct or remove it; ")
            + f"known here: {', '.join(_known_keys(first['loc'], group))}"
        )
    message = first["msg"].removeprefix("Value error, ")
    for ours, pydantics in (
        (r"expected a group of settings", r"Input should be a valid dictionary or instance of \w+"),
        (r"expected a text that matches", r"String should match pattern"),
        (r"expected", r"Input should be"),
    ):
        message = re.sub(pydantics, ours, message)
    if first["type"] == "value_error" and isinstance(first["input"], dict):
        # A rule about several fields names them itself.
        return f"{message}; correct one of them in the file or by its key.path=VALUE"
    # A rule of ours says itself what it found.
    found = "" if first["type"] == "value_error" else f", found {shown(first['input'])}"
    if group is not Config:
        return f"{where}: {message}{found}; correct it"
    # An override sets a whole list, not one item of it.
    setting = re.sub(r"\.\d+(\..*)?$", "", where)
    return f"{where}: {message}{found}; correct it in the file or by {setting}=VALUE"


def _similar(where: str, group: type[BaseModel]) -> str:
    """Return the known settings that somebody who wrote `where` may have meant, quoted; empty if there are none."""
    everything = _all_settings(group)
    ending = [setting for setting in everything if setting.endswith(f".{where}")]
    return " or ".join(map(repr, ending or difflib.get_close_matches(where, everything, n=1, cutoff=0.8)))


def _all_settings(group: type[BaseModel], prefix: str = "") -> list[str]:
    found = []
    for name, info in group.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found += _all_settings(kind, f"{prefix}{name}.")
        found.append(f"{prefix}{name}")
    return found


def identity_of(config: Config) -> dict[str, Any]:
    """Return the identity half as plain JSON values."""
    return config.identity.model_dump(mode="json")


def read_yaml(path: Path, *, what: str, hint: str) -> dict[str, Any]:
    """Return the mapping in a file of safe YAML in which every key stands once; `what` and `hint` are for errors.

    Raises:
        UsageError: if the file is missing, not UTF-8, not YAML or no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UsageError(f"expected {what} at {path}, found nothing; {hint}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"expected a readable UTF-8 {what.removeprefix('a ')} at {path}, found: {error}") from error
    try:
        content = parse_yaml(text)
    except YamlError as error:
        raise UsageError(f"expected YAML in {path}, found: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"expected a mapping of settings in {path}, found {type(content).__name__}")
    return content


def _apply_override(content: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UsageError(f"expected key.path=value, found {shown(override)}, for example identity.dpo.steps=200")
    parts = _SHORT_PATHS.get(key, key).split(".")
    node = content
    for part in parts[:-1]:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise UsageError(
                f"expected a path of settings, found {shown(override)}: {shown(part)} is a value, not a group"
            )
        node = child
    try:
        node[parts[-1]] = parse_yaml(text)
    except YamlError as error:
        raise UsageError(f"expected a YAML value in {shown(override)}, found: {error}") from error


def _known_keys(location: tuple[int | str, ...], group: type[BaseModel]) -> list[str]:
    fields = group.model_fields
    for part in location[:-1]:
        annotation = fields[str(part)].annotation if str(part) in fields else None
        fields = getattr(annotation, "model_fields", {})
    return sorted(fields)
