from __future__ import annotations

import pytest
import torch

from safetydpo.artifacts.lazy_tensors import LazyTensors
from safetydpo.artifacts.storage import Location
from safetydpo.errors import SafetyDPOError
from safetydpo.merging.collected import collected_from_bytes, collected_to_bytes, open_collected


def read(data: bytes, *, kind: str = "votes", base: str = "base") -> dict[str, torch.Tensor]:
    return collected_from_bytes(data, kind=kind, what="layer inputs", source="x", base_fingerprint=base)


def test_what_is_written_is_read_and_order_changes_no_byte():
    tensors = {"b": torch.arange(6.0).reshape(2, 3).T, "a": torch.ones(2, dtype=torch.float16)}
    data = collected_to_bytes(tensors, kind="votes", base_fingerprint="base")
    turned = collected_to_bytes(dict(reversed(tensors.items())), kind="votes", base_fingerprint="base")
    assert data == turned
    found = read(data)
    assert {name: value.dtype for name, value in found.items()} == {"a": torch.float16, "b": torch.float32}
    assert torch.equal(found["b"], tensors["b"])


def test_damaged_files_other_kinds_and_other_bases_are_refused():
    data = collected_to_bytes({"a": torch.ones(2)}, kind="votes", base_fingerprint="base")
    for broken in (data[:10], data[:-1], b""):
        with pytest.raises(SafetyDPOError, match=r"expected layer inputs at x, found \d+ bytes that are none"):
            read(broken)
    with pytest.raises(SafetyDPOError, match=r"bytes that are none \('moments'\): collect them again"):
        read(data, kind="moments")
    with pytest.raises(SafetyDPOError, match="expected layer inputs of base 'other' at x, found base 'base'"):
        read(data, base="other")


def test_tensors_are_read_when_they_are_asked_for(store: Location):
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(2, dtype=torch.float16)}
    (store / "x").write_bytes(collected_to_bytes(tensors, kind="votes", base_fingerprint="base"))

    def read_lazily(*, kind: str = "votes", base: str = "base") -> LazyTensors:
        return open_collected(store / "x", kind=kind, what="layer inputs", base_fingerprint=base)

    found = read_lazily()
    assert list(found) == ["a", "b"]
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    with pytest.raises(SafetyDPOError, match=r"expected layer inputs at .*x, found other tensors \('moments'\)"):
        read_lazily(kind="moments")
    with pytest.raises(SafetyDPOError, match="expected layer inputs of base 'other' at .*x, found base 'base'"):
        read_lazily(base="other")
