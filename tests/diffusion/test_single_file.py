from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from safetydpo.config.schema import BaseModelConfig
from safetydpo.diffusion.build import base_fingerprint, check_targets, load_backbone
from safetydpo.diffusion.folder import CONFIG_PATTERNS
from safetydpo.errors import SafetyDPOError, UsageError
from tests.diffusion.original_layout import save_single_file
from tests.diffusion.tiny_models import build_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd1")
    build_model("sd1", folder)
    return folder


@pytest.fixture(scope="module")
def configurations(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same folder without weights."""
    copy = tmp_path_factory.mktemp("configurations") / "only"
    return Path(shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.safetensors")))


@pytest.fixture(scope="module")
def file(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("file") / "v1-5-pruned.safetensors"
    save_single_file(folder, file, layers_per_block=1, num_blocks=2)
    return file


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_single_file_computes_what_its_folder_does(family: str, tmp_path: Path):
    """The same latents and pictures, bit for bit; with SDXL that includes both text encoders and the size embedding.

    The text encoder of SD2 has another layout and a last layer that is not used; its v-prediction stands in the folder.
    """
    build_model(family, tmp_path / "whole")
    save_single_file(
        tmp_path / "whole", tmp_path / "one.safetensors", layers_per_block=1, num_blocks=2, is_sd2=family == "sd2"
    )
    bare = shutil.copytree(
        tmp_path / "whole", tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors", "*.safetensors.*")
    )
    base = BaseModelConfig(model=str(tmp_path / "one.safetensors"), config=str(bare))
    single, whole = load_backbone(base), load_backbone(BaseModelConfig(model=str(tmp_path / "whole")))
    assert not any(parameter.requires_grad for parameter in single.network.parameters())
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    drawn = []
    for backbone in (single, whole):
        prompts, empty = backbone.encode_prompts(["a red ball", "a dagger"]), backbone.encode_prompts([""])
        drawn.append(backbone.sample(noise, prompts, empty=empty, steps=3, guidance_scale=3.0))
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(single.decode(drawn[0]), whole.decode(drawn[1]))
    half = load_backbone(base.model_copy(update={"dtype": "bfloat16"}))
    assert {parameter.dtype for parameter in half.network.parameters()} == {torch.bfloat16}


def test_quantised_weights_are_refused(configurations: Path, file: Path, tmp_path: Path):
    """diffusers would pass over the scale and compute with what the numbers mean only times it."""
    scale = "model.diffusion_model.out.2.scale_weight"
    save_file({**load_file(file), scale: torch.ones(1)}, tmp_path / "scaled.safetensors")
    base = BaseModelConfig(model=str(tmp_path / "scaled.safetensors"), config=str(configurations))
    for use in (load_backbone, base_fingerprint):
        with pytest.raises(SafetyDPOError, match=rf"expected plain weights in .*scaled.safetensors.*{scale}'\): use"):
            use(base)


def test_fingerprint_covers_file_configurations_and_autoencoder(
    folder: Path, configurations: Path, file: Path, tmp_path: Path
):
    base = BaseModelConfig(model=str(file), config=str(configurations))
    found = base_fingerprint(base)
    assert found == load_backbone(base).fingerprint != base_fingerprint(BaseModelConfig(model=str(folder)))
    # Weights beside the configurations are not read and do not count.
    assert found == base_fingerprint(base.model_copy(update={"config": str(folder)}))
    moved = shutil.copyfile(file, tmp_path / "another_name.safetensors")
    assert found == base_fingerprint(base.model_copy(update={"model": str(moved)}))
    with_vae = base.model_copy(update={"vae": str(folder)})
    assert base_fingerprint(with_vae) == load_backbone(with_vae).fingerprint != found
    other = Path(shutil.copytree(configurations, tmp_path / "other"))
    config = other / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text() + " ")
    assert found != base_fingerprint(base.model_copy(update={"config": str(other)}))


def test_targets_are_told_by_the_configuration(configurations: Path, file: Path):
    base = BaseModelConfig(model=str(file), config=str(configurations))
    check_targets(base, ["to_q", "ff.net.2"])
    with pytest.raises(UsageError, match="linear layers of the denoiser, found 'to_w', which names none"):
        check_targets(base, ["to_w"])


def test_configurations_may_come_from_a_hub(configurations: Path, file: Path, monkeypatch: pytest.MonkeyPatch):
    asked = {}

    def snapshot_download(name: str, **arguments: object) -> str:
        asked.update(arguments, name=name)
        return str(configurations)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    load_backbone(BaseModelConfig(model=str(file), config="owner/name"))
    assert asked == {"name": "owner/name", "revision": None, "allow_patterns": list(CONFIG_PATTERNS)}
    assert not any("safetensors" in pattern for pattern in CONFIG_PATTERNS)


@pytest.mark.parametrize(
    "prefix", ["model.diffusion_model.middle_block", "first_stage_model.decoder.mid", "cond_stage_model.transformer"]
)
def test_a_file_that_lacks_weights_is_refused_by_component(
    configurations: Path, file: Path, tmp_path: Path, prefix: str
):
    kept = {name: tensor for name, tensor in load_file(file).items() if not name.startswith(prefix)}
    save_file(kept, tmp_path / "less.safetensors")
    base = BaseModelConfig(model=str(tmp_path / "less.safetensors"), config=str(configurations))
    component = {"model": "unet", "first_stage_model": "vae", "cond_stage_model": "text_encoder"}[prefix.split(".")[0]]
    with pytest.raises(SafetyDPOError, match=rf"expected all weights of the {component} \(\w+\) in .*less.safetensors"):
        load_backbone(base)


def test_a_damaged_file_is_refused(configurations: Path, file: Path, tmp_path: Path):
    damaged = tmp_path / "cut.safetensors"
    damaged.write_bytes(file.read_bytes()[:-100])
    base = BaseModelConfig(model=str(damaged), config=str(configurations))
    with pytest.raises(SafetyDPOError, match=r"expected a safetensors file of .* cut short: fetch the file again"):
        base_fingerprint(base)
    with pytest.raises(SafetyDPOError, match=r"expected readable safetensors weights at .*cut.safetensors, found"):
        load_backbone(base)


def test_a_single_file_needs_configurations(folder: Path, file: Path):
    with pytest.raises(UsageError, match=r"expected base.config to name a local folder or hub id .* found null: name"):
        load_backbone(BaseModelConfig(model=str(file)))
    with pytest.raises(UsageError, match=r"expected base.config to be a local folder or a hub id .*, found '/no/such'"):
        load_backbone(BaseModelConfig(model=str(file), config="/no/such"))
    with pytest.raises(UsageError, match=r"expected base.config to be null, because base.model .* is no single file"):
        load_backbone(BaseModelConfig(model=str(folder), config=str(folder)))
    with pytest.raises(UsageError, match=r"expected base.revision to be null for the local model"):
        load_backbone(BaseModelConfig(model=str(file), config=str(folder), revision="main"))


@pytest.mark.parametrize(("name", "what"), [("model.ckpt", "the pickle"), ("model.onnx", "the file")])
def test_a_file_in_another_format_is_never_read(tmp_path: Path, name: str, what: str):
    (tmp_path / name).write_bytes(b"not read")
    with pytest.raises(UsageError, match=rf"single-file model in safetensors format, found {what} '{name}'"):
        load_backbone(BaseModelConfig(model=str(tmp_path / name)))
