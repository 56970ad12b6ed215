"""An adapter added to the base's weights for a while."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from safetydpo.diffusion.adapter import AdapterSlot
from safetydpo.errors import SafetyDPOError
from tests.diffusion.test_adapter import SIGNATURE, build_network, random_layers


@pytest.fixture
def network() -> nn.Module:
    return build_network()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(5))


def test_fused_computes_the_same_with_the_base_layers_alone_and_gives_them_back(network, x):
    """Rank 1 and a scale other than 1; afterwards the weights are the base's bit for bit, also after an error."""
    base = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    slot = AdapterSlot(network)
    slot.install(SIGNATURE)
    slot.load(random_layers(slot, rank=1), scale=0.5)
    changed = network(x)
    with slot.fused():
        torch.testing.assert_close(network(x), changed, rtol=1e-5, atol=1e-6)
        layer = slot.export()["0.to_q"]
        wanted = base["0.to_q.weight"] + layer.up @ layer.down
        torch.testing.assert_close(slot.weight("0.to_q"), wanted, rtol=1e-6, atol=1e-7)
        with slot.off():
            torch.testing.assert_close(slot.weight("0.to_q"), wanted, rtol=1e-6, atol=1e-7)
    assert torch.equal(network(x), changed)
    with pytest.raises(RuntimeError, match="inside"), slot.fused():
        raise RuntimeError("inside")
    assert torch.equal(network(x), changed)
    slot.remove()
    assert all(torch.equal(tensor, base[name]) for name, tensor in network.state_dict().items())


def test_fused_without_a_slot_or_while_it_is_off_computes_the_base(network, x):
    base = network(x)
    slot = AdapterSlot(network)
    with slot.fused():
        assert torch.equal(network(x), base)
    slot.install(SIGNATURE)
    slot.load(random_layers(slot, rank=2))
    changed = network(x)
    with slot.off(), slot.fused():
        assert torch.equal(network(x), base)
    with slot.gated():
        gated = network(x)
        with slot.off(), slot.fused():
            assert torch.equal(network(x), base)
        with slot.fused():
            torch.testing.assert_close(network(x), changed, rtol=1e-5, atol=1e-6)
        assert torch.equal(network(x), gated)
    assert torch.equal(network(x), changed)


def test_an_adapter_is_not_fused_into_shorter_numbers(network):
    slot = AdapterSlot(network.bfloat16())
    slot.install(SIGNATURE)
    slot.load(random_layers(slot, rank=2))
    before = slot.weight("0.to_q").clone()
    with pytest.raises(SafetyDPOError, match=r"float32 .* found torch\.bfloat16: leave identity\.sampler\.fused out"):
        slot.fused().__enter__()
    assert torch.equal(slot.weight("0.to_q"), before)
