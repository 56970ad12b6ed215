"""Layer inputs on Ray: the bytes of one process, whatever the number of workers and whoever dies on the way."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from ray_jobs import layer_inputs
from ray_jobs.expert_files import INPUTS_FILE, MOMENTS_FILE, record_folder
from ray_jobs.layer_inputs import Content, chosen_prompts, collect_layer_inputs
from ray_jobs.run import Run, with_absolute_paths
from safetydpo.artifacts.schemas import sha256_of
from safetydpo.config.schema import Config
from safetydpo.diffusion.build import load_backbone
from safetydpo.merging.activations import collect_inputs, inputs_to_bytes
from safetydpo.merging.moments import BENIGN, MomentSums, moments_to_bytes
from safetydpo.seeding import derive_seed
from tests.ray.toy_workers import DyingInputsWorker
from tests.tiny import build_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]


def open_run(place: Path, name: str, *, workers: int) -> Run:
    """Three prompts of each of three categories and six benign ones in batches of four: groups share batches."""
    config: dict[str, Any] = {
        "name": "test",
        "identity": {
            "base": {"model": str(place / "model")},
            "prompts": {"categories": ["violence", "shocking", "hate"]},
            "sampler": {"steps": 2, "batch_size": 4},
            "lora": {"rank": 2},
            "merge": {"activation_prompts_per_category": 3, "activation_timesteps": [801, 201]},
        },
        "execution": {
            "num_workers": workers,
            "logical_cpus": 4,
            "store": str(place / name),
            "run_dir": str(place / f"{name}-run"),
        },
    }
    return Run(with_absolute_paths(Config.model_validate(config)))


@pytest.fixture(scope="module")
def place(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    build_tiny_model(folder / "model")
    return folder


@pytest.fixture(scope="module")
def expected(place: Path) -> dict[str, bytes]:
    """All prompts in this process, in one loop."""
    run = open_run(place, "expected", workers=1)
    identity, prompts = run.config.identity, chosen_prompts(run)
    assert [prompt.group for prompt in prompts] == ["violence"] * 3 + ["shocking"] * 3 + ["hate"] * 3 + [BENIGN] * 6
    backbone = load_backbone(identity.base)
    sums = MomentSums([prompt.group for prompt in prompts])
    inputs = collect_inputs(
        backbone,
        prompts=[prompt.text for prompt in prompts],
        seeds=[derive_seed(identity.seed, "activation_noise", prompt.text) for prompt in prompts],
        timesteps=(801, 201),
        targets=identity.lora.layer_targets,
        sampler=identity.sampler,
        observe=sums,
    )
    return {
        INPUTS_FILE: inputs_to_bytes(
            {name: values[: 9 * 2] for name, values in inputs.items()}, base_fingerprint=backbone.fingerprint
        ),
        MOMENTS_FILE: moments_to_bytes(sums.means(), base_fingerprint=backbone.fingerprint),
    }


def check(run: Run, expected: dict[str, bytes]) -> None:
    record = collect_layer_inputs(run, Content.INPUTS_AND_MOMENTS)
    folder = record_folder(run, record)
    assert {name: (folder / name).read_bytes() for name in expected} == expected
    assert record.fingerprint == sha256_of([hashlib.sha256(data).hexdigest() for data in expected.values()])
    assert record.counts["prompts"] == 15
    assert not (folder / layer_inputs.PARTS_FOLDER).exists()


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.long), 3])
def test_any_number_of_workers_gives_the_bytes_of_one_process(
    place: Path, expected: dict[str, bytes], workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The work is too small to be worth more than one otherwise.
    monkeypatch.setattr("ray_jobs.resources.NETWORK_PASSES_PER_WORKER", 1)
    check(open_run(place, f"workers-{workers}", workers=workers), expected)


def test_a_worker_that_dies_in_the_middle_changes_no_byte(
    place: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_inputs, "InputsWorker", DyingInputsWorker)
    run = open_run(place, "killed", workers=1)
    check(run, expected)
    (artifact,) = (run.store / "layer_inputs").list()
    assert (artifact / "died").is_file()


def test_without_moments_the_same_inputs_and_nothing_else(place: Path, expected: dict[str, bytes]) -> None:
    run = open_run(place, "inputs-only", workers=1)
    record = collect_layer_inputs(run, Content.INPUTS)
    folder = record_folder(run, record)
    assert (folder / INPUTS_FILE).read_bytes() == expected[INPUTS_FILE]
    assert record.fingerprint == sha256_of([hashlib.sha256(expected[INPUTS_FILE]).hexdigest()])
    assert record.counts["prompts"] == 9
    assert sorted(file.name for file in folder.walk()) == [INPUTS_FILE, "record.json"]
