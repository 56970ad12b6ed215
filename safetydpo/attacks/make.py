"""One attack on one concept: from its names to a prompt.

Axis legend: `draw` pictures of the denoising objective.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safetydpo.attacks.objectives import DenoisingObjective, Objective, TextObjective, check_encoder
from safetydpo.attacks.paraphrases import paraphrases_of
from safetydpo.attacks.search import FoundPrompt, PromptSpace, losses_of_texts, search_prompt
from safetydpo.attacks.typos import misspell_name
from safetydpo.attacks.vocabulary import Vocabulary, find_banned, whole_words
from safetydpo.config.attacks import AttackName, AttackSearchConfig
from safetydpo.config.schema import SamplerConfig
from safetydpo.diffusion.backbone import Backbone
from safetydpo.diffusion.render import initial_noise
from safetydpo.errors import SafetyDPOError
from safetydpo.seeding import derive_seed, derive_torch

STAGE = "attacks"
NAMES_TO_MISSPELL = 2
"""The first names: those that experts trained on, which a slip of the hand is most likely to start from."""


@dataclass(frozen=True)
class AttackTask:
    """What an attack prompt is made from; equal tasks give equal prompts.

    Attributes:
        attack: How it is made.
        concept: Key of the unsafe concept.
        names: All that prompts call it.
        frame: The rest of a prompt around a name, with `{name}` for it.
        banned: Names of which a searched prompt may use no token: those of all unsafe concepts, or what it draws
            might be another one that it names.
        index: Number of the prompt among those of the concept, from 0.
        seed: Seed of the run.
    """

    attack: AttackName
    concept: str
    names: tuple[str, ...]
    frame: str
    banned: tuple[str, ...]
    index: int
    seed: int

    @property
    def row_key(self) -> str:
        """Return what tells the task's draws from those of others."""
        return f"{self.attack}/{self.concept}/{self.index}"

    def fill(self, names: Sequence[str]) -> list[str]:
        """Return the frame around each name."""
        return [self.frame.replace("{name}", name) for name in names]


@dataclass(frozen=True)
class AttackPrompt:
    """An attack prompt, and what its making went by: the objective of the prompt and of what it began with."""

    text: str
    loss: float
    start_loss: float


class AttackMaker:
    """A base model, its words and the settings of the search; makes one prompt after another.

    An adapter that stands in the model changes the attack `white_box` and no other.
    """

    def __init__(self, backbone: Backbone, settings: AttackSearchConfig, sampler: SamplerConfig) -> None:
        """Read the model's words.

        Raises:
            UsageError: if prompts of the model are more than the features of one text encoder.
        """
        check_encoder(backbone)
        self._backbone, self._settings, self._sampler = backbone, settings, sampler
        self.vocabulary: Vocabulary = whole_words(backbone.token_texts(), self._read)
        self._space = PromptSpace(backbone, words=settings.words)

    def _read(self, texts: Sequence[str]) -> list[list[int]]:
        (empty,) = self._backbone.tokenize([""]).cpu()
        special = {int(empty[0]), int(empty[1]), int(empty[-1])}
        rows = self._backbone.tokenize(list(texts)).cpu().tolist()
        return [[number for number in row if number not in special] for row in rows]

    def make(self, task: AttackTask) -> AttackPrompt:
        """Return the prompt of a task.

        Raises:
            SafetyDPOError: if there are fewer wordings than the task's index asks for, or a search ended with a token
                that names the concept.
        """
        if task.attack == "paraphrase":
            return self._choose(task, task.fill(paraphrases_of(task.concept)))
        if task.attack == "typo":
            slips = [slip for name in task.names[:NAMES_TO_MISSPELL] for slip in misspell_name(name, known=task.names)]
            return self._choose(task, task.fill(slips))
        if task.attack == "random":
            return self._random(task)
        return self._search(task)

    def _choose(self, task: AttackTask, texts: Sequence[str]) -> AttackPrompt:
        """Return the text that is the index-th nearest to the unsafe prompts in the eyes of the base's encoder."""
        if task.index >= len(texts):
            raise SafetyDPOError(
                f"expected more than {task.index} wordings of attack {task.attack!r} on {task.concept!r}, found "
                f"{len(texts)}: lower identity.evaluation.attack_prompts_per_concept"
            )
        losses = losses_of_texts(self._backbone, texts, self._text_objective(task, texts), batch_size=self._batch)
        order = losses.argsort(stable=True)
        return AttackPrompt(texts[int(order[task.index])], float(losses[order[task.index]]), float(losses.max()))

    def _random(self, task: AttackTask) -> AttackPrompt:
        allowed = self.vocabulary.allowed(task.banned)
        drawn = torch.randint(len(allowed), (self._settings.words,), generator=self._generator(task))
        return self._checked(task, FoundPrompt(allowed[drawn], 0.0, 0.0))

    def _search(self, task: AttackTask) -> AttackPrompt:
        allowed, generator = self.vocabulary.allowed(task.banned), self._generator(task)
        objective: Objective = self._text_objective(task)
        if task.attack == "optimised" and self._settings.objective == "text":
            found = search_prompt(self._space, objective, allowed, self._settings, generator=generator)
            return self._checked(task, found)
        # Predictions are dear: the search for them goes on from where the one for features ends.
        start = search_prompt(self._space, objective, allowed, self._settings, generator=generator)
        objective = self._denoising_objective(task, generator)
        found = search_prompt(self._space, objective, allowed, self._settings, generator=generator, start=start.words)
        return self._checked(task, found)

    def _text_objective(self, task: AttackTask, judged: Sequence[str] = ()) -> TextObjective:
        wanted = task.fill(task.names)
        return TextObjective.of_texts(self._backbone, wanted, words=self._settings.words, judged=judged)

    def _denoising_objective(self, task: AttackTask, generator: torch.Generator) -> DenoisingObjective:
        backbone, sampler, draws = self._backbone, self._sampler, self._settings.draws
        texts = task.fill(task.names)
        prompts = backbone.encode_prompts([texts[index % len(texts)] for index in range(draws)])
        with backbone.adapter_off():
            clean: Tensor = backbone.sample(
                initial_noise(
                    [derive_seed(task.seed, STAGE, f"{task.row_key}/{draw}") for draw in range(draws)],
                    shape=backbone.latent_shape(height=sampler.height, width=sampler.width),
                ),
                prompts,
                empty=backbone.encode_prompts([""] * draws),
                steps=sampler.steps,
                guidance_scale=sampler.guidance_scale,
            )
        last = backbone.num_train_timesteps
        # In the middle of each of equally long stretches: all phases of drawing, from layout to detail.
        timesteps = torch.tensor([(2 * draw + 1) * last // (2 * draws) for draw in range(draws)])
        return DenoisingObjective.of_pictures(backbone, clean, prompts, timesteps=timesteps, generator=generator)

    def _checked(self, task: AttackTask, found: FoundPrompt) -> AttackPrompt:
        text = self.vocabulary.write(found.words.tolist())
        named = find_banned(self.vocabulary, text, task.banned)
        if named or self._read([text]) != [found.words.tolist()]:
            # The vocabulary excludes it; a model whose tokenizer reads a sentence unlike its words would show here.
            raise SafetyDPOError(
                f"expected an attack prompt on {task.concept!r} that is read as the {len(found.words)} words it was "
                f"found with, none of them of an unsafe name, found {len(named)} that are: report this tokenizer"
            )
        return AttackPrompt(text, found.loss, found.start_loss)

    @property
    def _batch(self) -> int:
        return self._settings.candidates

    def _generator(self, task: AttackTask) -> torch.Generator:
        return derive_torch(task.seed, STAGE, task.row_key)
