"""Second moments of a layer's inputs per group of prompts: what RegMean weighs the experts' changes with.

The moment of a group is the mean over its inputs of sum over tokens of h h', all tokens counted (votes may look at a
few tokens, a regression may not). Groups are categories of unsafe prompts and `BENIGN`.

Axis legend: `token` tokens or pixels of a layer, `d_in` input features of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from safetydpo.artifacts.lazy_tensors import LazyTensors
from safetydpo.artifacts.storage import Location
from safetydpo.errors import SafetyDPOError
from safetydpo.merging.collected import collected_from_bytes, collected_to_bytes, open_collected, write_collected

BENIGN = "benign"
METADATA_KEY = "safetydpo_moments"
WHAT = "moments of layer inputs"
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

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return {group/module: shape}, as a file of moments names them."""
        return {
            f"{group}/{module}": tuple(total.shape)
            for module, sums in self._sums.items()
            for group, total in sums.items()
        }

    def mean(self, module: str, group: str) -> Float[Tensor, "d_in d_in"]:
        """Return the mean over inputs of one module and group in float32.

        Raises:
            SafetyDPOError: if it is not finite.
        """
        moment = self._sums[module][group] / self._counts[module, group]
        if not bool(torch.isfinite(moment).all()):
            raise SafetyDPOError(
                f"expected finite second moments of the inputs of {module!r}, found NaN or infinity: "
                "check the base model"
            )
        return moment

    def means(self) -> dict[str, dict[str, Float[Tensor, "d_in d_in"]]]:
        """Return {module: {group: mean over inputs}} in float32.

        Raises:
            SafetyDPOError: if a moment is not finite.
        """
        return {module: {group: self.mean(module, group) for group in sums} for module, sums in self._sums.items()}


def moments_to_bytes(moments: Moments, *, base_fingerprint: str) -> bytes:
    """Return moments as a safetensors file (float32); equal moments give equal bytes."""
    tensors = {
        f"{group}/{module}": moment.to(torch.float32)
        for module, groups in moments.items()
        for group, moment in groups.items()
    }
    return collected_to_bytes(tensors, kind=METADATA_KEY, base_fingerprint=base_fingerprint)


def write_moments(location: Location, sums: MomentSums, *, base_fingerprint: str) -> str:
    """Write the file of `moments_to_bytes` with one mean beside the sums at a time; return its SHA-256.

    Raises:
        SafetyDPOError: if a moment is not finite, or the place is not writable.
    """

    def mean(name: str) -> Tensor:
        group, module = name.split("/", maxsplit=1)
        return sums.mean(module, group)

    return write_collected(
        location, sums.shapes(), mean, number="F32", kind=METADATA_KEY, base_fingerprint=base_fingerprint
    )


def join_moments(location: Location, parts: Sequence[Location], *, base_fingerprint: str) -> str:
    """Write the moments of several files of other groups each as one file, one tensor at a time; return its SHA-256.

    Raises:
        SafetyDPOError: if a part is truncated, is none of ours, or was collected on another base model.
    """
    opened = [open_moment_tensors(part, base_fingerprint=base_fingerprint) for part in parts]
    holders = {name: part for part in opened for name in part}
    return write_collected(
        location,
        {name: part.shape(name) for name, part in holders.items()},
        lambda name: holders[name][name],
        number="F32",
        kind=METADATA_KEY,
        base_fingerprint=base_fingerprint,
    )


def moments_from_bytes(
    data: bytes, *, source: str, base_fingerprint: str
) -> dict[str, dict[str, Float[Tensor, "d_in d_in"]]]:
    """Return the moments of a file written by `moments_to_bytes`.

    Raises:
        SafetyDPOError: if the file is truncated, is none of ours, or was collected on another base model.
    """
    tensors = collected_from_bytes(data, kind=METADATA_KEY, what=WHAT, source=source, base_fingerprint=base_fingerprint)
    moments: dict[str, dict[str, Tensor]] = {}
    for name, moment in tensors.items():
        group, module = name.split("/", maxsplit=1)
        moments.setdefault(module, {})[group] = moment
    return moments


def open_moments(location: Location, *, base_fingerprint: str) -> Moments:
    """Return the moments of such a file, each read when it is asked for.

    Raises:
        SafetyDPOError: as `moments_from_bytes`.
    """
    tensors = open_moment_tensors(location, base_fingerprint=base_fingerprint)
    names: dict[str, dict[str, str]] = {}
    for name in tensors:
        group, module = name.split("/", maxsplit=1)
        names.setdefault(module, {})[group] = name
    return {module: _StoredGroups(tensors, groups) for module, groups in names.items()}


def open_moment_tensors(location: Location, *, base_fingerprint: str) -> LazyTensors:
    """Return {group/module: moment} of such a file, each read when it is asked for.

    Raises:
        SafetyDPOError: as `moments_from_bytes`.
    """
    return open_collected(location, kind=METADATA_KEY, what=WHAT, base_fingerprint=base_fingerprint)


class _StoredGroups(Mapping[str, Tensor]):
    """The moments of one module, each read from the file when it is asked for."""

    def __init__(self, tensors: LazyTensors, names: Mapping[str, str]) -> None:
        self._tensors, self._names = tensors, names

    def __getitem__(self, group: str) -> Tensor:
        return self._tensors[self._names[group]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class ExpertMoments(Mapping[str, tuple[Tensor, ...]]):
    """Per module the moments of each expert's own inputs, and last that of benign prompts; added up when asked for."""

    def __init__(self, moments: Moments, modules: Sequence[str], experts: Sequence[tuple[str, Sequence[str]]]) -> None:
        """Take the experts as (name, categories); nothing is read yet.

        Raises:
            SafetyDPOError: if a module has no moments, or an expert names no category or one without a moment.
        """
        for module in modules:
            groups = moments.get(module, {})
            if BENIGN not in groups:
                raise SafetyDPOError(
                    f"expected moments of the inputs of every LoRA target, on benign prompts too, found none for "
                    f"{module!r}: collect them again with the same lora.targets"
                )
            for name, categories in experts:
                _check_categories(groups, expert=name, categories=categories)
        self._moments, self._modules, self._experts = moments, tuple(modules), tuple(experts)

    def __getitem__(self, module: str) -> tuple[Tensor, ...]:
        """Return the moments of one module; experts of equal categories share one tensor."""
        groups = self._moments[module]
        own: dict[tuple[str, ...], Tensor] = {}
        for name, categories in self._experts:
            if tuple(categories) not in own:
                own[tuple(categories)] = expert_moment(groups, expert=name, categories=categories)
        return (*(own[tuple(categories)] for _, categories in self._experts), groups[BENIGN])

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)


def expert_moment(
    groups: Mapping[str, Float[Tensor, "d_in d_in"]], *, expert: str, categories: Sequence[str]
) -> Float[Tensor, "d_in d_in"]:
    """Return the moment of an expert's own inputs: the sum over its categories; of one category its own tensor.

    Raises:
        SafetyDPOError: if the expert names no category or one without a moment.
    """
    _check_categories(groups, expert=expert, categories=categories)
    if len(categories) == 1:
        # A search asks for it at each of its merges: not one copy more.
        return groups[categories[0]]
    return torch.stack([groups[category] for category in categories]).sum(dim=0)


def _check_categories(groups: Mapping[str, Tensor], *, expert: str, categories: Sequence[str]) -> None:
    missing = [category for category in categories if category not in groups]
    if missing or not categories:
        raise SafetyDPOError(
            f"expected moments of the categories of expert {expert!r} ({', '.join(categories) or 'none named'}), found "
            f"{', '.join(sorted(groups))}: collect the layer inputs again with its categories"
        )
