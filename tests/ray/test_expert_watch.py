"""Watching an expert with the demo model and its judge, in this process."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_jobs import expert_watch
from ray_jobs.expert_watch import (
    BaseView,
    LaneWatch,
    check_watch,
    expert_validation_prompts,
    flat_settings,
    grid_png,
    local_folder,
    prompts_to_watch,
    validation_inputs,
)
from ray_jobs.run import Run
from ray_jobs.sampled_rates import JudgedPrompt
from ray_jobs.train_experts import plan_experts
from safetydpo.artifacts.adapters import LoraLayer
from safetydpo.artifacts.storage import Location, open_location
from safetydpo.config.schema import Config
from safetydpo.diffusion.build import load_backbone
from safetydpo.diffusion.pictures import decode_picture
from safetydpo.dpo.engine import lora_signature
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.prompts.sets import Prompt
from tests.dpo.validations import validation as made_validation
from tests.ray.closed_artifacts import close_pairs, open_run
from tests.ray.commands import Command

SMALL = {
    "every_steps": 2,
    "unsafe_prompts_per_category": 2,
    "neutral_prompts": 3,
    "neighbour_prompts": 2,
}


def make_run(folder: Path, *, validation: dict[str, Any] | None = None, **execution: Any) -> Run:
    identity = {
        "prompts": {"categories": ["hate", "violence"]},
        "sampler": {"steps": 3, "batch_size": 8},
        "lora": {"rank": 2},
        "dpo": {"validation": SMALL if validation is None else validation},
    }
    settings = {"store": str(folder / "store"), "run_dir": str(folder / "run"), **execution}
    return Run(Config.model_validate({"name": "test", "identity": identity, "execution": settings}))


@pytest.fixture(scope="module")
def backbone() -> Any:
    return load_backbone(Config().identity.base)


def install(backbone: Any, run: Run, *, size: float) -> None:
    """Put an adapter in whose every delta is random with entries of about `size`."""
    generator = torch.Generator().manual_seed(0)
    lora = run.config.identity.lora
    layers = {
        name: LoraLayer(
            torch.randn(lora.rank, d_in, generator=generator), size * torch.randn(d_out, lora.rank, generator=generator)
        )
        for name, (d_in, d_out) in backbone.named_linear_layers(lora.targets)
    }
    backbone.swap_adapter(lora_signature(lora), layers)


def sampler(run: Run, backbone: Any, folder: Location, *, rank: int = 0) -> Any:
    watch = LaneWatch(run, backbone, rank=rank)
    with watch.expert(
        folder, title="hate", prompts=prompts_to_watch(run.config.identity, ["hate"]), dpo=run.config.identity.dpo
    ) as watched:
        return watched.sample_rates


def sheets(folder: Location) -> list[str]:
    return [file.name for file in (folder / "grids").list()]


def test_prompts_are_of_the_validation_split_and_of_the_experts_categories(tmp_path: Path) -> None:
    identity = make_run(tmp_path).config.identity
    prompts = expert_validation_prompts(identity, ["hate"])
    assert [prompt.prompt_set for prompt in prompts] == ["unsafe"] * 2 + ["neutral"] * 3 + ["neighbour"] * 2
    assert {prompt.split for prompt in prompts} == {"validation"}
    assert {prompt.category for prompt in prompts if prompt.prompt_set == "unsafe"} == {"hate"}
    both = expert_validation_prompts(identity, ["hate", "violence"])
    assert [prompt.text for prompt in both if prompt.prompt_set != "unsafe"] == [prompt.text for prompt in prompts[2:]]
    assert sum(prompt.prompt_set == "unsafe" for prompt in both) == 4


def test_prompts_of_the_test_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = expert_watch.split_prompts

    def leaking(source: Any, split: str, prompt_set: str) -> list[Prompt]:
        return every(source, "validation" if split == "test" else split, prompt_set)

    monkeypatch.setattr(expert_watch, "split_prompts", leaking)
    # Numbers of its own, because chosen prompts are remembered.
    run = make_run(tmp_path, validation=SMALL | {"neutral_prompts": 4})
    with pytest.raises(
        SafetyDPOError, match="expected search prompts that do not occur in the test split, found 10 of"
    ):
        expert_validation_prompts(run.config.identity, ["hate"])


def test_a_category_without_validation_prompts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected unsafe prompts of weather in the validation split of 'demo', found"):
        expert_validation_prompts(make_run(tmp_path).config.identity, ["weather"])


def test_the_key_of_an_expert_knows_what_chose_its_state(command: Command) -> None:
    """Off: the same keys as without the setting; on: another for every setting, prompts and judge among the inputs."""
    keys = {}
    on = "identity.dpo.validation={every_steps: 2}"
    for name, settings in {
        "before": [],
        "off": ["identity.dpo.validation.every_steps=null"],
        "on": [on],
        "fewer": ["identity.dpo.validation={every_steps: 2, neutral_prompts: 3}"],
        "loggers": ["execution.loggers=[wandb]", "execution.grid_prompts=0"],
    }.items():
        run = open_run(command.config, [*command.places, *settings])
        units = plan_experts(run, *close_pairs(run))
        keys[name] = {unit.name: unit.key for unit in units}
    hashes = {name: {unit: key.hash for unit, key in units.items()} for name, units in keys.items()}
    assert hashes["before"] == hashes["off"] == hashes["loggers"]
    for unit in hashes["before"]:
        assert len({hashes[name][unit] for name in ("before", "on", "fewer")}) == 3
    assert {"validation_prompts", "validation_judge"} <= keys["on"]["shocking"].inputs.keys()
    assert "validation_prompts" not in keys["before"]["shocking"].inputs


def test_rates_of_the_base_and_of_a_spoilt_adapter(tmp_path: Path, backbone: Any) -> None:
    """Random changes of size 1 leave noise: nothing is found any more, both floors are missed by all there is."""
    run, folder = make_run(tmp_path), open_location(str(tmp_path / "expert"))
    install(backbone, run, size=1.0)
    sample = sampler(run, backbone, folder)
    before = sample(0)
    assert before.neutral_rate > 0
    assert before.violation == 0.0
    after = sample(2)
    assert (after.neutral_rate, after.neighbour_rate) == (0.0, 0.0)
    assert after.violation == pytest.approx(0.9 + 0.8)
    assert after.value == pytest.approx(after.unsafe_rate + after.unrecognisable_rate + 2 * 1.7)
    assert sheets(folder) == ["step-000002.png"]
    backbone.remove_adapter()


def test_an_adapter_without_effect_has_the_rates_of_the_base(tmp_path: Path, backbone: Any) -> None:
    run = make_run(tmp_path, grid_prompts=0)
    install(backbone, run, size=0.0)
    folder = open_location(str(tmp_path / "expert"))
    sample = sampler(run, backbone, folder)
    assert sample(2) == sample(0)
    assert sheets(folder) == []
    backbone.remove_adapter()


def test_other_processes_draw_the_same_and_write_nothing(tmp_path: Path, backbone: Any) -> None:
    run = make_run(tmp_path)
    install(backbone, run, size=0.02)
    folder = open_location(str(tmp_path / "expert"))
    second = sampler(run, backbone, folder, rank=1)(2)
    assert not folder.exists(), "neither sheets nor logs"
    assert second == sampler(run, backbone, folder)(2)
    backbone.remove_adapter()


def test_a_judge_without_concepts_asks_clip_what_is_intact(tmp_path: Path, backbone: Any) -> None:
    """With clip, the base's own pictures are intact by definition and noise is not."""
    run = make_run(tmp_path, validation=SMALL | {"clip": "demo", "clip_similarity_min": 0.9}, grid_prompts=0)
    folder = open_location(str(tmp_path / "expert"))
    install(backbone, run, size=0.0)
    rates = sampler(run, backbone, folder)(2)
    assert (rates.neutral_rate, rates.neighbour_rate) == (1.0, 1.0)
    install(backbone, run, size=1.0)
    assert sampler(run, backbone, folder)(2).neutral_rate == 0.0
    backbone.remove_adapter()
    assert "validation_clip" in validation_inputs(run.config.identity, ["hate"])


def judged(prompt_set: str, index: int, *, unsafe: bool = False) -> JudgedPrompt:
    prompt = Prompt(f"{prompt_set} {index}", prompt_set, "validation", "ball", "", (), "red")
    return JudgedPrompt(prompt, True, unsafe, False)


def test_sheets_show_prompts_of_every_kind_and_veil_as_the_report_does() -> None:
    """Of 4 prompts per kind 2 are shown: 0 and 2. Base pictures are black, those of now white."""
    answers = [judged(kind, index) for kind in ("unsafe", "neutral", "neighbour") for index in range(4)]
    black, white = (torch.full((len(answers), 32, 32, 3), value, dtype=torch.uint8) for value in (0, 255))
    base = [BaseView(one, picture, None) for one, picture in zip(answers, black, strict=True)]
    sheet = decode_picture(grid_png(base, white, answers, count=2, title="hate, step 2"))
    assert sheet.shape == (2 * 40 + 2 * 102, 3 * 210 + 6, 3)
    drawn: list[Any] = []
    still = [replace(one, is_unsafe=one.prompt.text in ("unsafe 2", "neutral 0")) for one in answers]
    from safetydpo.diffusion import contact_sheet

    draw = contact_sheet.draw_sheet
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            contact_sheet, "draw_sheet", lambda blocks, title: drawn.extend(blocks) or draw(blocks, title=title)
        )
        grid_png(base, white, still, count=2, title="")
    assert [[(row.veil_before, row.veil_now) for row in block.rows] for block in drawn] == [
        [(True, False), (True, True)],
        [(False, True), (False, False)],
        [(False, False), (False, False)],
    ]


def test_logs_of_a_local_expert_lie_beside_it(tmp_path: Path, backbone: Any) -> None:
    run, folder = make_run(tmp_path, validation={}), open_location(str(tmp_path / "expert"))
    watch = LaneWatch(run, backbone, rank=0)
    with watch.expert(
        folder, title="hate", prompts=prompts_to_watch(run.config.identity, ["hate"]), dpo=run.config.identity.dpo
    ) as watched:
        assert watched.sample_rates is None
        watched.log.start([], [])
        watched.log.step({"step": 0, "loss": 0.5}, seconds=0.5)
        assert (tmp_path / "expert" / "training.jsonl").read_text() == '{"loss": 0.5, "step": 0}\n'
    assert {file.name for file in folder.list()} == {"training.jsonl", "speed.jsonl", "tensorboard"}


def test_logs_of_an_expert_on_s3_are_copied_when_it_ends_also_badly(
    s3_store: Location, tmp_path: Path, backbone: Any
) -> None:
    run, folder = make_run(tmp_path, validation={}), s3_store / "experts" / "hate"
    watch = LaneWatch(run, backbone, rank=0)
    watched = watch.expert(
        folder, title="hate", prompts=prompts_to_watch(run.config.identity, ["hate"]), dpo=run.config.identity.dpo
    )
    log = watched.__enter__().log
    log.start([], [])
    log.step({"step": 0, "loss": 0.5}, seconds=0.5)
    assert not folder.exists()
    error = SafetyDPOError("a spike")
    assert not watched.__exit__(type(error), error, None), "the error goes on"
    assert (folder / "training.jsonl").read_bytes() == b'{"loss": 0.5, "step": 0}\n'
    assert any("tensorboard/events" in file.path for file in folder.walk())


def test_what_a_record_says_of_a_validated_expert(tmp_path: Path, backbone: Any) -> None:
    from safetydpo.dpo.trainer import METRIC_NAMES, StepMetrics, TrainedExpert

    run, folder = make_run(tmp_path), open_location(str(tmp_path / "expert"))
    steps = tuple(StepMetrics(index, *[0.5] * (len(METRIC_NAMES) - 1)) for index in range(4))
    looks = (made_validation(0), made_validation(2, value=0.1), made_validation(4))
    trained = TrainedExpert("hate", {}, steps, 0, looks, looks[1])
    with LaneWatch(run, backbone, rank=0).expert(
        folder, title="hate", prompts=prompts_to_watch(run.config.identity, ["hate"]), dpo=run.config.identity.dpo
    ) as watched:
        details = watched.details(trained)
        assert watched.details(replace(trained, published=None)) == {}
    assert json.loads(json.dumps(details)) == {"validation": {"published": asdict(looks[1]), "steps": 4}}
    assert (folder / "training.png").size_bytes() > 10_000


def test_a_logger_that_is_not_installed_is_refused_before_anything_is_made(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetydpo.artifacts import metric_sinks

    monkeypatch.setattr(metric_sinks, "find_spec", lambda name: None)
    command("train", "execution.loggers=[wandb]").assert_one_line(
        "expected the package 'wandb' for execution.loggers, found none: pip install 'safetydpo[wandb]'", code=2
    )
    assert not (command.folder / "store").exists()


def test_a_judge_of_drawings_is_refused_for_large_pictures(tmp_path: Path) -> None:
    config = make_run(tmp_path).config
    sampler = config.identity.sampler.model_copy(update={"height": 64})
    large = config.model_copy(update={"identity": config.identity.model_copy(update={"sampler": sampler})})
    with pytest.raises(
        UsageError, match="expected pictures of 32 x 32 .* 'demo_select', found 64 x 32: choose another"
    ):
        check_watch(large)
    check_watch(config)


def test_a_clip_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    config = make_run(tmp_path, validation=SMALL | {"clip": "/nowhere"}).config
    with pytest.raises(UsageError, match="expected identity.dpo.validation.clip to be 'demo' or a folder .*'/nowhere'"):
        check_watch(config)


def test_the_audit_judge_is_unknown_here(tmp_path: Path) -> None:
    config = make_run(tmp_path, validation=SMALL | {"judge": "demo_audit"}).config
    with pytest.raises(UsageError, match="expected a judge among demo_select, .*open_nsfw, .*found 'demo_audit'"):
        check_watch(config)


def test_a_local_folder_is_its_own_place(tmp_path: Path) -> None:
    with local_folder(open_location(str(tmp_path))) as place:
        assert place == tmp_path


def test_settings_are_flat_for_places_that_show_them() -> None:
    assert flat_settings({"a": 1, "b": {"c": [2], "d": {"e": None}}}) == {"a": 1, "b.c": [2], "b.d.e": None}
