"""What a distillation is made from and under which key it stands; the training itself is in `test_chain_slow`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ray_jobs.distill_experts import _key, adapter_config, distillation_data
from ray_jobs.expert_files import MergeAids, read_aids
from ray_jobs.expert_plan import plan_experts
from ray_jobs.pipeline import check_request
from ray_jobs.run import Run
from ray_jobs.training_tables import TrainingTables
from safetydpo.artifacts.records import Record
from safetydpo.artifacts.schemas import caption_sha256
from safetydpo.config.load import load_config
from safetydpo.config.schema import Config
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.merging.registry import find_method
from tests.ray.closed_artifacts import close_pairs, open_run
from tests.ray.commands import Command

SHAPE = (2, 4, 4)
CAPTIONS = ("", "a bomb", "a balloon", "a dagger", "a bouquet", "a dog")
BACKBONE = SimpleNamespace(latent_shape=lambda *, height, width: SHAPE)


def make_tables(*, benign: bool = True) -> TrainingTables:
    images = {
        ("p1", "unsafe"): ("i1", "a bomb"),
        ("p1", "safe"): ("i2", "a balloon"),
        ("p2", "unsafe"): ("i3", "a dagger"),
        ("p2", "safe"): ("i4", "a bouquet"),
        ("dog", "benign"): ("i5", "a dog"),
    }
    if not benign:
        images = {key: value for key, value in images.items() if key[1] != "benign"}
    return TrainingTables(
        texts={"p1": ("a bomb", "a balloon"), "p2": ("a dagger", "a bouquet")},
        images=images,
        latents={f"i{number}": np.full(SHAPE, number, np.float16) for number in range(1, 6)},
        embeddings={caption_sha256(text): np.zeros((3, 5), np.float16) for text in CAPTIONS},
    )


def test_rows_by_hand() -> None:
    """p1 is a pair of both experts: each answers both its pictures under the unsafe prompt. The base answers the safe
    pictures under their own prompts, p1's once, and the benign picture."""
    taught = {"hate": ["p1"], "violence": ["p1", "p2"]}
    data = distillation_data(make_tables(), taught, BACKBONE, Config())
    wanted = [("hate", "i1", "a bomb"), ("hate", "i2", "a bomb"), ("violence", "i1", "a bomb")]
    wanted += [("violence", "i2", "a bomb"), ("violence", "i3", "a dagger"), ("violence", "i4", "a dagger")]
    wanted += [("", "i2", "a balloon"), ("", "i4", "a bouquet"), ("", "i5", "a dog")]
    found = {(row.teacher, row.image_id, row.caption_sha256) for row in data.rows}
    assert found == {(teacher, image, caption_sha256(text)) for teacher, image, text in wanted}
    assert (len(data.taught), len(data.benign)) == (6, 3)


def test_pairs_alone_have_benign_rows_too() -> None:
    data = distillation_data(make_tables(benign=False), {"hate": ["p1"]}, BACKBONE, Config())
    assert [row.image_id for row in data.benign] == ["i2"]


def test_no_pair_is_no_lesson() -> None:
    with pytest.raises(SafetyDPOError, match="expected pictures of experts' pairs to distil experts on, found 0"):
        distillation_data(make_tables(), {"hate": []}, BACKBONE, Config())


def test_the_adapter_has_the_experts_targets_and_its_own_rank() -> None:
    config = Config.model_validate({"identity": {"lora": {"rank": 4, "alpha": 8}}})
    assert (adapter_config(config).rank, adapter_config(config).alpha) == (4, None)
    config = Config.model_validate({"identity": {"lora": {"rank": 4}, "merge": {"distill": {"rank": 9}}}})
    assert adapter_config(config).rank == 9
    assert adapter_config(config).targets == config.identity.lora.targets


def record(name: str, fingerprint: str) -> Record:
    return Record("experts", name, "h", 1, {}, {"retention_prompts": "neutral"}, fingerprint)


def test_its_key_follows_experts_pairs_and_what_it_starts_from(command: Command) -> None:
    run = open_run(command.config, command.places)
    experts = {"hate": record("hate", "1"), "violence": record("violence", "2")}

    def key(run: Run = run, **changes: Any) -> str:
        settings: dict[str, Any] = {
            "members": experts,
            "taught": {"hate": ("p1",)},
            "benign": "neutral",
            "aids": MergeAids(),
        }
        settings |= changes
        return _key(run, *settings.values()).hash

    same = key()
    assert key(members=dict(reversed(experts.items()))) == same
    assert key(members={**experts, "hate": record("hate", "9")}) != same
    assert key(taught={"hate": ("p1", "p2")}) != same
    assert key(benign="others") != same
    assert key(aids=MergeAids(layer_inputs=record("inputs", "4"))) != same
    other = open_run(command.config, [*command.places, "identity.merge.distill.steps=99"])
    assert key(other) != same
    # What only the search and the evaluation do leaves it as it is.
    assert key(open_run(command.config, [*command.places, "identity.search.trials=3"])) == same


def test_aids_are_those_that_a_method_needs(command: Command) -> None:
    run = open_run(command.config, command.places)
    aids = MergeAids(record("inputs", "1"), record("distilled", "2"))
    assert aids.needed_by([find_method("sum")]) == MergeAids()
    assert aids.needed_by([find_method("regmean")]) == MergeAids(layer_inputs=aids.layer_inputs)
    assert aids.needed_by([find_method("distill")]) == MergeAids(distilled=aids.distilled)
    assert aids.fingerprints() == {"layer_inputs": "1", "distilled": "2"}
    assert set(aids.folders(run)) == {"layer_inputs", "distilled"}
    assert read_aids(run, {}, methods=["sum"]) == {"inputs": None, "moments": None, "distilled": None}


@pytest.mark.parametrize(("pictures", "empty"), [("neutral", True), ("safe", False), ("others", False)])
def test_retention_of_other_pairs_is_planned_and_part_of_the_key(command: Command, pictures: str, empty: bool) -> None:
    """With `safe` and `others` an expert keeps the other categories' pairs, so its key follows them."""
    settings = [*command.places, "identity.dpo.retention_weight=1.0", f"identity.dpo.retention_pictures={pictures}"]
    run = open_run(command.config, settings)
    units = {unit.name: unit for unit in plan_experts(run, *close_pairs(run))}
    own = set(units["violence"].pair_ids)
    assert not own & set(units["violence"].others.ids())
    assert (units["violence"].others.ids() == ()) is empty
    assert (units["violence"].key.inputs["retention_pairs"] == "") is empty
    assert units["all_single"].others.ids() == ()
    if not empty:
        assert own | set(units["violence"].others.ids()) == set(units["all_single"].pair_ids)


def test_a_distillation_cannot_start_from_itself(command: Command) -> None:
    config = load_config(command.config, [*command.places, "identity.merge.distill.start_method=distill"])
    with pytest.raises(UsageError, match="expected a merge that a distillation can start from in identity.merge.dist"):
        check_request(Run(config))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "single", "processes": 2}, "strategy 'single' trains in one process, found processes 2"),
        ({"rows_per_step": 10, "benign_rate": 0.3, "processes": 2}, "multiple of processes .2., found 3 benign rows"),
        ({"rows_per_step": 2, "benign_rate": 0.1}, "found 0 benign rows"),
        (
            {"steps": 5, "warmup_steps": 5},
            r"merge\.distill\.warmup_steps \(5\) must be below identity\.merge\.distill\.st",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.model_validate({"identity": {"merge": {"distill": settings}}})


def test_an_unknown_start_is_refused_before_anything_is_written(command: Command) -> None:
    config = load_config(command.config, [*command.places, "identity.merge.distill.start_method=tie"])
    with pytest.raises(UsageError, match=r"found 'tie': correct identity\.merge\.distill\.start_method"):
        check_request(Run(config))
