"""SD3 and FLUX.1 as single files, whole and in the parts that are published."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from safetydpo.config.schema import BaseModelConfig
from safetydpo.diffusion.backbone import Backbone
from safetydpo.diffusion.build import base_fingerprint, check_targets, load_backbone
from safetydpo.diffusion.folder import CONFIG_PATTERNS
from safetydpo.diffusion.original_layout import networks_beside
from safetydpo.errors import SafetyDPOError
from tests.diffusion.original_transformers import FLUX_ENCODERS, SD3_ENCODERS, save_flux_file, save_sd3_file
from tests.diffusion.tiny_models import build_model

SD3_PARTS = ("vae", *SD3_ENCODERS)


def build_sd3(folder: Path, name: str = "sd3") -> Path:
    """Write a tiny model whose first text encoder projects by the identity, as all published ones do."""
    build_model(name, folder)
    (file,) = (folder / "text_encoder").glob("*.safetensors")
    weights = load_file(file)
    weights["text_projection.weight"] = torch.eye(len(weights["text_projection.weight"]))
    save_file(weights, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_sd3(tmp_path_factory.mktemp("models") / "sd3")


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "flux"
    build_model("flux-dev", folder)
    return folder


def without_weights(folder: Path, place: Path, *, of: Collection[str] | None = None) -> Path:
    """Copy a model's folder without weights, or without those `of` some networks."""
    shutil.copytree(folder, place)
    for file in place.glob("*/*.safetensors"):
        if of is None or file.parent.name in of:
            file.unlink()
    return place


def draw(backbone: Any) -> tuple[Tensor, Tensor]:
    for network in (backbone.network, backbone._vae, *(tower._encoder for tower in backbone._towers)):
        for parameter in network.parameters():
            # Weights lie where they lie in their file, and a product's last bit depends on the alignment.
            parameter.data = parameter.data.clone()
    noise = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    prompts, empty = backbone.encode_prompts(["a red ball", "a dagger"]), backbone.encode_prompts([""])
    latents = backbone.sample(noise, prompts, empty=empty, steps=3, guidance_scale=3.0)
    return latents, backbone.decode(latents)


def assert_equal(single: Backbone, whole: Backbone) -> None:
    assert not any(parameter.requires_grad for parameter in single.network.parameters())
    for one, other in zip(draw(single), draw(whole), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["sd3", "sd3-without-t5", "sd3-dual"])
def test_a_whole_sd3_file_computes_what_its_folder_does(name: str, tmp_path: Path):
    """The same latents and pictures, bit for bit; `sd3-dual` has the second attention of SD3.5 medium."""
    whole = build_sd3(tmp_path / "whole", name)
    parts = [part for part in SD3_PARTS if (whole / part).is_dir()]
    save_sd3_file(whole, tmp_path / "one.safetensors", parts=parts)
    bare = without_weights(whole, tmp_path / "bare")
    base = BaseModelConfig(model=str(tmp_path / "one.safetensors"), config=str(bare))
    assert base_fingerprint(base) == load_backbone(base).fingerprint
    assert_equal(load_backbone(base), load_backbone(BaseModelConfig(model=str(whole))))
    check_targets(base, ["attn.to_q", "attn.add_k_proj"])


@pytest.mark.parametrize("parts", [(), ("vae",), ("vae", "text_encoder", "text_encoder_2")])
def test_what_an_sd3_file_lacks_is_read_from_the_folder_beside_it(sd3: Path, tmp_path: Path, parts: tuple[str, ...]):
    """As they are published: transformer only, with the autoencoder, with both CLIPs; what is held is not needed."""
    save_sd3_file(sd3, tmp_path / "one.safetensors", parts=parts)
    beside = without_weights(sd3, tmp_path / "beside", of=[*parts, "transformer"])
    base = BaseModelConfig(model=str(tmp_path / "one.safetensors"), config=str(beside))
    found = base_fingerprint(base)
    assert load_backbone(base).fingerprint == found
    assert_equal(load_backbone(base), load_backbone(BaseModelConfig(model=str(sd3))))
    # What is read from beside counts, what the file holds does not.
    (file,) = (beside / "text_encoder_3").glob("*.safetensors")
    weights = load_file(file)
    save_file({**weights, "shared.weight": weights["shared.weight"] + 1}, file, metadata={"format": "pt"})
    assert base_fingerprint(base) != found
    lost = without_weights(sd3, tmp_path / "lost")
    message = (
        r"expected safetensors weights in .*lost/text_encoder.*, because one.safetensors holds none of the text_en"
    )
    for use in (load_backbone, base_fingerprint):
        with pytest.raises(SafetyDPOError, match=message):
            use(base.model_copy(update={"config": str(lost)}))


def test_t5_in_8_bits_is_computed_with_as_it_is(sd3: Path, tmp_path: Path):
    """Its numbers, rounded to 8 bits, in the compute type; the same as from a folder with the rounded numbers."""
    save_sd3_file(sd3, tmp_path / "one.safetensors", parts=SD3_PARTS, half_t5=True)
    rounded = Path(shutil.copytree(sd3, tmp_path / "rounded"))
    (file,) = (rounded / "text_encoder_3").glob("*.safetensors")
    weights = {name: tensor.to(torch.float8_e4m3fn).float() for name, tensor in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    base = BaseModelConfig(model=str(tmp_path / "one.safetensors"), config=str(sd3))
    assert_equal(load_backbone(base), load_backbone(BaseModelConfig(model=str(rounded))))


def test_an_autoencoder_of_its_own_stands_for_one_that_the_file_lacks(sd3: Path, tmp_path: Path):
    save_sd3_file(sd3, tmp_path / "one.safetensors", parts=tuple(SD3_ENCODERS))
    bare = without_weights(sd3, tmp_path / "bare")
    base = BaseModelConfig(model=str(tmp_path / "one.safetensors"), config=str(bare), vae=str(sd3 / "vae"))
    assert_equal(load_backbone(base), load_backbone(BaseModelConfig(model=str(sd3))))


def test_a_file_that_lacks_weights_of_a_network_it_holds_is_refused(sd3: Path, flux: Path, tmp_path: Path):
    save_sd3_file(sd3, tmp_path / "sd3.safetensors", parts=SD3_PARTS)
    for lost, component in (("joint_blocks.1", "transformer"), ("t5xxl.transformer.encoder.block", "text_encoder_3")):
        kept = {name: t for name, t in load_file(tmp_path / "sd3.safetensors").items() if lost not in name}
        save_file(kept, tmp_path / "less.safetensors")
        with pytest.raises(SafetyDPOError, match=rf"expected all weights of the {component} \(\w+\) in .*less.safet"):
            load_backbone(BaseModelConfig(model=str(tmp_path / "less.safetensors"), config=str(sd3)))
    save_file({"double_blocks.0.x": torch.ones(1)}, tmp_path / "flux.safetensors")
    with pytest.raises(SafetyDPOError, match=r"weights of the transformer .*flux.safetensors, found none of some"):
        load_backbone(BaseModelConfig(model=str(tmp_path / "flux.safetensors"), config=str(flux)))


def test_only_the_parts_that_are_missing_are_fetched(sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[str, ...]] = []

    def snapshot_download(_name: str, *, allow_patterns: list[str], **_arguments: Any) -> str:
        asked.append(tuple(allow_patterns))
        return str(sd3)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    save_sd3_file(sd3, tmp_path / "one.safetensors", parts=("vae", "text_encoder", "text_encoder_2"))
    base_fingerprint(BaseModelConfig(model=str(tmp_path / "one.safetensors"), config="owner/name"))
    configurations, weights = asked
    assert configurations == CONFIG_PATTERNS
    assert {pattern.split("/")[0] for pattern in set(weights) - set(CONFIG_PATTERNS)} == {"text_encoder_3"}
    save_sd3_file(sd3, tmp_path / "one.safetensors", parts=SD3_PARTS)
    asked.clear()
    base_fingerprint(BaseModelConfig(model=str(tmp_path / "one.safetensors"), config="owner/name"))
    assert asked == [CONFIG_PATTERNS]


def test_networks_beside_by_hand():
    names = ["model.diffusion_model.joint_blocks.0.x", "first_stage_model.y", "text_encoders.clip_g.z", "__metadata__"]
    assert networks_beside("StableDiffusion3Pipeline", names) == ("text_encoder", "text_encoder_3")
    assert networks_beside("FluxPipeline", ["double_blocks.0.img_mod.lin.bias"]) == (
        "text_encoder",
        "text_encoder_2",
        "vae",
    )
    # The denoiser is what such a file is for: one without is damaged. Other families hold everything.
    assert networks_beside("FluxPipeline", []) == ("text_encoder", "text_encoder_2", "vae")
    assert networks_beside("StableDiffusionXLPipeline", []) == ()


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("is_published", [True, False])
def test_a_flux_file_computes_what_its_folder_does(flux: Path, tmp_path: Path, is_published: bool):
    """One block of each kind at the true width of 3072, which diffusers' key table takes for given (1 GB in 16 bits).

    Published files hold the transformer only; others hold everything, the transformer's names after a prefix.
    """
    whole = Path(shutil.copytree(flux, tmp_path / "whole"))
    config = json.loads((whole / "transformer" / "config.json").read_text())
    size = {"num_attention_heads": 24, "attention_head_dim": 128, "axes_dims_rope": (16, 56, 56)}
    torch.manual_seed(0)
    with torch.device("meta"):
        transformer = FluxTransformer2DModel.from_config({**config, **size})
    transformer = transformer.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.normal_(std=0.02)
    shutil.rmtree(whole / "transformer")
    transformer.save_pretrained(whole / "transformer")
    parts = () if is_published else ("vae", *FLUX_ENCODERS)
    prefix = "" if is_published else "model.diffusion_model."
    save_flux_file(whole, tmp_path / "one.safetensors", parts=parts, prefix=prefix)
    beside = without_weights(whole, tmp_path / "beside", of=[*parts, "transformer"])
    base = BaseModelConfig(model=str(tmp_path / "one.safetensors"), config=str(beside), dtype="bfloat16")
    assert_equal(load_backbone(base), load_backbone(BaseModelConfig(model=str(whole), dtype="bfloat16")))
