"""A malicious pickle under every name that a reader opens, and beside every file it reads: its mark never appears."""

from __future__ import annotations

import contextlib
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from safetydpo.artifacts.adapters import read_adapter
from safetydpo.artifacts.layout import demo_weights
from safetydpo.artifacts.lazy_tensors import LazyLayers
from safetydpo.artifacts.lora_files import read_lora_file
from safetydpo.artifacts.storage import open_location
from safetydpo.config.load import load_config
from safetydpo.config.schema import BaseModelConfig
from safetydpo.diffusion.build import base_fingerprint, load_backbone
from safetydpo.dpo.checkpoint import decode_checkpoint
from safetydpo.errors import SafetyDPOError
from safetydpo.judges.demo import load_select_judge
from safetydpo.judges.features import read_weights
from safetydpo.judges.multiheaded import load_heads
from safetydpo.judges.picture_files import read_picture
from safetydpo.merging.activations import inputs_from_bytes
from safetydpo.prompts.concepts import read_concepts
from safetydpo.prompts.readers import read_prompt_file
from tests.dpo.test_checkpoint import identity
from tests.ray.closed_artifacts import close_experts, open_run
from tests.ray.commands import Command
from tests.security.hostile import malicious_pickle, malicious_zip

ENDINGS = (".safetensors", ".bin", ".ckpt", ".pt", ".json", ".parquet", ".yaml", ".csv")
TRAPS = {"pickle": malicious_pickle, "torch archive": malicious_zip}


@pytest.fixture(params=list(TRAPS))
def trap(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[bytes]:
    """The bytes of a trap; afterwards its mark must not be there."""
    marker = tmp_path / "it ran"
    yield TRAPS[request.param](marker)
    assert not marker.exists()


@pytest.mark.parametrize("name", TRAPS)
def test_the_trap_works(name: str, tmp_path: Path):
    """Or nothing below would say anything."""
    marker = tmp_path / "it ran"
    file = tmp_path / "model.pt"
    file.write_bytes(TRAPS[name](marker))
    with contextlib.suppress(RuntimeError, pickle.UnpicklingError):
        torch.load(file, weights_only=False)
    assert marker.exists()


READERS: dict[str, Callable[[Path], object]] = {
    "adapter": lambda file: read_adapter(open_location(str(file))),
    "lora": lambda file: read_lora_file(open_location(str(file))),
    "layers": lambda file: LazyLayers(open_location(str(file))),
    "single_file": lambda file: load_backbone(BaseModelConfig(model=str(file), config=str(demo_weights() / "base"))),
    "checkpoint": lambda file: decode_checkpoint(file.read_bytes(), expected=identity(), where=str(file)),
    "activations": lambda file: inputs_from_bytes(file.read_bytes(), source=str(file), base_fingerprint="x"),
    "heads": lambda file: load_heads(file, width=768),
    "features": lambda file: read_weights(file, what="Inception", where="there"),
    "prompts": lambda file: read_prompt_file(open_location(str(file))),
    "concepts": read_concepts,
    "config": load_config,
    "picture": lambda file: read_picture(file.read_bytes()),
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("reader", READERS)
def test_a_renamed_pickle_is_refused_in_one_line(reader: str, ending: str, trap: bytes, tmp_path: Path):
    file = tmp_path / f"file{ending}"
    file.write_bytes(trap)
    with pytest.raises(SafetyDPOError) as caught:
        READERS[reader](file)
    assert "\n" not in str(caught.value)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the demo's base model."""
    return Path(shutil.copytree(demo_weights() / "base", tmp_path / "model"))


def test_pickles_beside_the_weights_of_a_model_are_not_looked_at(model: Path, trap: bytes):
    before = base_fingerprint(BaseModelConfig(model=str(model)))
    for folder in ("", "unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        for name in ("diffusion_pytorch_model", "pytorch_model", "model", "optimizer", "training_args"):
            for ending in (".bin", ".ckpt", ".pt", ".pth", ".pkl"):
                (model / folder / f"{name}{ending}").write_bytes(trap)
    load_backbone(BaseModelConfig(model=str(model)))
    assert base_fingerprint(BaseModelConfig(model=str(model))) == before


@pytest.mark.parametrize("network", ["unet", "vae", "text_encoder"])
def test_a_model_whose_weights_are_pickles_is_refused(network: str, model: Path, trap: bytes):
    for weights in (model / network).glob("*.safetensors"):
        weights.write_bytes(trap)
    with pytest.raises(SafetyDPOError, match="safetensors"):
        load_backbone(BaseModelConfig(model=str(model)))
    for weights in (model / network).glob("*.safetensors"):
        weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(SafetyDPOError, match="which is never read"):
        load_backbone(BaseModelConfig(model=str(model)))


def test_a_judge_whose_weights_are_a_pickle_is_refused(tmp_path: Path, trap: bytes):
    folder = Path(shutil.copytree(demo_weights() / "judge_select", tmp_path / "judge"))
    (folder / "model.safetensors").write_bytes(trap)
    with pytest.raises(SafetyDPOError, match="expected the labels and weights of a demo judge in"):
        load_select_judge(folder)


def test_pickles_in_the_store_and_the_run_folder_are_not_looked_at(command: Command, tmp_path: Path, trap: bytes):
    """Beside every file, under names that others' trainers give theirs; what is closed is found as before."""
    close_experts(open_run(command.config, command.places))
    assert command("pairs").code == 0
    folders = {file.parent for root in ("store", "run") for file in (tmp_path / root).rglob("*") if file.is_file()}
    assert len(folders) > 3
    for folder in folders:
        for name in ("checkpoint.pt", "model.pkl", "pytorch_model.bin", "state.ckpt", "trainer.pkl", ".tune_metadata"):
            (folder / name).write_bytes(trap)
    assert command("pairs").code == 0


def test_an_expert_that_is_a_pickle_stops_the_merge(command: Command, trap: bytes):
    file = close_experts(open_run(command.config, command.places))["shocking"]
    file.local_path.write_bytes(trap)
    command("merge").assert_one_line(f"expected a safetensors file at {file}", code=1)


@pytest.mark.parametrize("name", ["record.json", "selections.parquet", "prompt_pairs.parquet"])
def test_a_pickle_in_place_of_a_file_of_the_store_stops_the_run(
    command: Command, tmp_path: Path, trap: bytes, name: str
):
    close_experts(open_run(command.config, command.places))
    for file in (tmp_path / "store" / "pairs").rglob(name):
        file.write_bytes(trap)
    command("train").assert_one_line(name, code=1)


@pytest.mark.parametrize("name", ["artifacts.json", "identity.json"])
def test_a_pickle_in_place_of_a_file_of_the_run_folder_stops_the_run(
    command: Command, tmp_path: Path, trap: bytes, name: str
):
    close_experts(open_run(command.config, command.places))
    assert command("pairs").code == 0
    (tmp_path / "run" / name).write_bytes(trap)
    command("pairs").assert_one_line(name, code=1)
