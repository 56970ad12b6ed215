from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load, save

from safetydpo.artifacts.adapters import (
    AdapterMetadata,
    LoraLayer,
    LoraSignature,
    adapter_from_bytes,
    adapter_hash,
    adapter_to_bytes,
    read_adapter,
    write_adapter,
)
from safetydpo.artifacts.storage import Location
from safetydpo.errors import SafetyDPOError
from tests.tiny import build_tiny_model

METADATA = AdapterMetadata(
    base_fingerprint="f" * 64,
    signature=LoraSignature(rank=2, alpha=2.0, targets=("to_q", "to_v")),
    init_seed=7,
    training_hash="t" * 64,
    kind="expert",
    categories=("hate", "violence"),
    recipe={"a": [1, 2.5], "b": None},
)
PREFIX = "unet.mid.attn1.to_q."


def make_layers(ranks: dict[str, int], *, d_in: int = 5, d_out: int = 4, seed: int = 0) -> dict[str, LoraLayer]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: LoraLayer(
            down=torch.randn(rank, d_in, generator=generator), up=torch.randn(d_out, rank, generator=generator)
        )
        for name, rank in ranks.items()
    }


def assert_equal_layers(found: dict[str, LoraLayer], expected: dict[str, LoraLayer]) -> None:
    assert found.keys() == expected.keys()
    for name, layer in expected.items():
        assert torch.equal(found[name].down, layer.down)
        assert torch.equal(found[name].up, layer.up)


def test_round_trip_keeps_tensors_and_metadata():
    layers = make_layers({"mid.attn1.to_q": 2, "mid.attn1.to_v": 2})
    found, metadata = adapter_from_bytes(adapter_to_bytes(layers, METADATA), source="x")
    assert_equal_layers(found, layers)
    assert metadata == METADATA


def test_merged_metadata_without_signature_round_trips():
    merged = AdapterMetadata(base_fingerprint="b", kind="merged", recipe={"method": "sum"})
    _, metadata = adapter_from_bytes(adapter_to_bytes(make_layers({"q": 1}), merged), source="x")
    assert metadata == merged


def test_keys_are_the_diffusers_ones_and_sorted():
    tensors = load(adapter_to_bytes(make_layers({"b.to_q": 1, "a.to_q": 1}), METADATA))
    assert sorted(tensors) == [f"unet.{m}.to_q.lora_{f}.weight" for m in ("a", "b") for f in ("A", "B")]
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_bytes_are_equal_in_another_process_and_insertion_order():
    layers = make_layers({"b": 1, "a": 1})
    code = (
        "import hashlib, torch\n"
        "from safetydpo.artifacts.adapters import *\n"
        "layer = lambda k: LoraLayer(torch.full((1, 3), k), torch.full((2, 1), k))\n"
        "print(hashlib.sha256(adapter_to_bytes({'b': layer(2.0), 'a': layer(1.0)}, "
        "AdapterMetadata('f', recipe={'z': 1, 'y': 2}))).hexdigest())"
    )
    digests = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert len(digests) == 1
    assert adapter_to_bytes(layers, METADATA) == adapter_to_bytes(dict(reversed(layers.items())), METADATA)


def test_different_ranks_are_padded_in_the_file_and_cut_on_reading():
    """Ranks 1 and 3: the file holds 3 components for both, so that one alpha = 3 scales both by 1."""
    layers = make_layers({"q": 1, "v": 3})
    data = adapter_to_bytes(layers, METADATA)
    assert {tuple(t.shape) for k, t in load(data).items() if "lora_A" in k} == {(3, 5)}
    found, metadata = adapter_from_bytes(data, source="x")
    assert_equal_layers(found, layers)
    assert adapter_hash(found) == adapter_hash(layers)
    assert metadata == METADATA


def test_plain_diffusers_file_is_accepted():
    data = save({PREFIX + "lora_A.weight": torch.ones(1, 3).half(), PREFIX + "lora_B.weight": torch.ones(2, 1).half()})
    layers, metadata = adapter_from_bytes(data, source="x")
    assert metadata.base_fingerprint == ""
    assert layers["mid.attn1.to_q"].down.dtype == torch.float32


def test_hash_depends_on_values_names_and_shapes_only():
    layers = make_layers({"a": 2, "b": 2})
    assert adapter_hash(layers) == adapter_hash(dict(reversed(layers.items())))
    changed = {**layers, "a": LoraLayer(layers["a"].down.clone(), layers["a"].up + 1e-7)}
    assert adapter_hash(changed) != adapter_hash(layers)
    assert adapter_hash({"c": layers["a"], "b": layers["b"]}) != adapter_hash(layers)
    doubled = {name: LoraLayer(layer.down.double(), layer.up.double()) for name, layer in layers.items()}
    assert adapter_hash(doubled) == adapter_hash(layers)


def test_write_and_read(store: Location):
    layers = make_layers({"a": 2})
    write_adapter(store / "a.safetensors", layers, metadata=METADATA)
    found, metadata = read_adapter(store / "a.safetensors")
    assert_equal_layers(found, layers)
    assert metadata == METADATA


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_truncated_files_are_refused(keep):
    data = adapter_to_bytes(make_layers({"a": 2}), METADATA)
    with pytest.raises(SafetyDPOError, match=r"expected a safetensors file at here, found .* make or copy"):
        adapter_from_bytes(data[:keep], source="here")


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({PREFIX + "lora_A.weight": torch.ones(1, 3)}, "expected 'unet.mid.attn1.to_q.lora_B.weight' beside"),
        ({PREFIX + "lora_B.weight": torch.ones(3, 1)}, "expected 'unet.mid.attn1.to_q.lora_A.weight' beside"),
        ({"lora_unet_x.alpha": torch.ones(1)}, "found 'lora_unet_x.alpha'"),
        ({"text_encoder.q.lora_A.weight": torch.ones(1, 3)}, "found 'text_encoder.q.lora_A.weight'"),
        ({}, "a file without tensors"),
        (
            {PREFIX + "lora_A.weight": torch.ones(2, 3), PREFIX + "lora_B.weight": torch.ones(3, 1)},
            r"found \[2, 3\] and \[3, 1\]",
        ),
        (
            {PREFIX + "lora_A.weight": torch.ones(1, 3), PREFIX + "lora_B.weight": torch.full((3, 1), torch.nan)},
            "NaN or infinity in 'unet.mid.attn1.to_q.lora_B.weight'",
        ),
    ],
)
def test_bad_content_is_refused_by_name(tensors, text):
    with pytest.raises(SafetyDPOError, match=text):
        adapter_from_bytes(save(tensors), source="here")


@pytest.mark.parametrize(
    "header", ["[]", "{}", "no json", json.dumps({"signature": None, "categories": [], "kind": "x"})]
)
def test_foreign_metadata_is_refused(header):
    tensors = {PREFIX + "lora_A.weight": torch.ones(1, 3), PREFIX + "lora_B.weight": torch.ones(2, 1)}
    with pytest.raises(SafetyDPOError, match="expected adapter metadata written by safetydpo in here"):
        adapter_from_bytes(save(tensors, metadata={"safetydpo": header}), source="here")


def test_nothing_and_infinity_are_not_written():
    with pytest.raises(SafetyDPOError, match="at least one layer, found none"):
        adapter_to_bytes({}, METADATA)
    with pytest.raises(SafetyDPOError, match="NaN or infinity in 'unet.q.lora_A.weight'"):
        adapter_to_bytes({"q": LoraLayer(torch.full((1, 2), torch.inf), torch.ones(2, 1))}, METADATA)


@pytest.mark.parametrize("ranks", [(4, 4), (2, 7)])
def test_plain_diffusers_loads_the_file_and_computes_base_plus_up_down(tmp_path: Path, ranks: tuple[int, int]):
    """diffusers + our file == diffusers with `up @ down` added to its weights by hand, scale included.

    Ranks 2 and 7 in one file: a loader that takes one alpha for all layers would be wrong by 2 / 7 without padding.
    """
    build_tiny_model(tmp_path / "model")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    targets = [n for n, _ in pipeline.unet.named_modules() if n.endswith(("attn1.to_q", "attn2.to_v", "to_out.0"))]
    generator = torch.Generator().manual_seed(1)
    layers = {}
    for index, name in enumerate(targets):
        d_out, d_in = pipeline.unet.get_submodule(name).weight.shape
        rank = ranks[index % 2]
        # 2.5 stands for alpha / rank: it is part of `up`.
        layers[name] = LoraLayer(
            torch.randn(rank, d_in, generator=generator), 2.5 * torch.randn(d_out, rank, generator=generator) / 5
        )
    file = tmp_path / "pytorch_lora_weights.safetensors"
    file.write_bytes(adapter_to_bytes(layers, METADATA))

    by_hand = StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        for name, layer in layers.items():
            by_hand.unet.get_submodule(name).weight += layer.up @ layer.down
    x, tokens = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 16, 32, generator=generator)
    with torch.no_grad():
        base = pipeline.unet(x, 500, tokens).sample
        pipeline.load_lora_weights(tmp_path, weight_name=file.name)
        loaded, expected = (p.unet(x, 500, tokens).sample for p in (pipeline, by_hand))
    assert (expected - base).norm() > 0.1 * base.norm()
    torch.testing.assert_close(loaded, expected, rtol=1e-4, atol=1e-5)


def test_a_transformers_adapter_has_its_own_keys_and_comes_back():
    layers = make_layers({"transformer_blocks.0.attn.to_q": 2})
    metadata = AdapterMetadata(base_fingerprint="b", denoiser="transformer")
    data = adapter_to_bytes(layers, metadata)
    assert sorted(load(data)) == [f"transformer.transformer_blocks.0.attn.to_q.lora_{f}.weight" for f in ("A", "B")]
    found, read = adapter_from_bytes(data, source="x")
    assert_equal_layers(found, layers)
    assert read == metadata
    # A file that is not ours tells it by its keys too.
    assert adapter_from_bytes(save(load(data)), source="x")[1] == AdapterMetadata(denoiser="transformer")


def test_an_adapter_of_two_networks_is_refused():
    pair = {"lora_A.weight": torch.ones(1, 3), "lora_B.weight": torch.ones(3, 1)}
    both = {
        f"{network}.q.{part}": tensor.clone() for network in ("transformer", "unet") for part, tensor in pair.items()
    }
    with pytest.raises(SafetyDPOError, match=r"expected keys 'transformer.<module>.* found 'unet.q.lora_A.weight'"):
        adapter_from_bytes(save(both), source="here")


def test_the_metadata_of_a_unet_adapter_is_what_it_was_before_there_were_others():
    header = read_header_of(adapter_to_bytes(make_layers({"q": 1}), METADATA))
    assert "denoiser" not in header


def read_header_of(data: bytes) -> dict[str, object]:
    length = int.from_bytes(data[:8], "little")
    return dict(json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["safetydpo"]))
