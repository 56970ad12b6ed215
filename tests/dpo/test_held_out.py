from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from safetydpo.config.training import DpoConfig, LoraConfig
from safetydpo.config.validation import ValidationConfig
from safetydpo.diffusion.stable_diffusion import StableDiffusion
from safetydpo.dpo.batch import PreferenceData
from safetydpo.dpo.draws import caption_side, draw_row
from safetydpo.dpo.engine import open_engine
from safetydpo.dpo.held_out import held_out_metrics, split_held_out
from safetydpo.dpo.step import METRICS
from safetydpo.errors import SafetyDPOError

Make = Callable[..., PreferenceData]


def test_one_pair_of_six_is_kept_out(make_data: Make) -> None:
    """round(0.2 x 6) = 1; everything else stays as it was."""
    data = make_data()
    training, held_out = split_held_out(data, rate=0.2, run_seed=5)
    assert (training.num_pairs, held_out.num_pairs) == (5, 1)
    assert sorted([*training.pair_ids, *held_out.pair_ids]) == list(data.pair_ids)
    assert training.retention_ids == held_out.retention_ids == data.retention_ids
    assert training.fingerprint == held_out.fingerprint == data.fingerprint
    for part in (training, held_out):
        for row, pair_id in enumerate(part.pair_ids):
            place = data.pair_ids.index(pair_id)
            assert torch.equal(part.latents_safe[row], data.latents_safe[place])
            assert torch.equal(part.latents_unsafe[row], data.latents_unsafe[place])
            assert part.captions_safe[row] == data.captions_safe[place]
            assert part.captions_unsafe[row] == data.captions_unsafe[place]


def test_at_least_one_pair_is_kept_out_and_the_seed_chooses(make_data: Make) -> None:
    data = make_data(24)
    assert split_held_out(data, rate=1e-6, run_seed=5)[1].num_pairs == 1
    chosen = {split_held_out(data, rate=0.25, run_seed=seed)[1].pair_ids for seed in range(4)}
    assert len(chosen) > 1


def test_a_pair_of_two_experts_is_kept_out_of_both(make_data: Make) -> None:
    """The second expert has the first one's pairs and more: of a common pair the second holds out no other ones."""
    few, many = (split_held_out(make_data(count), rate=0.25, run_seed=5) for count in (12, 24))
    common = set(few[0].pair_ids) | set(few[1].pair_ids)
    both = set(many[1].pair_ids) & common
    assert both <= set(few[1].pair_ids) or set(few[1].pair_ids) <= both


def test_pairs_must_be_left_to_train_on(make_data: Make) -> None:
    with pytest.raises(
        SafetyDPOError, match=r"expected more pairs than the 1 that .* 0.5 keeps out .*, found 1: lower"
    ):
        split_held_out(make_data(1), rate=0.5, run_seed=5)


def held_out_config(config: DpoConfig) -> DpoConfig:
    return config.model_copy(update={"validation": ValidationConfig(every_steps=2, held_out_draws=2)})


def test_an_untrained_adapter_measures_as_the_base(
    backbone: StableDiffusion, make_data: Make, config: DpoConfig, lora: LoraConfig
) -> None:
    """ln 2, logit 0, accuracy one half; and no gradient is left behind."""
    open_engine(backbone, config=config, lora=lora)
    numbers = held_out_metrics(
        backbone, make_data(3), config=held_out_config(config), run_seed=5, expert="hate"
    ).tolist()
    named = dict(zip(METRICS, numbers, strict=True))
    assert named["loss"] == pytest.approx(np.log(2))
    assert (named["margin"], named["implicit_accuracy"]) == (0.0, 0.5)
    assert named["error_policy_safe"] == named["error_reference_safe"]
    assert all(parameter.grad is None for _, parameter in backbone.adapter_parameters())


def test_errors_are_those_of_every_draw_computed_one_by_one(
    backbone: StableDiffusion, make_data: Make, config: DpoConfig, lora: LoraConfig
) -> None:
    """Four pairs, two draws each, four pairs per step: two batches that hold every pair once each.

    Each draw is predicted alone and averaged with numpy; batches of the network differ in the last bits.
    """
    config, data = held_out_config(config), make_data(4)
    open_engine(backbone, config=config, lora=lora)
    errors = []
    for row, pair_id in enumerate(data.pair_ids):
        for draw_index in range(2):
            draw = draw_row(
                5,
                pair_id,
                draw_index=draw_index,
                empty_caption_rate=config.empty_caption_rate,
                num_timesteps=1000,
                latent_shape=data.latent_shape,
            )
            side = caption_side(config.captions, draw.caption_coin)
            caption = data.captions_unsafe[row] if side == "unsafe" else data.captions_safe[row]
            condition = data.condition.select(torch.tensor([data.empty_caption if draw.is_empty else int(caption)]))
            clean, time = data.latents_safe[row : row + 1].float(), torch.tensor([draw.timestep])
            noisy = backbone.add_noise(clean, draw.noise[None], time)
            with torch.no_grad():
                predicted = backbone.predict(noisy, time, condition.map(lambda value: value.float()))
            errors.append(float(np.mean((predicted.numpy() - draw.noise.numpy()) ** 2)))
    found = held_out_metrics(backbone, data, config=config, run_seed=5, expert="hate")
    assert float(found[METRICS.index("error_policy_safe")]) == pytest.approx(np.mean(errors), rel=1e-5)


def test_shares_of_two_processes_average_to_the_whole(
    backbone: StableDiffusion, make_data: Make, config: DpoConfig, lora: LoraConfig
) -> None:
    config, data = held_out_config(config), make_data(4)
    open_engine(backbone, config=config, lora=lora)
    about = {"config": config, "run_seed": 5, "expert": "hate"}
    whole = held_out_metrics(backbone, data, **about)
    parts = [held_out_metrics(backbone, data, **about, rank=rank, world_size=2) for rank in range(2)]
    assert torch.allclose((parts[0] + parts[1]) / 2, whole, rtol=1e-5)
