"""The tensors of safetensors files of unknown origin: damaged ones end in one kind of error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, load_file
from torch import Tensor

from safetydpo.artifacts.json_text import parse_object
from safetydpo.artifacts.weights import LENGTH_BYTES


class BrokenTensors(ValueError):  # noqa: N818 (says what was found)
    """Bytes that are no whole safetensors file, or hold what torch has no tensor for; the message is one line."""


def parse_tensors(data: bytes) -> dict[str, Tensor]:
    """Return the tensors of the bytes of a safetensors file.

    Raises:
        BrokenTensors: if they are none.
    """
    with _loading():
        return dict(load(data))


def load_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file; they are mapped, not copied.

    Raises:
        BrokenTensors: if it is none, or cannot be read.
    """
    with _loading():
        return dict(load_file(str(file)))


def parse_tensor_header(data: bytes) -> dict[str, Any]:
    """Return the header of the bytes of a safetensors file that `parse_tensors` takes.

    Raises:
        BrokenTensors: if there is none.
    """
    length = int.from_bytes(data[:LENGTH_BYTES], "little")
    with _loading():
        return parse_object(data[LENGTH_BYTES : LENGTH_BYTES + length])


@contextmanager
def _loading() -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        # safetensors raises its own; KeyError for a type that torch lacks. torch raises the last three, for shapes
        # beyond 64 bits.
        raise BrokenTensors(" ".join(str(error).split())[:200] or type(error).__name__) from error
