"""The merge methods by name: what a config may ask for, with the paper of each.

The entries stand beside their functions, one tuple `METHODS` per file of `safetydpo/merging/methods/`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from types import MappingProxyType

from safetydpo.errors import UsageError
from safetydpo.merging import methods
from safetydpo.merging.method import MergeMethod

__all__ = ["METHODS", "MergeMethod", "collect_methods", "density_methods", "find_method", "unweighted_methods"]


def collect_methods() -> dict[str, MergeMethod]:
    """Return the entries of every file of `safetydpo.merging.methods`, by name.

    Raises:
        ValueError: if two files have a method of the same name, or a file has none.
    """
    found: dict[str, MergeMethod] = {}
    for module in sorted(info.name for info in pkgutil.iter_modules(methods.__path__)):
        entries = getattr(importlib.import_module(f"{methods.__name__}.{module}"), "METHODS", ())
        if not entries:
            raise ValueError(f"expected METHODS with at least one entry in merging/methods/{module}.py, found none")
        for entry in entries:
            if entry.name in found:
                raise ValueError(
                    f"expected each merge method once, found {entry.name!r} again in {module}.py: rename it"
                )
            found[entry.name] = entry
    return found


METHODS: Mapping[str, MergeMethod] = MappingProxyType(collect_methods())


def find_method(name: str) -> MergeMethod:
    """Return the method of that name.

    Raises:
        UsageError: if there is none; lists the known names.
    """
    if name not in METHODS:
        raise UsageError(f"expected a merge method out of {', '.join(sorted(METHODS))}, found {name!r}")
    return METHODS[name]


def unweighted_methods() -> tuple[str, ...]:
    """Return the names of the methods whose result does not depend on coefficients per expert."""
    return tuple(name for name, method in METHODS.items() if not method.takes_weights)


def density_methods() -> tuple[str, ...]:
    """Return the names of the methods whose result depends on `density`."""
    return tuple(name for name, method in METHODS.items() if method.uses_density)
