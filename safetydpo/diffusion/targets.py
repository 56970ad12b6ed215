"""Which layers a LoRA signature names, told from names alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from safetydpo.errors import UsageError


def matches_suffix(name: str, suffixes: Sequence[str]) -> bool:
    """Return whether a module name equals one of the suffixes or ends in `.suffix` (peft's own rule)."""
    return any(name == suffix or name.endswith("." + suffix) for suffix in suffixes)


def require_targets(linear_layers: Iterable[str], suffixes: Sequence[str]) -> None:
    """Check that every suffix names a linear layer.

    Raises:
        UsageError: naming the first suffix that names none, and suffixes that do.
    """
    names = list(linear_layers)
    for suffix in suffixes:
        if not any(matches_suffix(name, [suffix]) for name in names):
            known = sorted({re.sub(r".*\.(?=\D)", "", name) for name in names})
            raise UsageError(
                f"expected lora.targets that name linear layers of the denoiser, found {suffix!r}, which names "
                f"none: use suffixes such as {', '.join(known[:8])}"
            )


def require_attention(denoiser: str, attention: str) -> None:
    """Check that a network has the attention layers that `lora.attention` chooses, told by what kind it is.

    Raises:
        UsageError: if `attention` is not `all` and the network is no U-Net.
    """
    if attention != "all" and denoiser != "unet":
        raise UsageError(
            f"expected lora.attention 'all' for a {denoiser}, found {attention!r}: only U-Nets (Stable Diffusion 1.x, "
            "2.x, XL) have self- and cross-attention layers of their own; this model's attention is joint"
        )
