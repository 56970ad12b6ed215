"""How often the experts of a run used the draws of their pairs: on the console and in the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ray_jobs.expert_plan import plan_experts
from ray_jobs.reference_errors import draws_of_pairs
from ray_jobs.run import Run
from safetydpo.artifacts.records import Record
from safetydpo.artifacts.storage import Location
from safetydpo.evaluation.report_records import DrawReuse, ExpertDraws

if TYPE_CHECKING:
    from ray_jobs.expert_plan import ExpertUnit


def count_draws(run: Run, units: Sequence[ExpertUnit], *, steps: Mapping[str, int] | None = None) -> dict[str, int]:
    """Return how many rows the units use in their steps (`draw_uses`), and of how many `distinct_draws`.

    `steps` is how many each unit did, by its name: a validation may end a training early. None = those of its settings.
    """
    done = {unit.name: unit.dpo.steps for unit in units} if steps is None else steps
    uses = sum(done[unit.name] * unit.dpo.pairs_per_step for unit in units)
    return {"draw_uses": uses, "distinct_draws": sum(draws_of_pairs(run, units, steps=done).values())}


def read_draw_reuse(run: Run, experts: Mapping[str, Record], pairs: Record, pairs_folder: Location) -> DrawReuse:
    """Return how often these experts used a draw, in the steps that their records say were done.

    Experts that share a pair share its draws, so that all of them together have fewer than the sum of each one's.
    """
    units = [unit for unit in plan_experts(run, pairs, pairs_folder) if unit.name in experts]
    steps = {unit.name: experts[unit.name].counts.get("steps", unit.dpo.steps) for unit in units}
    each = [(unit.name, count_draws(run, [unit], steps=steps)) for unit in units]
    whole = count_draws(run, units, steps=steps)
    return DrawReuse(
        experts=tuple(ExpertDraws(name, counts["draw_uses"], counts["distinct_draws"]) for name, counts in each),
        draw_uses=whole["draw_uses"],
        distinct_draws=whole["distinct_draws"],
        reference=run.config.identity.dpo.reference,
    )


def describe_draws(reuse: DrawReuse) -> str:
    """Return the line of a command's output that says how often a draw was used, by one expert and by all."""
    return (
        f"draws      {reuse.draw_uses:,} uses of {reuse.distinct_draws:,} draws of pairs: each {reuse.rate:.2f} times, "
        f"by one expert at most {max(expert.rate for expert in reuse.experts):.2f} times; reference {reuse.reference}"
    )
