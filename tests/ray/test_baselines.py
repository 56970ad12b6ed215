"""Comparators of a run: what they are told, how they are tuned in this process, and their rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_jobs.baselines import (
    BASE,
    CANDIDATES_FILE,
    RESULT_FILE,
    Candidates,
    candidate_folder,
    candidates_of,
    check_comparators,
    comparator_key,
    erasure_of,
    measure_here,
    tune,
)
from ray_jobs.evaluate import comparator_rows
from ray_jobs.evaluation_worker import EvaluateWorker
from ray_jobs.evidence_command import run_evidence
from ray_jobs.prompt_tables import split_prompts
from ray_jobs.run import Run
from safetydpo.artifacts.layout import INTERVENTION_FILE
from safetydpo.artifacts.schemas import IMAGE_MANIFEST
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import table_from_rows
from safetydpo.baselines.intervention import read_intervention
from safetydpo.config.load import load_config
from safetydpo.diffusion.build import load_backbone
from safetydpo.diffusion.pictures import decode_picture
from safetydpo.diffusion.render import render
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.search.objective import IP, NEIGHBOUR, NEUTRAL, UNRECOGNISABLE
from tests.diffusion.tiny_models import build_model
from tests.ray.closed_artifacts import open_run
from tests.ray.smoke_place import SMOKE

SETTINGS = [
    "identity.search.trials=2",
    "identity.search.prompts_per_category=1",
    "identity.search.neutral_prompts=2",
    "identity.search.neighbour_prompts=2",
]
BASE_RATES = {IP: 1.0, UNRECOGNISABLE: 0.0, NEUTRAL: 1.0, NEIGHBOUR: 1.0}


def opened(place: Path, *settings: str) -> Run:
    return open_run(SMOKE, [f"store={place}/store", f"run_dir={place}/run", *SETTINGS, *settings])


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return opened(tmp_path)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with tuned SLD and UCE, measured on pictures of the demo model."""
    run = opened(tmp_path_factory.mktemp("tuned"))
    for name in ("sld", "uce"):
        tune(run, name, measure_here(run))
    return run


def test_they_are_told_training_prompts_of_the_runs_own_pairs(run: Run) -> None:
    erasure = erasure_of(run)
    prompts = run.config.identity.prompts
    unsafe = {prompt.text: prompt.concept for prompt in split_prompts(prompts, "train", "unsafe")}
    assert len(erasure.concepts) == 10
    assert sum(len(concept.prompts) for concept in erasure.concepts) == 16
    for concept in erasure.concepts:
        assert {unsafe[text].replace("_", " ") for text in concept.prompts} == {concept.name}
        assert len(concept.safe_prompts) == len(concept.prompts)
    neutral = {prompt.text for prompt in split_prompts(prompts, "train", "neutral")}
    assert len(erasure.preserved) == 8
    assert set(erasure.preserved) <= neutral


def test_they_may_be_told_of_some_concepts(run: Run) -> None:
    everything = erasure_of(run)
    first = everything.concepts[1]
    assert erasure_of(run, concepts=[first.name.replace(" ", "_")]).concepts == (first,)


def test_a_key_holds_what_decides_and_nothing_else(run: Run, tmp_path: Path) -> None:
    keys = {name: comparator_key(run, name).hash for name in (BASE, "sld", "uce")}
    assert len(set(keys.values())) == 3
    more = opened(tmp_path / "more", "identity.search.trials=3")
    assert comparator_key(more, "uce").hash != keys["uce"]
    assert comparator_key(more, BASE).hash == keys[BASE]
    other = opened(tmp_path / "other", "identity.evaluation.neutral_prompts=5", "identity.dpo.steps=6")
    assert comparator_key(other, "uce").hash == keys["uce"]
    preserved = opened(tmp_path / "preserved", "identity.prompts.retention_prompts=9")
    assert comparator_key(preserved, "uce").hash != keys["uce"]


def test_as_many_candidates_as_the_search_has_trials(run: Run) -> None:
    assert [len(candidates_of(run, name)) for name in ("negative_prompt", "sld", "uce", "esd")] == [2] * 4
    assert candidates_of(run, BASE) == [{}]


class Measured:
    """Writes given rates in place of measured ones, and remembers which candidates were asked for."""

    def __init__(self, rates: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
        self.rates, self.asked = rates, []  # type: ignore[var-annotated]

    def __call__(self, folder: Location, name: str, candidates: Candidates) -> None:
        for index, settings in candidates:
            self.asked.append((name, index))
            place = candidate_folder(folder, index)
            metrics = self.rates[name][index]
            (place / INTERVENTION_FILE).write_bytes(f"{name} {index}".encode())
            result = {
                "settings": dict(settings),
                "metrics": metrics,
                "error": "" if metrics else "no unique solution",
                "fingerprint": f"{name}-{index}",
                "cpu_seconds": 1.5,
            }
            (place / RESULT_FILE).write_bytes(json.dumps(result).encode())


def test_the_best_candidate_has_the_least_price_that_meets_the_floors(run: Run) -> None:
    """The first has the lower price, 0.1 against 0.3, but keeps 0.5 of the neighbours, below the floor of 0.8."""
    first = {**BASE_RATES, IP: 0.1, NEIGHBOUR: 0.5}
    second = {**BASE_RATES, IP: 0.2, UNRECOGNISABLE: 0.1, NEIGHBOUR: 0.85}
    record = tune(run, "uce", Measured({BASE: [BASE_RATES], "uce": [first, second]}))
    folder = run.folder(comparator_key(run, "uce"))
    assert (record.details["candidate"], record.fingerprint) == (1, "uce-1")
    assert (folder / INTERVENTION_FILE).read_bytes() == b"uce 1"
    assert record.counts == {"candidates": 2, "failed": 0}
    assert not candidate_folder(folder, 0).is_folder()
    lines = (folder / CANDIDATES_FILE).read_bytes().decode().splitlines()
    assert [json.loads(line)["metrics"] for line in lines] == [first, second]


def test_what_an_interrupted_command_has_measured_is_not_measured_again(run: Run) -> None:
    measured = Measured({BASE: [BASE_RATES], "uce": [BASE_RATES, BASE_RATES]})
    measured(run.folder(comparator_key(run, "uce")), "uce", [(1, {})])
    tune(run, "uce", measured)
    assert measured.asked == [("uce", 1), (BASE, 0), ("uce", 0)]
    tune(run, "uce", measured)
    assert len(measured.asked) == 3


def test_a_candidate_that_fails_is_named(run: Run) -> None:
    record = tune(run, "uce", Measured({BASE: [BASE_RATES], "uce": [{}, BASE_RATES]}))
    assert record.details["candidate"] == 1
    assert record.counts["failed"] == 1
    assert record.failed_units == ("candidate 0: no unique solution",)


def test_if_all_fail_it_ends(run: Run) -> None:
    with pytest.raises(
        SafetyDPOError, match="at least one candidate of comparator 'uce' .*found 2 that failed, .*no unique solution"
    ):
        tune(run, "uce", Measured({BASE: [BASE_RATES], "uce": [{}, {}]}))


def test_tuned_on_real_pictures_they_are_closed_artifacts(tuned: Run) -> None:
    for name in ("sld", "uce"):
        record = tune(tuned, name, measure_here(tuned))
        folder = tuned.folder(comparator_key(tuned, name))
        intervention = read_intervention(folder)
        assert record.fingerprint == intervention.fingerprint
        assert bool(intervention.layers) == (name == "uce")
        assert set(record.details["metrics"]) == {IP, UNRECOGNISABLE, NEUTRAL, NEIGHBOUR}


def test_rows_draw_what_the_base_draws_with_their_intervention(tuned: Run) -> None:
    records = {name: tune(tuned, name, measure_here(tuned)) for name in ("sld", "uce")}
    rows = comparator_rows(tuned, records)
    assert [(row.source.name, row.source.kind, row.source.rank) for row in rows] == [
        ("sld", "comparator", None),
        ("uce", "comparator", None),
    ]
    assert all(row.prompt_sets == ("unsafe", "ood", "neutral", "neighbour") for row in rows)
    worker = EvaluateWorker(tuned.config.model_dump(mode="json"))
    places = ["", rows[0].adapter, rows[1].adapter, ""]
    manifest = [manifest_row(str(number), place) for number, place in enumerate(places)]
    found = worker(table_from_rows(manifest, IMAGE_MANIFEST)).to_pylist()
    assert {row["status"] for row in found} == {"ok"}
    pictures = [torch.from_numpy(decode_picture(row["image"])) for row in found]
    backbone = load_backbone(tuned.config.identity.base)
    for place, picture in zip(places, pictures, strict=True):
        guided: dict[str, Any] = {}
        if place:
            intervention = read_intervention(Location(tuned.store.filesystem, place))
            intervention.install(backbone)
            guided = intervention.guide(backbone)
        sampler = tuned.config.identity.sampler
        expected = render(backbone, prompts=["dagger on blue"], seeds=[3], sampler=sampler, **guided)
        backbone.remove_adapter()
        assert torch.equal(expected[0], picture)
    assert not torch.equal(pictures[0], pictures[1])
    assert not torch.equal(pictures[0], pictures[2])


def manifest_row(image_id: str, place: str) -> dict[str, object]:
    return {
        "image_id": image_id,
        "owner_id": "owner",
        "side": "unsafe",
        "prompt": "dagger on blue",
        "seed": 3,
        "adapter": place,
        "attempt": 1,
    }


def test_models_without_unet_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    build_model("sd3", tmp_path / "model")
    settings = [f"identity.base.model={tmp_path}/model", "identity.evaluation.comparators=[uce]"]
    with pytest.raises(
        UsageError, match="expected a U-Net model .* for identity.evaluation.comparators, found a trans"
    ):
        check_comparators(load_config(SMOKE, settings).identity)
    check_comparators(load_config(SMOKE, settings[:1]).identity)
    check_comparators(load_config(SMOKE, settings[1:]).identity)


def test_the_setting_is_left_out_of_what_is_stored_at_its_default() -> None:
    assert "comparators" not in load_config(SMOKE).identity.evaluation.model_dump()


def test_evidence_has_no_rows_for_them() -> None:
    config = load_config(SMOKE, ["identity.evaluation.comparators=[sld, uce]"])
    with pytest.raises(UsageError, match="expected no identity.evaluation.comparators for evidence, .* found sld, uce"):
        run_evidence(config, seed=None, row=None, minutes=None, only_list=True, only_tables=False)
