"""Second moments of a layer's inputs per group of prompts: what RegMean weighs the experts' changes with.

The moment of a group is the mean over its inputs of sum over tokens of h h', all tokens counted (votes may look at a
few tokens, a regression may not). Groups are categories of unsafe prompts and `BENIGN`.

Axis legend: `token` tokens or pixels of a layer, `d_in` input features of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from safetydpo.errors import SafetyDPOError
from safetydpo.merging.collected import collected_from_bytes, collected_to_bytes

BENIGN = "benign"
METADATA_KEY = "safetydpo_moments"
Moments = Mapping[str, Mapping[str, Float[Tensor, "d_in d_in"]]]
"""{module: {group: second moment}}."""


class MomentSums:
    """Adds up second moments while layer inputs are collected; an `observe` of `collect_inputs`."""

    def __init__(self, groups: Sequence[str]) -> None:
        """Take the group of each prompt."""
        self._groups = tuple(groups)
        self._sums: dict[str, dict[str, Tensor]] = {}
        self._counts: dict[tuple[str, str], int] = {}

    def __call__(self, module: str, row: int, tokens: Float[Tensor, "token d_in"]) -> None:
        """Add the input of one module for prompt `row` at one timestep."""
        group = self._groups[row]
        values = tokens.float()
        moment = (values.T @ values).cpu()
        sums = self._sums.setdefault(module, {})
        sums[group] = sums[group] + moment if group in sums else moment
        self._counts[module, group] = self._counts.get((module, group), 0) + 1

    def means(self) -> dict[str, dict[str, Float[Tensor, "d_in d_in"]]]:
        """Return {module: {group: mean over inputs}} in float32.

        Raises:
            SafetyDPOError: if a moment is not finite.
        """
        means = {
            module: {group: total / self._counts[module, group] for group, total in sums.items()}
            for module, sums in self._sums.items()
        }
        for module, groups in means.items():
            if not all(bool(torch.isfinite(moment).all()) for moment in groups.values()):
                raise SafetyDPOError(
                    f"expected finite second moments of the inputs of {module!r}, found NaN or infinity: "
                    "check the base model"
                )
        return means


def moments_to_bytes(moments: Moments, *, base_fingerprint: str) -> bytes:
    """Return moments as a safetensors file (float32); equal moments give equal bytes."""
    tensors = {
        f"{group}/{module}": moment.to(torch.float32)
        for module, groups in moments.items()
        for group, moment in groups.items()
    }
    return collected_to_bytes(tensors, kind=METADATA_KEY, base_fingerprint=base_fingerprint)


def moments_from_bytes(
    data: bytes, *, source: str, base_fingerprint: str
) -> dict[str, dict[str, Float[Tensor, "d_in d_in"]]]:
    """Return the moments of a file written by `moments_to_bytes`.

    Raises:
        SafetyDPOError: if the file is truncated, is none of ours, or was collected on another base model.
    """
    tensors = collected_from_bytes(
        data, kind=METADATA_KEY, what="moments of layer inputs", source=source, base_fingerprint=base_fingerprint
    )
    moments: dict[str, dict[str, Tensor]] = {}
    for name, moment in tensors.items():
        group, module = name.split("/", maxsplit=1)
        moments.setdefault(module, {})[group] = moment
    return moments


def expert_moment(
    groups: Mapping[str, Float[Tensor, "d_in d_in"]], *, expert: str, categories: Sequence[str]
) -> Float[Tensor, "d_in d_in"]:
    """Return the moment of an expert's own inputs: the sum over its categories.

    Raises:
        SafetyDPOError: if the expert names no category or one without a moment.
    """
    missing = [category for category in categories if category not in groups]
    if missing or not categories:
        raise SafetyDPOError(
            f"expected moments of the categories of expert {expert!r} ({', '.join(categories) or 'none named'}), found "
            f"{', '.join(sorted(groups))}: collect the layer inputs again with its categories"
        )
    return torch.stack([groups[category] for category in categories]).sum(dim=0)
