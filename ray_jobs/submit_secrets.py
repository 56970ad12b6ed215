"""What looks like a secret, by its name or by itself, and where it belongs instead. Pure; values are never repeated."""

from __future__ import annotations

import re

from safetydpo.artifacts.object_store import SECRET_VARIABLES

_SECRET_WORDS = {
    "TOKEN",
    "SECRET",
    "PASSWORD",
    "PASSWD",
    "PASSPHRASE",
    "CREDENTIAL",
    "CREDENTIALS",
    "KEY",
    "APIKEY",
    "COOKIE",
}
_PLACE_WORDS = ("_PATH", "_FILE", "_ENV")
"""Endings of names that say where a secret is: a file, or a variable of the environment. That itself is none."""
_VALUES = re.compile(
    r"\b(AKIA|ASIA)[0-9A-Z]{16}\b|\bhf_[A-Za-z0-9]{20,}|\bsk-[A-Za-z0-9_-]{20,}|\bgh[pousr]_[A-Za-z0-9]{20,}|"
    r"-----BEGIN [A-Z ]*PRIVATE KEY|://[^/@\s:]+:[^@\s]+@"
)


def is_secret_name(name: str) -> bool:
    """Return whether a variable of this name usually holds a secret: one of its words says so."""
    if name.upper() in SECRET_VARIABLES:
        return True
    words = set(re.split(r"[^A-Z0-9]+", name.upper()))
    return bool(words & _SECRET_WORDS) and not name.upper().endswith(_PLACE_WORDS)


def holds_secret(text: str) -> bool:
    """Return whether the text holds what looks like a key of a known form, or an address with a password in it."""
    return _VALUES.search(text) is not None


def where_it_belongs(name: str) -> str:
    """Return what to do instead of sending the variable `name` along with a job."""
    upper = name.upper()
    if upper.startswith("AWS_") or upper in SECRET_VARIABLES:
        return "give each node a role, or its own ~/.aws/credentials (docs/storage.md)"
    if upper.startswith("RAY_"):
        return "put the token into ~/.ray/auth_token of this machine and of each node (docs/cluster.md)"
    return "set it on the nodes themselves, by the cluster file or from a secret store (docs/cluster.md)"
