"""Which draws a run makes, how often, and what is said where their errors are not stored; without Ray."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ray_jobs import reference_errors
from ray_jobs.draw_uses import count_draws
from ray_jobs.expert_plan import ExpertUnit, plan_experts
from ray_jobs.reference_errors import draws_of_pairs, with_reference_errors
from ray_jobs.run import Run
from ray_jobs.training_tables import PairTables
from safetydpo.dpo.draws import pair_order
from safetydpo.errors import SafetyDPOError
from tests.ray.closed_artifacts import close_pairs, open_run
from tests.ray.commands import Command

USAGE = 2


def planned(command: Command, *settings: str) -> tuple[Run, list[ExpertUnit]]:
    run = open_run(command.config, [*command.places, *settings])
    return run, plan_experts(run, *close_pairs(run))


def counted(run: Run, units: list[ExpertUnit]) -> Counter[tuple[str, int]]:
    """Every use of every step of every expert, one by one."""
    found: Counter[tuple[str, int]] = Counter()
    for unit in units:
        pair_ids = sorted(unit.pair_ids)
        for step in range(unit.dpo.steps):
            uses = pair_order(
                run.config.identity.seed,
                unit.name,
                num_pairs=len(pair_ids),
                step=step,
                pairs_per_step=unit.dpo.pairs_per_step,
            )
            found.update((pair_ids[use.index], use.draw_index) for use in uses)
    return found


def test_the_draws_of_a_run_are_counted(command: Command) -> None:
    """Two experts of 5 steps of 4 and `all_single` of 10: 80 uses. Experts of one pair share its draws."""
    run, units = planned(command)
    found = counted(run, units)
    assert count_draws(run, units) == {"draw_uses": found.total(), "distinct_draws": len(found)}
    assert found.total() == 80 > len(found)
    assert set(found) == {(pair, i) for pair, number in draws_of_pairs(run, units).items() for i in range(number)}
    for unit in units:
        assert count_draws(run, [unit]) == dict.fromkeys(("draw_uses", "distinct_draws"), unit.dpo.steps * 4)


def test_a_limit_of_draws_is_a_limit_of_each_pair(command: Command) -> None:
    run, units = planned(command, "identity.dpo.draws_per_pair=1")
    pairs = {pair_id for unit in units for pair_id in unit.pair_ids}
    assert draws_of_pairs(run, units) == dict.fromkeys(pairs, 1)
    assert count_draws(run, units) == {"draw_uses": 80, "distinct_draws": len(pairs)}


def test_a_draw_seed_orders_the_pairs(command: Command) -> None:
    """The run's own seed as draw seed changes nothing; another one has other pairs drawn once more."""

    def draws(*settings: str) -> dict[str, int]:
        return draws_of_pairs(*planned(command, "identity.seed=3", *settings))

    assert draws() == draws("identity.dpo.draw_seed=3") != draws("identity.dpo.draw_seed=4")
    assert draws().keys() == draws("identity.dpo.draw_seed=4").keys()


def test_errors_that_are_gone_are_named(command: Command) -> None:
    run, units = planned(command, "identity.dpo.reference=cached")
    unit = units[0]
    images: dict[tuple[str, str], tuple[str, str]] = {}
    for pair_id in unit.pair_ids:
        images |= {(pair_id, side): (f"{side} of {pair_id}", "text") for side in ("safe", "unsafe")}
    tables = PairTables(dict.fromkeys(unit.pair_ids, ("unsafe", "safe")), images)
    data: Any = SimpleNamespace(pair_ids=unit.pair_ids)
    backbone: Any = SimpleNamespace(fingerprint=run.base_fingerprint, num_train_timesteps=1000)
    message = r"expected 20 stored reference errors of expert 'violence' in .*reference_errors/pool-.*, found 0: run"
    with pytest.raises(SafetyDPOError, match=message):
        with_reference_errors(run, unit, data, tables, backbone)
    live = SimpleNamespace(dpo=unit.dpo.model_copy(update={"reference": "live"}))
    assert with_reference_errors(run, live, data, tables, backbone) is data  # type: ignore[arg-type]


def test_what_does_not_go_together_is_refused_before_anything_is_written(command: Command) -> None:
    for settings, said in (
        (("dpo.flip_rate=0.5",), "identity.dpo.flip_rate (0.5) must be 0 without identity.pairs.flipped_latents"),
        (("dpo.latent_sampling=sample",), "needs identity.pairs.latents 'mean_and_deviation', found 'mean'"),
        (
            ("dpo.reference=cached", "dpo.retention_weight=2"),
            "identity.dpo.retention_weight (2) must be 0 with identity.dpo.reference 'cached'",
        ),
    ):
        seen = command("train", *(f"identity.{setting}" for setting in settings))
        assert seen.code == USAGE
        assert said in seen.err
        assert seen.err.count("\n") == 1
    assert np.array_equal(list(command.folder.iterdir()), [])


@pytest.mark.parametrize(
    ("workers", "at_once", "pairs"), [(1, None, 8), (2, None, 4), (4, None, 2), (1, 2, 2), (2, 2, 2), (4, 4, 2)]
)
def test_passes_have_the_size_of_a_workers_own(command: Command, workers: int, at_once: int | None, pairs: int) -> None:
    """8 pairs in a step: what a worker of it takes through the denoiser at once is what the stored errors are made in.

    Another size is another pool, because it may change the last bits.
    """
    settings = ["identity.dpo.pairs_per_step=8", f"identity.dpo.pairs_per_forward={at_once or 'null'}"]
    run, units = planned(command, *settings, f"execution.workers_per_expert={workers}")
    dpo = units[0].dpo
    batch = SimpleNamespace(num_pairs=dpo.pairs_per_step // workers)
    assert pairs == min(batch.num_pairs, at_once or batch.num_pairs)
    context = reference_errors._context(run, dpo)
    assert context.batch_size == pairs
    alone = reference_errors._context(planned(command, "identity.dpo.pairs_per_step=8")[0], dpo)
    assert (context.hash == alone.hash) == (pairs == alone.batch_size)
