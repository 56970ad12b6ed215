"""Experts of one small layer for tests of merge methods."""

from __future__ import annotations

import torch

from safetydpo.artifacts.adapters import LoraLayer
from safetydpo.merging.algebra import exact_factors
from safetydpo.merging.method import LayerExperts
from safetydpo.merging.votes import score_neurons
from safetydpo.seeding import derive_torch

SEED = 5


def dense_experts(
    *matrices: list[list[float]], weights: list[float] | None = None, density: float = 1.0
) -> LayerExperts:
    layers = [exact_factors(torch.tensor(matrix)) for matrix in matrices]
    hashes = [f"hash{index}" for index in range(len(layers))]
    return LayerExperts("q", layers, weights or [1.0] * len(layers), density=density, seed=SEED, hashes=hashes)


def random_experts(
    num: int,
    *,
    weights: list[float] | None = None,
    density: float = 0.4,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> LayerExperts:
    generator = torch.Generator().manual_seed(seed)
    layers = [
        LoraLayer(torch.randn(3, 8, generator=generator), torch.randn(6, 3, generator=generator)) for _ in range(num)
    ]
    inputs = torch.randn(10, 4, 8, generator=generator)
    if dtype is not None:
        layers = [LoraLayer(layer.down.to(dtype), layer.up.to(dtype)) for layer in layers]
    scores = [score_neurons(layer, inputs) for layer in layers]
    moments = [random_moment(generator) for _ in range(num)]
    return LayerExperts(
        "q",
        layers,
        weights or [1.0] * num,
        density=density,
        scores=scores,
        seed=SEED,
        moments=moments,
        benign_moment=random_moment(generator),
        hashes=[f"hash{index}" for index in range(num)],
    )


def random_moment(generator: torch.Generator) -> torch.Tensor:
    values = torch.randn(20, 8, generator=generator)
    return values.T @ values


def scaled_deltas(experts: LayerExperts) -> list[torch.Tensor]:
    """The dense change of each expert times its weight."""
    return [weight * (e.up @ e.down) for e, weight in zip(experts.layers, experts.weights, strict=True)]


def draws(experts: LayerExperts, index: int) -> torch.Tensor:
    """The uniform numbers that decide which entries of an expert are dropped."""
    generator = derive_torch(experts.seed, "merging.drop", f"{experts.name}\x1f{experts.hashes[index]}")
    layer = experts.layers[index]
    return torch.rand(layer.up.shape[0], layer.down.shape[1], generator=generator, dtype=layer.up.dtype)
