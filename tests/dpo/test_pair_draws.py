from __future__ import annotations

import torch

from safetydpo.config.training import DpoConfig
from safetydpo.dpo.draws import RowUse, draw_row
from safetydpo.dpo.pair_draws import draw_pairs, pair_choices, side_of

PAIRS = ("p", "q")
USES = [RowUse(index, draw_index) for draw_index in range(5) for index in (1, 0)]


def drawn(config: DpoConfig, draw_seed: int = 7):
    return draw_pairs(PAIRS, USES, config=config, draw_seed=draw_seed, num_timesteps=1000, latent_shape=(1, 2, 2))


def test_settings_become_draws() -> None:
    """Each use has the draw of its pair and index under the rates of the settings."""
    config = DpoConfig(empty_caption_rate=0.5, flip_rate=0.5, latent_sampling="sample")
    for use, (same, draw) in zip(USES, drawn(config), strict=True):
        rates = {"empty_caption_rate": 0.5, "flip_rate": 0.5, "is_sampled": True}
        where = {"draw_index": use.draw_index, "num_timesteps": 1000, "latent_shape": (1, 2, 2)}
        expected = draw_row(7, PAIRS[use.index], **where, **rates)  # type: ignore[arg-type]
        assert same == use
        assert torch.equal(draw.noise, expected.noise)
        assert draw.posterior_noise is not None
        assert torch.equal(draw.posterior_noise, expected.posterior_noise)  # type: ignore[arg-type]
        choices, side = pair_choices(config, PAIRS[use.index], use.draw_index, draw_seed=7, num_timesteps=1000)
        assert vars(choices) == {name: getattr(draw, name) for name in vars(choices)}
        assert side == side_of(config, draw)


def test_two_draws_per_pair_are_used_in_turn() -> None:
    """Uses 0 to 4 of a pair get its draws 0, 1, 0, 1, 0."""
    found = drawn(DpoConfig(draws_per_pair=2))
    assert [use.draw_index for use, _ in found] == [0, 0, 1, 1, 0, 0, 1, 1, 0, 0]
    assert torch.equal(found[0][1].noise, found[4][1].noise)
    assert not torch.equal(found[0][1].noise, found[2][1].noise)


def test_an_empty_caption_belongs_to_no_side() -> None:
    assert {side_of(DpoConfig(empty_caption_rate=1.0), d) for _, d in drawn(DpoConfig(empty_caption_rate=1.0))} == {
        None
    }
    unsafe = DpoConfig(empty_caption_rate=0.0, captions="unsafe")
    assert {side_of(unsafe, draw) for _, draw in drawn(unsafe)} == {"unsafe"}
