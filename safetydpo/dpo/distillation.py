"""Distillation of many experts into one adapter: it answers each expert's prompts as that expert does.

Benign prompts are answered by the base, so what no expert should touch stays. The answers are predictions of the
network on noisy latents; each row is answered at a few timesteps and noises, once, before training. Its cost does not
grow with the number of experts but for those answers.

Axis legend: `row` pictures under a caption, `draw` draws of a row, `batch` rows of a step, `channel height width`
latent axes, `metric` numbers of a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from safetydpo.artifacts.adapters import LoraLayer, LoraSignature
from safetydpo.artifacts.schemas import sha256_of
from safetydpo.config.training import DistillConfig
from safetydpo.diffusion.backbone import Backbone, Condition
from safetydpo.dpo.arrays import gather_arrays
from safetydpo.dpo.batch import EMPTY_CAPTION
from safetydpo.dpo.draws import RowDraw, RowUse, draw_row, row_order
from safetydpo.dpo.loss import squared_error
from safetydpo.dpo.weighting import error_weights
from safetydpo.errors import SafetyDPOError

BASE = ""
"""The teacher of benign rows: the network without an adapter."""
METRICS = ("loss", "error_taught", "error_benign")
"""Names of the numbers that `distillation_loss` returns, in order."""


@dataclass(frozen=True, order=True)
class TaughtRow:
    """One picture under one caption, and the expert (or `BASE`) whose prediction is the answer."""

    teacher: str
    image_id: str
    caption_sha256: str

    @property
    def key(self) -> str:
        """Key of the row's draws."""
        return "\x1f".join((self.teacher, self.image_id, self.caption_sha256))


@dataclass(frozen=True)
class DistillationData:
    """All rows of a distillation: those of experts first, then the benign ones, each sorted."""

    taught: tuple[TaughtRow, ...]
    benign: tuple[TaughtRow, ...]
    latents: Float[Tensor, "row channel height width"]
    captions: Int[Tensor, " row"]
    condition: Condition
    """Features of the distinct captions; `captions` points into its rows."""
    empty_caption: int
    """Row of the empty caption in `condition`."""

    @property
    def rows(self) -> tuple[TaughtRow, ...]:
        """All rows, in the order of `latents`."""
        return self.taught + self.benign

    @property
    def fingerprint(self) -> str:
        """sha256 over all rows."""
        return sha256_of([[row.teacher, row.image_id, row.caption_sha256] for row in self.rows])

    @classmethod
    def from_tables(
        cls,
        rows: Sequence[TaughtRow],
        *,
        latents: Mapping[str, NDArray[np.floating]],
        embeddings: Mapping[str, NDArray[np.floating]],
        latent_shape: tuple[int, int, int],
        pooled: Mapping[str, NDArray[np.floating]] | None = None,
    ) -> DistillationData:
        """Gather rows from latents by image id and text features by caption sha256; equal rows count once.

        Raises:
            SafetyDPOError: if no row has an expert or none the base as teacher, or a latent or embedding is missing,
                of another shape or not finite.
        """
        distinct = set(rows)
        taught = tuple(sorted(row for row in distinct if row.teacher != BASE))
        benign = tuple(sorted(row for row in distinct if row.teacher == BASE))
        for what, found, advice in (
            ("pictures of experts' pairs", taught, "render more pairs"),
            ("benign pictures", benign, "set prompts.retention_prompts above 0"),
        ):
            if not found:
                raise SafetyDPOError(
                    f"expected {what} to distil experts on, found 0: {advice}, or leave 'distill' out of the merge "
                    "methods"
                )
        captions = sorted({EMPTY_CAPTION} | {row.caption_sha256 for row in distinct})
        place = {sha: index for index, sha in enumerate(captions)}
        ordered = taught + benign
        return cls(
            taught=taught,
            benign=benign,
            latents=gather_arrays(
                [row.image_id for row in ordered], latents, "latent of picture", shape=latent_shape
            ).float(),
            captions=torch.tensor([place[row.caption_sha256] for row in ordered], dtype=torch.long),
            condition=Condition(
                gather_arrays(captions, embeddings, "text features of caption").float(),
                None if pooled is None else gather_arrays(captions, pooled, "pooled features of caption").float(),
            ),
            empty_caption=place[EMPTY_CAPTION],
        )


@dataclass(frozen=True)
class Questions:
    """Noisy latents with timestep and caption: what teacher and student see alike."""

    noisy: Float[Tensor, "batch channel height width"]
    timesteps: Int[Tensor, " batch"]
    condition: Condition


def ask(
    backbone: Backbone, data: DistillationData, uses: Sequence[RowUse], *, config: DistillConfig, run_seed: int
) -> Questions:
    """Return the questions of some uses of rows, drawn from (run seed, row, draw index) alone."""
    indices = torch.tensor([use.index for use in uses], dtype=torch.long)
    latents = data.latents[indices]
    draws = [_draw(data, use, backbone, config=config, run_seed=run_seed) for use in uses]
    captions = torch.where(
        torch.tensor([draw.is_empty for draw in draws]), torch.tensor(data.empty_caption), data.captions[indices]
    )
    timesteps = torch.tensor([draw.timestep for draw in draws], dtype=torch.long).to(backbone.device)
    noise = torch.stack([draw.noise for draw in draws]).to(backbone.device)
    condition = data.condition.select(captions).map(lambda features: features.to(backbone.device))
    return Questions(backbone.add_noise(latents.to(backbone.device), noise, timesteps), timesteps, condition)


def _draw(data: DistillationData, use: RowUse, backbone: Backbone, *, config: DistillConfig, run_seed: int) -> RowDraw:
    row = data.rows[use.index]
    channels, height, width = data.latents.shape[1:]
    return draw_row(
        run_seed,
        row.key,
        draw_index=use.draw_index,
        # Experts are fitted on their prompts; the unconditional branch is the base's to answer for.
        empty_caption_rate=config.benign_empty_caption_rate if row.teacher == BASE else 0.0,
        num_timesteps=backbone.num_train_timesteps,
        latent_shape=(channels, height, width),
    )


def answer_rows(
    backbone: Backbone,
    data: DistillationData,
    teachers: Mapping[str, Mapping[str, LoraLayer]],
    *,
    signature: LoraSignature,
    config: DistillConfig,
    run_seed: int,
    rank: int = 0,
    world_size: int = 1,
) -> Float[Tensor, "row draw channel height width"]:
    """Return every teacher's predictions on its rows, float32 on the CPU; the slot is used and taken out again.

    Process `rank` answers every `world_size`-th batch and leaves the others 0, so that the sum over processes holds
    all answers. Batches have `rows_per_step` rows, the last one padded, so that an answer does not depend on them.

    Raises:
        SafetyDPOError: if a row's teacher is not among the experts.
    """
    answers = torch.zeros((len(data.rows), config.draws, *data.latents.shape[1:]))
    number = 0
    for teacher, uses in _uses_by_teacher(data, config.draws):
        if teacher == BASE:
            backbone.remove_adapter()
        elif teacher in teachers:
            backbone.swap_adapter(signature, teachers[teacher])
        else:
            raise SafetyDPOError(
                f"expected an expert {teacher!r} to answer its own rows, found {', '.join(sorted(teachers)) or 'none'}"
            )
        for start in range(0, len(uses), config.rows_per_step):
            number += 1
            if number % world_size != rank:
                continue
            chosen = uses[start : start + config.rows_per_step]
            padded = [*chosen, *[chosen[-1]] * (config.rows_per_step - len(chosen))]
            questions = ask(backbone, data, padded, config=config, run_seed=run_seed)
            with torch.no_grad():
                found = backbone.predict(questions.noisy, questions.timesteps, questions.condition)
            for use, prediction in zip(chosen, found.float().cpu(), strict=False):
                answers[use.index, use.draw_index] = prediction
    backbone.remove_adapter()
    return answers


def _uses_by_teacher(data: DistillationData, draws: int) -> Iterator[tuple[str, list[RowUse]]]:
    by_teacher: dict[str, list[RowUse]] = {}
    for index, row in enumerate(data.rows):
        by_teacher.setdefault(row.teacher, []).extend(RowUse(index, draw) for draw in range(draws))
    yield from sorted(by_teacher.items())


def step_uses(
    data: DistillationData, step: int, *, config: DistillConfig, run_seed: int, rank: int = 0, world_size: int = 1
) -> tuple[list[RowUse], list[RowUse]]:
    """Return the (taught, benign) row uses of optimizer step `step` for one process.

    Epochs are seeded shuffles laid end to end; epoch number n uses draw n modulo `draws`.
    """

    def share(kind: str, rows: Sequence[TaughtRow], first: int, count: int) -> list[RowUse]:
        order = row_order(run_seed, f"distill_{kind}_order", "", num_rows=len(rows), step=step, rows_per_step=count)
        return [RowUse(first + use.index, use.draw_index % config.draws) for use in order[rank::world_size]]

    taught = share("taught", data.taught, 0, config.rows_per_step - config.num_benign)
    return taught, share("benign", data.benign, len(data.taught), config.num_benign)


def distillation_loss(
    backbone: Backbone,
    data: DistillationData,
    answers: Float[Tensor, "row draw channel height width"],
    uses: tuple[Sequence[RowUse], Sequence[RowUse]],
    *,
    config: DistillConfig,
    run_seed: int,
) -> tuple[Float[Tensor, ""], Float[Tensor, " metric"]]:
    """Return the loss of one step's (taught, benign) rows and the numbers named by `METRICS`.

    `L = mean over rows of w_t * mean over channel, height, width of (prediction - answer)^2`, with w = 1 or the
    weight that `error_weighting` names.

    Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531), section 2, with the
    squared error of predictions; several experts as teachers as in Gu et al. 2023, "Mix-of-Show" (arXiv 2305.18292),
    section 4.3, which fits each layer on its own.
    """
    everything = [*uses[0], *uses[1]]
    questions = ask(backbone, data, everything, config=config, run_seed=run_seed)
    prediction = backbone.predict(questions.noisy, questions.timesteps, questions.condition)
    wanted = torch.stack([answers[use.index, use.draw_index] for use in everything]).to(prediction.device)
    errors = squared_error(prediction, wanted, weights=error_weights(backbone, questions.timesteps, config=config))
    taught, benign = errors.split([len(uses[0]), len(uses[1])])
    loss = errors.mean()
    return loss, torch.stack([loss.detach(), taught.detach().mean(), benign.detach().mean()])
