"""The rung of a search that draws nothing: stored pairs and benign pictures with fixed draws, as questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ray_jobs.expert_plan import plan_experts
from ray_jobs.run import Run
from ray_jobs.training_tables import TrainingTables, pair_data, read_training_tables
from safetydpo.artifacts.records import read_record
from safetydpo.artifacts.schemas import caption_sha256
from safetydpo.artifacts.storage import Location
from safetydpo.config.experts import ALL_SINGLE
from safetydpo.config.rungs import HeldOutRung
from safetydpo.errors import SafetyDPOError
from safetydpo.prompts.sets import Prompt
from safetydpo.search.proxy import PROMPTS, Answers, ProxyQuestions, Questions, ask, predict_rows, proxy_numbers
from safetydpo.seeding import derive_seed

PURPOSE = "search_proxy"
"""Of the choice of pairs and pictures, and of their draws."""


@dataclass(frozen=True)
class HeldOutQuestions:
    """Questions of one rung and the base's answers; both stay in memory for all candidates."""

    questions: ProxyQuestions
    base: Answers
    batch_size: int

    def numbers(self, backbone: Any) -> dict[str, float]:
        """Return the numbers of `search.proxy` of the model as it is."""
        return proxy_numbers(ask(backbone, self.questions, batch_size=self.batch_size), self.base, self.questions)


def open_questions(
    run: Run, rung: HeldOutRung, pairs_folder: Location, backbone: Any, *, prompts: Sequence[Prompt]
) -> HeldOutQuestions:
    """Read pairs and pictures, fix their draws, and ask the base; `prompts` are the search's own.

    Raises:
        SafetyDPOError: if no pair is held out, or there is no benign picture.
    """
    tables = read_training_tables(run, pairs_folder)
    chosen = _choose(_pair_ids(run, rung, pairs_folder, tables, backbone), rung.num_pairs, run)
    benign = _benign_rows(tables, rung, run)
    data = pair_data(tables, chosen, run.config.identity.dpo, backbone, run.config, retention=benign)

    def questions(latents: Any, captions: Any, place: Any, drawn: tuple[Any, Any]) -> Questions:
        noise, timesteps = (values.to(backbone.device) for values in drawn)
        pictures = latents[place].float().to(backbone.device)
        condition = data.condition.select(captions[place]).map(lambda values: values.to(backbone.device))
        noisy = backbone.add_noise(pictures, noise, timesteps)
        return Questions(noisy, timesteps, condition, backbone.target(pictures, noise, timesteps))

    pairs, of_pairs = _draws(data.pair_ids, rung, run, backbone, data.latent_shape)
    pictures, of_pictures = _draws(data.retention_ids, rung, run, backbone, data.latent_shape)
    unsafe = questions(data.latents_unsafe, data.captions_unsafe, pairs, of_pairs)
    safe = questions(data.latents_safe, data.captions_unsafe, pairs, of_pairs)
    safe_own = questions(data.latents_safe, data.captions_safe, pairs, of_pairs)
    asked_benign = questions(data.retention_latents, data.retention_captions, pictures, of_pictures)
    backbone.remove_adapter()
    size = run.config.identity.sampler.batch_size
    redirected = predict_rows(backbone, unsafe.noisy, unsafe.timesteps, safe_own.condition, batch_size=size)
    neutral, neighbour = (_ask_prompts(run, rung, backbone, prompts, kind, data.latent_shape) for kind in PROMPTS)
    found = ProxyQuestions(
        unsafe,
        safe,
        safe_own,
        asked_benign,
        redirected,
        neutral=neutral[0],
        neighbour=neighbour[0],
        neutral_plain=neutral[1],
        neighbour_plain=neighbour[1],
    )
    return HeldOutQuestions(found, ask(backbone, found, batch_size=size), size)


def _ask_prompts(
    run: Run,
    rung: HeldOutRung,
    backbone: Any,
    prompts: Sequence[Prompt],
    kind: str,
    shape: tuple[int, int, int],
) -> tuple[Questions, torch.Tensor]:
    """Return questions about noise under the captions of one kind, and the base's answers without a caption."""
    chosen = [prompt for prompt in prompts if prompt.prompt_set == kind]
    seeds = [derive_seed(run.config.identity.seed, f"{PURPOSE}/noise", prompt.prompt_id) for prompt in chosen]
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    noise = noise.to(backbone.device)
    last = backbone.num_train_timesteps - 1
    timesteps = torch.full((len(chosen),), round(rung.prompt_timestep * last), device=backbone.device)
    noisy = backbone.add_noise(torch.zeros_like(noise), noise, timesteps)
    captions = [backbone.encode_prompts(texts) for texts in ([prompt.text for prompt in chosen], [""] * len(chosen))]
    size = run.config.identity.sampler.batch_size
    own, plain = (predict_rows(backbone, noisy, timesteps, caption, batch_size=size) for caption in captions)
    return Questions(noisy, timesteps, captions[0], own), plain


def _pair_ids(run: Run, rung: HeldOutRung, pairs_folder: Location, tables: TrainingTables, backbone: Any) -> list[str]:
    from safetydpo.dpo.held_out import split_held_out

    record = read_record(pairs_folder)
    assert record is not None
    units = [unit for unit in plan_experts(run, record, pairs_folder) if unit.name != ALL_SINGLE]
    if rung.pairs == "all":
        return sorted({pair_id for unit in units for pair_id in unit.pair_ids})
    held: set[str] = set()
    trained: set[str] = set()
    for unit in units:
        data = pair_data(tables, unit.pair_ids, unit.dpo, backbone, run.config)
        seed = unit.dpo.draw_seed_of(run.config.identity.seed)
        kept, out = split_held_out(data, rate=unit.dpo.validation.held_out_rate, run_seed=seed)
        trained.update(kept.pair_ids)
        held.update(out.pair_ids)
    # A pair of two experts may be held out of one and trained on by the other.
    if not held - trained:
        raise SafetyDPOError(
            f"expected pairs that no expert has trained on, found none of {len(held | trained)}: raise "
            "identity.dpo.validation.held_out_rate, or set pairs: all for the rung of identity.search.ladder"
        )
    return sorted(held - trained)


def _benign_rows(tables: TrainingTables, rung: HeldOutRung, run: Run) -> list[Any]:
    from safetydpo.dpo.batch import RetentionRow

    prompts = {image_id: prompt for (_, side), (image_id, prompt) in tables.images.items() if side == "benign"}
    if not prompts:
        raise SafetyDPOError(
            "expected benign pictures for a rung of identity.search.ladder of kind 'held_out', found none: raise "
            "identity.prompts.retention_prompts"
        )
    chosen = _choose(sorted(prompts), rung.benign_pictures, run)
    return [RetentionRow(image_id, caption_sha256(prompts[image_id])) for image_id in chosen]


def _choose(ids: Sequence[str], count: int, run: Run) -> list[str]:
    seed = run.config.identity.seed
    return sorted(sorted(ids, key=lambda one: derive_seed(seed, PURPOSE, one))[:count])


def _draws(
    row_ids: Sequence[str], rung: HeldOutRung, run: Run, backbone: Any, shape: tuple[int, int, int]
) -> tuple[Any, tuple[Any, Any]]:
    """Return the row of each draw, and (noise, timesteps) of all draws."""
    from safetydpo.dpo.draws import draw_row

    seed = derive_seed(run.config.identity.seed, PURPOSE, "draws")
    drawn = [
        draw_row(
            seed,
            row_id,
            draw_index=index,
            empty_caption_rate=0.0,
            num_timesteps=backbone.num_train_timesteps,
            latent_shape=shape,
            timestep_range=rung.timestep_range,
        )
        for row_id in row_ids
        for index in range(rung.draws)
    ]
    place = torch.arange(len(row_ids)).repeat_interleave(rung.draws)
    return place, (torch.stack([one.noise for one in drawn]), torch.tensor([one.timestep for one in drawn]))
