from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save

from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.weights import read_header
from safetydpo.errors import SafetyDPOError


def test_the_header_is_what_safetensors_wrote(store: Location):
    data = save({"a": torch.zeros(2, 3), "b": torch.zeros(4)}, metadata={"made": "here"})
    (store / "x").write_bytes(data)
    header = read_header(store / "x", remedy="do this")
    assert header["__metadata__"] == {"made": "here"}
    assert {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"} == {"a": [2, 3], "b": [4]}


def test_every_way_to_cut_the_tensors_is_seen(store: Location):
    """A file of 8 + header + 40 bytes of tensors: 39 or 0 of them left is too short by the header's own count."""
    data = save({"a": torch.zeros(2, 3), "b": torch.zeros(4)})
    for cut in (1, 40):
        (store / "x").write_bytes(data[:-cut])
        with pytest.raises(
            SafetyDPOError,
            match=rf"expected a safetensors file of {len(data)} bytes at .*/x, found {len(data) - cut}, cut short: do",
        ):
            read_header(store / "x", remedy="do this")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x05\0\0",
        b"\xff" * 8,
        b"\x02\0\0\0\0\0\0\0[]",
        (len(json.dumps({"a": 3}))).to_bytes(8, "little") + json.dumps({"a": 3}).encode(),
        save({"a": torch.zeros(2)})[:40],
    ],
)
def test_a_file_without_a_header(store: Location, content: bytes):
    (store / "x").write_bytes(content)
    with pytest.raises(
        SafetyDPOError, match="expected a safetensors file at .*/x, found .* without its header: do this"
    ):
        read_header(store / "x", remedy="do this")


def test_no_file(store: Location):
    with pytest.raises(SafetyDPOError, match="expected a file at .*/x, found nothing: run the stage that makes it"):
        read_header(store / "x", remedy="do this")
