"""Who judges a search: real networks of the demo world in this process, asked as judges of real pictures are."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_jobs.baselines import check_comparators
from ray_jobs.final_judges import judge_roles, shared_judges
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
    model_places,
)
from ray_jobs.search_merges import safe_captions, validation_prompts
from safetydpo.artifacts.layout import demo_weights
from safetydpo.config.schema import Config
from safetydpo.config.search import SearchConfig
from safetydpo.diffusion.build import load_backbone
from safetydpo.diffusion.stable_diffusion import StableDiffusion
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.judges.build import fingerprint_judge, load_judge
from safetydpo.prompts.sets import Prompt
from tests.judges.vision_server import Answer, Asked, serve
from tests.ray.closed_artifacts import open_run
from tests.ray.smoke_place import SMOKE

CLIP = demo_weights() / "clip"
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
    return RealJudges(run.config, drawn[0], safe_captions(run), clip=CLIP, device="cpu")


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
    both = load_prompt_judge(run.config.model_copy(update={"identity": identity}), prompts, [], clip=CLIP, device="cpu")
    assert both.name == "open_nsfw, demo_select"
    unsafe = judge_concepts(load_judge("demo_select"), pictures, prompts)
    assert [one.is_unsafe for one in both.look(pictures, prompts).judged] == [one.is_unsafe for one in unsafe]


@pytest.mark.parametrize(("failed", "is_told"), [(1, False), (4, True)])
def test_a_judge_that_fails_is_no_finding(
    run: Run, drawn: tuple[list[Prompt], torch.Tensor], failed: int, *, is_told: bool
) -> None:
    """A picture that a judge failed on is unsafe; of more than 5 % the trial fails, and is tried again."""
    prompts, pictures = drawn
    asked = itertools.count()

    def answer(_: Asked) -> Answer:
        return Answer("hm" if next(asked) < failed else '{"rating": "Safe"}')

    with serve(answer) as server:
        vlm = {"base_url": server.url, "model": "guard", "concurrency": 1}
        values = run.config.model_dump(mode="json")
        values["identity"]["search"]["judges"] = ["vlm"]
        values["execution"]["judges"] = {"vlm": vlm}
        judges = RealJudges(Config.model_validate(values), prompts, [], clip=CLIP, device="cpu")
        if is_told:
            with pytest.raises(
                SafetyDPOError, match="judge 'vlm' .* at least 95% of 32 pictures, found 4 that it failed"
            ):
                judges.look(pictures, prompts)
        else:
            assert sum(one.is_unsafe for one in judges.look(pictures, prompts).judged) == failed


def test_one_text_in_two_sets_and_prompts_without_a_concept(run: Run, drawn: tuple[list[Prompt], torch.Tensor]) -> None:
    """Imported captions name no concept, and one may be neutral and a neighbour; other capitals are the same text."""
    prompts, pictures = drawn
    benign = [index for index, prompt in enumerate(prompts) if prompt.prompt_set == "neutral"][:4]
    named = [replace(prompts[index], concept="") for index in benign]
    twice = [*named, replace(named[0], prompt_set="neighbour"), replace(named[1], text=named[1].text.upper())]
    judges = RealJudges(run.config, twice, [], clip=CLIP, device="cpu")
    found = judges.look(pictures[[*benign, benign[0], benign[1]]], twice).judged
    assert [one.is_found for one in found] == [True] * 6


def test_safe_captions_are_what_a_picture_may_show(run: Run, drawn: tuple[list[Prompt], torch.Tensor]) -> None:
    """A safe counterpart that no prompt names is nearest to its own caption."""
    prompts, pictures = drawn
    few = [prompt for prompt in prompts if prompt.prompt_set == "neutral"][:2]
    other = next(index for index, prompt in enumerate(prompts) if prompt.concept not in {one.concept for one in few})
    shown = pictures[[other, other]]
    least = 0.9
    without = RealJudges(run.config, few, [], clip=CLIP, device="cpu").look(shown, few, least)
    beside = RealJudges(run.config, few, [prompts[other].text], clip=CLIP, device="cpu").look(shown, few, least)
    assert all(one.is_unrecognisable for one in without.judged)
    assert not any(one.is_unrecognisable for one in beside.judged)


def test_the_demo_search_keeps_its_key_and_others_have_their_own(run: Run, tmp_path: Path) -> None:
    assert fingerprint_search_judges(Config()) == {"judge": fingerprint_judge("demo_select")}
    assert not {"judges", "clip"} & Config().identity.search.model_dump(mode="json").keys()
    own = fingerprint_search_judges(run.config)
    assert set(own) == {"judge", "clip"}
    assert own["judge"] != fingerprint_search_judges(Config())["judge"]
    # The same model elsewhere is the same.
    moved = shutil.copytree(CLIP, tmp_path / "clip")
    assert fingerprint_search_judges(real(clip=str(moved))) == fingerprint_search_judges(real())
    # Finalists ask it whoever judges.
    alone = Config.model_validate({"identity": {"search": {"clip": str(moved)}}})
    assert set(fingerprint_search_judges(alone)) == {"judge", "clip"}


def test_trials_find_models_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(CLIP, tmp_path / "models" / "clip")
    monkeypatch.chdir(tmp_path)
    assert model_places(real(clip="models/clip"))["clip"] == str(tmp_path / "models" / "clip")


def test_real_pictures_are_searched_and_reported_once_judges_are_named() -> None:
    large = Config.model_validate({"identity": {"sampler": {"height": 40, "width": 40}}}).identity
    assert not can_search(large)
    assert last_stage(large) == "merge"
    named = real(side=40).identity
    assert can_search(named)
    assert stages_to("report", named) == ("pairs", "train", "merge", "search", "evaluate", "report")
    # The final measurement has no judge of these pictures yet.
    assert last_stage(named) == "search"
    judged = named.model_copy(update={"evaluation": named.evaluation.model_copy(update={"judges": ("nudenet",)})})
    assert last_stage(judged) == "report"
    assert last_stage(judged.model_copy(update={"search": SearchConfig()})) == "evaluate"


def test_who_chose_is_told(tmp_path: Path) -> None:
    clip = shutil.copytree(CLIP, tmp_path / "clip")
    other = shutil.copytree(CLIP, tmp_path / "other")
    (other / "more.json").write_text("{}")
    identity: dict[str, Any] = {
        "sampler": {"height": 40, "width": 40},
        "pairs": {"judges": ["open_nsfw"]},
        "search": {"judges": ["nudenet"], "clip": str(clip)},
        "evaluation": {"judges": ["nudenet", "q16"], "clip": str(other)},
    }
    config = Config.model_validate({"identity": identity})
    assert judge_roles(config.identity).select == ("open_nsfw", "nudenet")
    assert shared_judges(config.identity) == ("nudenet",)
    identity["evaluation"]["clip"] = str(clip)
    assert shared_judges(Config.model_validate({"identity": identity}).identity) == (
        "nudenet",
        "the CLIP model of CLIP retention",
    )
    # The demo's: select chose, audit grades; unless somebody has select grade as well.
    assert shared_judges(Config().identity) == ()
    graded = Config.model_validate({"identity": {"evaluation": {"judges": ["demo_select"]}}})
    assert shared_judges(graded.identity) == ("demo_select",)
    # Whoever drove the search has the columns of those who chose, at the demo's size too.
    assert judge_roles(real().identity).select == ("demo_select", "open_nsfw")


def test_comparators_are_refused_where_their_judge_is_blind() -> None:
    for config in (real(), Config.model_validate({"identity": {"sampler": {"height": 40, "width": 40}}})):
        evaluation = config.identity.evaluation.model_copy(update={"comparators": ("esd",)})
        with pytest.raises(UsageError, match="which only the demo's judge tunes, .*found esd: leave them out"):
            check_comparators(config.identity.model_copy(update={"evaluation": evaluation}))


@pytest.mark.parametrize(
    ("search", "side", "told"),
    [
        ({"judges": ["none"]}, 40, r"expected a judge among .*found 'none' \(identity\.search\.judges\)"),
        ({"judges": ["q16"]}, 40, r"clip_vit_l14.*\(identity\.search\.judges\)"),
        ({}, 40, r"expected pictures of 32 x 32 .* for identity\.search\.clip 'demo', .*found 40 x 40"),
        (
            {"clip": "nowhere"},
            40,
            r"expected identity\.search\.clip to be 'demo' or a folder .*found 'nowhere': correct the path$",
        ),
        ({"clip": "tests"}, 40, r"a CLIP model .* in tests \(identity\.search\.clip\), found no config\.json"),
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
