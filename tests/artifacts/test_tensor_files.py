from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from safetydpo.artifacts.tensor_files import BrokenTensors, load_tensors, parse_tensor_header, parse_tensors


def test_tensors_and_header_come_back(tmp_path: Path):
    data = save({"a": torch.ones(2, 3)}, metadata={"b": "c"})
    (tmp_path / "x.safetensors").write_bytes(data)
    for found in (parse_tensors(data), load_tensors(tmp_path / "x.safetensors")):
        assert torch.equal(found["a"], torch.ones(2, 3))
    assert parse_tensor_header(data)["__metadata__"] == {"b": "c"}


def test_damage_is_one_kind_of_error(tmp_path: Path):
    data = save({"a": torch.ones(2, 3)})
    for broken in (b"", data[:20], data[:-1], b"\xff" * 64, data.replace(b"F32", b"X99")):
        with pytest.raises(BrokenTensors):
            parse_tensors(broken)
    with pytest.raises(BrokenTensors, match="No such file"):
        load_tensors(tmp_path / "none")
    with pytest.raises(BrokenTensors, match="no object"):
        parse_tensor_header((2).to_bytes(8, "little") + b"[]")
