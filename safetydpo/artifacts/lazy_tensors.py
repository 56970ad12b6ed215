"""Tensors of a safetensors file that are read one at a time, so that many large files need little memory.

safetensors itself maps whole files, and pages once touched count as this process's; here each tensor is read from its
place, from a local disk or an object store, and nothing is kept.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safetydpo.artifacts.adapters import (
    DOWN_SUFFIX,
    UP_SUFFIX,
    AdapterMetadata,
    Denoiser,
    LoraLayer,
    parse_metadata,
)
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.weights import LENGTH_BYTES, read_header
from safetydpo.errors import SafetyDPOError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
REMEDY = "make or copy the file again"


class _Entry(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> _Entry:
        begin, end = entry["data_offsets"]
        return cls(sys.intern(entry["dtype"]), tuple(entry["shape"]), begin, end)


class LazyTensors(Mapping[str, Tensor]):
    """The tensors of one safetensors file; each access reads the file."""

    def __init__(self, location: Location) -> None:
        """Read the header.

        Raises:
            SafetyDPOError: if the file is missing, cut short, or no safetensors file.
        """
        self._location = location
        header = read_header(location, remedy=REMEDY)
        with location.open_random_access() as file:
            self._start = LENGTH_BYTES + int.from_bytes(file.read(LENGTH_BYTES), "little")
        self.header_metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        # Hundreds of files of the same names: each is kept once, and only what is needed to read.
        self._entries = {sys.intern(name): _Entry.of(entry) for name, entry in header.items()}

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor.

        Raises:
            KeyError: if there is none of that name.
            SafetyDPOError: if the file was cut or replaced meanwhile, or the type is none that is merged.
        """
        entry = self._entries[name]
        if entry.dtype not in DTYPES:
            raise SafetyDPOError(
                f"expected a tensor of {', '.join(DTYPES)} in {self._location}, found {entry.dtype} in {name!r}: "
                "save it as one of them"
            )
        dtype = DTYPES[entry.dtype]
        size = math.prod(entry.shape) * dtype.itemsize
        with self._location.open_random_access() as file:
            file.seek(self._start + entry.begin)
            data = bytearray(file.read(entry.end - entry.begin))
        if len(data) != size:
            raise SafetyDPOError(
                f"expected {size:,} bytes of {name!r} in {self._location}, found {len(data):,}: {REMEDY}"
            )
        return (torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)).reshape(entry.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        return len(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one tensor without reading it."""
        return self._entries[name].shape


class LazyLayers(Mapping[str, LoraLayer]):
    """The layers of one adapter file, float32; each access reads the file."""

    def __init__(self, location: Location) -> None:
        """Read the header.

        Raises:
            SafetyDPOError: if the file is missing, cut short, or has other keys than those of one denoiser's LoRA.
        """
        self._tensors = LazyTensors(location)
        denoiser: Denoiser = "transformer" if next(iter(self._tensors), "").startswith("transformer.") else "unet"
        header = {"__metadata__": self._tensors.header_metadata}
        metadata, self._ranks = parse_metadata(header, source=str(location))
        self.metadata: AdapterMetadata = replace(metadata, denoiser=denoiser)
        self._prefix = f"{denoiser}."
        self._names = self._check_names(location)

    def __getitem__(self, name: str) -> LoraLayer:
        """Read one layer, without the zero components that pad it."""
        down, up = (self._tensors[key].to(torch.float32) for key in self._keys(name))
        rank = self._ranks.get(name, down.shape[0])
        return LoraLayer(down[:rank].contiguous(), up[:, :rank].contiguous())

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shapes(self, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of a layer's `down` and `up` without reading them."""
        down, up = (self._tensors.shape(key) for key in self._keys(name))
        rank = self._ranks.get(name, down[0])
        return (rank, *down[1:]), (up[0], rank, *up[2:])

    def _keys(self, name: str) -> tuple[str, str]:
        return f"{self._prefix}{name}{DOWN_SUFFIX}", f"{self._prefix}{name}{UP_SUFFIX}"

    def _check_names(self, location: Location) -> tuple[str, ...]:
        names = sorted(
            {key.removeprefix(self._prefix).removesuffix(DOWN_SUFFIX).removesuffix(UP_SUFFIX) for key in self._tensors}
        )
        wanted = {key for name in names for key in self._keys(name)}
        wrong = sorted(wanted ^ set(self._tensors))
        if wrong or not names:
            raise SafetyDPOError(
                f"expected keys '{self._prefix}<module>{DOWN_SUFFIX}' and '…{UP_SUFFIX}' in {location}, found a first "
                f"difference at {wrong[0] if wrong else 'none at all'!r}: save the adapter in the diffusers format"
            )
        return tuple(names)
