"""PEFT's merges in delta space (`*_svd`) on a real model, linear and convolutional, against ours at the same rank."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from safetydpo.artifacts.adapters import AdapterMetadata, LoraLayer, adapter_hash
from safetydpo.merging.algebra import delta, flatten_kernel
from safetydpo.merging.merge import Expert, merge_experts

TARGETS = ("q", "point", "conv")
RANK = 4
PARAMETERS = {"ranks": [2, 3, 2], "alphas": [2, 6, 5], "weights": [1.0, 1.5, 0.7]}


class Network(nn.Module):
    """A linear layer, a 1 x 1 and a 3 x 3 convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.point, self.conv = nn.Linear(20, 12), nn.Conv2d(6, 9, 1), nn.Conv2d(5, 7, 3)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """Three adapters of different ranks, alphas and rank patterns."""
    torch.manual_seed(0)

    def config(rank: int, alpha: int) -> LoraConfig:
        pattern = {"conv": rank + 1}
        return LoraConfig(
            r=rank, lora_alpha=alpha, target_modules=list(TARGETS), init_lora_weights=False, rank_pattern=pattern
        )

    first, *others = (config(*row) for row in zip(PARAMETERS["ranks"], PARAMETERS["alphas"], strict=True))
    model = get_peft_model(Network(), first, adapter_name="a")
    for name, other in zip("bc", others, strict=True):
        model.add_adapter(name, other)
    return model


def read(model: nn.Module, adapter: str) -> dict[str, LoraLayer]:
    layers = {}
    for name in TARGETS:
        layer = getattr(model.base_model.model, name)
        down, up = layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach()
        layers[name] = LoraLayer(down.clone(), up * layer.scaling[adapter])
    return layers


def experts_of(model: nn.Module) -> list[Expert]:
    found = []
    for name in "abc":
        layers = read(model, name)
        found.append(Expert(name, adapter_hash(layers), layers, AdapterMetadata("base")))
    return found


@pytest.mark.parametrize(
    ("combination", "method", "weights"),
    [
        ("svd", "svd", PARAMETERS["weights"]),
        ("svd", "sum", PARAMETERS["weights"]),
        ("magnitude_prune_svd", "magnitude", PARAMETERS["weights"]),
        # PEFT elects signs before it weighs, we after: with equal weights both say the same.
        ("ties_svd", "ties", [1.0, 1.0, 1.0]),
    ],
)
def test_equals_add_weighted_adapter(model, combination, method, weights):
    name = f"{combination}-{method}"
    model.add_weighted_adapter(
        list("abc"), weights, name, combination_type=combination, svd_rank=RANK, density=0.6, svd_full_matrices=False
    )
    theirs = read(model, name)
    ours = merge_experts(
        experts_of(model),
        method=method,
        weights=dict(zip("abc", weights, strict=True)),
        density=0.6,
        output_rank=RANK,
    ).layers
    for layer in TARGETS:
        assert ours[layer].down.shape == theirs[layer].down.shape
        assert ours[layer].up.shape == theirs[layer].up.shape
        expected = delta(flatten_kernel(theirs[layer]))
        error = (delta(flatten_kernel(ours[layer])) - expected).norm() / expected.norm()
        assert float(error) < 1e-5


def test_the_flattened_delta_is_the_change_of_the_kernel(model):
    """PEFT's own change of a convolution's weight, alpha and rank pattern included."""
    for expert in experts_of(model):
        for name in TARGETS:
            theirs = getattr(model.base_model.model, name).get_delta_weight(expert.name)
            torch.testing.assert_close(delta(flatten_kernel(expert.layers[name])), theirs.flatten(1))


def test_a_merged_convolution_acts_as_the_sum_of_its_experts(model):
    """x -> up(down(x)) with the merged weights equals the sum of the experts' own, for 1 x 1 and 3 x 3 kernels."""
    experts = experts_of(model)
    merged = merge_experts(experts, method="sum").layers
    for name, channels in (("point", 6), ("conv", 5)):
        x = torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(1))

        def act(layer: LoraLayer, x: torch.Tensor = x) -> torch.Tensor:
            return nn.functional.conv2d(nn.functional.conv2d(x, layer.down), layer.up)

        expected = sum(act(expert.layers[name]) for expert in experts)
        torch.testing.assert_close(act(merged[name]), expected, rtol=1e-4, atol=1e-4)
