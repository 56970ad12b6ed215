"""What stages do beside their units: validations, stored reference errors, the distillation, rungs without pictures.

Counted in passes, as pictures are: a sampling step of one picture, which is two forward passes if it is guided by a
second one.
"""

from __future__ import annotations

from ray_jobs.expert_watch import expert_validation_prompts
from ray_jobs.pipeline import stages_to
from ray_jobs.plan_work import Found, candidates_by_rung, expert_steps, last_stage
from ray_jobs.prompt_tables import chosen_pairs
from ray_jobs.reference_errors import count_stored
from ray_jobs.search_merges import validation_prompts
from ray_jobs.trial_log import MeasurementLog
from safetydpo.config.experts import ALL_SINGLE
from safetydpo.config.rungs import HeldOutRung
from safetydpo.config.schema import IdentityConfig
from safetydpo.diffusion.build import embeds_guidance
from safetydpo.merging.registry import find_method
from safetydpo.planning.estimate import StageWork

FORWARDS_OF_A_TRAINED_ROW = 3
"""Of a distillation: the student's answer, and its gradient, which costs about two."""
ROWS_OF_A_PAIR = 3
"""Of a distillation: what an expert is asked of either picture, and the base of the safe one."""
FORWARDS_OF_A_DRAW = 2
"""The reference on the safe and on the unsafe picture of a pair."""
ANSWERS_OF_A_PAIR = 3
"""Of a rung without pictures: the unsafe picture, the safe one, and that under its own caption."""


def beside_work(found: Found) -> list[StageWork]:
    """Return what the run does beside the units of its stages, in their order; nothing that it does not do."""
    identity = found.run.config.identity
    stages = stages_to(last_stage(identity), identity)
    work = []
    if identity.dpo.reference == "cached":
        work.append(_reference_errors(found))
    if identity.dpo.validation.every_steps is not None:
        work.append(_validations(found, identity.dpo.validation.every_steps))
    methods = {"merge": identity.merge.methods, "search": identity.search.methods}
    # It is made once, by the first stage that needs it.
    distils = [
        stage
        for stage in ("merge", "search")
        if stage in stages and any(find_method(name).needs_distilled for name in methods[stage])
    ]
    work += [_distillation(found, stage) for stage in distils[:1]]
    if "search" in stages:
        rungs = enumerate(identity.search.ladder)
        work += [_rung(found, index, rung) for index, rung in rungs if isinstance(rung, HeldOutRung)]
    return work


def _passes(forwards: float, found: Found) -> float:
    identity = found.run.config.identity
    is_guided = identity.sampler.guidance_scale != 1.0
    if is_guided and found.is_model_here:
        is_guided = not embeds_guidance(identity.base)
    return forwards / 2 if is_guided else forwards


def _num_pairs(found: Found) -> int:
    """Return the pairs of all single experts, one of two experts counted twice: those kept, before as if all were."""
    if found.units:
        return sum(len(unit.pair_ids) for unit in found.units if unit.name != ALL_SINGLE)
    identity = found.run.config.identity
    return len(chosen_pairs(identity.prompts, seed=identity.seed))


def _reference_errors(found: Found) -> StageWork:
    dpo = found.run.config.identity.dpo
    is_closed, done = found.are_experts_closed, 0
    # Were no draw used twice.
    total = dpo.pairs_per_step * sum(expert_steps(found).values())
    if found.units and not is_closed:
        total, done = count_stored(found.run, found.units)
    return StageWork(
        "train",
        "reference errors",
        total,
        total if is_closed else done,
        _passes(FORWARDS_OF_A_DRAW, found),
        is_closed=is_closed,
        is_beside=True,
    )


def _num_prompts(identity: IdentityConfig, categories: int) -> int:
    settings = identity.dpo.validation
    unsafe = settings.unsafe_prompts_per_category * categories
    return unsafe + settings.neutral_prompts + settings.neighbour_prompts


def _validations(found: Found, every_steps: int) -> StageWork:
    """One every few steps and one after the last, as if no training ended early; every worker of an expert draws all.

    What is seen before the first step is the base, which a lane draws once.
    """
    identity = found.run.config.identity
    categories = {ALL_SINGLE: len(identity.prompts.categories)}
    prompts = {unit.name: len(expert_validation_prompts(identity, unit.categories)) for unit in found.units}
    base, validations, pictures_by_name = _num_prompts(identity, len(identity.prompts.categories)), 0, {}
    for name, steps in expert_steps(found).items():
        times = -(-steps // every_steps)
        # Before the pairs are closed as many as the settings allow, of one category.
        pictures_by_name[name] = times * prompts.get(name, _num_prompts(identity, categories.get(name, 1)))
        validations += times
    left = [pictures for name, pictures in pictures_by_name.items() if name not in found.experts]
    is_closed = found.are_experts_closed
    to_draw = 0 if is_closed else base + sum(left)
    total = base + sum(pictures_by_name.values())
    return StageWork(
        "train",
        "pictures",
        total,
        total - to_draw,
        identity.sampler.steps * found.run.config.execution.workers_per_expert,
        longest=max(left) / to_draw if left else 0.0,
        is_closed=is_closed,
        detail=f"{validations:,} validations",
        is_beside=True,
    )


def _distillation(found: Found, stage: str) -> StageWork:
    identity = found.run.config.identity
    distill = identity.merge.distill
    answers = distill.draws * (ROWS_OF_A_PAIR * _num_pairs(found) + identity.prompts.retention_prompts)
    total = answers + FORWARDS_OF_A_TRAINED_ROW * distill.steps * distill.rows_per_step
    return StageWork(
        stage,
        "forward passes",
        total,
        total if found.is_distilled else 0,
        _passes(1, found),
        # One training: its processes work together.
        longest=1.0 / distill.processes,
        is_closed=found.is_distilled,
        detail=f"distillation, {distill.steps:,} steps",
        is_beside=True,
    )


def _rung(found: Found, index: int, rung: HeldOutRung) -> StageWork:
    identity = found.run.config.identity
    prompts = sum(prompt.prompt_set in ("neutral", "neighbour") for prompt in validation_prompts(found.run))
    kept = _num_pairs(found)
    if rung.pairs == "held_out":
        kept = round(kept * identity.dpo.validation.held_out_rate)
    rows = ANSWERS_OF_A_PAIR * min(rung.num_pairs, kept) + min(rung.benign_pictures, identity.prompts.retention_prompts)
    # The base, one of them, is asked once by every worker and logged by none.
    total, done = candidates_by_rung(identity.search)[index] - 1, 0
    is_closed = found.search is not None
    if found.search_folder is not None:
        log = MeasurementLog(found.search_folder / "measurements")
        done = sum(row["rung"] == index for row in log.rows())
    return StageWork(
        "search",
        "candidates",
        total,
        total if is_closed else min(done, total),
        _passes(rows * rung.draws + prompts, found),
        is_closed=is_closed,
        detail="measured without pictures",
        is_beside=True,
    )
