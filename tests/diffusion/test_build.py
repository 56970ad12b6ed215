from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch

from safetydpo.artifacts import layout
from safetydpo.config.schema import BaseModelConfig
from safetydpo.diffusion.build import base_fingerprint, check_targets, load_backbone, resolve_folder
from safetydpo.diffusion.folder import HUB_PATTERNS, VAE_PATTERNS, linear_layers_of
from safetydpo.diffusion.targets import matches_suffix
from safetydpo.errors import SafetyDPOError, UsageError


def test_a_folder_is_loaded_by_its_index_whatever_its_name(tiny_folder: Path, tmp_path: Path):
    folder = shutil.copytree(tiny_folder, tmp_path / "sdxl-flux-sd3")
    config = BaseModelConfig(model=str(folder), dtype="bfloat16")
    backbone = load_backbone(config, device="cpu")
    assert type(backbone).__name__ == "StableDiffusion"
    assert next(backbone.network.parameters()).dtype == torch.bfloat16
    assert backbone.fingerprint == base_fingerprint(config)
    assert base_fingerprint(config) == base_fingerprint(BaseModelConfig(model=str(tiny_folder)))


def test_num_threads_is_set(tiny_folder: Path):
    before = torch.get_num_threads()
    try:
        load_backbone(BaseModelConfig(model=str(tiny_folder)), num_threads=before + 1)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_demo_is_the_packaged_folder(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(layout, "demo_weights", lambda: tmp_path)
    with pytest.raises(UsageError, match=r"expected the demo model in .*base, found no such folder: install"):
        resolve_folder(BaseModelConfig())
    shutil.copytree(tiny_folder, tmp_path / "base")
    assert resolve_folder(BaseModelConfig()) == tmp_path / "base"
    with pytest.raises(UsageError, match=r"expected base.revision to be null for the local model 'demo'"):
        resolve_folder(BaseModelConfig(revision="main"))


def test_a_local_folder_has_no_revision(tiny_folder: Path):
    with pytest.raises(UsageError, match=r"expected base.revision to be null for the local model"):
        resolve_folder(BaseModelConfig(model=str(tiny_folder), revision="main"))


def test_an_unsupported_family_is_refused_with_the_supported_ones(tiny_folder: Path, tmp_path: Path):
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "other"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "KandinskyPipeline"}))
    for call in (load_backbone, base_fingerprint):
        with pytest.raises(
            UsageError, match=r"supported family \(StableDiffusionPipeline, .*FluxPipeline\), found 'KandinskyPipeline'"
        ):
            call(BaseModelConfig(model=str(folder)))


def test_a_folder_without_index_is_refused(tmp_path: Path):
    with pytest.raises(SafetyDPOError, match=r"found no model_index.json in .*: save the model"):
        load_backbone(BaseModelConfig(model=str(tmp_path)))


@pytest.mark.parametrize("name", ["/no/such/folder", "./missing", "missing", "a/b/c", "owner/name@main"])
def test_a_missing_path_is_refused(name: str):
    with pytest.raises(UsageError, match=r"expected base.model to be 'demo', a local folder or a hub id"):
        load_backbone(BaseModelConfig(model=name))


def test_a_hub_model_is_fetched_without_pickles(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch):
    asked = {}

    def snapshot_download(name: str, **arguments: object) -> str:
        asked.update(arguments, name=name)
        return str(tiny_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve_folder(BaseModelConfig(model="owner/name", revision="abc")) == tiny_folder
    assert asked == {"name": "owner/name", "revision": "abc", "allow_patterns": list(HUB_PATTERNS)}


def test_an_unreachable_hub_model_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    def snapshot_download(name: str, **_: object) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(SafetyDPOError, match=r"reachable hub model 'owner/name', found neither \(ConnectionError\)"):
        resolve_folder(BaseModelConfig(model="owner/name"))


def test_targets_are_told_from_the_files_alone(tiny_folder: Path):
    """The same linear layers that the loaded network has; a misspelt one is refused, with those there are."""
    base = BaseModelConfig(model=str(tiny_folder))
    loaded = {name for name, _ in load_backbone(base).named_linear_layers(["to_q", "ff.net.2"])}
    found = set(linear_layers_of(tiny_folder / "unet"))
    assert {name for name in found if matches_suffix(name, ["to_q", "ff.net.2"])} == loaded
    check_targets(base, ["to_q", "ff.net.2"])
    with pytest.raises(UsageError, match=r"linear layers of the denoiser, found 'to_w', which names none: use .*to_q"):
        check_targets(base, ["to_q", "to_w"])


def test_another_autoencoder_is_found_on_a_hub_or_inside_a_model(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch):
    asked = {}

    def snapshot_download(name: str, **arguments: object) -> str:
        asked.update(arguments, name=name)
        return str(tiny_folder / "vae")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    fetched = base_fingerprint(BaseModelConfig(model=str(tiny_folder), vae="owner/vae-fix"))
    assert asked == {"name": "owner/vae-fix", "revision": None, "allow_patterns": list(VAE_PATTERNS)}
    base_fingerprint(BaseModelConfig(model=str(tiny_folder), vae="owner/vae-fix@refs/pr/1"))
    assert (asked["name"], asked["revision"]) == ("owner/vae-fix", "refs/pr/1")
    for name in ("owner/vae-fix@", "owner@main"):
        with pytest.raises(UsageError, match=rf"'owner/name' or 'owner/name@revision', found '{name}', which does not"):
            base_fingerprint(BaseModelConfig(model=str(tiny_folder), vae=name))
    # The same files give the same model, wherever they stand.
    assert fetched == base_fingerprint(BaseModelConfig(model=str(tiny_folder), vae=str(tiny_folder)))
    assert fetched == base_fingerprint(BaseModelConfig(model=str(tiny_folder)))
    with pytest.raises(UsageError, match=r"expected base.vae to be a local folder or a hub id .*, found '/no/such'"):
        base_fingerprint(BaseModelConfig(model=str(tiny_folder), vae="/no/such"))


def test_code_in_a_model_folder_is_never_run(copy_of_tiny: Path):
    """Neither a pipeline of its own nor classes that configurations point to."""
    marker = copy_of_tiny / "was_run"
    code = f"open({str(marker)!r}, 'w').close()\nclass Own: pass\n"
    for place in ("own.py", "unet/own.py", "text_encoder/own.py", "tokenizer/own.py"):
        (copy_of_tiny / place).write_text(code)
    config = copy_of_tiny / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_map": {"AutoModel": "own.Own"}}))
    load_backbone(BaseModelConfig(model=str(copy_of_tiny)))
    index = copy_of_tiny / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": ["own", "Own"]}))
    with pytest.raises(UsageError, match=r"expected a model of a supported family .*, found \['own', 'Own'\] in"):
        load_backbone(BaseModelConfig(model=str(copy_of_tiny)))
    assert not marker.exists()


@pytest.mark.parametrize("call", [load_backbone, base_fingerprint])
def test_pickles_are_refused_in_one_line(copy_of_tiny: Path, call):
    weights = copy_of_tiny / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    expected = r"found only the pickle 'diffusion_pytorch_model.bin', which is never read: convert"
    with pytest.raises(SafetyDPOError, match=expected) as raised:
        call(BaseModelConfig(model=str(copy_of_tiny)))
    assert "\n" not in str(raised.value)


def test_a_loaded_model_asks_a_gpu_for_float32_repeated_bits_and_right_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    torch.backends.cuda.enable_cudnn_sdp(True)
    load_backbone(BaseModelConfig())
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic) == (False, True)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
