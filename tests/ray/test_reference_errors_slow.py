"""Reference errors on Ray: made once, found by every later run, equal to those of this process; mirrored latents."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_jobs.draw_uses import count_draws
from ray_jobs.expert_plan import ExpertUnit, plan_experts
from ray_jobs.generate_pairs import generate_pairs, latent_pool
from ray_jobs.places import image_pool
from ray_jobs.reference_errors import make_reference_errors, with_reference_errors
from ray_jobs.run import Run, with_absolute_paths
from ray_jobs.training_tables import preference_data, read_training_tables
from ray_jobs.workers import decode_pictures
from safetydpo.artifacts.latents import latent_deviations, latent_means
from safetydpo.artifacts.pool_index import read_pool
from safetydpo.artifacts.records import Record
from safetydpo.artifacts.schemas import IMAGE_MANIFEST, IMAGES, LATENTS, REFERENCE_ERRORS, flipped_image_id
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import read_table
from safetydpo.config.experts import ALL_SINGLE
from safetydpo.config.schema import Config
from safetydpo.diffusion.build import load_backbone
from safetydpo.dpo.batch import step_batch
from safetydpo.dpo.engine import open_engine
from safetydpo.dpo.step import METRICS, policy_loss
from safetydpo.dpo.trainer import train_expert
from tests.tiny import build_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.usefixtures("cluster")]


def open_run(place: Path, **dpo: Any) -> Run:
    good = {"unsafe_score_min": 0.0, "safe_score_max": 1.0, "unrecognisable_max": 1.0, "min_kept_per_category": 1}
    settings = {
        "steps": 6,
        "warmup_steps": 1,
        "pairs_per_step": 4,
        "strategy": "single",
        "reference": "cached",
        "flip_rate": 0.5,
        "latent_sampling": "sample",
    }
    config = {
        "name": "test",
        "identity": {
            "base": {"model": str(place / "model")},
            "prompts": {"categories": ["violence", "shocking"], "pairs_per_category": 8, "retention_prompts": 4},
            "sampler": {"steps": 2, "batch_size": 8},
            # The random model draws noise: every pair is good.
            "pairs": {**good, "latents": "mean_and_deviation", "flipped_latents": True},
            "lora": {"rank": 2},
            "dpo": {**settings, **dpo},
        },
        "execution": {
            "num_workers": 2,
            "logical_cpus": 4,
            "store": str(place / "store"),
            "run_dir": str(place / "run"),
        },
    }
    return Run(with_absolute_paths(Config.model_validate(config)))


def prepare(run: Run) -> tuple[Record, Location, list[ExpertUnit]]:
    pairs = generate_pairs(run)
    folder = next(iter((run.store / "pairs").list()))
    return pairs, folder, plan_experts(run, pairs, folder)


@pytest.fixture(scope="module")
def place(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cached")
    build_tiny_model(folder / "model", autoencoder="kl")
    run = open_run(folder)
    _, pairs_folder, units = prepare(run)
    make_reference_errors(run, units, pairs_folder)
    return folder


def pools(run: Run) -> list[Location]:
    return list((run.store / "reference_errors").list())


def test_latents_of_mirrored_pictures_are_stored_beside_the_others(place: Path) -> None:
    """Those of pairs, and equal to what the mirrored picture gives here."""
    run = open_run(place)
    _, folder, _ = prepare(run)
    rows = read_table(folder / "images.parquet", IMAGE_MANIFEST).to_pylist()
    of_pairs = [row["image_id"] for row in rows if row["side"] != "benign"]
    table = read_pool(latent_pool(run), LATENTS, id_column="image_id")
    means, deviations = latent_means(table), latent_deviations(table)
    assert set(means) == {row["image_id"] for row in rows} | {flipped_image_id(image_id) for image_id in of_pairs}
    pictures = {
        row["image_id"]: row["image"] for row in read_pool(image_pool(run), IMAGES, id_column="image_id").to_pylist()
    }
    backbone = load_backbone(run.config.identity.base)
    for image_id in of_pairs[:3]:
        mirrored = decode_pictures([pictures[image_id]]).numpy()[:, :, ::-1].copy()
        mean, deviation = backbone.encode_image_moments(backbone_picture(mirrored))
        assert np.allclose(means[flipped_image_id(image_id)], mean[0].numpy(), atol=2e-3)
        assert np.allclose(deviations[flipped_image_id(image_id)], deviation[0].numpy(), rtol=2e-3)
        assert not np.allclose(means[image_id][:, :, ::-1], mean[0].numpy(), atol=2e-3)


def backbone_picture(picture: np.ndarray[Any, Any]) -> Any:
    import torch

    return torch.from_numpy(picture)


def test_each_draw_is_computed_once(place: Path) -> None:
    """As many rows as distinct draws of all experts, all different and finite."""
    run = open_run(place)
    _, _, units = prepare(run)
    (pool,) = pools(run)
    found = read_pool(pool, REFERENCE_ERRORS, id_column="error_id")
    assert found.num_rows == count_draws(run, units)["distinct_draws"] < count_draws(run, units)["draw_uses"]
    assert all(math.isfinite(value) and value > 0 for value in found.column("error_reference_safe").to_pylist())


@pytest.mark.parametrize("expert", ["violence", ALL_SINGLE])
def test_they_are_what_a_step_computes(place: Path, expert: str) -> None:
    """Mirrored and sampled: stored errors of three steps equal the live ones to the bit, and train the same expert."""
    run = open_run(place)
    _, folder, units = prepare(run)
    unit = next(unit for unit in units if unit.name == expert)
    backbone = load_backbone(run.config.identity.base, parts="denoiser")
    tables = read_training_tables(run, folder)
    data = with_reference_errors(run, unit, preference_data(tables, unit, backbone, run.config), tables, backbone)
    live = unit.dpo.model_copy(update={"reference": "live"})
    lora = run.config.identity.lora
    trained = []
    for config in (live, unit.dpo):
        engine = open_engine(backbone, config=config, lora=lora)
        for step in range(3):
            where: dict[str, Any] = {"run_seed": 0, "expert": expert, "num_timesteps": 1000}
            batch = step_batch(data, step, config=config, **where)
            trained.append(policy_loss(backbone, batch, config=config)[1].tolist())
        result = train_expert(backbone, data, config=config, lora=lora, run_seed=0, expert_name=expert, engine=engine)
        trained.append([metrics.loss for metrics in result.history])
        engine.close()
        backbone.remove_adapter()
    assert len(METRICS) == len(trained[0])
    assert trained[:4] == trained[4:]


def test_another_setting_of_the_loss_computes_nothing_new(place: Path) -> None:
    """Another beta, learning rate and weight; then more steps, which need some more draws; then another draw seed."""
    run = open_run(place, beta=7.0, learning_rate=1e-4, safe_rise_weight=0.0)
    _, folder, units = prepare(run)
    before = [pool.path for pool in pools(run)], sorted(file.path for pool in pools(run) for file in pool.walk())
    make_reference_errors(run, units, folder)
    after = [pool.path for pool in pools(run)], sorted(file.path for pool in pools(run) for file in pool.walk())
    assert before == after
    longer = open_run(place, steps=9)
    _, _, more = prepare(longer)
    make_reference_errors(longer, more, folder)
    (pool,) = pools(run)
    found = read_pool(pool, REFERENCE_ERRORS, id_column="error_id")
    batches = [batch for batch in pool.list() if (batch / "record.json").is_file()]
    assert found.num_rows == count_draws(longer, more)["distinct_draws"]
    assert len(batches) == 2
    rows = sum(read_pool_rows(batch) for batch in batches)
    assert rows == found.num_rows
    other = open_run(place, draw_seed=8)
    _, _, others = prepare(other)
    make_reference_errors(other, others, folder)
    assert len(pools(run)) == 2


def read_pool_rows(batch: Location) -> int:
    return sum(read_table(file, REFERENCE_ERRORS).num_rows for file in (batch / "data").walk())


def test_a_live_run_makes_none(place: Path) -> None:
    run = open_run(place, reference="live", draw_seed=11)
    _, folder, units = prepare(run)
    before = len(pools(run))
    make_reference_errors(run, units, folder)
    assert len(pools(run)) == before
