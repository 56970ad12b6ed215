"""One more expert leaves the layer inputs as they are; moments are made where they are needed, in bounded memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch

from ray_jobs import expert_files, layer_inputs
from ray_jobs.expert_files import INPUTS_FILE, MOMENTS_FILE, read_aids
from ray_jobs.layer_inputs import (
    BENIGN_FACTOR,
    Content,
    GroupedPrompt,
    chosen_prompts,
    collect_layer_inputs,
    find_layer_inputs,
    join_parts,
    layer_inputs_key,
    part_file,
)
from ray_jobs.merge_experts import find_aids, merge_aids, wanted_content
from ray_jobs.run import Run, with_absolute_paths
from safetydpo.artifacts.records import Record
from safetydpo.artifacts.schemas import sha256_of
from safetydpo.artifacts.storage import open_location
from safetydpo.config.load import load_config
from safetydpo.config.schema import Config
from safetydpo.errors import SafetyDPOError
from safetydpo.merging import activations, moments
from safetydpo.merging.collected import write_collected
from safetydpo.merging.moments import BENIGN
from safetydpo.merging.registry import find_method
from tests.ray.fresh_process import in_fresh_process


def open_run(place: Path, **experts: Any) -> Run:
    config: dict[str, Any] = {
        "name": "test",
        "identity": {
            "prompts": {"categories": ["violence", "hate"]},
            "merge": {"activation_prompts_per_category": 2},
            "experts": experts,
        },
        "execution": {"store": str(place / "store"), "run_dir": str(place / "run")},
    }
    return Run(with_absolute_paths(Config.model_validate(config)))


def test_prompts_are_unsafe_ones_by_category_and_then_benign_ones(tmp_path: Path) -> None:
    prompts = chosen_prompts(open_run(tmp_path))
    assert [prompt.group for prompt in prompts] == ["violence"] * 2 + ["hate"] * 2 + [BENIGN] * 2 * BENIGN_FACTOR
    assert len({prompt.text for prompt in prompts}) == len(prompts)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Content]:
    """What was collected instead of found."""
    contents: list[Content] = []

    def collect(run: Run, folder: Any, prompts: Any, content: Content) -> dict[str, Any]:
        contents.append(content)
        return {"fingerprint": sha256_of(content.value)}

    monkeypatch.setattr(layer_inputs, "_make", collect)
    return contents


def test_other_experts_find_what_is_collected(tmp_path: Path, made: list[Content]) -> None:
    """An expert per category, then one per concept: one collection, and no pass through the base for the second."""
    first = collect_layer_inputs(open_run(tmp_path), Content.INPUTS)
    second = collect_layer_inputs(open_run(tmp_path, group_by="concept"), Content.INPUTS)
    assert first.hash == second.hash
    assert len(made) == 1


def test_inputs_with_moments_have_the_key_that_they_always_had() -> None:
    run = Run(Config.model_validate({"name": "test"}))
    vars(run)["base_fingerprint"] = "b" * 64
    prompts = [GroupedPrompt("hate", "a"), GroupedPrompt(BENIGN, "b")]
    key = layer_inputs_key(run, prompts, Content.INPUTS_AND_MOMENTS)
    assert key.hash == "6fec503b34c926f1477e9e9b0914a9b4fdbbd6872338c59b46a78cd1f544ed79"
    assert layer_inputs_key(run, prompts, Content.INPUTS).hash != key.hash


def test_stored_moments_serve_where_none_are_needed(tmp_path: Path, made: list[Content]) -> None:
    run = open_run(tmp_path)
    assert find_layer_inputs(run, Content.INPUTS) is None
    both = collect_layer_inputs(run, Content.INPUTS_AND_MOMENTS)
    assert collect_layer_inputs(run, Content.INPUTS) == both == find_layer_inputs(run, Content.INPUTS)
    assert made == [Content.INPUTS_AND_MOMENTS]


def test_moments_that_come_later_leave_a_run_with_what_it_has(tmp_path: Path, made: list[Content]) -> None:
    run = open_run(tmp_path)
    inputs = collect_layer_inputs(run, Content.INPUTS)
    assert find_layer_inputs(run, Content.INPUTS_AND_MOMENTS) is None
    both = collect_layer_inputs(run, Content.INPUTS_AND_MOMENTS)
    assert made == [Content.INPUTS, Content.INPUTS_AND_MOMENTS]
    assert collect_layer_inputs(run, Content.INPUTS) == inputs == find_layer_inputs(run, Content.INPUTS)
    assert find_layer_inputs(run, Content.INPUTS_AND_MOMENTS) == both
    assert len(made) == 2


@pytest.mark.parametrize(
    ("merge", "search", "expected"),
    [
        ({"methods": ["sum", "co_merge"]}, ["sum"], Content.INPUTS),
        ({"methods": ["co_merge", "regmean"]}, ["sum"], Content.INPUTS_AND_MOMENTS),
        # The search of the same run needs them: its merges before the search take the same artifact.
        ({"methods": ["co_merge"]}, ["regmean"], Content.INPUTS_AND_MOMENTS),
        ({"methods": ["co_merge"], "within_category": {"method": "regmean"}}, ["sum"], Content.INPUTS_AND_MOMENTS),
        ({"methods": ["co_merge"], "distill": {"start_method": "regmean"}}, ["sum"], Content.INPUTS),
        ({"methods": ["co_merge"], "distill": {"start_method": "regmean"}}, ["distill"], Content.INPUTS_AND_MOMENTS),
    ],
)
def test_moments_are_collected_for_methods_that_need_them(
    tmp_path: Path, made: list[Content], merge: dict[str, Any], search: list[str], expected: Content
) -> None:
    config = open_run(tmp_path).config.model_dump(mode="json")
    config["identity"]["merge"] |= merge
    config["identity"]["search"]["methods"] = search
    run = Run(Config.model_validate(config))
    aids = merge_aids(run, {}, cast("Record", None), run.store, methods=[find_method("co_merge")])
    assert made == [expected]
    assert aids.layer_inputs == find_layer_inputs(run, expected)
    assert find_aids(run, {}, cast("Record", None), run.store, methods=[find_method("co_merge")]) == aids


def test_a_search_that_cannot_be_asks_for_no_moments(tmp_path: Path) -> None:
    """Pictures of another size than the demo's have no judge by default, and so no search."""
    config = open_run(tmp_path).config.model_dump(mode="json")
    config["identity"]["search"]["methods"] = ["regmean"]
    assert wanted_content(Run(Config.model_validate(config)), []) is Content.INPUTS_AND_MOMENTS
    config["identity"]["sampler"] |= {"height": 1024, "width": 1024}
    assert wanted_content(Run(Config.model_validate(config)), []) is Content.INPUTS


@pytest.mark.parametrize(
    ("name", "methods", "expected"),
    [
        ("demo", (), Content.INPUTS_AND_MOMENTS),
        ("evidence", (), Content.INPUTS_AND_MOMENTS),
        ("merge_evidence", ("regmean", "co_merge"), Content.INPUTS_AND_MOMENTS),
        ("scale", (), Content.INPUTS),
    ],
)
def test_what_the_shipped_configs_collect(
    configs: Path, name: str, methods: tuple[str, ...], expected: Content
) -> None:
    run = Run(load_config(configs / f"{name}.yaml"))
    assert wanted_content(run, [find_method(method) for method in methods]) is expected


GROUPS, MODULES, WIDTH = ("a", "b", "c", "d", "e", "f", BENIGN), 8, 1024


def test_parts_are_joined_one_tensor_at_a_time(tmp_path: Path) -> None:
    """7 groups x 8 modules x 1024^2 x 4 bytes = 235 MB of moments, 4 MB each: memory grows by a few of them only."""
    peak_bytes, folder = in_fresh_process(join_large_parts, str(tmp_path))
    assert open_location(folder).size_bytes() > len(GROUPS) * MODULES * 4 * WIDTH**2
    assert peak_bytes < 10 * 4 * WIDTH**2


def join_large_parts(place: str) -> tuple[int, str]:
    """Join large synthetic parts; return how far memory grew above what it was, and the file of moments."""
    folder = open_location(place)
    names = [f"down.{number}.to_q" for number in range(MODULES)]
    for number, group in enumerate(GROUPS):
        for file, shape, type_, kind in (
            (INPUTS_FILE, (4, 16, WIDTH), "F16", activations.METADATA_KEY),
            (MOMENTS_FILE, (WIDTH, WIDTH), "F32", moments.METADATA_KEY),
        ):
            prefix = "" if file == INPUTS_FILE else f"{group}/"
            write_collected(
                part_file(folder / layer_inputs.PARTS_FOLDER, sha256_of(group), file),
                {prefix + name: shape for name in names},
                lambda _, shape=shape, number=number: torch.full(shape, float(number)),
                number=cast("Any", type_),
                kind=kind,
                base_fingerprint="base",
            )
    before = peak_memory()
    # Two prompts of each group, whose inputs at two timesteps are four.
    prompt_groups = [group for group in GROUPS for _ in range(2)]
    join_parts(folder, prompt_groups, Content.INPUTS_AND_MOMENTS, base_fingerprint="base")
    return peak_memory() - before, (folder / MOMENTS_FILE).path


def peak_memory() -> int:
    """Return the most memory that this process has held, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


def test_large_moments_are_read_one_layer_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run(tmp_path)
    vars(run)["base_fingerprint"] = "base"
    values = {"q": {"hate": torch.eye(3), BENIGN: torch.ones(3, 3)}}
    file = open_location(str(tmp_path / "inputs")).make_folder() / MOMENTS_FILE
    file.write_bytes(moments.moments_to_bytes(values, base_fingerprint="base"))
    folders = {"layer_inputs": str(tmp_path / "inputs")}
    kept = read_aids(run, folders, methods=["regmean"])["moments"]
    monkeypatch.setattr(expert_files, "MAX_INPUT_BYTES", 0)
    stored = read_aids(run, folders, methods=["regmean"])["moments"]
    assert torch.equal(stored["q"]["hate"], kept["q"]["hate"])
    file.delete()
    assert torch.equal(kept["q"][BENIGN], torch.ones(3, 3))
    with pytest.raises(SafetyDPOError, match="expected a readable file"):
        stored["q"][BENIGN]
