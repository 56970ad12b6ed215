"""What a plan counts of searches with rungs, attacks and comparators, and what it says that it does not count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ray_jobs.attack_prompts import PROMPTS_FILE, count_attacks, plan_attacks
from ray_jobs.attack_prompts import STAGE as ATTACKS
from ray_jobs.baselines import comparator_key
from ray_jobs.evaluate import evaluation_prompts
from ray_jobs.plan_rates import pointed_records, units_of
from ray_jobs.plan_work import not_counted
from ray_jobs.run import Run
from safetydpo.artifacts.records import ArtifactKey, Record, write_pointers
from safetydpo.artifacts.schemas import ATTACK_PROMPTS
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import table_from_rows, write_table
from safetydpo.config.load import identity_of, load_config
from safetydpo.planning.costs import load_costs
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
    assert detail == "4 trials, about 2 in full, 0 done; 12 prompts each; 2 finalists"


def test_the_base_among_known_first_trials_is_drawn_once(command: Command) -> None:
    """6 candidates of 12 prompts, of which one is the base, which every search measures."""
    settings = ["identity.search.first_trials=known", "identity.search.trials=6"]
    assert stages(told(command, *settings))["search"][0] == 6 * 12


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
    assert units(run, search=[record])["search"] == (5 * 12 + added * 3 * 12) * 4


def units(run: Run, **records: list[Record]) -> dict[str, float]:
    """Of records made by hand and the identity as its file has it."""
    none: dict[str, list[Record]] = {stage: [] for stage in ("pairs", "train", "merge", "search", "evaluate")}
    return units_of(none | records, json.loads(json.dumps(identity_of(run.config))))


def test_pictures_of_a_former_search_with_rungs_are_those_that_a_plan_counts(command: Command) -> None:
    """4 trials of a rung of 6 prompts at half the steps, 2 in full, the base at both."""
    rung = "{kind: few_steps, steps: 2, prompts_per_category: 1, neutral_prompts: 2, neighbour_prompts: 2, keep: 0.5}"
    ladder = f"identity.search.ladder=[{{kind: held_out, pairs: all, keep: 1.0}}, {rung}]"
    run = open_run(command.config, [*command.places, ladder])
    rungs = [{"measured": 4, "went_on": 4}, {"measured": 4, "went_on": 2}]
    made = {"fingerprint": "search", "counts": {"trials": 4}, "details": {"ladder": {"rungs": rungs, "pictures": 999}}}
    record = run.make(ArtifactKey("search", "smoke", {}, {}, 1), lambda _folder: made)
    planned = stages(told(command, ladder))["search"][0]
    assert units(run, search=[record])["search"] == (5 * 6 / 2 + 3 * 12) * 4 == planned * 4


def test_pictures_of_a_former_measurement_with_comparators(command: Command) -> None:
    """68 test pictures, 4 candidates and the base of 12 prompts."""
    run = open_run(command.config, command.places)
    counts = [("outcomes", {"pictures": 68}), ("comparators", {"candidates": 4}), ("comparators", {"candidates": 1})]
    records = []
    for number, (stage, count) in enumerate(counts):
        made = {"fingerprint": str(number), "counts": count}
        records.append(run.make(ArtifactKey(stage, str(number), {}, {}, 1), lambda _folder, made=made: made))
    assert units(run, evaluate=records)["evaluate"] == (68 + 5 * 12) * 4
    write_pointers(
        run.run_dir,
        {f"n{number}": ArtifactKey(stage, str(number), {}, {}, 1) for number, (stage, _) in enumerate(counts)},
    )
    assert len(pointed_records(run, run.run_dir)["evaluate"]) == 3


def test_storage_counts_no_pictures_that_are_thrown_away(command: Command) -> None:
    """Those by which comparators are tuned."""

    def rows(*settings: str) -> int:
        return next(one["rows"] for one in told(command, *settings)["storage"] if one["what"] == "test pictures")

    run = open_run(command.config, command.places)
    each = sum(map(len, evaluation_prompts(run).values()))
    assert rows("identity.evaluation.comparators=[negative_prompt]") == rows() + each


def test_the_shipped_prices_know_the_speeds_of_the_shipped_configs(configs: Path) -> None:
    """The first machine of each model is taken where none is named, so that one must know both speeds."""
    table = load_costs(configs / "cluster" / "costs.yaml")
    for name in ("sd15", "sdxl"):
        identity = load_config(configs / f"{name}.yaml").identity
        size = {"height": identity.sampler.height, "width": identity.sampler.width}
        speed = table.speed(identity.base.model, **size, machine=None)
        assert speed is not None
        assert speed.training_pairs_per_second is not None
        assert speed.passes_per_second is not None
