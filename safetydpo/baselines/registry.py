"""Every comparator by name."""

from __future__ import annotations

from collections.abc import Mapping

from safetydpo.baselines.esd import EsdComparator
from safetydpo.baselines.negative_prompt import NegativePromptComparator
from safetydpo.baselines.protocol import Comparator
from safetydpo.baselines.sld import SldComparator
from safetydpo.baselines.uce import UceComparator
from safetydpo.errors import UsageError

_ALL: tuple[Comparator, ...] = (NegativePromptComparator(), SldComparator(), UceComparator(), EsdComparator())
COMPARATORS: Mapping[str, Comparator] = {comparator.name: comparator for comparator in _ALL}
"""In the order of the table."""


def find_comparator(name: str) -> Comparator:
    """Return the comparator of that name.

    Raises:
        UsageError: if there is none.
    """
    if name not in COMPARATORS:
        raise UsageError(f"expected a comparator of {', '.join(COMPARATORS)}, found {name!r}: correct its name")
    return COMPARATORS[name]
