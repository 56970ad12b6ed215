from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.nn import functional

from safetydpo.artifacts.adapters import LoraLayer, LoraSignature
from safetydpo.diffusion.adapter import AdapterSlot, initial_adapter
from safetydpo.diffusion.targets import matches_suffix
from safetydpo.errors import SafetyDPOError, UsageError

SIGNATURE = LoraSignature(rank=2, alpha=2.0, targets=("to_q", "to_out.0"))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(4, 6)
        self.to_out = nn.ModuleList([nn.Linear(6, 4), nn.Dropout(0.0)])
        self.norm = nn.LayerNorm(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.to_out[0](functional.silu(self.to_q(x))))


def build_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block()).requires_grad_(False)


def random_layers(slot: AdapterSlot, *, rank: int, seed: int = 1) -> dict[str, LoraLayer]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: LoraLayer(
            down=torch.randn(rank, d_in, generator=generator), up=torch.randn(d_out, rank, generator=generator)
        )
        for name, (d_in, d_out) in slot.shapes(SIGNATURE.targets)
    }


@pytest.fixture
def network() -> nn.Module:
    return build_network()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(5))


def test_suffixes_match_whole_name_parts():
    assert matches_suffix("blocks.0.attn1.to_out.0", ["to_out.0"])
    assert matches_suffix("to_q", ["to_q"])
    assert not matches_suffix("blocks.0.add_to_q", ["to_q"])


def test_one_layer_by_hand():
    """W = I, A = [1 0], B = [0 2]': up @ down @ [3, 5]' = [0, 6]'; at scale 0.5 the output is [3, 5 + 3] = [3, 8]."""
    network = nn.ModuleDict({"to_q": nn.Linear(2, 2, bias=False)}).requires_grad_(False)
    network["to_q"].weight.data = torch.eye(2)
    slot = AdapterSlot(network)
    slot.install(LoraSignature(rank=1, alpha=1.0, targets=("to_q",)))
    slot.load({"to_q": LoraLayer(down=torch.tensor([[1.0, 0.0]]), up=torch.tensor([[0.0], [2.0]]))}, scale=0.5)
    assert network["to_q"](torch.tensor([3.0, 5.0])).tolist() == [3.0, 8.0]
    assert slot.export()["to_q"].up.tolist() == [[0.0], [1.0]]


@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("alpha", [2.0, 16.0])
@pytest.mark.parametrize("scale", [1.0, -0.7])
def test_output_equals_adding_the_delta_to_the_weights(network, x, rank, alpha, scale):
    slot = AdapterSlot(network)
    layers = random_layers(slot, rank=rank)
    slot.install(LoraSignature(rank=2, alpha=alpha, targets=SIGNATURE.targets))
    slot.load(layers, scale=scale)
    merged = build_network()
    for name, layer in layers.items():
        merged.get_submodule(name).weight.data += scale * layer.up @ layer.down
    torch.testing.assert_close(network(x), merged(x), rtol=1e-5, atol=1e-6)
    for name, layer in slot.export().items():
        torch.testing.assert_close(layer.up @ layer.down, scale * layers[name].up @ layers[name].down)


def test_ranks_may_differ_between_layers_and_change_back(network, x):
    slot = AdapterSlot(network)
    slot.install(SIGNATURE)
    mixed = random_layers(slot, rank=3) | {"0.to_q": random_layers(slot, rank=1)["0.to_q"]}
    slot.load(mixed)
    exported = slot.export()
    assert exported["0.to_q"].down.shape == (1, 4)
    assert exported["1.to_q"].down.shape == (3, 4)
    assert all(torch.equal(exported[name].up, mixed[name].up) for name in mixed)
    again = random_layers(slot, rank=2)
    slot.load(again)
    fresh = AdapterSlot(build_network())
    fresh.install(SIGNATURE)
    fresh.load(again)
    assert torch.equal(network(x), fresh._network(x))


def test_another_rank_costs_no_new_peft_layers_and_computes_as_a_slot_of_that_rank(network, x):
    """Twelve alternating loads keep the modules and their switches; a rank of its own has no alpha / rank."""
    slot = AdapterSlot(network)
    slot.install(LoraSignature(rank=2, alpha=8.0, targets=SIGNATURE.targets))
    for _, parameter in slot.parameters():
        parameter.requires_grad_(False)
    modules = {name: network.get_submodule(name) for name in ("0.to_q", "1.to_q")}
    for rank in (2, 5, 1, 2, 3, 2) * 2:
        layers = random_layers(slot, rank=rank)
        slot.load(layers)
        fresh = AdapterSlot(build_network())
        fresh.install(LoraSignature(rank=rank, alpha=float(rank), targets=SIGNATURE.targets))
        fresh.load(layers)
        torch.testing.assert_close(network(x), fresh._network(x), rtol=1e-6, atol=1e-6)
        assert all(torch.equal(slot.export()[name].down, layers[name].down) for name in layers)
    assert all(network.get_submodule(name) is module for name, module in modules.items())
    assert not any(parameter.requires_grad for _, parameter in slot.parameters())
    with slot.off():
        assert torch.equal(network(x), build_network()(x))


def test_same_rank_is_copied_in_place(network):
    slot = AdapterSlot(network)
    slot.install(SIGNATURE)
    before = slot.parameters()
    slot.load(random_layers(slot, rank=2))
    assert all(old is new for (_, old), (_, new) in zip(before, slot.parameters(), strict=True))
    assert [name for name, _ in before][:3] == [
        "0.to_q.lora_A.weight",
        "0.to_q.lora_B.weight",
        "0.to_out.0.lora_A.weight",
    ]
    assert all(p.requires_grad and p.dtype == torch.float32 for _, p in before)


def test_missing_layers_become_zeros(network):
    slot = AdapterSlot(network)
    slot.install(SIGNATURE)
    layers = random_layers(slot, rank=2)
    slot.load(layers)
    slot.load({"0.to_q": layers["0.to_q"]})
    exported = slot.export()
    assert torch.equal(exported["0.to_q"].up, layers["0.to_q"].up)
    assert not exported["1.to_q"].up.any()
    assert not exported["1.to_q"].down.any()


def test_training_uses_alpha_over_rank_and_export_folds_it(network, x):
    """alpha 8, rank 2: scale 4. B = 1 everywhere is exported as up = 4, and computes the same in a slot of scale 1."""
    slot = AdapterSlot(network)
    slot.install(LoraSignature(rank=2, alpha=8.0, targets=SIGNATURE.targets))
    with torch.no_grad():
        for _, parameter in slot.parameters():
            parameter.fill_(1.0)
    assert slot.export()["0.to_q"].up.unique().tolist() == [4.0]
    plain = build_network()
    plain_slot = AdapterSlot(plain)
    plain_slot.install(SIGNATURE)
    plain_slot.load(slot.export())
    torch.testing.assert_close(network(x), plain(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("compute", ["float32", "base"])
def test_one_layer_of_a_low_precision_base(network, compute):
    """W x + c + scale * B A x, summed in float64 from the same weights: to three roundings of bfloat16 (2^-8 each)."""
    network = network.to(torch.bfloat16)
    slot, name = AdapterSlot(network), "0.to_q"
    base = network.get_submodule(name)
    given = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    plain = base(given)
    slot.compute_in(compute)
    slot.install(SIGNATURE)
    adapted = network.get_submodule(name)
    assert torch.equal(adapted(given), plain)
    layer = random_layers(slot, rank=2)[name]
    slot.load({name: layer}, scale=0.5)
    found = adapted(given).detach()
    wanted = given.double() @ (base.weight.double() + 0.5 * layer.up.double() @ layer.down.double()).T
    wanted = wanted + base.bias.double()
    assert found.dtype == torch.bfloat16
    assert float((found.double() - wanted).norm()) <= 3 * 2**-8 * float(wanted.norm())
    with slot.off():
        assert torch.equal(adapted(given), plain)


def test_off_and_remove_give_the_base_bit_for_bit(network, x):
    base = network(x)
    original = network.get_submodule("0.to_q")
    slot = AdapterSlot(network)
    slot.install(SIGNATURE)
    assert torch.equal(network(x), base)
    slot.load(random_layers(slot, rank=2))
    changed = network(x)
    with slot.off():
        assert torch.equal(network(x), base)
        with slot.off():
            assert torch.equal(network(x), base)
        assert torch.equal(network(x), base)
    assert torch.equal(network(x), changed)
    slot.remove()
    assert torch.equal(network(x), base)
    assert network.get_submodule("0.to_q") is original
    with slot.off():
        assert torch.equal(network(x), base)


def test_off_comes_back_on_after_an_error_and_keeps_frozen_tensors_frozen(network, x):
    slot = AdapterSlot(network)
    slot.install(SIGNATURE)
    slot.load(random_layers(slot, rank=2))
    slot.parameters()[0][1].requires_grad_(False)
    changed = network(x)
    with pytest.raises(RuntimeError, match="inside"), slot.off():
        raise RuntimeError("inside")
    assert torch.equal(network(x), changed)
    assert [p.requires_grad for _, p in slot.parameters()][:2] == [False, True]


def test_gradients_reach_the_adapter_only_also_when_the_reference_runs_in_between(network, x):
    slot = AdapterSlot(network)
    slot.install(SIGNATURE)
    slot.load(random_layers(slot, rank=2))
    policy = network(x)
    with slot.off(), torch.no_grad():
        reference = network(x)
    (policy - reference).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for _, p in slot.parameters())
    assert {name for name, p in network.named_parameters() if p.grad is not None} == {
        name.replace(".weight", ".default.weight") for name, _ in slot.parameters()
    }


def test_installing_leaves_the_global_random_state_alone(network):
    slot = AdapterSlot(network)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    slot.install(SIGNATURE)
    assert torch.equal(torch.rand(3), expected)


def test_loading_without_a_slot_is_refused(network):
    with pytest.raises(SafetyDPOError, match="expected an installed adapter, found none: call install_adapter"):
        AdapterSlot(network).load({})


def test_unknown_module_is_refused_by_name_and_changes_nothing(network, x):
    slot = AdapterSlot(network)
    slot.install(SIGNATURE)
    layers = random_layers(slot, rank=2)
    slot.load(layers)
    before = network(x)
    foreign = random_layers(slot, rank=2, seed=9) | {"7.to_q": layers["0.to_q"]}
    with pytest.raises(SafetyDPOError, match=r"first differing key '7.to_q.lora_A.weight'"):
        slot.load(foreign)
    assert torch.equal(network(x), before)


@pytest.mark.parametrize(
    ("down", "up", "text"),
    [
        ((2, 5), (6, 2), r"expected '0.to_q.lora_A.weight' of shape \[2, 4\], found \[2, 5\]"),
        ((2, 4), (5, 2), r"expected '0.to_q.lora_B.weight' of shape \[6, 2\], found \[5, 2\]"),
    ],
)
def test_wrong_shapes_are_refused_by_name(network, down, up, text):
    slot = AdapterSlot(network)
    slot.install(SIGNATURE)
    with pytest.raises(SafetyDPOError, match=text):
        slot.load({"0.to_q": LoraLayer(down=torch.zeros(down), up=torch.zeros(up))})


def test_a_target_that_names_no_linear_layer_is_refused(network):
    with pytest.raises(UsageError, match=r"found 'norm', which names none: use suffixes such as to_out.0, to_q"):
        AdapterSlot(network).install(LoraSignature(rank=2, alpha=2.0, targets=("to_q", "norm")))


def test_weight_is_live_and_refuses_unknown_names(network, x):
    slot = AdapterSlot(network)
    before = network(x)
    slot.install(SIGNATURE)
    slot.weight("0.to_q").mul_(2.0)
    assert not torch.equal(network(x), before)
    with pytest.raises(SafetyDPOError, match="expected the name of a linear layer of the denoiser, found 'nope'"):
        slot.weight("nope")


def draw(**changes: object) -> dict[str, LoraLayer]:
    arguments = {"base_fingerprint": "f", "run_seed": 0, "init": "shared", "expert_name": "hate"} | changes
    return initial_adapter([("a.to_q", (64, 8)), ("b.to_q", (64, 8))], SIGNATURE, **arguments)


def test_shared_start_is_the_same_for_all_experts_and_differs_otherwise():
    first = draw()
    assert torch.equal(first["a.to_q"].down, draw(expert_name="violence")["a.to_q"].down)
    assert not torch.equal(first["a.to_q"].down, first["b.to_q"].down)
    for change in ({"base_fingerprint": "g"}, {"run_seed": 1}, {"init": "independent"}):
        assert not torch.equal(first["a.to_q"].down, draw(**change)["a.to_q"].down)
    one, other = draw(init="independent"), draw(init="independent", expert_name="violence")
    assert not torch.equal(one["a.to_q"].down, other["a.to_q"].down)


def test_start_does_not_depend_on_the_order_of_layers_or_targets():
    layers = [("b.to_q", (64, 8)), ("a.to_q", (64, 8))]
    swapped = LoraSignature(rank=2, alpha=2.0, targets=("to_out.0", "to_q"))
    other = initial_adapter(layers, swapped, base_fingerprint="f", run_seed=0, init="shared", expert_name="x")
    assert torch.equal(draw()["a.to_q"].down, other["a.to_q"].down)


def test_start_is_gaussian_of_width_one_over_rank_and_b_is_zero():
    layers = initial_adapter(
        [("a", (50_000, 3))],
        LoraSignature(rank=4, alpha=4.0, targets=("a",)),
        base_fingerprint="f",
        run_seed=0,
        init="shared",
        expert_name="x",
    )
    down = layers["a"].down
    # 200,000 draws: the standard error of the standard deviation is 0.25 / sqrt(400,000) = 0.0004.
    assert down.std().item() == pytest.approx(1 / 4, abs=0.002)
    assert down.mean().item() == pytest.approx(0.0, abs=0.003)
    assert layers["a"].up.shape == (3, 4)
    assert not layers["a"].up.any()


def test_rank_4_on_stable_diffusion_1_5_has_797184_parameters():
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    shapes = list(AdapterSlot(unet).shapes(("to_q", "to_k", "to_v", "to_out.0")))
    assert len(shapes) == 128
    assert sum(4 * (d_in + d_out) for _, (d_in, d_out) in shapes) == 797_184


def test_swapping_keeps_the_slot_and_computes_what_a_fresh_one_computes(network: nn.Module, x: torch.Tensor):
    """Ranks 2, 5, 5, 2 one after another, one layer missing at times: equal bits; the third needs no new layers."""
    slot = AdapterSlot(network)
    for seed, rank, is_new in ((1, 2, True), (2, 5, True), (3, 5, False), (4, 2, True)):
        layers = random_layers(slot, rank=rank, seed=seed)
        if seed == 3:
            del layers["0.to_q"]
        before = [parameter for _, parameter in slot.parameters()] if seed > 1 else []
        slot.swap(SIGNATURE, layers)
        fresh_network = build_network()
        fresh = AdapterSlot(fresh_network)
        fresh.install(SIGNATURE)
        fresh.load(layers)
        assert torch.equal(network(x), fresh_network(x))
        kept = [old is new for old, (_, new) in zip(before, slot.parameters() if before else [], strict=True)]
        assert not before or all(kept) == (not is_new)
    other = LoraSignature(rank=3, alpha=3.0, targets=("to_q",))
    slot.swap(other, {"1.to_q": random_layers(slot, rank=3)["1.to_q"]})
    assert sorted(slot.export()) == ["0.to_q", "1.to_q"]
    slot.remove()
    assert torch.equal(network(x), build_network()(x))
