"""Exactness of the sum and of its reduction: different ranks, alphas and rank patterns, linear and convolutional."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from safetydpo.artifacts.adapters import AdapterMetadata, LoraLayer, LoraSignature, adapter_hash
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.merging import algebra
from safetydpo.merging.algebra import (
    decompose,
    delta,
    flatten_kernel,
    nonzero_count,
    prefers_factors,
    rank_of,
    restore_kernel,
    truncate,
)
from safetydpo.merging.merge import Expert, MergeSettings, merge_with, prepare_experts
from safetydpo.merging.moments import BENIGN
from safetydpo.merging.registry import METHODS

LIMITS = {torch.float32: 1e-6, torch.float64: 1e-12}
LINEAR, POINT, CONV = "down_blocks.0.to_q", "mid_block.proj", "up_blocks.1.conv"
PATTERN = {LINEAR: 0, POINT: 1, CONV: 2}


def draw(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def make_expert(seed: int, *, rank: int, alpha: float, dtype: torch.dtype) -> Expert:
    """Layers of ranks `rank`, rank + 1 and rank + 2, each scaled by alpha / its rank."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        LINEAR: ((30,), (24,)),
        POINT: ((10, 1, 1), (12, 1, 1)),
        CONV: ((6, 3, 3), (20, 1, 1)),
    }
    layers = {}
    for name, (d_in, (d_out, *ones)) in shapes.items():
        own = rank + PATTERN[name]
        down, up = draw(generator, own, *d_in), draw(generator, d_out, own, *ones) * alpha / own
        layers[name] = LoraLayer(down.to(dtype), up.to(dtype))
    signature = LoraSignature(rank, alpha, ("to_q", "proj", "conv"))
    return Expert(f"e{seed}", f"hash{seed}", layers, AdapterMetadata("base", signature, categories=(f"c{seed}",)))


def dense_sum(experts: list[Expert], name: str, weights: dict[str, float]) -> np.ndarray:
    """einsum over the kernel's axes in float64: no flattening."""
    total = 0.0
    for expert in experts:
        layer = expert.layers[name]
        down, up = layer.down.double().numpy(), layer.up.double().numpy()
        total = total + weights[expert.name] * np.einsum("or,r...->o...", up.reshape(up.shape[:2]), down)
    return np.asarray(total)


def change(layer: LoraLayer) -> np.ndarray:
    up, down = layer.up.double().numpy(), layer.down.double().numpy()
    return np.einsum("or,r...->o...", up.reshape(up.shape[:2]), down)


@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize("num", [1, 3, 9])
def test_sums_are_exact(dtype, num):
    """Up to 9 experts of ranks 1 … 6: below and above the 24, 10 and 20 components that a layer can have."""
    experts = [make_expert(seed, rank=1 + seed % 4, alpha=2.0 + seed, dtype=dtype) for seed in range(num)]
    weights = {expert.name: 0.5 + 0.25 * index for index, expert in enumerate(experts)}
    merged = merge_with(prepare_experts(experts), MergeSettings("sum", weights=weights))
    for name, most in ((LINEAR, 24), (POINT, 10), (CONV, 20)):
        layer, first = merged.layers[name], experts[0].layers[name]
        assert layer.down.shape[1:] == first.down.shape[1:]
        assert layer.up.shape[2:] == first.up.shape[2:]
        assert rank_of(layer) == min(most, sum(rank_of(expert.layers[name]) for expert in experts))
        expected = dense_sum(experts, name, weights)
        assert np.linalg.norm(change(layer) - expected) <= LIMITS[dtype] * np.linalg.norm(expected)


@pytest.mark.parametrize("dtype", list(LIMITS))
def test_reduction_to_the_true_rank_is_exact(dtype):
    """Two experts and their halves, ranks 2 to 4 per layer: the sum of four has the rank of two."""
    experts = [make_expert(seed, rank=2, alpha=3.0, dtype=dtype) for seed in range(2)]
    halves = [
        Expert(
            f"half{e.name}", f"half{e.hash}", {n: LoraLayer(x.down, x.up / 2) for n, x in e.layers.items()}, e.metadata
        )
        for e in experts
    ]
    weights = {expert.name: 1.0 for expert in (*experts, *halves)}
    merged = merge_with(prepare_experts([*experts, *halves]), MergeSettings("svd", weights=weights, output_rank=8))
    for name in PATTERN:
        expected = dense_sum([*experts, *halves], name, weights)
        assert np.linalg.norm(change(merged.layers[name]) - expected) <= LIMITS[dtype] * np.linalg.norm(expected)
    assert merged.overall_truncation_error < LIMITS[dtype]


@pytest.mark.parametrize("method", sorted(name for name, method in METHODS.items() if not method.reshapes))
def test_one_expert_with_convolutions_comes_back(method):
    expert = make_expert(0, rank=2, alpha=3.0, dtype=torch.float32)
    inputs = {
        name: torch.randn(4, 2, flatten_kernel(layer).down.shape[1], generator=torch.Generator().manual_seed(1))
        for name, layer in expert.layers.items()
    }
    merged = merge_with(prepare_experts([expert], inputs=inputs), MergeSettings(method, density=1.0))
    for name, layer in expert.layers.items():
        assert merged.layers[name].down.shape[1:] == layer.down.shape[1:]
        expected = change(layer)
        assert np.linalg.norm(change(merged.layers[name]) - expected) <= 1e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize("kind", ["inputs", "moments"])
def test_what_is_collected_of_linear_layers_only_refuses_a_convolution(kind):
    expert = make_expert(0, rank=2, alpha=3.0, dtype=torch.float32)
    linear = {name: layer for name, layer in expert.layers.items() if name != CONV}
    collected = {
        "inputs": {name: torch.ones(4, 2, flatten_kernel(layer).down.shape[1]) for name, layer in linear.items()},
        "moments": {name: {"hate": torch.eye(2), BENIGN: torch.eye(2)} for name in linear},
    }
    with_category = replace(expert, metadata=replace(expert.metadata, categories=("hate",)))
    with pytest.raises(SafetyDPOError, match="found none for '.*conv'"):
        prepare_experts([with_category], **{kind: collected[kind]})


@pytest.mark.parametrize(
    "method", ["sum", "svd", "ties", "dare_ties", "knots", "tsv", "iso", "component", "delta_neuron"]
)
def test_different_ranks_and_kernels_merge_in_any_order(method):
    experts = [make_expert(seed, rank=1 + seed, alpha=2.0, dtype=torch.float32) for seed in range(3)]
    inputs = {
        name: torch.randn(4, 2, flatten_kernel(layer).down.shape[1], generator=torch.Generator().manual_seed(1))
        for name, layer in experts[0].layers.items()
    }
    found = {
        adapter_hash(merge_with(prepare_experts(order, inputs=inputs), MergeSettings(method, output_rank=3)).layers)
        for order in itertools.permutations(experts)
    }
    assert len(found) == 1


@pytest.mark.parametrize("rank", [3, 16, 20, 24])
def test_both_ways_to_a_decomposition_agree(monkeypatch, rank):
    """24 components of 24 x 30 at most: up to 16 in factored form, above by the dense SVD (were it no small layer)."""
    monkeypatch.setattr(algebra, "SMALL_LAYER", 23)
    generator = torch.Generator().manual_seed(rank)
    layer = LoraLayer(draw(generator, rank, 30), draw(generator, 24, rank))
    assert prefers_factors(layer) == (rank <= 16)
    u, s, vh = decompose(layer)
    expected = np.linalg.svd((layer.up @ layer.down).numpy(), compute_uv=False)
    np.testing.assert_allclose(s.numpy(), expected[: len(s)], atol=1e-12 * expected[0])
    torch.testing.assert_close(u * s @ vh, delta(layer), rtol=1e-10, atol=1e-10)
    reduced = truncate(layer, 2)
    assert reduced.truncation_error == pytest.approx(
        np.sqrt((expected[2:] ** 2).sum() / (expected**2).sum()), rel=1e-10
    )


@pytest.mark.parametrize(
    ("side", "rank", "is_factored"), [(256, 255, True), (256, 256, False), (300, 210, True), (300, 211, False)]
)
def test_small_layers_stay_factored_as_long_as_they_can(side, rank, is_factored):
    assert prefers_factors(LoraLayer(torch.zeros(rank, side), torch.zeros(side + 1, rank))) == is_factored


def test_values_below_rounding_do_not_count():
    assert nonzero_count(torch.tensor([1.0, 1e-5, 1e-7, 0.0]), dtype=torch.float32) == 2
    assert nonzero_count(torch.tensor([1.0, 1e-5, 1e-7, 1e-16]), dtype=torch.float64) == 3
    assert nonzero_count(torch.zeros(2), dtype=torch.float32) == 0
    assert nonzero_count(torch.zeros(0), dtype=torch.float32) == 0


def test_kernels_come_back():
    layer = LoraLayer(torch.arange(24.0).reshape(2, 3, 2, 2), torch.ones(5, 2, 1, 1))
    flat = flatten_kernel(layer)
    assert flat.down.tolist()[0] == list(map(float, range(12)))
    again = restore_kernel(flat, (2, 2))
    assert torch.equal(again.down, layer.down)
    assert torch.equal(again.up, layer.up)
    assert flatten_kernel(flat) is flat
    assert restore_kernel(flat, ()) is flat


def test_a_linear_layer_is_no_convolution():
    one, other = (make_expert(seed, rank=2, alpha=1.0, dtype=torch.float32) for seed in range(2))
    flat = Expert("flat", "hash", {**other.layers, CONV: flatten_kernel(other.layers[CONV])}, other.metadata)
    with pytest.raises(
        SafetyDPOError, match=r"layer shapes: 'e0' has \[20, 6, 3, 3\], 'flat' \[20, 54\]; first differ"
    ):
        prepare_experts([one, flat])


def test_weights_that_add_up_to_nothing_are_refused():
    experts = [make_expert(seed, rank=2, alpha=1.0, dtype=torch.float32) for seed in range(2)]
    with pytest.raises(UsageError, match="weights that add up to a number other than 0 for merge method 'linear'"):
        merge_with(prepare_experts(experts), MergeSettings("linear", weights={"e0": 0.5, "e1": -0.5}))
    options = {
        "della_window": r"della_window of at least 0, found -1",
        "breadcrumbs_outliers": r"in \[0, 1\), found -1",
    }
    for name, message in options.items():
        settings = MergeSettings("sum")
        broken = type(settings.options)(**{name: -1.0})
        with pytest.raises(UsageError, match=message):
            merge_with(prepare_experts(experts), MergeSettings("sum", options=broken))
