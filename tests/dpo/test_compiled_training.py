"""Training by compiled blocks: policy and reference must still cancel exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from safetydpo.artifacts.adapters import LoraLayer
from safetydpo.config.training import DpoConfig, LoraConfig
from safetydpo.diffusion import adapted_network
from safetydpo.diffusion.lora_layer import SlotLinear
from safetydpo.diffusion.stable_diffusion import StableDiffusion
from safetydpo.dpo.batch import PreferenceData, step_batch
from safetydpo.dpo.draws import RowUse, pair_order
from safetydpo.dpo.engine import lora_signature, open_engine
from safetydpo.dpo.reference import ErrorContext, compute_errors
from safetydpo.dpo.step import policy_loss
from safetydpo.dpo.trainer import StepMetrics
from tests.dpo.lessons import random_layers
from tests.dpo.preferences import small_config
from tests.dpo.runs import largest_difference, train

Make = Callable[..., PreferenceData]


def options(**changes: object) -> DpoConfig:
    terms = {"redirection_weight": 1.0, "output_preservation_weight": 0.5}
    return DpoConfig.model_validate(small_config().model_dump() | terms | changes)


def loss_and_gradients(backbone: StableDiffusion, data: PreferenceData, config: DpoConfig) -> tuple[Tensor, Tensor]:
    batch = step_batch(data, 0, config=config, run_seed=5, expert="hate", num_timesteps=1000)
    loss, metrics = policy_loss(backbone, batch, config=config)
    torch.autograd.backward(loss)
    found = [parameter.grad for _, parameter in backbone.adapter_parameters()]
    assert all(gradient is not None for gradient in found)
    flat = torch.cat([gradient.flatten() for gradient in found if gradient is not None])
    for _, parameter in backbone.adapter_parameters():
        parameter.grad = None
    return metrics, flat


@pytest.mark.parametrize("compute", ["float32", "base"])
def test_an_adapter_switched_by_a_number_is_the_one_that_peft_switches(
    backbone: StableDiffusion, make_data: Make, lora: LoraConfig, compute: str
) -> None:
    """Without any compiler: the same numbers and gradients to float32's rounding, and no gate is left behind."""
    config = options(adapter_compute=compute)
    open_engine(backbone, config=config, lora=lora)
    backbone.load_adapter(random_layers(backbone, seed=3, size=0.02), scale=0.7)
    plain = loss_and_gradients(backbone, make_data(), config)
    with backbone._slot.gated():
        gated = loss_and_gradients(backbone, make_data(), config)
    for one, other in zip(plain, gated, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert all(m.gate is None for m in backbone.network.modules() if isinstance(m, SlotLinear))


def test_a_gate_of_0_is_exactly_the_base_and_may_be_nested(backbone: StableDiffusion, lora: LoraConfig) -> None:
    layer = next(name for name, _ in backbone.named_linear_layers(("to_q",)))
    backbone.install_adapter(lora_signature(lora))
    backbone.load_adapter(random_layers(backbone, seed=3))
    module = backbone.network.get_submodule(layer)
    x = torch.randn(2, 5, module.in_features, generator=torch.Generator().manual_seed(0))
    base, adapted = module.base_layer(x), module(x)
    with backbone._slot.gated():
        assert torch.allclose(module(x), adapted, atol=1e-6)
        with backbone.adapter_off():
            with backbone.adapter_off():
                assert torch.equal(module(x), base)
            assert torch.equal(module(x), base)
            assert module(x).requires_grad
        assert not torch.equal(module(x), base)
    assert torch.equal(module(x), adapted)
    assert not torch.equal(adapted, base)


def test_a_reference_has_a_gradient_only_where_its_code_must_be_the_policys(
    backbone: StableDiffusion, lora: LoraConfig
) -> None:
    backbone.install_adapter(lora_signature(lora))
    with backbone.as_reference():
        assert not torch.is_grad_enabled()
    with backbone._slot.gated(), torch.no_grad(), backbone.as_reference():
        assert torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def test_errors_for_compiled_steps_have_ids_of_their_own() -> None:
    """By what their code depends on; those of other trainings keep the ids that they had before there were any."""
    config = options(reference="cached", redirection_weight=0.0, output_preservation_weight=0.0, retention_weight=0.0)

    def context(compiled_for: LoraConfig | None, **changes: object) -> str:
        dpo = config.model_copy(update=changes)
        return ErrorContext("base", "float32", 4, 1000, 5, dpo, compiled_for=compiled_for).hash

    plain, lora = context(None), LoraConfig(rank=2)
    assert plain == context(None, adapter_compute="base", compiled=True)
    others = [
        context(lora),
        context(LoraConfig(rank=4)),
        context(LoraConfig(rank=2, targets=("to_q",))),
        context(lora, adapter_compute="base"),
    ]
    assert len({plain, *others}) == 5
    assert context(LoraConfig(rank=2, init="independent", alpha=1.0)) == context(lora)


def test_a_slot_that_is_put_in_anew_or_off_keeps_its_gate(backbone: StableDiffusion, lora: LoraConfig) -> None:
    backbone.install_adapter(lora_signature(lora))
    with backbone._slot.gated():
        backbone.load_adapter(
            {
                name: LoraLayer(layer.down[:1], layer.up[:, :1])
                for name, layer in random_layers(backbone, seed=3).items()
            }
        )
        gates = [m.gate for m in backbone.network.modules() if isinstance(m, SlotLinear)]
        assert gates
        assert all(gate is not None and float(gate) == 1.0 for gate in gates)
    with backbone.adapter_off(), backbone._slot.gated():
        gates = [m.gate for m in backbone.network.modules() if isinstance(m, SlotLinear)]
        assert all(gate is not None and float(gate) == 0.0 for gate in gates)


@pytest.mark.slow
@pytest.mark.usefixtures("process_group")
def test_compiled_policy_and_reference_cancel_exactly(
    backbone: StableDiffusion, make_data: Make, lora: LoraConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ln 2 and equal errors at step 0, live and with stored errors; it ends where the other ends; one compilation.

    Of the blocks that hold adapters alone: a C++ compiler takes half a minute for them.
    """
    monkeypatch.setattr(adapted_network, "COMPILED_BLOCKS", frozenset({"BasicTransformerBlock"}))
    terms = {"redirection_weight": 0.0, "output_preservation_weight": 0.0, "retention_weight": 0.0}
    config, data = options(compiled=True, **terms), make_data()
    counters = torch._dynamo.utils.counters
    plain = train(backbone, data, options(**terms), lora)
    counters.clear()
    found = train(backbone, data, config, lora)
    assert counters["stats"]["unique_graphs"] > 0
    require_start(found.history[0])
    size = max(float(layer.up.abs().max()) for layer in plain.layers.values())
    assert largest_difference(plain.layers, found.layers) <= 0.01 * size
    assert not any("forward" in vars(module) for module in backbone.network.modules())

    counters.clear()
    train(backbone, data, config, lora, expert="violence")
    deepspeed = train(backbone, data, config.model_copy(update={"strategy": "deepspeed", "zero_stage": 1}), lora)
    assert largest_difference(found.layers, deepspeed.layers) <= 1e-6
    cached = DpoConfig.model_validate(config.model_dump() | {"reference": "cached"})
    context = ErrorContext("base", "float32", cached.pairs_per_step, 1000, 5, cached, compiled_for=lora)
    uses = [RowUse(pair, draw) for pair in range(data.num_pairs) for draw in range(4)]
    entered: list[None] = []
    compiled = backbone.compiled_for_training
    monkeypatch.setattr(backbone, "compiled_for_training", lambda: entered.append(None) or compiled())
    errors = compute_errors(backbone, data, uses, context).view(data.num_pairs, 4, 2)
    assert len(entered) == 1
    start = train(backbone, replace(data, reference_errors=errors), cached, lora).history[0]
    require_start(start)
    # Before what is taken for rounding is taken off.
    rows = pair_order(5, "hate", num_pairs=data.num_pairs, step=0, pairs_per_step=cached.pairs_per_step)
    stored = torch.stack([errors[use.index, use.draw_index] for use in rows]).mean(dim=0)
    assert stored.tolist() == pytest.approx([start.error_policy_safe, start.error_policy_unsafe], rel=1e-6)
    again = train(backbone, data, config.model_copy(update={"activation_checkpointing": True}), lora)
    assert largest_difference(found.layers, again.layers) <= 1e-3 * size
    assert counters["stats"]["unique_graphs"] == 0
    torch._dynamo.reset()


def require_start(first: StepMetrics) -> None:
    assert first.loss == pytest.approx(math.log(2), abs=1e-7)
    assert first.error_policy_safe == first.error_reference_safe
    assert first.error_policy_unsafe == first.error_reference_unsafe
    assert first.safe_rise == 0.0
