"""Blocks: named groups of a network's layers, so that a merge may be stronger in one part of it than in another."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from types import MappingProxyType

from safetydpo.errors import UsageError

BLOCKS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "down": ("down_blocks.*",),
        "mid": ("mid_block.*",),
        "up": ("up_blocks.*",),
        "joint": ("transformer_blocks.*",),
        "single": ("single_transformer_blocks.*",),
    }
)
"""Blocks of U-Nets (`down`, `mid`, `up`) and of transformers (`joint`, `single`), by patterns of module names."""


def assign_blocks(
    layer_names: Sequence[str], wanted: Collection[str], blocks: Mapping[str, Sequence[str]] | None = None
) -> dict[str, str]:
    """Return {layer name: block} of the wanted blocks; a layer of none is left out.

    A block is a name in `blocks` or in `BLOCKS`, which have patterns of module names (`*` and `?` as in file names), or
    itself the first parts of module names, such as `down_blocks` or `up_blocks.1`.

    Raises:
        UsageError: if a block holds no layer, so that a number given for it would do nothing, or a layer is in two.
    """
    known = {**BLOCKS, **(blocks or {})}
    found: dict[str, str] = {}
    for block in sorted(wanted):
        patterns = known.get(block, (block, f"{block}.*"))
        members = [name for name in layer_names if any(fnmatchcase(name, pattern) for pattern in patterns)]
        if not members:
            raise UsageError(
                f"expected blocks that hold layers of the adapter ({', '.join(known)}, or first parts of names such as "
                f"{layer_names[0]!r}), found {block!r}, which holds none: correct its name or its patterns"
            )
        for name in members:
            if name in found:
                raise UsageError(
                    f"expected each layer in at most one block, found {name!r} in {found[name]!r} and {block!r}: "
                    "change their patterns"
                )
            found[name] = block
    return found
