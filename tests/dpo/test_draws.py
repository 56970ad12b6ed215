from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from safetydpo.dpo.draws import caption_side, draw_choices, draw_row, num_uses, pair_order, retention_order
from safetydpo.seeding import derive_numpy, derive_torch


def draw(row_key: str = "pair", draw_index: int = 0, **changes: object):
    settings = {"empty_caption_rate": 0.2, "num_timesteps": 1000, "latent_shape": (4, 8, 8), **changes}
    return draw_row(7, row_key, draw_index=draw_index, **settings)  # type: ignore[arg-type]


def test_order_is_epochs_laid_end_to_end() -> None:
    """5 pairs, 3 a step: step 1 takes places 3, 4 of epoch 0 and place 0 of epoch 1."""
    epochs = [derive_numpy(3, "dpo_pair_order", f"hate\x1f{epoch}").permutation(5).tolist() for epoch in range(2)]
    order = pair_order(3, "hate", num_pairs=5, step=1, pairs_per_step=3)
    assert [(use.index, use.draw_index) for use in order] == [(epochs[0][3], 0), (epochs[0][4], 0), (epochs[1][0], 1)]


@settings(max_examples=50, deadline=None)
@given(num_pairs=st.integers(1, 20), per_step=st.integers(1, 12), steps=st.integers(1, 12), seed=st.integers(0, 99))
def test_every_pair_is_used_equally_often_and_never_twice_with_one_draw(
    num_pairs: int, per_step: int, steps: int, seed: int
) -> None:
    uses = [
        (use.index, use.draw_index)
        for step in range(steps)
        for use in pair_order(seed, "x", num_pairs=num_pairs, step=step, pairs_per_step=per_step)
    ]
    assert len(uses) == steps * per_step
    assert len(set(uses)) == len(uses)
    counts = Counter(index for index, _ in uses)
    per_pair = [counts[index] for index in range(num_pairs)]
    assert max(per_pair) - min(per_pair) <= 1


def test_order_depends_on_seed_expert_and_kind() -> None:
    base = pair_order(0, "hate", num_pairs=50, step=0, pairs_per_step=50)
    assert base == pair_order(0, "hate", num_pairs=50, step=0, pairs_per_step=50)
    assert base != pair_order(1, "hate", num_pairs=50, step=0, pairs_per_step=50)
    assert base != pair_order(0, "sexual", num_pairs=50, step=0, pairs_per_step=50)
    assert base != retention_order(0, "hate", num_pictures=50, step=0, pictures_per_step=50)


@pytest.mark.parametrize(("num_pairs", "step", "per_step"), [(0, 0, 1), (1, -1, 1), (1, 0, 0)])
def test_nothing_to_draw_from_is_refused(num_pairs: int, step: int, per_step: int) -> None:
    with pytest.raises(ValueError, match="expected at least 1 row"):
        pair_order(0, "hate", num_pairs=num_pairs, step=step, pairs_per_step=per_step)


def test_draw_follows_its_documented_recipe() -> None:
    """Timestep, two coins, noise, in this order, from the generator of (seed, row key, draw index)."""
    generator = derive_torch(7, "dpo_draw", "pair\x1f3")
    timestep = int(torch.randint(1000, (), generator=generator))
    coins = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    noise = torch.randn(4, 8, 8, generator=generator)
    found = draw(draw_index=3)
    assert (found.timestep, found.caption_coin, found.is_empty) == (timestep, coins[0], coins[1] < 0.2)
    assert torch.equal(found.noise, noise)


def test_the_whole_range_of_timesteps_is_no_range_at_all() -> None:
    """None draws as before there were ranges, and so does the range of the whole schedule."""
    for index in range(20):
        one, other = draw(f"{index}"), draw(f"{index}", timestep_range=(0, 999))
        assert (one.timestep, one.caption_coin, one.is_empty) == (other.timestep, other.caption_coin, other.is_empty)
        assert torch.equal(one.noise, other.noise)


@given(low=st.integers(0, 999), width=st.integers(0, 999), key=st.integers(0, 99))
def test_timesteps_lie_in_the_range_and_nothing_else_moves(low: int, width: int, key: int) -> None:
    high = min(999, low + width)
    ranged, plain = draw(f"{key}", timestep_range=(low, high)), draw(f"{key}")
    assert low <= ranged.timestep <= high
    assert ranged.caption_coin == plain.caption_coin
    assert torch.equal(ranged.noise, plain.noise)


def test_timesteps_are_uniform_over_the_range_with_both_ends() -> None:
    """1,000 draws of 5 timesteps, 200 of each expected (chi-square, fixed seeds)."""
    counts = Counter(draw(f"{index}", timestep_range=(397, 401)).timestep for index in range(1000))
    assert set(counts) == {397, 398, 399, 400, 401}
    assert stats.chisquare(list(counts.values())).pvalue > 0.01


def test_draws_differ_by_key_and_use_and_not_by_latent_size() -> None:
    first = draw()
    assert torch.equal(first.noise, draw().noise)
    for other in (draw("other"), draw(draw_index=1)):
        assert not torch.equal(first.noise, other.noise)
    larger = draw(latent_shape=(4, 16, 16))
    assert (larger.timestep, larger.caption_coin) == (first.timestep, first.caption_coin)


def test_draws_do_not_touch_global_randomness() -> None:
    before = torch.random.get_rng_state()
    draw()
    assert torch.equal(before, torch.random.get_rng_state())


def test_draws_have_the_stated_distributions() -> None:
    """2,000 draws: uniform timesteps and coins (Kolmogorov-Smirnov), 20 % empty (binomial), fixed seeds."""
    draws = [draw(f"pair{index}", latent_shape=(1, 2, 2)) for index in range(2000)]
    assert stats.kstest([one.timestep / 1000 for one in draws], "uniform").pvalue > 0.01
    assert stats.kstest([one.caption_coin for one in draws], "uniform").pvalue > 0.01
    assert stats.binomtest(sum(one.is_empty for one in draws), 2000, 0.2).pvalue > 0.01
    assert stats.kstest(torch.cat([one.noise.flatten() for one in draws]).numpy(), "norm").pvalue > 0.01


def test_empty_rate_zero_and_one() -> None:
    assert not any(draw(f"{index}", empty_caption_rate=0.0).is_empty for index in range(50))
    assert all(draw(f"{index}", empty_caption_rate=1.0).is_empty for index in range(50))


def test_caption_side() -> None:
    assert (caption_side("both", 0.49), caption_side("both", 0.5)) == ("unsafe", "safe")
    assert caption_side("unsafe", 0.9) == "unsafe"
    assert caption_side("safe", 0.1) == "safe"


def test_an_option_leaves_all_other_draws_as_they_are() -> None:
    """Values of before the options, and with each of them: the flip and the posterior's noise change no other draw."""
    plain = draw(draw_index=3)
    assert (plain.is_flipped, plain.posterior_noise) == (False, None)
    both = draw(draw_index=3, flip_rate=1.0, is_sampled=True)
    assert (both.timestep, both.caption_coin, both.is_empty) == (plain.timestep, plain.caption_coin, plain.is_empty)
    assert torch.equal(both.noise, plain.noise)
    assert both.is_flipped
    assert both.posterior_noise is not None
    assert both.posterior_noise.shape == (2, 4, 8, 8)
    assert not torch.equal(both.posterior_noise[0], both.posterior_noise[1])


def test_choices_are_those_of_the_whole_draw() -> None:
    for index in range(40):
        whole = draw(draw_index=index, flip_rate=0.5)
        rates = {"empty_caption_rate": 0.2, "num_timesteps": 1000, "flip_rate": 0.5}
        choices = draw_choices(7, "pair", draw_index=index, **rates)  # type: ignore[arg-type]
        assert vars(choices) == {name: getattr(whole, name) for name in vars(choices)}


def test_draws_of_two_seeds_are_independent() -> None:
    """2,000 rows under seeds 7 and 8: no correlation of timesteps, coins and noise, and flips as two fair coins.

    The correlation of 2,000 independent numbers has a deviation of 1 / sqrt(2000) = 0.022, that of 32,000 noise values
    one of 0.0056; four deviations are asked for.
    """
    rates = {"empty_caption_rate": 0.2, "num_timesteps": 1000, "latent_shape": (1, 4, 4), "flip_rate": 0.5}
    sides = [[draw_row(seed, f"pair{i}", draw_index=0, **rates) for i in range(2000)] for seed in (7, 8)]  # type: ignore[arg-type]
    for value in (lambda one: one.timestep, lambda one: one.caption_coin, lambda one: float(one.is_flipped)):
        columns = [[value(one) for one in side] for side in sides]
        assert abs(stats.pearsonr(*columns).statistic) < 4 / 2000**0.5
    noise = [torch.cat([one.noise.flatten() for one in side]).numpy() for side in sides]
    assert abs(stats.pearsonr(*noise).statistic) < 4 / len(noise[0]) ** 0.5
    table = np.array([[0, 0], [0, 0]])
    for one, other in zip(*sides, strict=True):
        table[int(one.is_flipped), int(other.is_flipped)] += 1
    assert stats.chi2_contingency(table).pvalue > 0.01
    assert stats.binomtest(int(table[1].sum()), 2000, 0.5).pvalue > 0.01


@settings(max_examples=60, deadline=None)
@given(num_pairs=st.integers(1, 20), per_step=st.integers(1, 12), steps=st.integers(1, 12), seed=st.integers(0, 99))
def test_uses_are_counted_as_the_order_takes_them(num_pairs: int, per_step: int, steps: int, seed: int) -> None:
    """Counted one by one over all steps; and the uses of a pair have the draw indices 0, 1, 2, ..."""
    found: dict[int, list[int]] = {index: [] for index in range(num_pairs)}
    for step in range(steps):
        for use in pair_order(seed, "x", num_pairs=num_pairs, step=step, pairs_per_step=per_step):
            found[use.index].append(use.draw_index)
    counted = num_uses(seed, "x", num_pairs=num_pairs, steps=steps, pairs_per_step=per_step)
    assert counted.tolist() == [len(uses) for uses in found.values()]
    assert all(uses == list(range(len(uses))) for uses in found.values())
