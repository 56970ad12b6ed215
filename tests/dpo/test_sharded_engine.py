from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from safetydpo.config.training import DpoConfig, LoraConfig
from safetydpo.diffusion.stable_diffusion import StableDiffusion
from safetydpo.dpo.batch import PreferenceData
from safetydpo.dpo.engine import open_engine
from tests.dpo.runs import disturb, largest_difference, train

Make = Callable[..., PreferenceData]


def attributes(backbone: StableDiffusion) -> list[set[str]]:
    return [set(vars(one)) for one in (*backbone.network.modules(), *backbone.network.parameters())]


@pytest.mark.usefixtures("process_group")
def test_it_trains_as_the_plain_loop_and_gives_the_network_back(
    backbone: StableDiffusion, make_data: Make, config: DpoConfig, lora: LoraConfig
) -> None:
    """One step with all terms: the same expert to 1e-6, and a network as it was, in weights and in everything else.

    While it is open, the large frozen weights are apart and the adapter is whole.
    """
    config = config.model_copy(update={"steps": 1, "warmup_steps": 0, "redirection_weight": 1.0})
    single = train(backbone, make_data(), config, lora)
    before = attributes(backbone)
    weights = {name: value.detach().clone() for name, value in backbone.network.named_parameters()}
    sharded = config.model_copy(update={"strategy": "deepspeed", "zero_stage": 3})
    engine = open_engine(backbone, config=sharded, lora=lora)
    sizes = {name: value.numel() for name, value in backbone.network.named_parameters()}
    assert sum(size == 0 for size in sizes.values()) > 10
    assert all(value.numel() for _, value in backbone.adapter_parameters())
    found = train(backbone, make_data(), sharded, lora, engine=engine)
    engine.close()
    assert largest_difference(single.layers, found.layers) < 1e-6
    assert found.history[0].loss == pytest.approx(single.history[0].loss, rel=1e-5)
    assert attributes(backbone) == before
    frozen = {name: value for name, value in backbone.network.named_parameters() if "lora" not in name}
    assert all(torch.equal(value, weights[name]) for name, value in frozen.items())


@pytest.mark.slow
@pytest.mark.parametrize("offload", ["none", "cpu"])
@pytest.mark.usefixtures("process_group")
def test_everything_together(
    offload: str, backbone: StableDiffusion, make_data: Make, config: DpoConfig, lora: LoraConfig
) -> None:
    """Parts, a running mean, activations computed again, and an overflow under a loss scale: the expert to 1e-6."""
    config = config.model_copy(update={"steps": 3, "ema_decay": 0.9, "redirection_weight": 1.0})
    single = train(backbone, make_data(), config, lora)
    changes: dict[str, Any] = {
        "strategy": "deepspeed",
        "zero_stage": 3,
        "base_offload": offload,
        "pairs_per_forward": 2,
        "activation_checkpointing": True,
        "loss_scaling": "dynamic",
    }
    config = config.model_copy(update=changes)
    engine = open_engine(backbone, config=config, lora=lora)
    disturb(engine, calls={1})
    found = train(backbone, make_data(), config, lora, engine=engine)
    assert engine.loss_scale is not None
    assert engine.loss_scale.skipped == 1
    engine.close()
    assert largest_difference(single.layers, found.layers) < 1e-6


@pytest.mark.slow
@pytest.mark.usefixtures("process_group")
def test_the_next_engine_trains_as_the_first(
    backbone: StableDiffusion, make_data: Make, config: DpoConfig, lora: LoraConfig
) -> None:
    config = config.model_copy(update={"steps": 2, "strategy": "deepspeed", "zero_stage": 3})
    first = train(backbone, make_data(), config, lora)
    second = train(backbone, make_data(), config, lora)
    assert largest_difference(first.layers, second.layers) == 0.0
