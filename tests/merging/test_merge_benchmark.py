"""The benchmark of merges measures what it says: true shapes, the same experts on both sides."""

from __future__ import annotations

import pytest

from benchmarks.random_experts import RANK, SD15, SDXL, layer_shapes, make_experts
from safetydpo.artifacts.adapters import AdapterMetadata
from safetydpo.merging.merge import prepare_experts


@pytest.mark.parametrize(("unet", "layers", "parameters"), [(SD15, 128, 797_184), (SDXL, 560, 5_806_080)])
def test_experts_have_the_shapes_of_real_ones(unet, layers, parameters):
    shapes = layer_shapes(unet)
    assert len(shapes) == layers
    assert sum(RANK * (d_in + d_out) for d_in, d_out in shapes.values()) == parameters


def test_experts_can_be_merged():
    experts = make_experts({"down_blocks.0.to_q": (6, 5)}, 3)
    assert [expert.name for expert in prepare_experts(experts).experts] == ["expert0", "expert1", "expert2"]
    assert experts[0].metadata != AdapterMetadata()
