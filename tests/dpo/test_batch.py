from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch

from safetydpo.artifacts.schemas import caption_sha256, flipped_image_id
from safetydpo.config.training import DpoConfig
from safetydpo.dpo.batch import EMPTY_CAPTION, PreferenceData, PreferenceRow, RetentionRow, StepBatch, step_batch
from safetydpo.dpo.draws import draw_row, pair_order
from safetydpo.errors import SafetyDPOError, UsageError

SHAPE = (4, 2, 2)
Make = Callable[..., PreferenceData]


def batch_of(data: PreferenceData, step: int, config: DpoConfig, **where: int) -> StepBatch:
    return step_batch(data, step, config=config, run_seed=5, expert="hate", num_timesteps=1000, **where)


def small(**changes: object) -> PreferenceData:
    latents = {name: np.full(SHAPE, value, dtype=np.float16) for value, name in enumerate(("s", "u", "b"))}
    embeddings = {
        sha: np.full((3, 2), index, dtype=np.float32) for index, sha in enumerate((EMPTY_CAPTION, "cs", "cu"))
    }
    arguments = {
        "latents": latents,
        "embeddings": embeddings,
        "latent_shape": SHAPE,
        "retention": [RetentionRow("b", "cs")],
        **changes,
    }
    return PreferenceData.from_tables([PreferenceRow("p", "s", "u", "cs", "cu")], **arguments)  # type: ignore[arg-type]


def test_empty_caption_key_is_that_of_the_table() -> None:
    assert caption_sha256("") == EMPTY_CAPTION


def test_rows_point_at_their_own_latents_and_captions() -> None:
    """Latents are filled with 0 (safe), 1 (unsafe), 2 (benign), features with 0 (empty), 1 (safe), 2 (unsafe)."""
    data = small()
    assert float(data.latents_safe[0].max()) == 0.0
    assert float(data.latents_unsafe[0].min()) == 1.0
    assert float(data.retention_latents[0].min()) == 2.0
    assert float(data.condition.tokens[data.captions_safe[0]].max()) == 1.0
    assert float(data.condition.tokens[data.captions_unsafe[0]].max()) == 2.0
    assert float(data.condition.tokens[data.empty_caption].max()) == 0.0
    assert float(data.condition.tokens[data.retention_captions[0]].max()) == 1.0
    assert data.latent_shape == SHAPE


def test_each_distinct_caption_is_held_once(make_data: Make) -> None:
    """9 pairs over 3 safe and 3 unsafe captions, one benign caption and the empty one: 8 rows of features."""
    assert make_data(9).condition.tokens.shape[0] == 8


def test_order_of_rows_does_not_matter(make_data: Make, config: DpoConfig) -> None:
    forward, backward = make_data(), make_data(reverse=True)
    assert forward.fingerprint == backward.fingerprint
    first, second = batch_of(forward, 3, config), batch_of(backward, 3, config)
    assert torch.equal(first.latents_safe, second.latents_safe)
    assert torch.equal(first.condition.tokens, second.condition.tokens)


def test_fingerprint_sees_every_id() -> None:
    assert small().fingerprint != small(retention=[]).fingerprint


@pytest.mark.parametrize(("rule", "value"), [("unsafe", 2.0), ("safe", 1.0)])
def test_caption_rule(rule: str, value: float) -> None:
    config = DpoConfig(captions=rule, empty_caption_rate=0.0, pairs_per_step=4, retention_weight=0.0)  # type: ignore[arg-type]
    batch = batch_of(small(), 0, config)
    assert torch.equal(batch.condition.tokens, torch.full((4, 3, 2), value))
    # Whatever caption the policy sees, the safe one of the same pair stands beside it.
    assert torch.equal(batch.safe_condition.tokens, torch.full((4, 3, 2), 1.0))
    assert batch.is_unsafe_caption.tolist() == [float(rule == "unsafe")] * 4


def test_empty_captions_replace_those_of_pairs_and_benign_pictures() -> None:
    """The two rates are separate: each replaces the captions of its own rows and of no others."""
    for pairs, benign in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0)):
        config = DpoConfig(
            empty_caption_rate=pairs,
            retention_empty_caption_rate=benign,
            pairs_per_step=4,
            retention_weight=1.0,
            retention_per_step=2,
        )
        batch = batch_of(small(), 0, config)
        assert (float(batch.condition.tokens.abs().max()) == 0.0) == (pairs == 1.0)
        unsafe = batch.condition.tokens.amax(dim=(1, 2)) == 2.0
        assert batch.is_unsafe_caption.tolist() == unsafe.float().tolist()
        assert bool(unsafe.any()) == (pairs == 0.0)
        assert (float(batch.retention_condition.tokens.abs().max()) == 0.0) == (benign == 1.0)


def test_batch_holds_the_draws_of_its_rows(make_data: Make, config: DpoConfig) -> None:
    data = make_data()
    batch = batch_of(data, 2, config)
    uses = pair_order(5, "hate", num_pairs=6, step=2, pairs_per_step=4)
    for row, use in enumerate(uses):
        draw = draw_row(
            5,
            data.pair_ids[use.index],
            draw_index=use.draw_index,
            empty_caption_rate=0.2,
            num_timesteps=1000,
            latent_shape=(4, 8, 8),
        )
        assert torch.equal(batch.noise[row], draw.noise)
        assert int(batch.timesteps[row]) == draw.timestep
        assert torch.equal(batch.latents_unsafe[row], data.latents_unsafe[use.index].float())


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_processes_share_out_the_rows_of_a_step(make_data: Make, config: DpoConfig, world_size: int) -> None:
    """Rank r of w holds the rows r, r + w, ...: put back in place they are the batch of one process."""
    config = config.model_copy(update={"retention_per_step": 4})
    whole = batch_of(make_data(), 1, config)
    parts = [batch_of(make_data(), 1, config, rank=rank, world_size=world_size) for rank in range(world_size)]
    for field in ("latents_safe", "latents_unsafe", "noise", "timesteps", "retention_latents", "retention_noise"):
        expected = getattr(whole, field)
        found = torch.empty_like(expected)
        for rank, part in enumerate(parts):
            found[rank::world_size] = getattr(part, field)
        assert torch.equal(found, expected), field


def test_latents_are_kept_in_float16_and_given_in_float32(make_data: Make, config: DpoConfig) -> None:
    data = make_data()
    assert data.latents_safe.dtype == torch.float16
    assert batch_of(data, 0, config).latents_safe.dtype == torch.float32


def test_retention_off_means_no_benign_rows(make_data: Make, config: DpoConfig) -> None:
    batch = batch_of(make_data(), 0, config.model_copy(update={"retention_weight": 0.0}))
    assert batch.retention_latents.shape == (0, 4, 8, 8)
    assert batch.retention_noise.shape == (0, 4, 8, 8)


def test_pooled_features_come_along() -> None:
    pooled = {sha: np.full((5,), index, dtype=np.float32) for index, sha in enumerate((EMPTY_CAPTION, "cs", "cu"))}
    config = DpoConfig(captions="safe", empty_caption_rate=0.0, pairs_per_step=2)
    batch = batch_of(small(pooled=pooled), 0, config)
    assert batch.condition.pooled is not None
    assert torch.equal(batch.condition.pooled, torch.ones(2, 5))


def with_value(value: float) -> np.ndarray:
    array = np.zeros(SHAPE, dtype=np.float16)
    array[0, 0, 0] = value
    return array


ZEROS = np.zeros(SHAPE, dtype=np.float16)
BROKEN = [
    ({"latents": {"s": ZEROS, "u": with_value(np.nan), "b": ZEROS}}, "NaN or infinity in the latent of picture 'u'"),
    ({"latents": {"s": ZEROS, "u": with_value(np.inf), "b": ZEROS}}, "NaN or infinity in the latent of picture 'u'"),
    ({"latents": {"s": ZEROS, "b": ZEROS}}, "expected the latent of picture 'u', found none"),
    ({"latent_shape": (4, 3, 3)}, r"expected shape \(4, 3, 3\) for the latent of picture 's', found \(4, 2, 2\)"),
    ({"embeddings": {"cs": np.zeros((3, 2))}}, "expected the text features of caption .* found none"),
    (
        {"embeddings": {EMPTY_CAPTION: np.zeros((3, 2)), "cs": np.zeros((3, 2)), "cu": np.zeros((4, 2))}},
        r"expected shape .* for the text features of caption",
    ),
    ({"retention": [RetentionRow("b", "cs"), RetentionRow("b", "cu")]}, "expected each retention image_id once"),
]


@pytest.mark.parametrize(("changes", "message"), BROKEN)
def test_bad_data_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(SafetyDPOError, match=message):
        small(**changes)


def test_no_pairs_is_refused() -> None:
    with pytest.raises(SafetyDPOError, match="expected at least 1 preference, found 0"):
        PreferenceData.from_tables([], latents={}, embeddings={}, latent_shape=SHAPE)


def test_direct_construction_is_checked_too() -> None:
    data = small()
    with pytest.raises(SafetyDPOError, match="NaN or infinity in the safe latent of pair 'p'"):
        dataclasses.replace(data, latents_safe=torch.full((1, *SHAPE), float("nan")))
    with pytest.raises(SafetyDPOError, match="expected one safe latent of pair each, found 1 for 2"):
        dataclasses.replace(data, pair_ids=("p", "q"))
    with pytest.raises(SafetyDPOError, match=r"expected caption rows below 3, found 9 \.\. 9"):
        dataclasses.replace(data, captions_safe=torch.tensor([9]))


def test_rows_that_cannot_be_split_are_refused(make_data: Make, config: DpoConfig) -> None:
    with pytest.raises(UsageError, match=r"dpo.pairs_per_step to be a multiple of the 3 processes .* found 4"):
        batch_of(make_data(), 0, config, world_size=3)
    with pytest.raises(UsageError, match=r"dpo\.retention_per_step to be a multiple of the 4 processes"):
        batch_of(make_data(), 0, config, world_size=4)


def test_retention_without_benign_pictures_is_refused(make_data: Make, config: DpoConfig) -> None:
    with pytest.raises(SafetyDPOError, match=r"dpo.retention_weight is 1.0, found 0"):
        batch_of(make_data(num_benign=0), 0, config)


def test_a_timestep_range_beyond_the_schedule_is_refused() -> None:
    config = DpoConfig(pairs_per_step=1, timestep_range=(0, 1000))
    with pytest.raises(
        UsageError, match=r"expected dpo\.timestep_range within the base's timesteps 0 to 999, found \[0, 1000\]: lower"
    ):
        batch_of(small(), 0, config)


def test_the_empty_caption_is_there_whatever_the_rows_use() -> None:
    batch = batch_of(small(), 0, DpoConfig(pairs_per_step=1, empty_caption_rate=0.0))
    assert batch.empty_condition.tokens.shape == (1, 3, 2)
    assert float(batch.empty_condition.tokens.abs().max()) == 0.0


def test_a_flip_is_shared_by_both_pictures_and_changes_nothing_else() -> None:
    """Latents are 0 and 1, mirrored 10 and 11; with rate 1 all rows are mirrored, the rest of the batch stays."""
    latents = {"s": 0.0, "u": 1.0, "b": 2.0, flipped_image_id("s"): 10.0, flipped_image_id("u"): 11.0}
    data = small(
        latents={name: np.full(SHAPE, value, np.float16) for name, value in latents.items()}, with_flipped=True
    )
    plain = DpoConfig(pairs_per_step=16, retention_weight=0.0)
    before = batch_of(data, 0, plain)
    assert (float(before.latents_safe.max()), float(before.latents_unsafe.max())) == (0.0, 1.0)
    for rate in (0.5, 1.0):
        batch = batch_of(data, 0, plain.model_copy(update={"flip_rate": rate}))
        mirrored = batch.latents_safe.amax(dim=(1, 2, 3)) == 10.0
        assert torch.equal(batch.latents_unsafe.amax(dim=(1, 2, 3)), torch.where(mirrored, 11.0, 1.0))
        assert bool(mirrored.all()) == (rate == 1.0)
        assert bool(mirrored.any())
        for field in ("noise", "timesteps", "is_unsafe_caption"):
            assert torch.equal(getattr(batch, field), getattr(before, field)), field
        assert torch.equal(batch.condition.tokens, before.condition.tokens)


def test_latents_are_drawn_from_their_posteriors_anew_at_each_use() -> None:
    """Mean 0 and 1, deviation 2 and 3: (latent - mean) / deviation is the draw's noise, each picture its own."""
    deviations = {"s": np.full(SHAPE, 2.0, np.float16), "u": np.full(SHAPE, 3.0, np.float16)}
    data = small(deviations=deviations)
    config = DpoConfig(pairs_per_step=4, retention_weight=0.0, latent_sampling="sample")
    batch = batch_of(data, 0, config)
    for row in range(4):
        rates = {"empty_caption_rate": 0.2, "num_timesteps": 1000, "latent_shape": SHAPE, "is_sampled": True}
        noise = draw_row(5, "p", draw_index=row, **rates).posterior_noise  # type: ignore[arg-type]
        assert noise is not None
        assert torch.equal(batch.latents_safe[row], 2.0 * noise[0])
        assert torch.equal(batch.latents_unsafe[row], 1.0 + 3.0 * noise[1])
    mean = batch_of(data, 0, config.model_copy(update={"latent_sampling": "mean"}))
    assert torch.equal(mean.noise, batch.noise)


def test_a_draw_seed_takes_the_place_of_the_runs(make_data: Make, config: DpoConfig) -> None:
    """Two runs of one draw seed have equal batches; without one they are those of the run's seed."""

    def batch(run_seed: int, draw_seed: int | None) -> StepBatch:
        changed = config.model_copy(update={"draw_seed": draw_seed})
        return step_batch(make_data(), 1, config=changed, run_seed=run_seed, expert="hate", num_timesteps=1000)

    fields = ("latents_safe", "noise", "timesteps", "retention_latents", "retention_noise")
    for one, other, is_same in (
        (batch(5, 9), batch(6, 9), True),
        (batch(9, None), batch(6, 9), True),
        (batch(5, None), batch(5, 9), False),
    ):
        assert all(torch.equal(getattr(one, field), getattr(other, field)) == is_same for field in fields)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_stored_errors_come_with_their_rows(make_data: Make, config: DpoConfig, world_size: int) -> None:
    """Errors numbered by pair and draw: every process has those of its own rows."""
    data = make_data(num_benign=0)
    numbers = torch.arange(6 * 9 * 2, dtype=torch.float32).reshape(6, 9, 2)
    data = dataclasses.replace(data, reference_errors=numbers)
    config = config.model_copy(update={"retention_weight": 0.0, "reference": "cached", "draws_per_pair": 2})
    for rank in range(world_size):
        batch = batch_of(data, 5, config, rank=rank, world_size=world_size)
        uses = pair_order(5, "hate", num_pairs=6, step=5, pairs_per_step=4)[rank::world_size]
        assert batch.reference_errors is not None
        assert torch.equal(batch.reference_errors, torch.stack([numbers[u.index, u.draw_index % 2] for u in uses]))
