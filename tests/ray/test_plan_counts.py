"""What a plan counts of searches with rungs, attacks and comparators, and what it says that it does not count."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ray_jobs.attack_prompts import PROMPTS_FILE, count_attacks, plan_attacks
from ray_jobs.attack_prompts import STAGE as ATTACKS
from ray_jobs.baselines import comparator_key
from ray_jobs.evaluate import evaluation_prompts
from ray_jobs.plan_rates import units_of
from ray_jobs.plan_work import not_counted
from safetydpo.artifacts.records import ArtifactKey
from safetydpo.artifacts.schemas import ATTACK_PROMPTS
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import table_from_rows, write_table
from safetydpo.config.load import identity_of
from tests.ray.closed_artifacts import open_run
from tests.ray.commands import Command
from tests.ray.plans import stages, told


def test_what_is_beside_the_count_is_named(command: Command) -> None:
    assert not_counted(open_run(command.config, command.places)) == []
    run = open_run(
        command.config,
        [
            "identity.search.ladder=[{kind: held_out, pairs: all}]",
            "identity.merge.methods=[sum, distill]",
            "identity.evaluation.attacks=[typo]",
            "identity.evaluation.comparators=[negative_prompt]",
        ],
    )
    assert not_counted(run) == [
        "the distillation",
        "what rungs measure without pictures (identity.search.ladder)",
        "the making of attack prompts",
        "what comparators train",
    ]


def test_pictures_of_rungs_and_finalists(command: Command) -> None:
    """By hand: 5 candidates (4 and the base) of 6 prompts at half the steps; of each 2 one goes on, 3 of 12 in full;
    then 2 finalists and the base, 2 seeds of 12."""
    rung = "{kind: few_steps, steps: 2, prompts_per_category: 1, neutral_prompts: 2, neighbour_prompts: 2, keep: 0.5}"
    settings = [f"identity.search.ladder=[{{kind: held_out, pairs: all, keep: 1.0}}, {rung}]"]
    assert stages(told(command, *settings))["search"][0] == 5 * 6 / 2 + 3 * 12
    plan = told(command, *settings, "identity.search.finalists=2")
    assert stages(plan)["search"][0] == 5 * 6 / 2 + 3 * 12 + 3 * 2 * 12
    detail = next(one["detail"] for one in plan["stages"] if one["stage"] == "search")
    assert detail == "4 trials, at most 2 in full, 0 done; 12 prompts each; 2 finalists"


def test_pictures_of_attacks_and_of_comparators(command: Command) -> None:
    """Attack prompts on the base and the searched row; 4 candidates of the comparator and the base, 12 prompts each."""
    before = stages(told(command))["evaluate"][0]
    attacks = ["identity.evaluation.attacks=[typo, paraphrase]", "identity.evaluation.attacked_rows=[searched]"]
    run = open_run(command.config, [*command.places, *attacks])
    each = len(plan_attacks(run, adapter=None))
    assert each == count_attacks(run.config.identity) > 0
    assert stages(told(command, *attacks))["evaluate"][0] == before + 2 * each
    comparators = ["identity.evaluation.comparators=[negative_prompt]"]
    run = open_run(command.config, [*command.places, *comparators])
    row = sum(map(len, evaluation_prompts(run).values()))
    found = stages(told(command, *comparators))
    assert found["evaluate"] == (before + row + (4 + 1) * 12, 0, False)
    for name, number in (("base", 1), ("negative_prompt", 4)):
        made = {"fingerprint": name, "counts": {"candidates": number}}
        run.make(comparator_key(run, name), lambda _folder, made=made: made)
        assert stages(told(command, *comparators))["evaluate"][1] == 12 * (1 if name == "base" else 5)


def test_attack_prompts_that_are_made_are_looked_for(command: Command) -> None:
    """Then the base's attacked pictures have names too, and the count stays what it was."""
    attacks = ["identity.evaluation.attacks=[typo]"]
    before = stages(told(command, *attacks))["evaluate"]
    run = open_run(command.config, [*command.places, *attacks])
    run.open()
    planned = plan_attacks(run, adapter=None)
    rows = [{**row, "text": f"text {number}", "loss": 0.0, "start_loss": 0.0} for number, row in enumerate(planned)]
    names = ATTACK_PROMPTS.names

    def make(folder: Location) -> dict[str, Any]:
        write_table(
            folder / PROMPTS_FILE,
            table_from_rows([{name: row[name] for name in names} for row in rows], ATTACK_PROMPTS),
        )
        return {"fingerprint": "attacks"}

    run.build(ATTACKS, ArtifactKey(ATTACKS, "smoke", {}, {}, 1), make)
    assert stages(told(command, *attacks))["evaluate"] == before


@pytest.mark.parametrize(("seeds", "added"), [([], 2), (["identity.search.finalist_seeds=3"], 3)])
def test_pictures_of_a_former_search_by_hand(command: Command, seeds: list[str], added: int) -> None:
    """4 trials and the base of 12 prompts; then 2 finalists and the base with each fresh seed; at 4 steps."""
    run = open_run(command.config, [*command.places, "identity.search.finalists=2", *seeds])
    made = {"fingerprint": "search", "counts": {"trials": 4}, "details": {"finalists": [{}, {}]}}
    record = run.make(ArtifactKey("search", "smoke", {}, {}, 1), lambda _folder: made)
    records = {stage: [] for stage in ("pairs", "train", "merge", "evaluate")} | {"search": [record]}
    units = units_of(records, json.loads(json.dumps(identity_of(run.config))))
    assert units["search"] == (5 * 12 + added * 3 * 12) * 4
