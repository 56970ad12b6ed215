"""How often the experts of a run used a draw: in what a command prints, and with a validation that keeps pairs out."""

from __future__ import annotations

import pytest

from ray_jobs.draw_uses import count_draws, describe_draws, read_draw_reuse
from ray_jobs.expert_plan import plan_experts
from ray_jobs.reference_errors import draws_of_pairs
from safetydpo.artifacts.records import Record, find_closed
from safetydpo.dpo.draws import pair_order
from safetydpo.dpo.held_out import held_out_ids
from safetydpo.evaluation.report_records import DrawReuse, ExpertDraws
from tests.ray.closed_artifacts import close_experts, close_pairs, open_run
from tests.ray.commands import Command

VALIDATED = "identity.dpo.validation={every_steps: 2, held_out_rate: 0.25, clip: demo}"


def test_the_line_of_the_summary() -> None:
    """80 uses of 32 draws: 2.5 each; the second expert 40 of 32: 1.25."""
    experts = (ExpertDraws("hate", 20, 20), ExpertDraws("sexual", 40, 32))
    assert describe_draws(DrawReuse(experts, 80, 32, "cached")) == (
        "draws      80 uses of 32 draws of pairs: each 2.50 times, by one expert at most 1.25 times; reference cached"
    )


def test_the_steps_that_were_done_are_counted_without_the_pairs_that_were_kept_out(command: Command) -> None:
    """The first expert ended after 3 of its 5 steps of 4 pairs: its uses are listed one by one."""
    run = open_run(command.config, [*command.places, VALIDATED])
    pairs, folder = close_pairs(run)
    units, seed = plan_experts(run, pairs, folder), run.config.identity.seed
    steps = {unit.name: unit.dpo.steps for unit in units} | {units[0].name: 3}
    records = {name: Record("experts", name, "", 1, {}, {}, "", counts={"steps": done}) for name, done in steps.items()}
    found = read_draw_reuse(run, records, pairs, folder)
    together: set[tuple[str, int]] = set()
    for unit, told in zip(units, found.experts, strict=True):
        held_out = held_out_ids(sorted(unit.pair_ids), rate=0.25, run_seed=seed)
        trained = [pair_id for pair_id in sorted(unit.pair_ids) if pair_id not in held_out]
        assert held_out
        assert len(trained) < len(unit.pair_ids)
        uses = [
            (trained[use.index], use.draw_index)
            for step in range(steps[unit.name])
            for use in pair_order(seed, unit.name, num_pairs=len(trained), step=step, pairs_per_step=4)
        ]
        assert told == ExpertDraws(unit.name, len(uses), len(set(uses)))
        assert not held_out & draws_of_pairs(run, [unit], steps=steps).keys()
        together |= set(uses)
    assert found.draw_uses == 4 * sum(steps.values())
    assert found.distinct_draws == len(together) < found.draw_uses
    assert count_draws(run, units, steps=steps)["distinct_draws"] == len(together)


@pytest.mark.parametrize("settings", [(), (VALIDATED,)])
def test_the_command_says_it_with_a_validation_too(command: Command, settings: tuple[str, ...]) -> None:
    run = open_run(command.config, [*command.places, *settings])
    close_experts(run)
    pairs, folder = close_pairs(run)
    records = {unit.name: find_closed(run.store, unit.key) for unit in plan_experts(run, pairs, folder)}
    closed = {name: record for name, record in records.items() if record is not None}
    assert len(closed) == len(records)
    seen = command("train", *settings)
    assert seen.code == 0, seen.err
    assert describe_draws(read_draw_reuse(run, closed, pairs, folder)) in seen.out
