"""What is measured of an evaluation's stored pictures, how it is read back, and what is refused beforehand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from ray_jobs.evaluate import OUTCOMES_FILE, EvaluatedRow, evaluation_prompts, outcome_id, outcomes_pool
from ray_jobs.picture_features import measure_pictures, network_fingerprints, read_measures
from ray_jobs.run import Run, with_absolute_paths
from safetydpo.artifacts.evaluation_schemas import PICTURE_CHANGES
from safetydpo.artifacts.layout import demo_weights
from safetydpo.artifacts.records import ArtifactKey, Record
from safetydpo.artifacts.schemas import OUTCOMES, make_change_id
from safetydpo.artifacts.tables import table_from_rows, write_table
from safetydpo.config.load import load_config
from safetydpo.config.measures import MeasuresConfig
from safetydpo.config.schema import Config
from safetydpo.diffusion.pictures import encode_picture
from safetydpo.errors import UsageError
from safetydpo.evaluation.rows import RowSource
from safetydpo.judges.build import fingerprint_files
from safetydpo.judges.perceptual import ClipTowerDistance
from tests.ray.closed_artifacts import close_batch
from tests.ray.test_picture_workers import outcome_row

SETS = ("neutral",)
ROWS = [
    EvaluatedRow(RowSource("base", "base"), "", SETS),
    EvaluatedRow(RowSource("sum", "merged", "h", 4, 1.0), "sum", SETS),
]


@pytest.fixture
def run(configs: Path, tmp_path: Path) -> Run:
    settings = [
        f"store={tmp_path}/store",
        f"run_dir={tmp_path}/run",
        "execution.logical_cpus=4",
        "execution.num_workers=1",
    ]
    return Run(with_absolute_paths(load_config(configs / "smoke.yaml", settings)))


def ids_of(run: Run) -> dict[tuple[str, str], str]:
    """The ids of all neutral pictures, by row and prompt."""
    sampler = run.config.identity.sampler.model_dump(mode="json")
    return {
        (row.source.name, prompt.prompt_id): outcome_id(run, row, prompt, 0, sampler)
        for row in ROWS
        for prompt in evaluation_prompts(run)["neutral"]
    }


def close_outcomes(run: Run, files: dict[str, bytes | None], embeddings: dict[str, list[float]]) -> Record:
    """Close a pool and an artifact of outcomes that hold these pictures."""
    rows = [{**outcome_row(name, data), "clip_embedding": embeddings.get(name, [])} for name, data in files.items()]
    table = table_from_rows(rows, OUTCOMES)
    close_batch(outcomes_pool(run), table)
    key = ArtifactKey("outcomes", run.config.name, {}, {}, 1)

    def make(folder: Any) -> dict[str, object]:
        write_table(folder / OUTCOMES_FILE, table)
        return {"fingerprint": "outcomes"}

    return run.build("outcomes", key, make)


def test_the_settings_are_off_by_default_and_left_out_of_what_is_stored() -> None:
    evaluation = Config().identity.evaluation
    assert evaluation.measures == MeasuresConfig()
    assert "measures" not in evaluation.model_dump()
    assert network_fingerprints(evaluation.measures) == {}


def test_the_demo_and_the_smoke_run_measure_what_the_package_ships(configs: Path) -> None:
    for name in ("demo", "smoke"):
        measures = load_config(configs / f"{name}.yaml").identity.evaluation.measures
        assert (measures.cmmd, measures.perceptual) == (True, ("clip_tower",))
        assert network_fingerprints(measures) == {"clip_tower": fingerprint_files(demo_weights() / "clip")}
    assert load_config(configs / "evidence.yaml").identity.evaluation.measures == MeasuresConfig()


@pytest.mark.parametrize(
    ("measures", "wanted"),
    [
        (
            {"perceptual": ("vgg16",)},
            "measures.perceptual 'vgg16' needs identity.evaluation.measures.vgg16, the folder",
        ),
        ({"reference_pictures": "x"}, "measures.reference_pictures needs identity.evaluation.measures.inception"),
        ({"perceptual": ("dists",)}, "'clip_tower', 'alexnet' or 'vgg16'"),
    ],
)
def test_settings_that_cannot_be_carried_out(measures: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ValidationError, match=wanted):
        MeasuresConfig(**measures)


def test_weights_and_pictures_that_are_not_there(tmp_path: Path) -> None:
    absent = str(tmp_path / "absent")
    for measures, wanted in (
        (
            MeasuresConfig(perceptual=("vgg16",), vgg16=absent),
            "a folder with the weights of vgg16 at .*absent",
        ),
        (
            MeasuresConfig(perceptual=("clip_tower",), clip=absent),
            "identity.evaluation.measures.clip to be",
        ),
        (MeasuresConfig(inception=absent), "the weights of Inception-v3 at .*absent .*found no file: save"),
        (MeasuresConfig(perceptual=("vgg16",), vgg16=str(tmp_path)), "expected the weights of vgg16 at .*safetensors"),
    ):
        with pytest.raises(UsageError, match=wanted):
            network_fingerprints(measures)
    (tmp_path / "weights").write_bytes(b"x")
    with pytest.raises(UsageError, match="expected at least 2 PNG or WebP pictures in .*absent .*, found 0"):
        network_fingerprints(MeasuresConfig(inception=str(tmp_path / "weights"), reference_pictures=absent))


def test_no_network_is_no_work(run: Run) -> None:
    plain = run.config.identity.evaluation.model_copy(update={"measures": MeasuresConfig()})
    identity = run.config.identity.model_copy(update={"evaluation": plain})
    bare = Run(run.config.model_copy(update={"identity": identity}))
    record = Record("outcomes", "test", "0" * 64, 1, {}, {}, "x")
    assert measure_pictures(bare, record, ROWS) is None
    assert read_measures(bare, record, None, ROWS).embeddings == {}


def test_measures_are_read_back_by_picture(run: Run) -> None:
    """Distances belong to pictures of rows other than the base's; what failed is named, and so is a NaN embedding."""
    ids = ids_of(run)
    prompts = [prompt_id for row, prompt_id in ids if row == "base"]
    embeddings = {image_id: [1.0, float(place)] for place, image_id in enumerate(ids.values())}
    embeddings[ids["sum", prompts[1]]] = [float("nan"), 1.0]
    files: dict[str, bytes | None] = dict.fromkeys(ids.values(), b"x")
    files[ids["sum", prompts[2]]] = None
    outcomes = close_outcomes(run, files, embeddings)
    rows = [
        {
            "change_id": make_change_id(ids["sum", prompt_id], ids["base", prompt_id]),
            "distance": None if place == 3 else 0.1 * place,
            "status": "error" if place == 3 else "ok",
            "error": "expected finite perceptual distance" if place == 3 else "",
            "attempt": 1,
        }
        for place, prompt_id in enumerate(prompts)
        if place != 2
    ]
    key = ArtifactKey("picture_measures", run.config.name, {}, {}, 1)

    def make(folder: Any) -> dict[str, object]:
        write_table(folder / "clip_tower.parquet", table_from_rows(rows, PICTURE_CHANGES))
        return {"fingerprint": "changes"}

    found = read_measures(run, outcomes, run.build("picture_measures", key, make), ROWS)
    assert found.changes == {"clip_tower": {("sum", prompts[0], 0): 0.0, ("sum", prompts[1], 0): 0.1}}
    assert found.failures == {
        ("change by clip_tower", ("sum", prompts[3], 0)): "expected finite perceptual distance",
        ("CLIP embedding", ("sum", prompts[1], 0)): "expected finite numbers, found a NaN, an infinity or nothing",
    }
    missing = {("sum", prompts[1], 0), ("sum", prompts[2], 0)}
    assert set(found.embeddings) == {(row, prompt_id, 0) for row, prompt_id in ids} - missing


@pytest.mark.slow
def test_stored_pictures_are_measured_once(cluster: None, run: Run, tmp_path: Path) -> None:
    """The job's distances are the network's; a picture that was never drawn has none; a second call makes nothing."""
    ids = ids_of(run)
    prompts = [prompt_id for row, prompt_id in ids if row == "base"]
    generator = torch.Generator().manual_seed(0)
    images = {name: torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8) for name in ids.values()}
    files: dict[str, bytes | None] = {name: encode_picture(image) for name, image in images.items()}
    files[ids["base", prompts[0]]] = None
    outcomes = close_outcomes(run, files, {name: [1.0, 2.0] for name in ids.values()})
    record = measure_pictures(run, outcomes, ROWS)
    assert record is not None
    assert record.counts == {"clip_tower": len(prompts) - 1}
    found = read_measures(run, outcomes, record, ROWS).changes["clip_tower"]
    network = ClipTowerDistance(demo_weights() / "clip")
    for prompt_id in prompts[1:]:
        pair = [images[ids[row, prompt_id]][None] for row in ("sum", "base")]
        np.testing.assert_allclose(found["sum", prompt_id, 0], float(network.distance(*pair)), rtol=1e-4)
    assert len(found) == len(prompts) - 1
    made = list(run.made)
    assert measure_pictures(run, outcomes, ROWS) == record
    assert run.made == made
