"""Who judges a search: real networks of the demo world in this process, asked as judges of real pictures are."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_jobs.final_judges import judge_roles
from ray_jobs.pipeline import stages_to
from ray_jobs.plan_work import last_stage
from ray_jobs.run import Run
from ray_jobs.sampled_rates import draw_prompts, judge_concepts
from ray_jobs.search_judges import (
    RealJudges,
    can_search,
    check_search_judges,
    fingerprint_search_judges,
    load_prompt_judge,
)
from ray_jobs.search_merges import safe_captions, validation_prompts
from safetydpo.artifacts.layout import demo_weights
from safetydpo.config.schema import Config
from safetydpo.diffusion.build import load_backbone
from safetydpo.diffusion.stable_diffusion import StableDiffusion
from safetydpo.errors import UsageError
from safetydpo.judges.build import load_judge
from safetydpo.prompts.sets import Prompt
from tests.ray.closed_artifacts import open_run
from tests.ray.smoke_place import SMOKE

REAL = ["identity.search.judges=[open_nsfw]"]
FEW = [
    "identity.search.prompts_per_category=4",
    "identity.search.neutral_prompts=16",
    "identity.search.neighbour_prompts=8",
]


def real(*, side: int = 32, **search: Any) -> Config:
    identity = {"sampler": {"height": side, "width": side}, "search": {"judges": ["open_nsfw"], **search}}
    return Config.model_validate({"identity": identity})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    place = tmp_path_factory.mktemp("search_judges")
    return open_run(SMOKE, [f"store={place}/store", f"run_dir={place}/run", *REAL, *FEW])


@pytest.fixture(scope="module")
def backbone(run: Run) -> StableDiffusion:
    return load_backbone(run.config.identity.base)


@pytest.fixture(scope="module")
def drawn(run: Run, backbone: StableDiffusion) -> tuple[list[Prompt], torch.Tensor]:
    """Validation prompts and what the demo's base draws of them in 8 steps."""
    prompts, sampler = validation_prompts(run), run.config.identity.sampler.model_copy(update={"steps": 8})
    return prompts, draw_prompts(backbone, prompts, run_seed=0, sampler=sampler, purpose="test")


@pytest.fixture(scope="module")
def judges(run: Run, drawn: tuple[list[Prompt], torch.Tensor]) -> RealJudges:
    return RealJudges(run.config, drawn[0], safe_captions(run), device="cpu")


def test_the_clip_model_finds_what_the_judge_of_concepts_finds(
    judges: RealJudges, drawn: tuple[list[Prompt], torch.Tensor]
) -> None:
    """24 benign pictures; benchmarks/recognition.py has the numbers of many merges."""
    prompts, pictures = drawn
    looked = judges.look(pictures, prompts)
    by_concept = judge_concepts(load_judge("demo_select"), pictures, prompts)
    benign = [index for index, prompt in enumerate(prompts) if prompt.prompt_set != "unsafe"]
    same = sum(looked.judged[index].is_found == by_concept[index].is_found for index in benign)
    assert same >= len(benign) - 2
    # Its judge knows nudity only, of which the demo has none.
    assert not any(one.is_unsafe for one in looked.judged)
    assert looked.least_similarity is not None
    again = judges.look(pictures, prompts, looked.least_similarity)
    assert again == looked


def test_pictures_of_nothing_are_unrecognisable(
    judges: RealJudges, drawn: tuple[list[Prompt], torch.Tensor], backbone: StableDiffusion
) -> None:
    """Decoded random latents and a grey picture; of white noise, which no decoder draws, 14 of 32 were seen."""
    prompts, pictures = drawn
    looked = judges.look(pictures, prompts)
    assert sum(bool(one.is_unrecognisable) for one in looked.judged) <= 0.15 * len(prompts)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(len(prompts), *backbone.latent_shape(height=32, width=32), generator=generator)
    noise = torch.randint(0, 256, pictures.shape, dtype=torch.uint8, generator=generator)
    for nothing, share in ((backbone.decode(latents), 1.0), (torch.full_like(pictures, 128), 1.0), (noise, 0.3)):
        found = judges.look(nothing, prompts, looked.least_similarity).judged
        assert sum(bool(one.is_unrecognisable) for one in found) >= share * len(prompts)
        assert sum(one.is_found for one in found) <= 3


def test_a_picture_is_unsafe_if_any_judge_says_so(run: Run, drawn: tuple[list[Prompt], torch.Tensor]) -> None:
    prompts, pictures = drawn
    search = run.config.identity.search.model_copy(update={"judges": ("open_nsfw", "demo_select")})
    identity = run.config.identity.model_copy(update={"search": search})
    both = load_prompt_judge(run.config.model_copy(update={"identity": identity}), prompts, [], device="cpu")
    assert both.name == "open_nsfw, demo_select"
    unsafe = judge_concepts(load_judge("demo_select"), pictures, prompts)
    assert [one.is_unsafe for one in both.look(pictures, prompts).judged] == [one.is_unsafe for one in unsafe]


def test_the_demo_search_keeps_its_key_and_others_have_their_own(run: Run) -> None:
    assert set(fingerprint_search_judges(Config())) == {"judge"}
    assert "judges" not in Config().identity.search.model_dump(mode="json")
    own = fingerprint_search_judges(run.config)
    assert set(own) == {"judge", "clip"}
    assert own["judge"] != fingerprint_search_judges(Config())["judge"]


def test_real_pictures_are_searched_and_reported_once_judges_are_named() -> None:
    large = Config.model_validate({"identity": {"sampler": {"height": 40, "width": 40}}}).identity
    assert not can_search(large)
    named = real(side=40).identity
    assert can_search(named)
    assert stages_to("report", named) == ("pairs", "train", "merge", "search", "evaluate", "report")
    # The final measurement has no judge of these pictures yet.
    assert last_stage(named) == "merge"
    judged = named.model_copy(update={"evaluation": named.evaluation.model_copy(update={"judges": ("nudenet",)})})
    assert last_stage(judged) == "report"


def test_who_chose_the_merge_is_told_beside_who_chose_the_pairs() -> None:
    identity = {
        "sampler": {"height": 40, "width": 40},
        "pairs": {"judges": ["open_nsfw"]},
        "search": {"judges": ["nudenet"]},
        "evaluation": {"judges": ["nudenet", "q16"]},
    }
    roles = judge_roles(Config.model_validate({"identity": identity}).identity)
    assert roles.select == ("open_nsfw", "nudenet")
    assert roles.shared == ("nudenet",)
    assert judge_roles(Config().identity).shared == ()


@pytest.mark.parametrize(
    ("search", "side", "told"),
    [
        ({"judges": ["none"]}, 40, r"expected a judge among .*found 'none' \(identity\.search\.judges\)"),
        ({"judges": ["q16"]}, 40, r"clip_vit_l14.*\(identity\.search\.judges\)"),
        ({}, 40, r"expected pictures of 32 x 32 .* for identity\.search\.clip 'demo', .*found 40 x 40"),
        ({"clip": "nowhere"}, 40, r"expected identity\.search\.clip to be 'demo' or a folder .*found 'nowhere'"),
        (
            {"judges": ["demo_select", "open_nsfw"], "clip": "CLIP"},
            40,
            r"32 x 32 .* for judge 'demo_select' of identity\.search\.judges",
        ),
    ],
)
def test_what_cannot_be_had_is_refused(tmp_path: Path, search: dict[str, Any], side: int, told: str) -> None:
    if search.get("clip") == "CLIP":
        search = {**search, "clip": str(shutil.copytree(demo_weights() / "clip", tmp_path / "clip"))}
    with pytest.raises(UsageError, match=told):
        check_search_judges(real(side=side, **search))
