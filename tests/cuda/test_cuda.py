"""The same numbers on a GPU: pictures, losses, trained adapters. Skipped where there is none.

Run on a machine with a GPU: `python -m pytest tests/cuda`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel

from safetydpo.artifacts.adapters import LoraLayer
from safetydpo.artifacts.storage import open_location
from safetydpo.config.schema import BaseModelConfig, SamplerConfig
from safetydpo.config.training import DpoConfig, LoraConfig
from safetydpo.diffusion.adapter import initial_adapter
from safetydpo.diffusion.backbone import Backbone
from safetydpo.diffusion.build import load_backbone
from safetydpo.diffusion.render import redraw, render
from safetydpo.dpo.batch import PreferenceData, step_batch
from safetydpo.dpo.engine import lora_signature, open_engine
from safetydpo.dpo.step import policy_loss
from safetydpo.dpo.trainer import TrainedExpert, train_expert
from tests.diffusion import tiny_models
from tests.diffusion.tiny_models import FAMILIES, SIZE, build_model
from tests.dpo.cached import cached_config, stored
from tests.dpo.preferences import small_config
from tests.dpo.runs import KilledError, kill_after
from tests.dpo.test_families import preferences

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that CUDA knows")
DEVICE = "cuda"
LORA = LoraConfig(rank=2)
PROMPTS = [f"a drawing of a {thing} on {colour}" for thing in ("bomb", "ball") for colour in ("red", "blue", "green")]
SAMPLER = SamplerConfig(steps=6, guidance_scale=4.0, height=32, width=32, batch_size=4)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place: Path = tmp_path_factory.mktemp(request.param)
    build_model(request.param, place)
    return place


def load(folder: Path, device: str, dtype: str = "float32") -> Backbone:
    return load_backbone(BaseModelConfig(model=str(folder), dtype=dtype), device=device)


@pytest.fixture(scope="module")
def data(folder: Path) -> PreferenceData:
    return preferences(load(folder, "cpu"))


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    dist.init_process_group("nccl", init_method="tcp://127.0.0.1:29511", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def draw(backbone: Backbone, prompts: list[str], seeds: list[int], **changes: object) -> np.ndarray:
    return render(backbone, prompts=prompts, seeds=seeds, sampler=SAMPLER.model_copy(update=changes)).numpy()


def train(backbone: Backbone, data: PreferenceData, config: DpoConfig, **options: object) -> TrainedExpert:
    engine = open_engine(backbone, config=config, lora=LORA)
    try:
        return train_expert(
            backbone,
            data,
            config=config,
            lora=LORA,
            run_seed=5,
            expert_name="hate",
            engine=engine,
            **options,
        )
    finally:
        engine.close()


def relative(one: dict[str, LoraLayer], other: dict[str, LoraLayer], start: dict[str, LoraLayer]) -> float:
    """Return the difference of two trainings as a share of the way that the second has gone from its start."""

    def flat(layers: dict[str, LoraLayer]) -> torch.Tensor:
        return torch.cat(
            [tensor.double().flatten() for name in layers for tensor in (layers[name].down, layers[name].up)]
        )

    way = flat(other) - flat(start)
    return float((flat(one) - flat(other)).norm() / way.norm())


def fresh(backbone: Backbone, config: DpoConfig) -> dict[str, LoraLayer]:
    signature = lora_signature(LORA)
    shapes = backbone.named_linear_layers(signature.targets)
    return initial_adapter(
        shapes, signature, base_fingerprint=backbone.fingerprint, run_seed=5, init=LORA.init, expert_name="hate"
    )


def test_pictures_are_those_of_the_cpu(folder: Path) -> None:
    """In float32: at most 2 of 256 levels, and at most 1 % of the values differ at all."""
    seeds = list(range(len(PROMPTS)))
    there, here = (draw(load(folder, device), PROMPTS, seeds).astype(int) for device in (DEVICE, "cpu"))
    difference = np.abs(there - here)
    print(folder.name, "levels", difference.max(), "share", (difference > 0).mean())
    assert difference.max() <= 2
    assert (difference > 0).mean() <= 0.01


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_picture_depends_on_its_row_alone(folder: Path, dtype: str) -> None:
    """One card: equal bytes when drawn again, in another order and beside other pictures, in batches of one size."""
    backbone, seeds = load(folder, DEVICE, dtype), list(range(len(PROMPTS)))
    first = draw(backbone, PROMPTS, seeds)
    again = draw(load(folder, DEVICE, dtype), PROMPTS[::-1], seeds[::-1])[::-1]
    alone = draw(backbone, PROMPTS[3:4], seeds[3:4])
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first[3:4], alone)


def test_pictures_are_redrawn(folder: Path) -> None:
    backbone = load(folder, DEVICE)
    pictures = render(backbone, prompts=PROMPTS[:2], seeds=[0, 1], sampler=SAMPLER)
    negative = ["", ""]
    drawn = redraw(
        backbone,
        pictures=pictures,
        prompts=PROMPTS[1:3],
        negative_prompts=negative,
        seeds=[0, 1],
        sampler=SAMPLER,
        strength=0.5,
    )
    assert drawn.shape == pictures.shape
    assert drawn.device.type == "cpu"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_first_loss_is_ln_2(folder: Path, data: PreferenceData, dtype: str) -> None:
    """Policy and reference come from the same kernels, with and without a gradient: their errors cancel exactly."""
    backbone, config = load(folder, DEVICE, dtype), small_config()
    config = config.model_copy(update={"safe_rise_weight": 0.0, "retention_weight": 0.0, "redirection_weight": 0.0})
    backbone.install_adapter(lora_signature(LORA))
    backbone.load_adapter(fresh(backbone, config))
    batch = step_batch(data, 0, config=config, run_seed=5, expert="hate", num_timesteps=backbone.num_train_timesteps)
    loss, _ = policy_loss(backbone, batch, config=config)
    assert float(loss) == pytest.approx(math.log(2), abs=1e-7)


def gradient(backbone: Backbone, data: PreferenceData, config: DpoConfig) -> torch.Tensor:
    engine = open_engine(backbone, config=config, lora=LORA)
    backbone.load_adapter(fresh(backbone, config))
    batch = step_batch(
        data,
        0,
        config=config,
        run_seed=5,
        expert="hate",
        num_timesteps=backbone.num_train_timesteps,
        device=backbone.device,
    )
    loss, _ = policy_loss(backbone, batch, config=config)
    torch.autograd.backward(loss)
    found = [p.grad.double().flatten().cpu() for _, p in backbone.adapter_parameters() if p.grad is not None]
    engine.close()
    backbone.remove_adapter()
    return torch.cat(found)


def require_the_gradient_of_plain_attention(backbone: Backbone, data: PreferenceData) -> None:
    """The kernels of attention that torch chooses against its composition of plain products, in one type.

    A kernel's wrong backward pass leaves the loss as it should be.
    """
    config = small_config().model_copy(update={"safe_rise_weight": 0.0, "retention_weight": 0.0})
    found = gradient(backbone, data, config)
    with sdpa_kernel(SDPBackend.MATH):
        plain = gradient(backbone, data, config)
    cosine = float(torch.nn.functional.cosine_similarity(found, plain, dim=0))
    print("cosine", cosine, "length", float(found.norm() / plain.norm()))
    assert cosine > 0.99
    assert float(found.norm() / plain.norm()) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gradients_of_attention_in_16_bits(folder: Path, data: PreferenceData, dtype: str) -> None:
    require_the_gradient_of_plain_attention(load(folder, DEVICE, dtype), data)


def test_gradients_of_attention_at_the_true_head_size_of_flux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true_heads = partial(tiny_models.FluxTransformer2DModel, attention_head_dim=128, axes_dims_rope=(16, 56, 56))

    def network(**settings: Any) -> Any:
        return true_heads(**{name: value for name, value in settings.items() if name not in true_heads.keywords})

    monkeypatch.setattr(tiny_models, "FluxTransformer2DModel", network)
    place = tmp_path / "flux-dev"
    build_model("flux-dev", place)
    require_the_gradient_of_plain_attention(load(place, DEVICE, "bfloat16"), preferences(load(place, "cpu")))


def test_compiled_training(folder: Path, data: PreferenceData) -> None:
    """In bfloat16: policy and reference cancel exactly at first; something was compiled."""
    config = small_config().model_copy(update={"compiled": True, "adapter_compute": "base"})
    torch._dynamo.utils.counters.clear()
    first = train(load(folder, DEVICE, "bfloat16"), data, config).history[0]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert first.preference_loss == pytest.approx(math.log(2), abs=1e-7)
    assert first.error_policy_safe == first.error_reference_safe
    assert first.retention == 0.0


def test_a_compiled_training_ends_where_the_other_ends(folder: Path, data: PreferenceData) -> None:
    """In float32, to 1 % of the way that the adapter goes: its way back is right too."""
    backbone, config = load(folder, DEVICE), small_config()
    plain = train(backbone, data, config)
    compiled = train(backbone, data, config.model_copy(update={"compiled": True}))
    found = relative(compiled.layers, plain.layers, fresh(backbone, config))
    print(folder.name, "compiled, relative difference", found)
    assert found <= 0.01


def test_stored_errors_of_compiled_steps(folder: Path, data: PreferenceData) -> None:
    """In bfloat16, where other code differs by far more than what is taken for rounding."""
    config = cached_config(safe_rise_weight=0.0, compiled=True, adapter_compute="base")
    backbone = load(folder, DEVICE, "bfloat16")
    rows = stored(backbone, data, config, compiled_for=LORA)
    first = train(backbone, rows, config).history[0]
    assert first.loss == pytest.approx(math.log(2), abs=1e-6)
    assert first.error_policy_unsafe == pytest.approx(first.error_reference_unsafe, rel=1e-6)


def test_training_ends_where_it_ends_on_the_cpu(folder: Path, data: PreferenceData) -> None:
    """In float32, to 1 % of the way that the adapter goes; a training that goes on ends where a whole one does."""
    config = small_config()
    there = train(load(folder, DEVICE), data, config)
    backbone = load(folder, "cpu")
    here = train(backbone, data, config)
    found = relative(there.layers, here.layers, fresh(backbone, config))
    print(folder.name, "relative difference", found)
    assert found <= 0.01
    assert [one.loss for one in there.history] == pytest.approx([one.loss for one in here.history], rel=1e-3)


def test_an_interrupted_training_goes_on(folder: Path, data: PreferenceData, tmp_path: Path) -> None:
    config, checkpoint = small_config(), open_location(str(tmp_path)) / "checkpoint"
    backbone = load(folder, DEVICE)
    whole = train(backbone, data, config)
    with pytest.raises(KilledError):
        train(backbone, data, config, checkpoint=checkpoint, report=kill_after(3))
    went_on = train(backbone, data, config, checkpoint=checkpoint)
    found = relative(went_on.layers, whole.layers, fresh(backbone, config))
    print(folder.name, "difference of the resumed training", found)
    assert found <= 1e-3


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": "ddp"},
        *({"strategy": "deepspeed", "zero_stage": stage} for stage in (1, 2, 3)),
        {"strategy": "deepspeed", "zero_stage": 3, "base_offload": "cpu"},
        {"activation_checkpointing": True},
        {"pairs_per_forward": 2},
    ],
    ids=["ddp", "zero1", "zero2", "zero3", "offload", "checkpointing", "parts"],
)
def test_every_strategy_gives_one_expert(tmp_path_factory: pytest.TempPathFactory, changes: dict[str, object]) -> None:
    place = tmp_path_factory.mktemp("sd1")
    build_model("sd1", place)
    rows, config = preferences(load(place, "cpu")), small_config()
    config = config.model_copy(update={"retention_per_step": 2})
    plain = load(place, DEVICE)
    single = train(plain, rows, config)
    other = config.model_copy(update=changes)
    waits = "cpu" if changes.get("base_offload") == "cpu" else None
    backbone = load_backbone(BaseModelConfig(model=str(place)), device=DEVICE, denoiser_device=waits)
    found = relative(train(backbone, rows, other).layers, single.layers, fresh(plain, config))
    print(changes, "difference", found)
    assert found <= 1e-3


def test_float16_trains_with_a_scaled_loss(folder: Path, data: PreferenceData) -> None:
    config = small_config().model_copy(update={"loss_scaling": "dynamic"})
    trained = train(load(folder, DEVICE, "float16"), data, config)
    assert all(math.isfinite(one.loss) for one in trained.history)
    assert any(layer.up.abs().sum() > 0 for layer in trained.layers.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stored_errors_stand_in_for_the_reference(folder: Path, data: PreferenceData, dtype: str) -> None:
    # Without the penalty on a rise of the safe error: at its kink a last bit decides whether a row has a gradient.
    backbone, config = load(folder, DEVICE, dtype), cached_config(safe_rise_weight=0.0)
    backbone.install_adapter(lora_signature(LORA))
    rows = stored(backbone, data, config)
    cached = train(backbone, rows, config)
    live = train(backbone, data, config.model_copy(update={"reference": "live"}))
    assert cached.history[0].loss == pytest.approx(live.history[0].loss, abs=1e-6)
    found = relative(cached.layers, live.layers, fresh(backbone, config))
    print(folder.name, dtype, "stored errors, difference", found)
    # AdamW divides a gradient by its own size: one that is all rounding moves its weight by a whole step.
    assert found <= 0.05
    assert [one.loss for one in cached.history] == pytest.approx([one.loss for one in live.history], rel=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_computed_in_the_bases_type(folder: Path, data: PreferenceData, dtype: str) -> None:
    """Exactly ln 2 at first all the same; in float32 it is the same training."""
    config = small_config().model_copy(update={"retention_weight": 0.0, "safe_rise_weight": 0.0})
    backbone = load(folder, DEVICE, dtype)
    low = train(backbone, data, config.model_copy(update={"adapter_compute": "base"}))
    full = train(backbone, data, config)
    assert low.history[0].loss == pytest.approx(math.log(2), abs=1e-7)
    found = relative(low.layers, full.layers, fresh(backbone, config))
    print(folder.name, dtype, "computed in the base's type, difference", found)
    assert found == 0.0 if dtype == "float32" else math.isfinite(found)


def test_compiled_pictures(folder: Path) -> None:
    """In float32: at most 2 of 256 levels, and at most 1 % of the values differ at all; the next call is the same."""
    backbone, seeds = load(folder, DEVICE), list(range(len(PROMPTS)))
    plain = draw(backbone, PROMPTS, seeds).astype(int)
    compiled = draw(backbone, PROMPTS, seeds, compiled=True)
    difference = np.abs(plain - compiled)
    print(folder.name, "compiled, levels", difference.max(), "share", (difference > 0).mean())
    assert difference.max() <= 2
    assert (difference > 0).mean() <= 0.01
    np.testing.assert_array_equal(draw(backbone, PROMPTS, seeds, compiled=True), compiled)
    np.testing.assert_array_equal(draw(backbone, PROMPTS, seeds), plain)


def test_sizes_agree() -> None:
    assert SAMPLER.height == SIZE
