"""What stages do beside their units: validations, stored reference errors, the distillation, rungs without pictures.

Counted in passes, as pictures are: a sampling step of one picture, two forward passes with guidance, else one.
"""

from __future__ import annotations

from ray_jobs.plan_work import Found, candidates_by_rung, expert_steps
from ray_jobs.reference_errors import count_stored
from ray_jobs.search_merges import validation_prompts
from ray_jobs.trial_log import MeasurementLog
from safetydpo.config.experts import ALL_SINGLE
from safetydpo.config.rungs import HeldOutRung
from safetydpo.config.schema import IdentityConfig
from safetydpo.merging.registry import find_method
from safetydpo.planning.estimate import StageWork

FORWARDS_OF_A_TRAINED_ROW = 4
"""The expert's answer, as if none were used again, the student's, and the student's gradient, which costs about two."""
FORWARDS_OF_A_DRAW = 2
"""The reference on the safe and on the unsafe picture of a pair."""
ANSWERS_OF_A_PAIR = 3
"""Of a rung without pictures: the unsafe picture, the safe one, and that under its own caption."""


def beside_work(found: Found) -> list[StageWork]:
    """Return what the run does beside the units of its stages, in their order; nothing that it does not do."""
    identity = found.run.config.identity
    work = []
    if identity.dpo.reference == "cached":
        work.append(_reference_errors(found))
    if identity.dpo.validation.every_steps is not None:
        work.append(_validations(found, identity.dpo.validation.every_steps))
    if any(find_method(name).needs_distilled for name in (*identity.merge.methods, *identity.search.methods)):
        work.append(_distillation(found))
    work += [_rung(found, index) for index, one in enumerate(identity.search.ladder) if isinstance(one, HeldOutRung)]
    return work


def _passes(forwards: float, identity: IdentityConfig) -> float:
    return forwards if identity.sampler.guidance_scale == 1.0 else forwards / 2


def _reference_errors(found: Found) -> StageWork:
    dpo = found.run.config.identity.dpo
    if found.units:
        total, done = count_stored(found.run, found.units)
    else:
        # Were no draw used twice.
        total, done = dpo.pairs_per_step * sum(expert_steps(found).values()), 0
    weight = _passes(FORWARDS_OF_A_DRAW, found.run.config.identity)
    is_closed = found.are_experts_closed
    done = total if is_closed else done
    return StageWork("train", "reference errors", total, done, weight, is_closed=is_closed, is_beside=True)


def _validations(found: Found, every_steps: int) -> StageWork:
    """One before the first step, one every few steps, one after the last, as if no training ended early; the base's
    pictures once."""
    identity = found.run.config.identity
    settings, unsafe = identity.dpo.validation, identity.dpo.validation.unsafe_prompts_per_category
    benign = settings.neutral_prompts + settings.neighbour_prompts
    categories = {unit.name: len(unit.categories) for unit in found.units}
    categories.setdefault(ALL_SINGLE, len(identity.prompts.categories))
    # Those of the base, which every lane draws once.
    total = unsafe * len(identity.prompts.categories) + benign
    done, validations = 0, 0
    for name, steps in expert_steps(found).items():
        times = 1 + -(-steps // every_steps)
        pictures = times * (unsafe * categories.get(name, 1) + benign)
        validations += times
        total += pictures
        done += pictures if name in found.experts else 0
    is_closed = found.are_experts_closed
    return StageWork(
        "train",
        "pictures",
        total,
        total if is_closed else done,
        identity.sampler.steps,
        is_closed=is_closed,
        detail=f"{validations:,} validations",
        is_beside=True,
    )


def _distillation(found: Found) -> StageWork:
    identity = found.run.config.identity
    distill = identity.merge.distill
    is_merged = any(find_method(name).needs_distilled for name in identity.merge.methods)
    total = distill.steps * distill.rows_per_step
    return StageWork(
        "merge" if is_merged else "search",
        "rows",
        total,
        total if found.is_distilled else 0,
        _passes(FORWARDS_OF_A_TRAINED_ROW, identity),
        # One training: its processes work together.
        longest=1.0 / distill.processes,
        is_closed=found.is_distilled,
        detail=f"distillation, {distill.steps:,} steps",
        is_beside=True,
    )


def _rung(found: Found, index: int) -> StageWork:
    identity = found.run.config.identity
    search, rung = identity.search, identity.search.ladder[index]
    assert isinstance(rung, HeldOutRung)
    benign = sum(prompt.prompt_set in ("neutral", "neighbour") for prompt in validation_prompts(found.run))
    each = (ANSWERS_OF_A_PAIR * rung.num_pairs + rung.benign_pictures) * rung.draws + benign
    total, done = candidates_by_rung(search)[index], 0
    is_closed = found.search is not None
    if found.search_folder is not None:
        log = MeasurementLog(found.search_folder / "measurements")
        done = sum(row["rung"] == index for row in log.rows())
    return StageWork(
        "search",
        "candidates",
        total,
        total if is_closed else min(done, total),
        _passes(each, identity),
        is_closed=is_closed,
        detail="measured without pictures",
        is_beside=True,
    )
