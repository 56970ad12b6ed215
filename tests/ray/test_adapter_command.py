"""`safetydpo adapter`: what it prints of files of any origin, what it writes, and what it refuses. No Ray."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save
from typer.testing import CliRunner

from ray_jobs.cli import app
from ray_jobs.publish import metrics_of, public_name, with_origin
from safetydpo.artifacts.adapters import AdapterMetadata, LoraLayer, adapter_hash, adapter_to_bytes
from safetydpo.artifacts.layout import demo_weights
from safetydpo.artifacts.records import Record
from safetydpo.diffusion.folder import fingerprint_folder
from safetydpo.errors import SafetyDPOError, UsageError
from tests.evaluation.synthetic import make_summary

BLOCK = "mid_block.attentions.0.transformer_blocks.0"
RECIPE = {
    "method": "co_merge",
    "paper": "Liu et al. 2024",
    "global_scale": 1.5,
    "output_rank": None,
    "experts": [
        {"name": "hate", "hash": "1" * 64, "weight": 1.0, "init_seed": 0},
        {"name": "violence", "hash": "2" * 64, "weight": 0.5, "init_seed": 0},
    ],
}


def demo_layers() -> dict[str, LoraLayer]:
    """Return changes of the demo model's middle block: norms 3 (3 x e1 e1') and 2, all others of the kind 0."""
    weights = load_file(demo_weights() / "base" / "unet" / "diffusion_pytorch_model.safetensors")
    layers = {}
    for name, norm in (("attn1.to_q", 3.0), ("attn2.to_k", 2.0)):
        d_out, d_in = weights[f"{BLOCK}.{name}.weight"].shape
        down, up = torch.zeros(2, d_in), torch.zeros(d_out, 2)
        down[0, 0], up[0, 0] = 1.0, norm
        layers[f"{BLOCK}.{name}"] = LoraLayer(down, up)
    return layers


@pytest.fixture(scope="module")
def base_fingerprint() -> str:
    return fingerprint_folder(demo_weights() / "base")


@pytest.fixture
def file(tmp_path: Path, base_fingerprint: str) -> Path:
    metadata = AdapterMetadata(
        base_fingerprint=base_fingerprint, training_hash="t" * 64, kind="merged", categories=("hate", "violence"),
        recipe=RECIPE,
    )  # fmt: skip
    place = tmp_path / "merged" / "pytorch_lora_weights.safetensors"
    place.parent.mkdir()
    place.write_bytes(adapter_to_bytes(demo_layers(), metadata))
    return place


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["adapter", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def inspect(file: Path) -> dict[str, Any]:
    return dict(json.loads(CliRunner().invoke(app, ["adapter", "inspect", str(file), "--json"]).output))


def test_inspect_prints_metadata_norms_and_shares(file: Path) -> None:
    """Norms 3 and 2: shares 9 / 13 and 4 / 13 of the squares; together sqrt 13 = 3.606."""
    record = Record("merged", "co_merge", "0" * 64, 2, {}, {}, adapter_hash(demo_layers()),
                    details={"shares": {"hate": 0.25, "violence": 0.75}})  # fmt: skip
    (file.parent / "record.json").write_bytes(json.dumps(record_json(record)).encode())
    text = run("inspect", file)
    for expected in (
        "format safetydpo", "kind merged", "categories hate, violence", "recipe: method co_merge",
        "base model not known",
        "hate 1 0.250 1111111111111111", "violence 0.5 0.750", f"unet.{BLOCK}.attn1.to_q linear 2 1 3 69.23%",
        f"unet.{BLOCK}.attn2.to_k linear 2 1 2 30.77%", "2 layers, norm of all together 3.606",
        "not known base model, licence: the file does not say",
    ):  # fmt: skip
        assert expected in text, expected
    assert inspect(file)["adapter_hash"] == adapter_hash(demo_layers())


def record_json(record: Record) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(record)


def test_a_record_of_another_adapter_says_nothing_of_this_one(file: Path) -> None:
    record = Record("merged", "co_merge", "0" * 64, 2, {}, {}, "other", details={"shares": {"hate": 1.0}})
    (file.parent / "record.json").write_bytes(json.dumps(record_json(record)).encode())
    found = inspect(file)
    assert found["shares"] is None
    assert any("the record that holds them is not beside the file" in note for note in found["unknown"])


def test_inspect_says_what_a_foreign_file_does_not_tell(tmp_path: Path) -> None:
    file = tmp_path / "plain.safetensors"
    name = f"unet.{BLOCK}.attn1.to_q"
    file.write_bytes(save({f"{name}.lora_A.weight": torch.ones(1, 4), f"{name}.lora_B.weight": torch.ones(4, 1)}))
    found = inspect(file)
    assert (found["format"], found["kind"], found["base_model"]) == ("diffusers", None, None)
    assert [(layer["layer"], layer["norm"], layer["rank"]) for layer in found["layers"]] == [(name, 4.0, 1)]
    assert len(found["unknown"]) == 3
    assert "alpha: the file does not say; taken as the rank, as diffusers does" in run("inspect", file)


def test_inspect_reads_kohya_files_with_their_scales(tmp_path: Path) -> None:
    """Rank 2, alpha 1: scale 0.5. B A is 2 x ones(3, 3), half of it ones: norm 3."""
    name = "lora_unet_" + BLOCK.replace(".", "_") + "_attn1_to_q"
    tensors = {
        f"{name}.lora_down.weight": torch.ones(2, 3), f"{name}.lora_up.weight": torch.ones(3, 2),
        f"{name}.alpha": torch.tensor(1.0),
    }  # fmt: skip
    (tmp_path / "k.safetensors").write_bytes(save(tensors))
    assert f"unet.{BLOCK}.attn1.to_q linear 2 0.5 3 100.00%" in run("inspect", tmp_path / "k.safetensors")


@pytest.mark.parametrize("to", ["kohya", "diffusers", "peft"])
def test_export_writes_file_and_card(file: Path, tmp_path: Path, to: str) -> None:
    family = ["--family", "sd1"] if to == "kohya" else []
    out = tmp_path / "out"
    text = run("export", file, "--to", to, "--out", out, "--base", "owner/base", "--licence", "mit", *family)
    names = {"kohya": "pytorch_lora_weights.safetensors", "diffusers": "pytorch_lora_weights.safetensors",
             "peft": "adapter_model.safetensors"}  # fmt: skip
    assert f"2 layers are in {out}" in text.replace("\n", "")
    card = (out / "README.md").read_text()
    assert "license: mit" in card
    assert "base_model: owner/base" in card
    found = inspect(out / names[to])
    assert (found["base_model"], found["licence"], found["format"]) == (
        "owner/base", "mit", "safetydpo" if to == "diffusers" else to
    )  # fmt: skip
    assert found["adapter_hash"] == adapter_hash(demo_layers())


def test_export_full_holds_the_sum_and_loads(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("export", file, "--to", "full", "--out", out, "--base", "demo")
    pipeline = StableDiffusionPipeline.from_pretrained(out)
    weights = load_file(demo_weights() / "base" / "unet" / "diffusion_pytorch_model.safetensors")
    key = f"{BLOCK}.attn1.to_q.weight"
    changed = pipeline.unet.get_submodule(key.removesuffix(".weight")).weight.detach() - weights[key].float()
    assert float(changed.norm()) == pytest.approx(3.0, rel=1e-3)
    assert "base_model_relation" not in (out / "README.md").read_text()
    assert "license: apache-2.0" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (["--to", "ckpt"], UsageError, "expected --to kohya, diffusers, peft, full, found 'ckpt'"),
        (["--to", "kohya", "--family", "sd9"], UsageError, "expected --family sd1, sd2, sdxl, found 'sd9'"),
        (["--to", "kohya"], UsageError, "name it with --family"),
        (["--to", "full"], UsageError, "expected the base model's folder or hub id for --to full, found none"),
        (["--to", "kohya", "--name", "a/b"], UsageError, "expected a name without / or .* for --name, found 'a/b'"),
        (["--to", "diffusers", "--licence", "All rights"], UsageError, "expected --licence as the hub writes it"),
    ],
)
def test_refusals(file: Path, tmp_path: Path, arguments: list[str], error: type[Exception], text: str) -> None:
    command = ["adapter", "export", str(file), "--out", str(tmp_path / "out"), *arguments]
    with pytest.raises(error, match=text):
        CliRunner().invoke(app, command, catch_exceptions=False)
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_base_is_not_fused(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(adapter_to_bytes(demo_layers(), AdapterMetadata(base_fingerprint="f" * 64)))
    command = ["adapter", "export", str(file), "--out", str(tmp_path / "out"), "--to", "full", "--base", "demo"]
    with pytest.raises(SafetyDPOError, match="expected the base model ffffffffffff of this adapter, found"):
        CliRunner().invoke(app, command, catch_exceptions=False)


def test_nothing_is_written_over_and_no_pickle_is_opened(file: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(UsageError, match="expected nothing or an empty folder"):
        run("export", file, "--to", "diffusers", "--out", tmp_path / "out")
    (tmp_path / "a.bin").write_bytes(b"\x80")
    with pytest.raises(UsageError, match="expected a .safetensors file, found 'a.bin'"):
        run("inspect", tmp_path / "a.bin")


def test_ray_is_not_imported(file: Path) -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from ray_jobs.cli import app\n"
        f"assert CliRunner().invoke(app, ['adapter', 'inspect', {str(file)!r}]).exit_code == 0\n"
        "assert not [name for name in sys.modules if name == 'ray' or name.startswith('ray.')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_published_adapter_names_base_licence_and_shares() -> None:
    metadata = with_origin(
        AdapterMetadata(recipe=RECIPE), {"shares": {"hate": 1.0}}, base_model="stabilityai/stable-diffusion-xl-base-1.0"
    )
    assert metadata.licence == "openrail++"
    assert metadata.recipe["shares"] == {"hate": 1.0}
    assert with_origin(AdapterMetadata(recipe=RECIPE), {}, base_model="x").recipe == RECIPE


def test_a_path_is_not_published(tmp_path: Path) -> None:
    assert public_name("owner/base") == "owner/base"
    assert public_name("demo") == "demo"
    assert public_name(str(tmp_path)) == tmp_path.name
    assert public_name("/home/somebody/base") == "base"


def test_the_cards_metrics_are_those_of_the_row_beside_the_bases() -> None:
    metrics = dict(metrics_of(make_summary(), "searched"))
    assert "; base " in metrics["IP ↓"]
    assert metrics_of(make_summary(), "nothing") == []
