"""Gradient search for a prompt: first in the space of embeddings, projected to words, then word by word.

Axis legend: `place` words of the prompt, `width` features of an embedding, `token` prompt tokens, `trial` prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from safetydpo.attacks.objectives import Objective
from safetydpo.attacks.swaps import best_words, draw_trials, project_to_words, swap_scores
from safetydpo.config.attacks import AttackSearchConfig
from safetydpo.diffusion.backbone import Backbone

MOMENTUM, SQUARES, TINY = 0.9, 0.95, 1e-12
"""Of Adam, for steps in the space of embeddings."""


@dataclass(frozen=True)
class FoundPrompt:
    """What a search ended with."""

    words: Int[Tensor, " place"]
    loss: float
    start_loss: float
    """Of the random words that it began with."""


class PromptSpace:
    """Prompts of a fixed number of words as a model's text encoder takes them."""

    def __init__(self, backbone: Backbone, *, words: int) -> None:
        """Take the model; padding is as it writes it. Tables stand on the CPU, where words are chosen."""
        (pattern,) = backbone.tokenize([""]).cpu()
        self._backbone = backbone
        self._pattern = torch.cat([pattern[:1], pattern[1:2].repeat(words), pattern[1 : len(pattern) - words]])
        self._places = slice(1, words + 1)
        self.table: Float[Tensor, "vocabulary width"] = backbone.token_embedding_table().detach().cpu()

    def ids(self, prompts: Int[Tensor, "trial place"]) -> Int[Tensor, "trial token"]:
        """Return prompts with start, end and padding."""
        rows = self._pattern.repeat(len(prompts), 1)
        rows[:, self._places] = prompts
        return rows

    @torch.no_grad()
    def losses(
        self, prompts: Int[Tensor, "trial place"], objective: Objective, *, batch_size: int
    ) -> Float[Tensor, " trial"]:
        """Return the loss of each prompt; every pass has `batch_size` rows, so that none depends on the others."""
        found = []
        for rows in _full_batches(self.ids(prompts), batch_size):
            condition = self._backbone.encode_prompt_embeddings(self.table[rows], ids=rows)
            found.append(objective(condition).float().cpu())
        return torch.cat(found)[: len(prompts)]

    def gradient(
        self, prompt: Int[Tensor, " place"], objective: Objective
    ) -> tuple[float, Float[Tensor, "place width"]]:
        """Return the loss of a prompt and its gradient at the input embeddings of its words."""
        ids = self.ids(prompt[None])
        embeddings = self.table[ids].clone().requires_grad_()
        loss = objective(self._backbone.encode_prompt_embeddings(embeddings, ids=ids))[0]
        (gradient,) = torch.autograd.grad(loss, embeddings)
        return float(loss.detach()), gradient[0, self._places]


def losses_of_texts(
    backbone: Backbone, texts: Sequence[str], objective: Objective, *, batch_size: int
) -> Float[Tensor, " trial"]:
    """Return the loss of each text, in passes of `batch_size` rows."""
    found = []
    for start in range(0, len(texts), batch_size):
        rows = list(texts[start : start + batch_size])
        condition = backbone.encode_prompts([*rows, *[rows[-1]] * (batch_size - len(rows))])
        with torch.no_grad():
            found.append(objective(condition)[: len(rows)].float().cpu())
    return torch.cat(found) if found else torch.zeros(0)


def _full_batches(rows: Int[Tensor, "trial token"], size: int) -> list[Int[Tensor, "trial token"]]:
    missing = -len(rows) % size
    return list(torch.cat([rows, rows[-1:].repeat(missing, 1)]).split(size))


def search_prompt(
    space: PromptSpace,
    objective: Objective,
    vocabulary: Int[Tensor, " word"],
    settings: AttackSearchConfig,
    *,
    generator: torch.Generator,
    start: Int[Tensor, " place"] | None = None,
) -> FoundPrompt:
    """Return the best prompt of words of `vocabulary` that was met, from random words or from `start`.

    The steps in the space of embeddings move a free embedding per place by Adam on the gradient that its nearest
    words have; the steps after them try `candidates` swaps of one word each and keep the best if it is better.

    Source: Wen et al. 2023 (arXiv 2302.03668), algorithm 1; Zou et al. 2023 (arXiv 2307.15043), algorithm 1.
    """
    if start is None:
        start = vocabulary[torch.randint(len(vocabulary), (settings.words,), generator=generator)]
    start_loss, _ = space.gradient(start, objective)
    best, loss = _descend(space, objective, vocabulary, settings, start)
    for _ in range(settings.swap_steps):
        _, gradient = space.gradient(best, objective)
        scores = swap_scores(gradient, space.table[best], space.table[vocabulary])
        choice = vocabulary[best_words(scores, count=settings.nearest)]
        trials = draw_trials(best, choice, count=settings.candidates, generator=generator)
        losses = space.losses(trials, objective, batch_size=settings.candidates)
        first = int(losses.argmin())
        if float(losses[first]) < loss:
            best, loss = trials[first], float(losses[first])
    return FoundPrompt(best, loss, start_loss)


def _descend(
    space: PromptSpace,
    objective: Objective,
    vocabulary: Int[Tensor, " word"],
    settings: AttackSearchConfig,
    start: Int[Tensor, " place"],
) -> tuple[Int[Tensor, " place"], float]:
    table = space.table[vocabulary].float()
    free = space.table[start].float().clone()
    mean, square = torch.zeros_like(free), torch.zeros_like(free)
    pace = settings.pace * float(table.std())
    best, loss = start, space.gradient(start, objective)[0]
    for step in range(1, settings.relaxed_steps + 1):
        words = vocabulary[project_to_words(free, table)]
        found, gradient = space.gradient(words, objective)
        if found < loss:
            best, loss = words, found
        mean = MOMENTUM * mean + (1 - MOMENTUM) * gradient.float()
        square = SQUARES * square + (1 - SQUARES) * gradient.float() ** 2
        root = (square / (1 - SQUARES**step)).sqrt() + TINY
        free = free - pace * (mean / (1 - MOMENTUM**step)) / root
    return best, loss
