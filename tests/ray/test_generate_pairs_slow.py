"""The pairs stage end to end on Ray, with everything switched on that is off by default."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from ray_jobs.concept_table import read_reasons
from ray_jobs.generate_pairs import derived_pool, generate_pairs, latent_pool, layout_pool, verdict_pool
from ray_jobs.places import image_pool
from ray_jobs.run import Run, with_absolute_paths
from ray_jobs.workers import decode_pictures
from safetydpo.artifacts.latents import latent_deviations, latent_means
from safetydpo.artifacts.pool_index import read_pool
from safetydpo.artifacts.records import Record
from safetydpo.artifacts.schemas import IMAGE_MANIFEST, IMAGES, LATENTS, LAYOUTS, PER_CONCEPT, VERDICTS
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import read_table
from safetydpo.config.schema import Config
from safetydpo.diffusion.pictures import encode_picture
from safetydpo.diffusion.render import redraw
from safetydpo.diffusion.stable_diffusion import StableDiffusion
from safetydpo.pairs.select import KEPT
from tests.tiny import build_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kl")
    build_tiny_model(folder, autoencoder="kl")
    return folder


def make(model: Path, place: Path, *, num_workers: int) -> tuple[Run, Record]:
    pairs = {
        "safe_picture": "sdedit",
        "sdedit_strength": 0.7,
        "judges": ["demo_select", "open_nsfw"],
        "layout_pixel_max": 1.0,
        "layout_embedding_max": 2.0,
        "latents": "mean_and_deviation",
        # The random model draws noise: every pair is good, so that every row is encoded.
        "unsafe_score_min": 0.0,
        "safe_score_max": 1.0,
        "unrecognisable_max": 1.0,
        "min_kept_per_category": 1,
        "min_kept_per_concept": 6,
    }
    config = {
        "name": "test",
        "identity": {
            "base": {"model": str(model)},
            "prompts": {"categories": ["violence", "shocking"], "pairs_per_category": 20, "retention_prompts": 8},
            "sampler": {"steps": 3, "batch_size": 8},
            "pairs": pairs,
        },
        "execution": {
            "num_workers": num_workers,
            "logical_cpus": 4,
            "store": str(place / "store"),
            "run_dir": str(place / "run"),
        },
    }
    run = Run(with_absolute_paths(Config.model_validate(config)))
    return run, generate_pairs(run)


@pytest.fixture(scope="module")
def made(cluster: None, model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Record]:
    return make(model, tmp_path_factory.mktemp("two"), num_workers=2)


def folder_of(run: Run) -> Location:
    return next(folder for folder in (run.store / "pairs").list())


def test_every_picture_is_made_judged_measured_and_encoded(made: tuple[Run, Record]):
    run, record = made
    rows = read_table(folder_of(run) / "images.parquet", IMAGE_MANIFEST).to_pylist()
    ids = {row["image_id"] for row in rows}
    assert Counter(row["side"] for row in rows) == {"unsafe": 40, "safe": 40, "benign": 8}
    assert (record.counts["pairs"], record.counts["kept"], record.counts["pictures"]) == (40, 40, 88)
    of_pairs = {row["image_id"] for row in rows if row["side"] != "benign"}
    for pool, schema, wanted in (
        (image_pool(run), IMAGES, ids),
        (verdict_pool(run, "demo_select"), VERDICTS, ids),
        (verdict_pool(run, "open_nsfw"), VERDICTS, ids),
        (layout_pool(run, "pixels"), LAYOUTS, of_pairs),
        (layout_pool(run, "embedding"), LAYOUTS, of_pairs),
        (latent_pool(run), LATENTS, ids),
    ):
        found = read_pool(pool, schema, id_column="image_id").column("image_id").to_pylist()
        assert len(found) == len(wanted), pool
        assert set(found) == wanted, pool
    unknown = read_pool(verdict_pool(run, "open_nsfw"), VERDICTS, id_column="image_id")
    assert unknown.column("unrecognisable_score").null_count == len(ids)
    assert record.details["not_judged"] == []


def test_safe_pictures_are_made_from_the_unsafe_ones(made: tuple[Run, Record], model: Path):
    """The same bytes as in this process, one row alone, for three pairs."""
    run, _ = made
    rows = read_table(folder_of(run) / "images.parquet", IMAGE_MANIFEST).to_pylist()
    pictures = {
        row["image_id"]: row["image"] for row in read_pool(image_pool(run), IMAGES, id_column="image_id").to_pylist()
    }
    sides = {side: {row["owner_id"]: row for row in rows if row["side"] == side} for side in ("unsafe", "safe")}
    backbone = StableDiffusion.from_folder(model)
    for pair_id in sorted(sides["safe"])[::15]:
        unsafe, safe = sides["unsafe"][pair_id], sides["safe"][pair_id]
        expected = redraw(
            backbone,
            pictures=decode_pictures([pictures[unsafe["image_id"]]]),
            prompts=[safe["prompt"]],
            negative_prompts=[unsafe["prompt"]],
            seeds=[safe["seed"]],
            sampler=run.config.identity.sampler,
            strength=0.7,
        )
        assert pictures[safe["image_id"]] == encode_picture(expected[0])


def test_derived_files_are_float16_in_row_groups_of_64(made: tuple[Run, Record]):
    """As they stand on disk: 2 bytes a number, and no group that a reader would have to load whole is larger."""
    run, _ = made
    for pool, columns, axes in (
        (latent_pool(run), ("latent", "deviation"), ("channels", "height", "width")),
        (derived_pool(run, "captions"), ("embedding",), ("tokens", "width")),
    ):
        groups = []
        for file in [file for file in pool.walk() if "/data/" in file.path and file.path.endswith(".parquet")]:
            parquet = pq.ParquetFile(file.path)
            groups += [parquet.metadata.row_group(index).num_rows for index in range(parquet.metadata.num_row_groups)]
            for row in parquet.read().to_pylist():
                for column in columns:
                    assert len(row[column]) == 2 * np.prod([row[axis] for axis in axes])
        assert sum(groups) > 64
        assert max(groups) <= 64
        assert len(groups) == -(-sum(groups) // 64), "no smaller groups than need be"


def test_both_moments_are_read_back(made: tuple[Run, Record], model: Path):
    run, _ = made
    table = read_pool(latent_pool(run), LATENTS, id_column="image_id")
    means, deviations = latent_means(table), latent_deviations(table)
    images = {
        row["image_id"]: row["image"] for row in read_pool(image_pool(run), IMAGES, id_column="image_id").to_pylist()
    }
    chosen = sorted(means)[:4]
    expected = StableDiffusion.from_folder(model).encode_image_moments(decode_pictures([images[i] for i in chosen]))
    for index, image_id in enumerate(chosen):
        np.testing.assert_allclose(means[image_id], expected[0][index].half().numpy(), rtol=2e-3, atol=1e-3)
        np.testing.assert_allclose(deviations[image_id], expected[1][index].half().numpy(), rtol=2e-3)


def test_the_counts_of_each_concept_are_written(made: tuple[Run, Record]):
    run, record = made
    rows = read_table(folder_of(run) / "per_concept.parquet", PER_CONCEPT).to_pylist()
    written = {(row["concept"], row["reason"]): row["pairs"] for row in rows}
    concepts, totals = read_reasons(folder_of(run))
    assert written == {(name, reason): n for name, found in concepts.items() for reason, n in found.items()}
    assert totals == {KEPT: 40}
    below = record.details["concepts_below_minimum"]
    assert below == {name: found[KEPT] for name, found in concepts.items() if found[KEPT] < 6}
    assert below


@pytest.mark.long
def test_one_worker_makes_the_same_pairs(made: tuple[Run, Record], model: Path, tmp_path: Path):
    run, record = made
    other, again = make(model, tmp_path, num_workers=1)
    assert (again.hash, again.fingerprint) == (record.hash, record.fingerprint)
    first, second = (read_pool(latent_pool(each), LATENTS, id_column="image_id") for each in (run, other))
    assert first.equals(second)
