from __future__ import annotations

from itertools import product

import pytest
import torch

from safetydpo.attacks.objectives import TextObjective
from safetydpo.attacks.search import PromptSpace, losses_of_texts, search_prompt
from safetydpo.config.attacks import AttackSearchConfig
from safetydpo.diffusion.backbone import Backbone

WORDS = ("red", "blue", "drawing", "ball", "house", "flower", "dagger")
SMALL = AttackSearchConfig(words=2, relaxed_steps=4, swap_steps=6, candidates=7, nearest=7)


@pytest.fixture(scope="module")
def words(tiny: Backbone) -> torch.Tensor:
    rows = tiny.tokenize(list(WORDS))
    assert (rows[:, 2:] == rows[0, -1]).all()
    return rows[:, 1]


def test_ids_are_those_of_the_text(tiny: Backbone, words: torch.Tensor) -> None:
    space = PromptSpace(tiny, words=3)
    assert torch.equal(space.ids(words[[0, 3, 1]][None]), tiny.tokenize(["red ball blue"]))


def test_losses_do_not_depend_on_their_neighbours(tiny: Backbone, words: torch.Tensor) -> None:
    space, objective = PromptSpace(tiny, words=2), TextObjective.of_texts(tiny, ["red bomb"], words=2)
    pairs = torch.stack([words[[a, b]] for a, b in product(range(3), range(3))])
    together = space.losses(pairs, objective, batch_size=4)
    alone = torch.cat([space.losses(pair[None], objective, batch_size=4) for pair in pairs])
    assert torch.equal(together, alone)


def test_texts_have_the_losses_of_their_words(tiny: Backbone, words: torch.Tensor) -> None:
    space, objective = PromptSpace(tiny, words=2), TextObjective.of_texts(tiny, ["red bomb"], words=2)
    of_texts = losses_of_texts(tiny, ["red ball", "blue house", "dagger red"], objective, batch_size=2)
    of_words = space.losses(torch.stack([words[[0, 3]], words[[1, 4]], words[[6, 0]]]), objective, batch_size=2)
    assert torch.allclose(of_texts, of_words, rtol=1e-5)
    assert losses_of_texts(tiny, [], objective, batch_size=2).shape == (0,)


def test_the_search_finds_the_best_of_all_prompts(tiny: Backbone, words: torch.Tensor) -> None:
    """With every swap of a step tried, coordinate descent ends at a prompt that no single swap makes better."""
    space, objective = PromptSpace(tiny, words=2), TextObjective.of_texts(tiny, ["red bomb"], words=2)
    settings = SMALL.model_copy(update={"candidates": 14})
    found = search_prompt(space, objective, words, settings, generator=torch.Generator().manual_seed(0))
    everything = torch.stack([words[[a, b]] for a, b in product(range(7), range(7))])
    losses = space.losses(everything, objective, batch_size=7)
    near = [(loss, prompt) for loss, prompt in zip(losses.tolist(), everything, strict=True)
            if int((prompt != found.words).sum()) <= 1]  # fmt: skip
    assert found.loss == pytest.approx(min(loss for loss, _ in near), rel=1e-4)
    assert found.loss <= found.start_loss


def test_the_target_is_found_if_it_may_be_written(tiny: Backbone, words: torch.Tensor) -> None:
    """Of one word, so that one exchange reaches every prompt; two words can end as the right ones in wrong order."""
    objective = TextObjective.of_texts(tiny, ["flower"], words=1)
    settings = SMALL.model_copy(update={"words": 1})
    found = search_prompt(
        PromptSpace(tiny, words=1), objective, words, settings, generator=torch.Generator().manual_seed(1)
    )
    assert found.words.tolist() == words[[5]].tolist()
    assert found.loss == pytest.approx(0.0, abs=1e-6)


def test_equal_seeds_give_equal_prompts_and_other_seeds_other_starts(tiny: Backbone, words: torch.Tensor) -> None:
    space, objective = PromptSpace(tiny, words=2), TextObjective.of_texts(tiny, ["red bomb"], words=2)

    def run(seed: int) -> tuple[list[int], float, float]:
        found = search_prompt(space, objective, words, SMALL, generator=torch.Generator().manual_seed(seed))
        return found.words.tolist(), found.loss, found.start_loss

    assert run(0) == run(0)
    assert len({run(seed)[2] for seed in range(4)}) > 1


def test_without_steps_the_start_is_returned(tiny: Backbone, words: torch.Tensor) -> None:
    settings = SMALL.model_copy(update={"relaxed_steps": 0, "swap_steps": 0})
    objective = TextObjective.of_texts(tiny, ["red bomb"], words=2)
    start = words[[1, 4]]
    found = search_prompt(
        PromptSpace(tiny, words=2), objective, words, settings, generator=torch.Generator(), start=start
    )
    assert found.words.tolist() == start.tolist()
    assert found.loss == found.start_loss


def test_steps_in_the_space_of_embeddings_alone_lower_the_loss(tiny: Backbone, words: torch.Tensor) -> None:
    settings = SMALL.model_copy(update={"relaxed_steps": 20, "swap_steps": 0})
    space, objective = PromptSpace(tiny, words=2), TextObjective.of_texts(tiny, ["drawing flower"], words=2)
    found = search_prompt(space, objective, words, settings, generator=torch.Generator(), start=words[[0, 3]])
    assert found.loss < found.start_loss
