from __future__ import annotations

from pathlib import Path

import pytest
import torch

from safetydpo.attacks.objectives import DenoisingObjective, TextObjective, check_encoder, first_free_token
from safetydpo.config.schema import BaseModelConfig
from safetydpo.diffusion.backbone import Backbone, Condition
from safetydpo.diffusion.build import load_backbone
from safetydpo.errors import SafetyDPOError, UsageError
from tests.diffusion.tiny_models import build_model
from tests.tiny import MAX_TOKENS


def test_text_objective_by_hand() -> None:
    """Tokens 1 and 2 count: differences (1, 0) and (0, 2), squares 1 + 4 over 4 features = 1.25."""
    objective = TextObjective(torch.tensor([[0.0, 0.0], [1.0, 1.0]]), first=1)
    tokens = torch.tensor([[[9.0, 9.0], [1.0, 0.0], [1.0, 3.0]], [[5.0, 5.0], [0.0, 0.0], [1.0, 1.0]]])
    assert objective(Condition(tokens=tokens)).tolist() == [1.25, 0.0]


def test_the_target_itself_is_at_no_distance(tiny: Backbone) -> None:
    objective = TextObjective.of_texts(tiny, ["red ball"], words=3)
    distances = objective(tiny.encode_prompts(["red ball", "blue house"]))
    assert distances[0] == 0
    assert distances[1] > 0


def test_several_targets_are_averaged(tiny: Backbone) -> None:
    both = TextObjective.of_texts(tiny, ["red ball", "blue house"], words=3)
    each = [TextObjective.of_texts(tiny, [text], words=3).wanted for text in ("red ball", "blue house")]
    assert torch.allclose(both.wanted, (each[0] + each[1]) / 2, atol=1e-6)


def test_the_first_token_behind_prompt_and_targets_by_hand(tiny: Backbone) -> None:
    """`red ball`: start, red, ball, end at 3, padding from 4. Five words end at 6, so that padding begins at 7."""
    assert first_free_token(tiny, ["red ball"], words=1) == 4
    assert first_free_token(tiny, ["red ball"], words=5) == 7
    assert first_free_token(tiny, ["red ball", "red ball on blue house"], words=1) == 7


def test_no_room_behind_the_prompt_is_refused(tiny: Backbone) -> None:
    with pytest.raises(SafetyDPOError, match=rf"prompt of {MAX_TOKENS - 2} words .* found {MAX_TOKENS} tokens in all"):
        first_free_token(tiny, ["red ball"], words=MAX_TOKENS - 2)


def denoising(model: Backbone, *, draws: int = 3) -> DenoisingObjective:
    generator = torch.Generator().manual_seed(3)
    return DenoisingObjective.of_pictures(
        model,
        torch.randn(draws, 4, 8, 8, generator=generator),
        model.encode_prompts(["red bomb"] * draws),
        timesteps=torch.tensor([100, 500, 900][:draws]),
        generator=generator,
    )


def test_denoising_objective_is_the_mean_over_draws_and_rows_do_not_meet(tiny: Backbone) -> None:
    objective = denoising(tiny)
    condition = tiny.encode_prompts(["red bomb", "blue house"])
    with torch.no_grad():
        found = objective(condition)
        row = condition.select(torch.tensor([1]))
        by_hand = [
            (tiny.predict(noisy[None], time[None], row)[0] - wanted).pow(2).mean()
            for noisy, time, wanted in zip(objective.noisy, objective.timesteps, objective.wanted, strict=True)
        ]
        alone = objective(condition.select(torch.tensor([1])))
    assert found[0] == 0
    assert found[1].item() == pytest.approx(torch.stack(by_hand).mean().item(), rel=1e-4)
    assert torch.equal(alone[0], found[1])


@pytest.mark.parametrize("kind", ["text", "denoising"])
def test_gradients_agree_with_finite_differences(tiny: Backbone, kind: str) -> None:
    """Central differences along random directions at the input embeddings of a prompt."""
    objective = denoising(tiny) if kind == "denoising" else TextObjective.of_texts(tiny, ["red bomb"], words=4)
    ids = tiny.tokenize(["blue house on green"])
    start = tiny.token_embedding_table()[ids].detach().clone()

    def loss(embeddings: torch.Tensor) -> torch.Tensor:
        return objective(tiny.encode_prompt_embeddings(embeddings, ids=ids))[0]

    leaf = start.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    for seed in range(3):
        direction = torch.randn(start.shape, generator=torch.Generator().manual_seed(seed))
        step = 1e-2 * direction / direction.norm()
        with torch.no_grad():
            measured = (loss(start + step) - loss(start - step)).item() / 2
        assert measured == pytest.approx((gradient * step).sum().item(), rel=0.05, abs=2e-6)


def test_models_with_pooled_features_are_refused(tiny: Backbone, tmp_path: Path) -> None:
    check_encoder(tiny)
    build_model("sdxl", tmp_path)
    with pytest.raises(UsageError, match=r"expected a model with one text encoder .* found one with pooled features"):
        check_encoder(load_backbone(BaseModelConfig(model=str(tmp_path))))
