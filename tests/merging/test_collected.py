from __future__ import annotations

import hashlib

import pytest
import torch

from safetydpo.artifacts.lazy_tensors import LazyTensors
from safetydpo.artifacts.storage import Location
from safetydpo.errors import SafetyDPOError
from safetydpo.merging.collected import collected_from_bytes, collected_to_bytes, open_collected, write_collected


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


@pytest.mark.parametrize(("number", "dtype"), [("F16", torch.float16), ("F32", torch.float32)])
def test_a_file_that_is_written_tensor_by_tensor_has_the_same_bytes(store: Location, number, dtype):
    """Names that sort around the slash, need escapes or more than a byte; tensors not contiguous, or empty; none."""
    names = ["a/q", "a b/q", 'ü "x"/\n', "b/k", "a/k.0"]
    tensors = {name: torch.arange(6.0).reshape(2, 3).T.to(dtype) + place for place, name in enumerate(names)}
    tensors["empty"] = torch.ones(0, 4, dtype=dtype)
    for kept in (tensors, {}):
        shapes = {name: tensor.shape for name, tensor in kept.items()}
        asked: list[str] = []
        sha256 = write_collected(
            store / "new" / "x",
            shapes,
            lambda name, asked=asked: asked.append(name) or tensors[name],
            number=number,
            kind="votes",
            base_fingerprint="base",
        )
        expected = collected_to_bytes(kept, kind="votes", base_fingerprint="base")
        assert (store / "new" / "x").read_bytes() == expected
        assert sha256 == hashlib.sha256(expected).hexdigest()
        assert asked == sorted(kept)


def test_a_tensor_of_another_shape_than_was_said_is_refused(store: Location):
    with pytest.raises(
        SafetyDPOError, match=r"a tensor of shape \[2, 3\] for 'a' in .*x, found \[3, 2\]: collect them"
    ):
        write_collected(
            store / "x", {"a": (2, 3)}, lambda _: torch.ones(3, 2), number="F32", kind="votes", base_fingerprint="base"
        )
