"""Experts that are read from their files layer by layer: the same bytes, and memory that hardly grows."""

from __future__ import annotations

import tracemalloc

import pytest
import torch

from safetydpo.artifacts.adapters import AdapterMetadata, LoraLayer, adapter_hash, write_adapter
from safetydpo.artifacts.lazy_tensors import LazyLayers
from safetydpo.artifacts.storage import Location
from safetydpo.errors import SafetyDPOError
from safetydpo.merging.merge import Expert, MergeSettings, merge_with, prepare_experts
from safetydpo.merging.registry import METHODS

SHAPES = {f"down_blocks.{index}.to_q": (10, 8) for index in range(6)}


def write(store: Location, num: int, *, width: int = 1) -> list[Expert]:
    experts = []
    for seed in range(num):
        generator = torch.Generator().manual_seed(seed)
        layers = {
            key: LoraLayer(
                torch.randn(2, d_in * width, generator=generator), torch.randn(d_out * width, 2, generator=generator)
            )
            for key, (d_in, d_out) in SHAPES.items()
        }
        write_adapter(store / f"{seed}.safetensors", layers, metadata=AdapterMetadata("base", categories=("hate",)))
        experts.append(Expert(f"e{seed}", adapter_hash(layers), layers, AdapterMetadata("base")))
    return experts


def lazy(store: Location, num: int) -> list[Expert]:
    found = []
    for seed in range(num):
        layers = LazyLayers(store / f"{seed}.safetensors")
        found.append(Expert(f"e{seed}", adapter_hash(layers), layers, layers.metadata))
    return found


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"distill", "regmean"}))
def test_the_same_bytes(store: Location, method: str):
    inputs = {key: torch.randn(5, 2, 10, generator=torch.Generator().manual_seed(7)) for key in SHAPES}
    settings = MergeSettings(method, density=0.5, output_rank=3)
    experts = write(store, 4)
    kept = merge_with(prepare_experts(experts, inputs=inputs), settings)
    read = merge_with(prepare_experts(lazy(store, 4), inputs=inputs, max_score_bytes=0), settings)
    assert adapter_hash(kept.layers) == adapter_hash(read.layers)
    assert kept.truncation_error == read.truncation_error
    assert kept.shares == read.shares


def test_one_layer_of_all_experts_is_held_at_a_time(store: Location):
    """Files of 6 layers x 2 x (1000 + 800) x 4 bytes = 86 kB, of which a sixth may be held: counted are the bytes that
    are read from files."""
    write(store, 20, width=100)
    experts = lazy(store, 20)
    tracemalloc.start()
    merge_with(prepare_experts(experts), MergeSettings("svd", output_rank=2))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * 86_400 / 2


def test_experts_that_do_not_belong_together_are_refused(store: Location):
    experts = write(store, 2)
    broken = {**experts[0].layers, "down_blocks.3.to_q": LoraLayer(torch.ones(2, 11), torch.ones(8, 2))}
    write_adapter(store / "1.safetensors", broken, metadata=AdapterMetadata("base"))
    with pytest.raises(SafetyDPOError, match=r"disagree on layer shapes: 'e0' has \[8, 10\], 'e1' \[8, 11\]; first"):
        prepare_experts(lazy(store, 2))
    broken["down_blocks.3.to_q"] = LoraLayer(torch.ones(3, 10), torch.ones(8, 3))
    write_adapter(store / "1.safetensors", broken, metadata=AdapterMetadata("base"))
    with pytest.raises(
        SafetyDPOError, match="disagree on LoRA rank: 'e0' has 2, 'e1' 3; first difference 'down_blocks.3"
    ):
        merge_with(prepare_experts(lazy(store, 2)), MergeSettings("max_magnitude"))
