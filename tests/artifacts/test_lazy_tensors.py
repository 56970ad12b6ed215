from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save

from safetydpo.artifacts.adapters import (
    AdapterMetadata,
    LoraLayer,
    adapter_from_bytes,
    adapter_hash,
    adapter_to_bytes,
)
from safetydpo.artifacts.lazy_tensors import LazyLayers, LazyTensors
from safetydpo.artifacts.storage import Location
from safetydpo.errors import SafetyDPOError


def make_layers(ranks: tuple[int, ...] = (3, 2)) -> dict[str, LoraLayer]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"down.{index}.to_q": LoraLayer(
            torch.randn(rank, 6 + index, generator=generator), torch.randn(5, rank, generator=generator)
        )
        for index, rank in enumerate(ranks)
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_tensors_are_those_of_the_file(store: Location, dtype: torch.dtype):
    tensors = {"b": torch.randn(3, 4).to(dtype), "a": torch.randn(2).to(dtype), "empty": torch.zeros(0, 3, dtype=dtype)}
    (store / "x").write_bytes(save(tensors, metadata={"k": "v"}))
    lazy = LazyTensors(store / "x")
    assert list(lazy) == ["a", "b", "empty"]
    assert len(lazy) == 3
    assert lazy.header_metadata == {"k": "v"}
    assert lazy.shape("b") == (3, 4)
    assert all(torch.equal(lazy[name], tensors[name]) for name in tensors)
    with pytest.raises(KeyError):
        lazy["c"]


@pytest.mark.parametrize("denoiser", ["unet", "transformer"])
def test_layers_are_those_that_are_read_at_once(store: Location, denoiser):
    """Ranks 3 and 2: the file pads the second one; neither way gives the padding back."""
    metadata = AdapterMetadata("base", categories=("hate",), denoiser=denoiser)
    data = adapter_to_bytes(make_layers(), metadata)
    (store / "x").write_bytes(data)
    layers, read = adapter_from_bytes(data, source="x")
    lazy = LazyLayers(store / "x")
    assert lazy.metadata == read == metadata
    assert list(lazy) == list(layers)
    assert adapter_hash(lazy) == adapter_hash(layers)
    assert lazy.shapes("down.1.to_q") == ((2, 7), (5, 2))
    assert len(lazy) == 2


def test_a_change_of_the_file_is_noticed(store: Location):
    (store / "x").write_bytes(adapter_to_bytes(make_layers(), AdapterMetadata()))
    lazy = LazyLayers(store / "x")
    data = (store / "x").read_bytes()
    (store / "x").write_bytes(data[:-8])
    with pytest.raises(SafetyDPOError, match=r"expected 60 bytes of 'unet.down.1.to_q.lora_B.weight' .*, found 52"):
        lazy["down.1.to_q"]


def test_other_files_are_refused(store: Location):
    (store / "x").write_bytes(b"nothing")
    with pytest.raises(SafetyDPOError, match="without its header: make or copy the file again"):
        LazyLayers(store / "x")
    layers = adapter_to_bytes(make_layers(), replace(AdapterMetadata(), kind="merged"))
    (store / "x").write_bytes(layers[:-4])
    with pytest.raises(SafetyDPOError, match="cut short"):
        LazyLayers(store / "x")
    (store / "x").write_bytes(save({"unet.a.lora_A.weight": torch.ones(1, 2)}))
    with pytest.raises(SafetyDPOError, match=r"first difference at 'unet.a.lora_B.weight': save the adapter in the"):
        LazyLayers(store / "x")
    (store / "x").write_bytes(save({"text.a.lora_A.weight": torch.ones(1, 2)}))
    with pytest.raises(SafetyDPOError, match=r"expected keys 'unet.<module>.lora_A.weight' and '….lora_B.weight'"):
        LazyLayers(store / "x")
    pair = {"unet.a.lora_A.weight": torch.ones(1, 2, dtype=torch.int8), "unet.a.lora_B.weight": torch.ones(1, 1)}
    (store / "x").write_bytes(save(pair))
    with pytest.raises(SafetyDPOError, match=r"a tensor of F64, F32, F16, BF16 in .*, found I8 in 'unet.a.lora_A"):
        LazyLayers(store / "x")["a"]
