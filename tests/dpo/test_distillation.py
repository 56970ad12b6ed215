from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safetydpo.artifacts.schemas import caption_sha256
from safetydpo.diffusion.backbone import Condition
from safetydpo.diffusion.stable_diffusion import StableDiffusion
from safetydpo.dpo.batch import EMPTY_CAPTION
from safetydpo.dpo.distillation import (
    BASE,
    DistillationData,
    TaughtRow,
    answer_rows,
    ask,
    distillation_loss,
    step_uses,
)
from safetydpo.dpo.draws import RowUse
from safetydpo.errors import SafetyDPOError
from tests.dpo.lessons import SIGNATURE, make_lessons, make_rows, random_layers, small_distillation


@pytest.fixture
def data(shared_backbone: StableDiffusion) -> DistillationData:
    return make_lessons(shared_backbone)


def answer(backbone: StableDiffusion, data: DistillationData, **arguments: int) -> torch.Tensor:
    teachers = {"hate": random_layers(backbone, seed=1), "violence": random_layers(backbone, seed=2)}
    return answer_rows(
        backbone, data, teachers, signature=SIGNATURE, config=small_distillation(), run_seed=5, **arguments
    )


def test_rows_are_sorted_and_equal_ones_count_once(shared_backbone: StableDiffusion):
    rows = make_rows()
    one, two = make_lessons(shared_backbone, rows), make_lessons(shared_backbone, rows[::-1] + rows[:2])
    assert one.rows == two.rows
    assert torch.equal(one.latents, two.latents)
    assert one.fingerprint == two.fingerprint
    assert [row.teacher for row in one.rows] == ["hate"] * 6 + ["violence"] * 3 + [BASE] * 5
    assert make_lessons(shared_backbone, rows[1:]).fingerprint != one.fingerprint


@pytest.mark.parametrize(("kept", "what"), [("hate", "benign pictures"), (BASE, "pictures of experts' pairs")])
def test_both_kinds_of_rows_are_needed(shared_backbone: StableDiffusion, kept: str, what: str):
    rows = [row for row in make_rows() if row.teacher == kept]
    with pytest.raises(
        SafetyDPOError, match=f"expected {what} to distil experts on, found 0: (set prompts.retention|render more)"
    ):
        make_lessons(shared_backbone, rows)


def test_answers_are_the_teachers_predictions(backbone: StableDiffusion, data: DistillationData):
    """Each row by hand: noise and timestep of its draw, its teacher in the slot, one prediction at a time."""
    config, answers = small_distillation(), answer(backbone, data)
    assert answers.shape == (14, 2, *data.latents.shape[1:])
    for index in (0, 7, 13):
        teacher = data.rows[index].teacher
        for draw in range(2):
            questions = ask(backbone, data, [RowUse(index, draw)], config=config, run_seed=5)
            if teacher == BASE:
                backbone.remove_adapter()
            else:
                backbone.swap_adapter(SIGNATURE, random_layers(backbone, seed={"hate": 1, "violence": 2}[teacher]))
            with torch.no_grad():
                alone = backbone.predict(questions.noisy, questions.timesteps, questions.condition)[0]
            torch.testing.assert_close(answers[index, draw], alone, rtol=1e-4, atol=1e-5)


def test_shares_of_processes_add_up_to_all_answers(backbone: StableDiffusion, data: DistillationData):
    shares = [answer(backbone, data, rank=rank, world_size=3) for rank in range(3)]
    assert torch.equal(shares[0] + shares[1] + shares[2], answer(backbone, data))
    assert all((share == 0).flatten(1).all(dim=1).any() for share in shares)


def test_a_missing_teacher_is_named(backbone: StableDiffusion, data: DistillationData):
    with pytest.raises(SafetyDPOError, match="expected an expert 'hate' to answer its own rows, found violence"):
        answer_rows(
            backbone,
            data,
            {"violence": random_layers(backbone, seed=2)},
            signature=SIGNATURE,
            config=small_distillation(),
            run_seed=5,
        )


def test_the_empty_caption_is_asked_of_the_base_only(backbone: StableDiffusion, data: DistillationData):
    config = small_distillation(benign_empty_caption_rate=1.0)
    condition = ask(backbone, data, [RowUse(0, 0), RowUse(13, 0)], config=config, run_seed=5).condition
    empty = backbone.encode_prompts([""]).tokens[0]
    assert not torch.equal(condition.tokens[0], empty)
    torch.testing.assert_close(condition.tokens[1], empty)


def test_loss_by_hand(backbone: StableDiffusion, data: DistillationData):
    """The base against answers that are off by 1 on two taught rows, by 2 on one benign row and right on another.

    Mean of (1, 1, 4, 0) = 1.5; taught 1, benign 2; in the velocity's unit each error is multiplied by its weight.
    """
    uses = ([RowUse(0, 0), RowUse(8, 1)], [RowUse(9, 0), RowUse(13, 1)])
    config = small_distillation()
    questions = ask(backbone, data, [*uses[0], *uses[1]], config=config, run_seed=5)
    with torch.no_grad():
        right = backbone.predict(questions.noisy, questions.timesteps, questions.condition)
    answers = torch.full((14, 2, *data.latents.shape[1:]), torch.nan)
    for use, offset, prediction in zip([*uses[0], *uses[1]], (1.0, 1.0, 2.0, 0.0), right, strict=True):
        answers[use.index, use.draw_index] = prediction + offset
    loss, numbers = distillation_loss(backbone, data, answers, uses, config=config, run_seed=5)
    assert float(loss) == pytest.approx(1.5, rel=1e-5)
    assert numbers.tolist() == pytest.approx([1.5, 1.0, 2.0], rel=1e-5)
    weights = backbone.velocity_weights(questions.timesteps).tolist()
    weighted = config.model_copy(update={"error_weighting": "velocity"})
    found, _ = distillation_loss(backbone, data, answers, uses, config=weighted, run_seed=5)
    assert float(found) == pytest.approx((weights[0] + weights[1] + 4 * weights[2]) / 4, rel=1e-5)


def bare_data(num_taught: int, num_benign: int) -> DistillationData:
    rows = [TaughtRow("hate", f"{i:03d}", EMPTY_CAPTION) for i in range(num_taught)]
    rows += [TaughtRow(BASE, f"{i:03d}", EMPTY_CAPTION) for i in range(num_benign)]
    count = len(rows)
    return DistillationData(
        taught=tuple(rows[:num_taught]),
        benign=tuple(rows[num_taught:]),
        latents=torch.zeros(count, 1, 1, 1),
        captions=torch.zeros(count, dtype=torch.long),
        condition=Condition(torch.zeros(1, 1, 1)),
        empty_caption=0,
    )


@settings(max_examples=25)
@given(st.integers(2, 9), st.integers(2, 9), st.integers(1, 3), st.integers(0, 50))
def test_every_row_is_used_in_turn_and_processes_share_a_step(taught: int, benign: int, draws: int, seed: int):
    data, config = bare_data(taught, benign), small_distillation(draws=draws)
    seen: Counter[int] = Counter()
    for step in range(taught * benign):
        whole = step_uses(data, step, config=config, run_seed=seed)
        parts = [step_uses(data, step, config=config, run_seed=seed, rank=r, world_size=2) for r in range(2)]
        for kind in range(2):
            assert Counter(whole[kind]) == Counter(parts[0][kind]) + Counter(parts[1][kind])
            assert len(whole[kind]) == 2
        assert all(use.draw_index < draws for side in whole for use in side)
        seen.update(use.index for side in whole for use in side)
    # Two rows of each kind a step: every taught row is used 2 * benign times, every benign row 2 * taught times.
    assert seen == Counter({i: 2 * benign if i < taught else 2 * taught for i in range(taught + benign)})


def test_a_caption_without_features_is_named(shared_backbone: StableDiffusion):
    rows = [*make_rows(), TaughtRow("hate", "image0", caption_sha256("never encoded"))]
    with pytest.raises(SafetyDPOError, match="expected the text features of caption '"):
        make_lessons(shared_backbone, rows)


def test_latents_are_float32(data: DistillationData):
    assert data.latents.dtype == torch.float32
    assert np.isfinite(data.latents.numpy()).all()
