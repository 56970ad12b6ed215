"""The actors of the pairs stage, called in this process: real small networks, no Ray."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from ray_jobs.generate_pairs import latent_batch_size
from ray_jobs.pair_workers import LayoutWorker, SdeditWorker
from ray_jobs.verify_pairs import DERIVED_BATCH
from ray_jobs.workers import FlippedLatentWorker, JudgeWorker, LatentWorker
from safetydpo.artifacts.latents import latent_deviations, latent_means
from safetydpo.artifacts.layout import demo_weights
from safetydpo.config.schema import SamplerConfig
from safetydpo.diffusion.pictures import decode_picture, encode_picture
from safetydpo.diffusion.render import redraw
from safetydpo.diffusion.stable_diffusion import StableDiffusion
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.judges.clip import ClipScorer
from safetydpo.judges.open_nsfw import OpenNsfwJudge
from safetydpo.pairs.layout import luminance_grid
from tests.tiny import PICTURE_SIZE, build_tiny_model

SAMPLER = SamplerConfig(steps=3, batch_size=2)
SIDE = PICTURE_SIZE


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return torch.randint(0, 256, (3, SIDE, SIDE, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture(scope="module")
def stored(pictures: torch.Tensor) -> pa.Table:
    return pa.table({"image_id": ["a", "b", "c"], "image": [encode_picture(picture) for picture in pictures]})


@pytest.fixture(scope="module")
def kl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kl")
    build_tiny_model(folder, autoencoder="kl")
    return folder


def test_sdedit_draws_rows_from_their_sources(kl_folder: Path, pictures: torch.Tensor):
    """The bytes of `redraw`; a source that cannot be decoded becomes an error row, its neighbours are unharmed."""
    base = {"model": str(kl_folder)}
    rows = [
        {
            "image_id": name,
            "owner_id": name,
            "side": "safe",
            "prompt": "a ball",
            "seed": index,
            "adapter": "",
            "attempt": 1,
            "negative_prompt": "a bomb",
            "source": b"broken" if name == "b" else encode_picture(pictures[index]),
        }
        for index, name in enumerate("abc")
    ]
    made = SdeditWorker(base, SAMPLER.model_dump(), strength=0.7)(pa.Table.from_pylist(rows)).to_pylist()
    assert [row["status"] for row in made] == ["ok", "error", "ok"]
    assert "expected a complete PNG or WebP" in made[1]["error"]
    expected = redraw(
        StableDiffusion.from_folder(kl_folder),
        pictures=pictures[[0, 2]],
        prompts=["a ball"] * 2,
        negative_prompts=["a bomb"] * 2,
        seeds=[0, 2],
        sampler=SAMPLER,
        strength=0.7,
    )
    for row, picture in zip((made[0], made[2]), expected, strict=True):
        assert np.array_equal(decode_picture(row["image"]), picture.numpy())


def test_layouts_are_grids_or_embeddings(stored: pa.Table, pictures: torch.Tensor):
    grids = LayoutWorker("pixels", clip="demo", batch_size=4)(stored).to_pylist()
    assert [row["image_id"] for row in grids] == ["a", "b", "c"]
    assert grids[1]["values"] == luminance_grid(pictures[1].numpy()).ravel().tolist()
    embedded = LayoutWorker("embedding", clip="demo", batch_size=4)(stored).to_pylist()
    expected = ClipScorer(demo_weights() / "clip").embed_images(pictures)
    torch.testing.assert_close(torch.tensor([row["values"] for row in embedded]), expected)


def test_latents_with_their_deviation(kl_folder: Path, stored: pa.Table, pictures: torch.Tensor):
    base = {"model": str(kl_folder)}
    table = LatentWorker(base, batch_size=4, with_deviation=True)(stored)
    means, deviations = StableDiffusion.from_folder(kl_folder).encode_image_moments(pictures)
    for index, name in enumerate("abc"):
        np.testing.assert_allclose(latent_means(table)[name], means[index].half().numpy(), rtol=2e-3, atol=1e-4)
        np.testing.assert_allclose(latent_deviations(table)[name], deviations[index].half().numpy(), rtol=2e-3)
    plain = LatentWorker(base, batch_size=4)(stored)
    assert plain.column("latent") == table.column("latent")
    with pytest.raises(SafetyDPOError, match="found the mean only"):
        latent_deviations(plain)
    with pytest.raises(UsageError, match="found AutoencoderTiny, which gives latents only"):
        LatentWorker({"model": "demo"}, batch_size=4, with_deviation=True)(stored)


def test_mirrored_latents_are_those_of_the_mirrored_pictures(kl_folder: Path, stored: pa.Table, pictures: torch.Tensor):
    base = {"model": str(kl_folder)}
    found = latent_means(FlippedLatentWorker(base, batch_size=4)(stored))
    mirrored = StableDiffusion.from_folder(kl_folder).encode_images(pictures.flip(2))
    for index, name in enumerate("abc"):
        np.testing.assert_allclose(found[name], mirrored[index].half().numpy(), rtol=2e-3, atol=1e-4)
    plain = latent_means(LatentWorker(base, batch_size=4)(stored))
    assert not np.allclose(found["a"], plain["a"], atol=1e-2)


def test_latents_are_encoded_in_small_passes(
    kl_folder: Path, stored: pa.Table, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Passes of 2, padded; where two do not fit, of 1, and the rows are the same but for their last bits."""
    worker = LatentWorker({"model": str(kl_folder)}, batch_size=2)
    room, sizes = 2, []
    encode = worker._backbone.encode_images

    def encode_in_room(images: torch.Tensor) -> torch.Tensor:
        sizes.append(len(images))
        if len(images) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(images)

    monkeypatch.setattr(worker._backbone, "encode_images", encode_in_room)
    table = worker(stored)
    assert sizes == [2, 2]
    assert worker(stored.slice(2)).equals(table.slice(2)), "a row's bytes do not depend on its neighbours"
    assert not caplog.records
    room = 1
    sizes.clear()
    small = worker(stored)
    assert sizes == [2, 1, 1, 1]
    assert "latents: 2 pictures do not fit into memory at once, 1 do" in caplog.text
    assert (table.column("micro_batch").to_pylist(), small.column("micro_batch").to_pylist()) == ([2] * 3, [1] * 3)
    for name, latent in latent_means(table).items():
        np.testing.assert_allclose(latent_means(small)[name], latent, rtol=2e-3, atol=1e-4)
    worker(stored)
    worker(stored)
    sizes.clear()
    worker(stored)
    assert sizes == [1, 1, 1], "after three failures running, two are not tried any more"


def test_small_pictures_are_encoded_as_ever_and_large_ones_as_they_are_drawn():
    assert latent_batch_size(SamplerConfig()) == latent_batch_size(SamplerConfig(batch_size=1)) == DERIVED_BATCH == 64
    assert latent_batch_size(SamplerConfig(height=64, width=64, batch_size=8)) == 64
    assert latent_batch_size(SamplerConfig(height=72, width=64, batch_size=8)) == 8
    assert latent_batch_size(SamplerConfig(height=1024, width=1024, batch_size=256)) == 64


def test_a_judge_that_does_not_know_leaves_nulls(stored: pa.Table, pictures: torch.Tensor):
    rows = JudgeWorker("open_nsfw", batch_size=4)(stored).to_pylist()
    assert [row["unsafe_score"] for row in rows] == pytest.approx(
        OpenNsfwJudge().judge(pictures).unsafe_score, abs=1e-6
    )
    for row in rows:
        assert row["judge"] == "open-nsfw"
        unknown = ("unrecognisable_score", "concept", "background", "is_unrecognisable")
        assert all(row[column] is None for column in unknown)


def test_a_picture_that_does_not_decode_is_named_and_harms_no_other(stored: pa.Table):
    whole = JudgeWorker("open_nsfw", batch_size=4)(stored).to_pylist()
    names, files = stored.column("image_id").to_pylist(), stored.column("image").to_pylist()
    broken = pa.table({"image_id": names, "image": [files[0][:40], *files[1:]]})
    first, *others = JudgeWorker("open_nsfw", batch_size=4)(broken).to_pylist()
    assert others == whole[1:]
    assert (first["image_id"], first["status"], first["is_unsafe"]) == (names[0], "error", True)
    assert math.isnan(first["unsafe_score"])
    assert first["error"]
    assert {row["status"] for row in others} == {"ok"}
