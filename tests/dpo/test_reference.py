"""Stored errors of the reference: whose they are, that they are those of a step, and what is trained with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from safetydpo.artifacts.adapters import LoraLayer
from safetydpo.artifacts.layout import demo_weights
from safetydpo.artifacts.schemas import caption_sha256
from safetydpo.config.schema import BaseModelConfig
from safetydpo.config.training import DpoConfig, LoraConfig
from safetydpo.diffusion.backbone import Backbone
from safetydpo.diffusion.build import load_backbone
from safetydpo.diffusion.stable_diffusion import StableDiffusion
from safetydpo.dpo.batch import EMPTY_CAPTION, PreferenceData, PreferenceRow, step_batch
from safetydpo.dpo.draws import RowUse, pair_order
from safetydpo.dpo.engine import open_engine
from safetydpo.dpo.pair_draws import pair_choices
from safetydpo.dpo.reference import (
    WITHOUT_EFFECT,
    compute_errors,
    error_ids,
    planned_draws,
)
from safetydpo.dpo.step import METRICS, policy_loss
from safetydpo.dpo.stored_errors import errors_by_draw
from safetydpo.dpo.trainer import TrainedExpert, train_expert
from safetydpo.errors import SafetyDPOError
from tests.dpo.cached import cached_config, context_of, stored
from tests.dpo.preferences import SAFE, UNSAFE

Make = Callable[..., PreferenceData]
ROW = PreferenceRow("p", "safe", "unsafe", "of safe", "of unsafe")
IN_IDS = {"latent_sampling"}
"""Settings that change the error of a draw."""


def ids_of(config: DpoConfig, row: PreferenceRow = ROW, *, changes: dict[str, object] | None = None) -> list[str]:
    return list(error_ids(row, 12, replace(context_of(config), **changes or {})))  # type: ignore[arg-type]


def train(backbone: Backbone, data: PreferenceData, config: DpoConfig, lora: LoraConfig) -> TrainedExpert:
    engine = open_engine(backbone, config=config, lora=lora)
    try:
        return train_expert(backbone, data, config=config, lora=lora, run_seed=5, expert_name="hate", engine=engine)
    finally:
        engine.close()
        backbone.remove_adapter()


def largest_difference(one: dict[str, LoraLayer], other: dict[str, LoraLayer]) -> float:
    """Relative to the largest weight of the layer."""
    assert one.keys() == other.keys()
    return max(
        float(
            (getattr(one[name], part) - getattr(other[name], part)).abs().max() / getattr(one[name], part).abs().max()
        )
        for name in one
        for part in ("down", "up")
    )


def test_every_setting_is_known_to_change_errors_or_not_to() -> None:
    """A new setting belongs into one of the two lists; until then it makes errors of its own, which is safe."""
    assert set(DpoConfig.model_fields) == WITHOUT_EFFECT | IN_IDS
    assert not WITHOUT_EFFECT & IN_IDS


@pytest.mark.parametrize(
    "change",
    [
        {"beta": 7.0},
        {"learning_rate": 1.0},
        {"steps": 9},
        {"safe_rise_weight": 3.0},
        {"safe_likelihood_weight": 3.0},
        {"error_weighting": "velocity"},
        {"pairs_per_step": 2},
        {"strategy": "deepspeed"},
        {"draw_seed": 5},
    ],
)
def test_a_sweep_shares_its_errors(change: dict[str, object]) -> None:
    assert ids_of(cached_config(**change)) == ids_of(cached_config())


def test_a_changed_rate_changes_the_ids_of_the_draws_that_come_out_differently() -> None:
    """Twelve draws; those whose caption or mirroring is as before keep their ids."""
    for change in ({"empty_caption_rate": 0.6}, {"captions": "unsafe"}, {"flip_rate": 0.5}):
        before, after = cached_config(), cached_config(**change)
        same = [one == other for one, other in zip(ids_of(before), ids_of(after), strict=True)]

        def outcome(config: DpoConfig, index: int) -> tuple[object, ...]:
            choices, side = pair_choices(config, "p", index, draw_seed=5, num_timesteps=1000)
            return side, choices.is_flipped, choices.timestep

        assert same == [outcome(before, index) == outcome(after, index) for index in range(12)]
        assert 0 < sum(same) < 12


@pytest.mark.parametrize(
    "change",
    [
        {"base_fingerprint": "other"},
        {"dtype": "bfloat16"},
        {"batch_size": 8},
        {"num_timesteps": 500},
        {"draw_seed": 6},
        {"config": cached_config(latent_sampling="sample")},
    ],
)
def test_every_part_of_the_context_counts(change: dict[str, object]) -> None:
    assert not set(ids_of(cached_config(), changes=change)) & set(ids_of(cached_config()))


def test_every_part_of_a_row_counts_and_no_id_comes_twice() -> None:
    plain = ids_of(cached_config(captions="both", empty_caption_rate=0.3))
    assert len(set(plain)) == 12
    for field in ("pair_id", "safe_image_id", "unsafe_image_id"):
        assert not set(plain) & set(ids_of(cached_config(empty_caption_rate=0.3), replace(ROW, **{field: "x"})))
    other = ids_of(cached_config(empty_caption_rate=0.3), replace(ROW, unsafe_caption_sha256="x"))
    assert 0 < len(set(plain) & set(other)) < 12


def test_planned_draws_are_those_of_the_steps() -> None:
    """All uses of all steps, counted; with a limit as many as the limit."""
    config = cached_config(steps=7, warmup_steps=1)
    uses, draws = planned_draws(config, run_seed=5, expert="hate", num_pairs=6)
    seen = {
        (use.index, use.draw_index)
        for step in range(7)
        for use in pair_order(5, "hate", num_pairs=6, step=step, pairs_per_step=4)
    }
    assert uses == 28 == len(seen)
    assert seen == {(pair, draw) for pair in range(6) for draw in range(draws[pair])}
    limited = cached_config(steps=7, warmup_steps=1, draws_per_pair=2)
    assert planned_draws(limited, run_seed=5, expert="hate", num_pairs=6)[1].tolist() == [2] * 6


def test_stored_errors_are_those_of_a_step(backbone: StableDiffusion, make_data: Make, lora: LoraConfig) -> None:
    """Equal bits where the passes have equal shapes: four pairs each, in the order of the step."""
    config, data = cached_config(), make_data(num_benign=0)
    uses = pair_order(5, "hate", num_pairs=6, step=1, pairs_per_step=4)
    errors = compute_errors(backbone, data, uses, context_of(config))
    live = config.model_copy(update={"reference": "live"})
    batch = step_batch(data, 1, config=live, run_seed=5, expert="hate", num_timesteps=1000)
    open_engine(backbone, config=live, lora=lora)
    values = dict(zip(METRICS, policy_loss(backbone, batch, config=live)[1].tolist(), strict=True))
    assert values["error_reference_safe"] == float(errors[:, 0].mean())
    assert values["error_reference_unsafe"] == float(errors[:, 1].mean())
    with_errors = replace(data, reference_errors=stored(backbone, data, config).reference_errors)
    given = step_batch(with_errors, 1, config=config, run_seed=5, expert="hate", num_timesteps=1000).reference_errors
    assert given is not None
    assert torch.allclose(given, errors, rtol=1e-5)


def test_an_error_does_not_depend_on_the_number_of_its_neighbours(backbone: StableDiffusion, make_data: Make) -> None:
    data, context = make_data(), context_of(cached_config())
    uses = [RowUse(pair, 0) for pair in range(6)]
    together = compute_errors(backbone, data, uses, context)
    assert torch.equal(compute_errors(backbone, data, uses[:1], context), together[:1])
    assert compute_errors(backbone, data, [], context).shape == (0, 2)


def count_passes(backbone: Backbone, work: Callable[[], object]) -> int:
    passes: list[int] = []
    handle = backbone.network.register_forward_pre_hook(lambda _module, inputs: passes.append(len(inputs[0])))
    work()
    handle.remove()
    return len(passes)


@pytest.mark.parametrize("weighting", ["native", "velocity"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_cached_training_equals_a_live_one(
    backbone: StableDiffusion, make_data: Make, lora: LoraConfig, weighting: str, batch_size: int
) -> None:
    """Four steps, half the passes; equal bits where errors were computed in passes of the step's own size.

    Else the errors differ in their last bit (2e-7), and weights, in four steps of Adam, by about 1e-4 of the largest of
    their layer.
    """
    config = cached_config(error_weighting=weighting)
    live, data = config.model_copy(update={"reference": "live"}), make_data(num_benign=0)
    with_errors = stored(backbone, data, config, batch_size)
    expected = train(backbone, data, live, lora)
    found: list[TrainedExpert] = []
    assert count_passes(backbone, lambda: found.append(train(backbone, with_errors, config, lora))) == config.steps
    difference = largest_difference(expected.layers, found[0].layers)
    assert difference <= (0.0 if batch_size == config.pairs_per_step else 1e-3)
    assert found[0].history[0].loss == pytest.approx(np.log(2), abs=1e-7)


def test_a_cached_training_of_the_demo_model_equals_a_live_one(lora: LoraConfig) -> None:
    """Three steps, equal bits at the step's own size of passes; else about 3e-5 of a layer's largest weight."""
    base = BaseModelConfig(model=str(demo_weights() / "base"))
    whole = load_backbone(base)
    texts = ["", *UNSAFE, *SAFE]
    tokens = whole.encode_prompts(texts).tokens.half().numpy()
    backbone = load_backbone(base, parts="denoiser")
    shape = backbone.latent_shape(height=32, width=32)
    generator = np.random.default_rng(0)
    rows = [
        PreferenceRow(f"p{i}", f"s{i}", f"u{i}", caption_sha256(SAFE[i % 3]), caption_sha256(UNSAFE[i % 3]))
        for i in range(5)
    ]
    data = PreferenceData.from_tables(
        rows,
        latents={f"{side}{i}": generator.normal(size=shape).astype(np.float16) for side in "su" for i in range(5)},
        embeddings={caption_sha256(text): row for text, row in zip(texts, tokens, strict=True)},
        latent_shape=shape,
    )
    config = cached_config(steps=3, warmup_steps=1)
    expected = train(backbone, data, config.model_copy(update={"reference": "live"}), lora)
    for batch_size, limit in ((4, 0.0), (16, 1e-3)):
        found = train(backbone, stored(backbone, data, config, batch_size), config, lora)
        assert largest_difference(expected.layers, found.layers) <= limit


def test_errors_that_are_not_stored_are_refused(backbone: StableDiffusion, make_data: Make, lora: LoraConfig) -> None:
    config, data = cached_config(), make_data(num_benign=0)
    message = r"stored reference errors of pair 'pair\d+', draw 0, because dpo.reference is 'cached', found none"
    with pytest.raises(SafetyDPOError, match=message):
        step_batch(data, 0, config=config, run_seed=5, expert="hate", num_timesteps=1000)
    fewer = replace(data, reference_errors=errors_by_draw([np.ones((1, 2), np.float32)] * 5 + [np.ones((0, 2))]))
    uses = [pair_order(5, "hate", num_pairs=6, step=step, pairs_per_step=4) for step in range(2)]
    step = next(step for step, members in enumerate(uses) if any(use.index == 5 for use in members))
    with pytest.raises(SafetyDPOError, match=message):
        step_batch(fewer, step, config=config, run_seed=5, expert="hate", num_timesteps=1000)


def test_an_error_that_is_no_number_is_refused(backbone: StableDiffusion, make_data: Make) -> None:
    data = make_data()
    # As an encoder would leave it; the data's own check is passed over.
    data.condition.tokens[data.empty_caption] = float("nan")
    context = context_of(cached_config(empty_caption_rate=1.0))
    with pytest.raises(SafetyDPOError, match=r"finite errors of the reference, found \[nan, nan\] for pair 'pair003'"):
        compute_errors(backbone, data, [RowUse(3, 0)], context)


def test_the_empty_caption_has_its_own_key() -> None:
    """Under rate 1 the captions of the pair are not part of the ids."""
    config = cached_config(empty_caption_rate=1.0)
    other = replace(ROW, safe_caption_sha256="x", unsafe_caption_sha256=EMPTY_CAPTION)
    assert ids_of(config) == ids_of(config, other)
