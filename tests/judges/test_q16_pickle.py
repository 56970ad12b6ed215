"""The only reader of a pickle: two prompts come out of every honest form, and nothing else is let in."""

from __future__ import annotations

import io
import os
import pickle  # noqa: TID251 (written, never read)
import pickletools
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safetydpo.errors import SafetyDPOError
from safetydpo.judges.q16_pickle import MOST_BYTES, read_prompts

PROMPTS = np.random.default_rng(0).normal(size=(2, 768))


class Attack:
    """What a malicious pickle holds: a call that the reader is to make."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def touched(folder: Path) -> tuple[Path, str]:
    mark = folder / "was_run"
    return mark, f"touch {mark}"


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["f2", "f4", "f8"])
def test_numpy_arrays_of_every_protocol(protocol: int, kind: str):
    wanted = PROMPTS.astype(kind)
    found = read_prompts(pickle.dumps(wanted, protocol=protocol))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, wanted.astype(np.float32))


@pytest.mark.parametrize("old", [b"numpy._core", b"numpy.core\x00"])
def test_arrays_of_older_numpy(old: bytes):
    """numpy before version 2 wrote the module's name without the underscore."""
    data = pickle.dumps(PROMPTS.astype("f4"), protocol=3)
    assert b"numpy._core" in data
    if old.endswith(b"\x00"):
        data = data.replace(b"numpy._core", b"numpy.core")
    np.testing.assert_array_equal(read_prompts(data), PROMPTS.astype("f4"))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_lists_of_numbers(protocol: int):
    np.testing.assert_array_equal(read_prompts(pickle.dumps(PROMPTS.tolist(), protocol)), PROMPTS.astype("f4"))


@pytest.mark.parametrize("kind", [torch.float16, torch.float32, torch.float64])
def test_tensors_in_torchs_archive(kind: torch.dtype):
    tensor = torch.from_numpy(PROMPTS).to(kind)
    for value in (tensor, torch.nn.Parameter(tensor)):
        buffer = io.BytesIO()
        torch.save(value, buffer)
        np.testing.assert_array_equal(read_prompts(buffer.getvalue()), tensor.float().numpy())


@pytest.mark.parametrize("protocol", [2, 4])
def test_calls_are_refused_before_anything_is_built(tmp_path: Path, protocol: int):
    mark, command = touched(tmp_path)
    numbers = PROMPTS.astype("f4")
    for content in (
        Attack(os.system, command),
        [numbers, Attack(os.system, command)],
        {"prompts": Attack(os.system, command)},
        Attack(eval, f"__import__('os').system({command!r})"),
        Attack(getattr, os.path.join, "__globals__"),
        Attack(np.load, str(tmp_path)),
    ):
        with pytest.raises(SafetyDPOError, match=r"found the (name|opcode) .*nothing of it was run"):
            read_prompts(pickle.dumps(content, protocol=protocol))
    assert not mark.exists()


def test_a_nested_pickle_is_not_read():
    """torch's plain pickles hold another pickle as bytes and a function that reads it."""
    data = pickle.dumps(torch.from_numpy(PROMPTS))
    with pytest.raises(SafetyDPOError, match=r"the name 'torch\.storage\._load_from_bytes'"):
        read_prompts(data)


def test_dotted_names_reach_nothing():
    """`numpy` plus `core.multiarray.…` or `os.system` behind a known module is another name."""
    for module, name in (("numpy", "os.system"), ("numpy.core.multiarray", "_reconstruct.__globals__")):
        data = (
            b"\x80\x04" + b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name)) + b"\x93."
        )
        with pytest.raises(SafetyDPOError, match="found the name"):
            read_prompts(data)
    with pytest.raises(SafetyDPOError, match=r"found the name 'posix\.system'"):
        read_prompts(b"cposix\nsystem\n(S'id'\ntR.")


def test_a_known_name_called_with_something_else_builds_nothing_large():
    """`_frombuffer` with a number instead of bytes would ask for a terabyte of zeros."""
    kind = b"\x8c\x05numpy\x8c\x05dtype\x93\x8c\x02f4\x89\x88\x87R"
    number = b"\x8a\x06" + (10**12).to_bytes(6, "little")
    shape = b"K\x02M\x00\x03\x86"
    data = b"\x80\x04\x8c\x13numpy._core.numeric\x8c\x0b_frombuffer\x93(" + number + kind + shape + b"\x8c\x01CtR."
    with pytest.raises(SafetyDPOError, match="an array whose content is no bytes"):
        read_prompts(data)


def test_claims_of_size_are_not_believed():
    claimed = b"\x80\x04\x8e" + (1 << 60).to_bytes(8, "little") + b"abc."
    with pytest.raises(SafetyDPOError, match="a pickle that does not fit together"):
        read_prompts(claimed)
    with pytest.raises(SafetyDPOError, match="1,000,001 bytes, more than the 1,000,000"):
        read_prompts(b"\x80\x04" + b"N" * (MOST_BYTES - 1))
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\0" * (MOST_BYTES + 1))
    with pytest.raises(SafetyDPOError, match="a zip archive that unpacks to more than 1,000,000 bytes"):
        read_prompts(bomb.getvalue())


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (PROMPTS[:1], "an array of shape [1, 768]"),
        (np.ascontiguousarray(PROMPTS.T), "an array of shape [768, 2]"),
        (PROMPTS.tolist()[:1], "a list"),
        ([[True] * 768, ["a"] * 768], "a list"),
        (PROMPTS.astype("i4"), "another type than little-endian floating point|'i4'"),
        (PROMPTS.astype(">f4"), "another type than little-endian floating point"),
        (np.asfortranarray(PROMPTS), "stored by columns"),
        (PROMPTS * np.nan, "prompts that are zero or not finite"),
        (PROMPTS * 0, "prompts that are zero or not finite"),
        ("prompts", "a str"),
        (None, "a nonetype"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else type(value).__name__,
)
def test_something_else_than_two_prompts(content: object, found: str):
    for protocol in (3, 5):
        with pytest.raises(SafetyDPOError, match=f"expected a pickle of two prompts .*({found.replace('[', '.')})"):
            read_prompts(pickle.dumps(content, protocol=protocol))


def test_archives_that_are_none():
    empty, odd = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(empty, "w") as archive:
        archive.writestr("a/version", "3")
    with pytest.raises(SafetyDPOError, match="a zip archive with 0 files data.pkl"):
        read_prompts(empty.getvalue())
    with pytest.raises(SafetyDPOError, match="a zip archive that cannot be read"):
        read_prompts(b"PK\x03\x04 not an archive")
    torch.save(torch.zeros(4, 768)[::2], odd)
    with pytest.raises(SafetyDPOError, match="a tensor that is only part of its storage"):
        read_prompts(odd.getvalue())


@given(st.binary(max_size=200))
def test_no_bytes_do_anything_but_fail_in_one_line(data: bytes):
    with pytest.raises(SafetyDPOError, match=r"^expected a pickle of two prompts [^\n]*$"):
        read_prompts(data)


@given(st.integers(0, 3000), st.integers(0, 255))
def test_a_changed_byte_gives_prompts_or_one_line(place: int, value: int):
    data = bytearray(pickle.dumps(PROMPTS.astype("f2"), protocol=4))
    data[place % len(data)] = value
    with suppress(SafetyDPOError):
        assert read_prompts(bytes(data)).shape == (2, 768)


def test_every_opcode_that_could_call_or_import_is_known_to_be_refused():
    """New opcodes of Python are refused too: the list names what is allowed."""
    from safetydpo.judges.q16_pickle import _OPCODES

    assert set(_OPCODES) < {opcode.name for opcode in pickletools.opcodes}
    for name in ("INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID", "NEXT_BUFFER", "DICT"):
        assert name not in _OPCODES
