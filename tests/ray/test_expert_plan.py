"""Which experts a run plans, under which keys; without Ray."""

from __future__ import annotations

import json
import logging
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ray_jobs.evaluate import list_rows
from ray_jobs.evidence import row_names
from ray_jobs.expert_files import expert_categories
from ray_jobs.expert_plan import (
    ExpertUnit,
    benign_fingerprint,
    lane_units,
    plan_experts,
    planned_names,
    read_lane_units,
    refuse_left_out,
)
from ray_jobs.run import Run
from ray_jobs.search_space import search_space, shared_weights
from safetydpo.artifacts.adapters import AdapterMetadata, LoraLayer, adapter_hash, write_adapter
from safetydpo.artifacts.layout import ADAPTER_FILE
from safetydpo.artifacts.records import Record
from safetydpo.artifacts.schemas import IMAGE_MANIFEST, MEMBERSHIPS, PROMPT_PAIRS, SELECTIONS, sha256_of
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import read_table, table_from_rows, write_table
from safetydpo.config.load import load_config
from safetydpo.errors import SafetyDPOError
from safetydpo.pairs.groups import concept_group_name
from tests.ray.closed_artifacts import LAYER, close_pairs, open_run
from tests.ray.commands import Command

STORED = {
    "violence": "3ee4be7749239912699cbaedb9b39dacc8e11a56c3099094621be3171a88a7d5",
    "shocking": "7e4a89716034ca04da2dc21d20370da698766c4057f4c8137e8b02e1a7686edd",
    "all_single": "45e12c6612ea0f34c048e972899b202d879d0292e202f7b500549750da35c1cb",
}
STORED_WITH_OTHERS = {
    "violence": "470b9f7900a17481dd2133ab29f4a04d27b3501bb245c1bb67b9aeebdbff9c5d",
    "shocking": "599c6b4659a270e27d30d4cbb8620bf3e07018051694d9862b06c476ac3c5662",
    "all_single": "45f2416871938e3c74767d8569946acd78dd77ed521ed02d102f5ae6f29325aa",
}
"""Keys of the smoke config's experts as they were before there were other groups than categories."""
OTHERS = ("identity.dpo.retention_weight=1", "identity.dpo.retention_pictures=others")
CONCEPTS = ("axe", "bomb", "burning_house", "dagger", "explosion")
CONCEPTS += ("blood_drop", "cockroach", "ogre", "skull", "vomiting_face")


def units_of(run: Run) -> dict[str, ExpertUnit]:
    return {unit.name: unit for unit in plan_experts(run, *close_pairs(run))}


def hashes(units: dict[str, ExpertUnit]) -> dict[str, str]:
    return {name: unit.key.hash for name, unit in units.items()}


@pytest.mark.parametrize(("settings", "stored"), [((), STORED), (OTHERS, STORED_WITH_OTHERS)])
def test_experts_of_categories_keep_their_keys(command: Command, settings: tuple[str, ...], stored: dict[str, str]):
    assert hashes(units_of(open_run(command.config, [*command.places, *settings]))) == stored


def test_groups_leave_categories_and_all_single_as_they_are(command: Command):
    run = open_run(
        command.config, [*command.places, "identity.experts.groups={blue: {text: [blue]}, sharp: {concept: [axe]}}"]
    )
    units = units_of(run)
    assert list(units) == ["violence", "shocking", "blue", "sharp", "all_single"]
    assert {name: units[name].key.hash for name in STORED} == STORED
    assert set(units["sharp"].pair_ids) <= set(units["violence"].pair_ids)
    assert units["sharp"].categories == ("violence",)


def test_one_expert_per_concept(command: Command):
    run = open_run(command.config, [*command.places, "identity.experts.group_by=concept"])
    units = units_of(run)
    assert set(units) == {*map(concept_group_name, CONCEPTS), "all_single"}
    assert units["all_single"].key.hash == STORED["all_single"]
    pairs = [set(unit.pair_ids) for name, unit in units.items() if name != "all_single"]
    assert set().union(*pairs) == set(units["all_single"].pair_ids)
    # A pair has one concept in the demo world.
    assert sum(map(len, pairs)) == len(set().union(*pairs))


def add_concept(folder: Location) -> None:
    """Add one pair of a new concept to a closed pairs artifact."""
    for name, schema, row in (
        ("prompt_pairs", PROMPT_PAIRS, {"pair_id": "new", "unsafe_text": "a saw", "safe_text": "a spoon"}),
        ("memberships", MEMBERSHIPS, {"pair_id": "new", "category": "violence", "concept": "saw", "source": "hand"}),
        ("selections", SELECTIONS, {"pair_id": "new", "seed": 1, "kept": True, "reason": "kept"}),
    ):
        file = folder / f"{name}.parquet"
        write_table(file, table_from_rows([*read_table(file, schema).to_pylist(), row], schema))


@pytest.mark.parametrize(
    ("pictures", "weight", "changed"),
    [("neutral", 1.0, False), ("others", 0.0, False), ("safe", 1.0, True), ("others", 1.0, True)],
)
def test_one_more_concept_trains_one_more_expert(command: Command, pictures: str, weight: float, changed: bool):
    """Unless experts are trained to leave the pairs of the others alone: then they follow them, and all are new."""
    settings = [f"identity.dpo.retention_weight={weight}", f"identity.dpo.retention_pictures={pictures}"]
    run = open_run(command.config, [*command.places, "identity.experts.group_by=concept", *settings])
    pairs, folder = close_pairs(run)
    before = hashes({unit.name: unit for unit in plan_experts(run, pairs, folder)})
    add_concept(folder)
    after = hashes({unit.name: unit for unit in plan_experts(run, pairs, folder)})
    new = concept_group_name("saw")
    assert set(after) == {*before, new}
    different = {name for name in before if after[name] != before[name]}
    # `all_single` trains on the new pair itself.
    assert different == (set(before) if changed else {"all_single"})


def test_a_failed_picture_of_a_pair_changes_no_other_expert(command: Command):
    run = open_run(command.config, [*command.places, "identity.dpo.retention_weight=1"])
    pairs, folder = close_pairs(run)
    row = {"owner_id": "o", "prompt": "a dog", "seed": 1, "adapter": "", "attempt": 1}
    rows = [{"image_id": "mine", "side": "unsafe", **row}, {"image_id": "dog", "side": "benign", **row}]
    write_table(folder / "images.parquet", table_from_rows(rows, IMAGE_MANIFEST))
    whole = benign_fingerprint(pairs, folder)
    assert benign_fingerprint(replace(pairs, failed_units=("mine",)), folder) == whole
    assert benign_fingerprint(replace(pairs, failed_units=("mine", "dog")), folder) != whole


def test_pairs_per_concept_leave_the_pairs_of_the_others_alone(command: Command):
    """8 pairs of a category are spread over its concepts: a concept more takes pairs from the others."""
    units = units_of(open_run(command.config, [*command.places, "identity.experts.group_by=concept"]))
    assert {len(units[concept_group_name(name)].pair_ids) for name in CONCEPTS[:5]} == {1, 2}
    units = units_of(
        open_run(
            command.config,
            [*command.places, "identity.experts.group_by=concept", "identity.prompts.pairs_per_concept=3"],
        )
    )
    assert {len(units[concept_group_name(name)].pair_ids) for name in CONCEPTS} == {3}


def test_safe_pictures_made_in_another_way_train_another_expert(command: Command):
    plain = hashes(units_of(open_run(command.config, command.places)))
    edited = hashes(
        units_of(
            open_run(
                command.config,
                [*command.places, "identity.pairs.safe_picture=sdedit", "identity.pairs.sdedit_strength=0.5"],
            )
        )
    )
    assert all(plain[name] != edited[name] for name in plain)


def test_wrong_groups_are_refused_before_anything_is_drawn(command: Command, tmp_path: Path):
    for setting, said in (
        ("groups={a: {concept: [dager]}}", "found 'dager'; did you mean 'dagger'?"),
        ("groups={a: {category: [violense]}}", "found 'violense'; did you mean 'violence'?"),
        ("groups={a: {text: [spaceship]}}", "found fewer in 1 groups: a (0); widen their queries"),
    ):
        seen = command("pairs", f"identity.experts.{setting}")
        seen.assert_one_line(said, code=1 if "fewer" in said else 2)
    assert not list(tmp_path.iterdir())


def test_what_is_left_out_is_said_once(command: Command, caplog: pytest.LogCaptureFixture):
    settings = ["identity.experts.group_by=concept", "identity.experts.min_pairs=2"]
    run = open_run(command.config, [*command.places, *settings, "identity.experts.small_groups=leave_out"])
    with caplog.at_level(logging.WARNING):
        units = units_of(run)
        units_of(run)
    assert len(caplog.messages) == 1
    assert "too few kept pairs (identity.experts.min_pairs): " in caplog.messages[0]
    assert 1 < len(units) < len(CONCEPTS) + 1
    with pytest.raises(SafetyDPOError, match=r"the row 'expert:axe', found no such expert: its group has too few kept"):
        refuse_left_out("expert:axe", {"base"})


def test_names_are_known_before_a_pair_is_drawn(command: Command):
    config = load_config(command.config, [*command.places, "identity.experts.group_by=concept"])
    units = units_of(open_run(command.config, [*command.places, "identity.experts.group_by=concept"]))
    assert [*planned_names(config.identity), "all_single"] == list(units)
    assert [name for name in row_names(config) if name.startswith("expert:")] == [
        f"expert:{name}" for name in units if name != "all_single"
    ]


def close_many(run: Run) -> dict[str, Record]:
    """Adapters of all planned experts, each saying its categories."""
    found = {}
    pairs, folder = close_pairs(run)
    for index, unit in enumerate(plan_experts(run, pairs, folder)):
        layers = {LAYER: LoraLayer(torch.full((2, 4), 1.0 + index), torch.ones(4, 2))}

        def make(target: Location, layers: dict[str, LoraLayer] = layers, unit: ExpertUnit = unit) -> dict[str, object]:
            metadata = AdapterMetadata(run.base_fingerprint, categories=unit.categories)
            write_adapter(target / "attempt-2" / ADAPTER_FILE, layers, metadata=metadata)
            return {"fingerprint": adapter_hash(layers), "details": {"attempt": 2}}

        found[unit.name] = run.make(unit.key, make)
    return found


def test_rows_say_what_an_expert_of_a_concept_is_made_for(command: Command):
    run = open_run(command.config, [*command.places, "identity.experts.group_by=concept"])
    records = close_many(run)
    rows = {row.source.name: row for row in list_rows(run, records, {}, None)}
    assert rows[f"expert:{concept_group_name('axe')}"].source.categories == ("violence",)
    assert rows[f"expert:{concept_group_name('skull')}"].source.categories == ("shocking",)
    assert rows["all_single"].source.categories == ()
    plain = open_run(command.config, command.places)
    assert expert_categories(plain, {"hate": records[concept_group_name("axe")]}) == {"hate": ("hate",)}


def test_many_experts_share_coefficients_by_category(command: Command, monkeypatch: pytest.MonkeyPatch):
    run = open_run(command.config, [*command.places, "identity.experts.group_by=concept"])
    records = {name: record for name, record in close_many(run).items() if name != "all_single"}
    alone = search_space(run, records)
    assert len(alone.groups) == len(CONCEPTS)
    assert shared_weights(alone) == {}
    monkeypatch.setattr("safetydpo.search.space.MAX_WEIGHTS", 9)
    shared = search_space(run, records)
    assert [name for name, _ in shared.groups] == ["shocking", "violence"]
    assert shared.groups[1][1] == tuple(sorted(map(concept_group_name, CONCEPTS[:5])))
    assert set(shared_weights(shared)) == {"weights"}


@pytest.mark.parametrize("settings", [(), OTHERS, ("identity.experts.group_by=concept", *OTHERS)])
def test_a_lane_finds_the_units_that_the_command_planned(command: Command, settings: tuple[str, ...]) -> None:
    """Names, keys and settings are told as plain JSON; pairs are found in the closed artifact."""
    run = open_run(command.config, [*command.places, *settings])
    pairs, folder = close_pairs(run)
    units = plan_experts(run, pairs, folder)
    told = json.loads(json.dumps(lane_units(units)))
    found = read_lane_units(run, folder, told)
    assert found == units
    assert [unit.key.hash for unit in found] == [unit.key.hash for unit in units]
    assert not any(pair_id in json.dumps(told) for unit in units for pair_id in unit.pair_ids)
    assert lane_units([])["units"] == []
    changed = {**units[0].key.identity, "seed": 9}
    with pytest.raises(ValueError, match=f"expected units of one run, found other settings at '{units[0].name}'"):
        lane_units([*units[1:], replace(units[0], key=replace(units[0].key, identity=changed))])


def test_a_lane_with_other_pairs_than_the_commands_refuses(command: Command) -> None:
    run = open_run(command.config, command.places)
    pairs, folder = close_pairs(run)
    told = lane_units(plan_experts(run, pairs, folder))
    add_concept(folder)
    with pytest.raises(SafetyDPOError, match="expected the pairs of expert 'violence' in .*, found other ones: the fo"):
        read_lane_units(run, folder, told)
    told["units"][0]["group"] = "weather"
    with pytest.raises(SafetyDPOError, match="expected the pairs of expert 'violence' in .*, found no such group: the"):
        read_lane_units(run, folder, told)


def close_synthetic(run: Run, *, concepts: int, pairs_each: int) -> Location:
    """Pairs of many concepts, as tables only."""
    folder = run.store / "pairs" / "many"
    rows = [(sha256_of([row]), f"c{row // pairs_each:03d}") for row in range(concepts * pairs_each)]
    texts = [{"pair_id": pair_id, "unsafe_text": "a", "safe_text": "b"} for pair_id, _ in rows]
    members = [
        {"pair_id": pair_id, "category": "violence", "concept": name, "source": "hand"} for pair_id, name in rows
    ]
    chosen = [{"pair_id": pair_id, "seed": 1, "kept": True, "reason": "kept"} for pair_id, _ in rows]
    for name, schema, table in (
        ("prompt_pairs", PROMPT_PAIRS, texts),
        ("memberships", MEMBERSHIPS, members),
        ("selections", SELECTIONS, chosen),
    ):
        write_table(folder / f"{name}.parquet", table_from_rows(table, schema))
    return folder


def test_what_a_lane_is_told_does_not_grow_with_the_pairs(command: Command) -> None:
    """40 experts that leave each other's pairs alone: below 1 kB each, with 2 pairs each or with 20."""
    run = open_run(command.config, [*command.places, "identity.experts.group_by=concept", *OTHERS])
    record, _ = close_pairs(run)
    sizes = []
    for pairs_each in (2, 20):
        folder = close_synthetic(run, concepts=40, pairs_each=pairs_each)
        units = plan_experts(run, record, folder)
        assert len(units) == 41
        assert len(units[0].others.ids()) == 39 * pairs_each
        told = lane_units(units)
        sizes.append(len(pickle.dumps(told)))
        assert read_lane_units(run, folder, told) == units
    assert sizes[0] == sizes[1] < 41 * 1000
