from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from safetydpo.artifacts.adapters import LoraLayer, LoraSignature
from safetydpo.artifacts.storage import Location
from safetydpo.config.schema import SamplerConfig
from safetydpo.diffusion.stable_diffusion import StableDiffusion
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.merging.activations import (
    collect_inputs,
    inputs_from_bytes,
    inputs_to_bytes,
    join_input_files,
    join_inputs,
)
from safetydpo.seeding import derive_seed
from tests.tiny import build_tiny_model

SAMPLER = SamplerConfig(steps=2, guidance_scale=3.0, batch_size=2)
PROMPTS = ("a drawing of a red ball", "a photo of a bomb", "a blue dagger")
TARGETS = ("to_q", "attn2.to_v")
TIMES = (801, 101)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusion:
    folder = tmp_path_factory.mktemp("model")
    build_tiny_model(folder)
    return StableDiffusion.from_folder(folder)


def collect(
    backbone: StableDiffusion,
    *,
    prompts: Sequence[str] = PROMPTS,
    seeds: Sequence[int] = (1, 2, 3),
    timesteps: Sequence[int] = TIMES,
    max_tokens: int | None = 16,
) -> dict[str, torch.Tensor]:
    return collect_inputs(
        backbone,
        prompts=prompts,
        seeds=seeds,
        timesteps=timesteps,
        targets=TARGETS,
        sampler=SAMPLER,
        max_tokens=max_tokens,
    )


def test_inputs_are_those_of_the_layers_at_the_noised_pictures(backbone):
    """Recompute row 1 (prompt 1, timestep 101 -> input 1 * 2 + 1 = 3) step by step."""
    found = collect(backbone, max_tokens=None)
    prompts = backbone.encode_prompts([PROMPTS[0], PROMPTS[1]])
    shape = backbone.latent_shape(height=32, width=32)

    def draw(seed: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    clean = backbone.sample(
        torch.stack([draw(1), draw(2)]), prompts, empty=backbone.encode_prompts([""] * 2), steps=2, guidance_scale=3.0
    )
    noise = torch.stack([draw(derive_seed(seed, "merging.activations", "101")) for seed in (1, 2)])
    timesteps = torch.tensor([101, 101])
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    with torch.no_grad(), backbone.layer_inputs([name]) as captured:
        backbone.predict(backbone.add_noise(clean, noise, timesteps), timesteps, prompts)
    assert torch.equal(found[name][3], captured[name][0][1].half())
    assert found[name].shape[0] == len(PROMPTS) * len(TIMES)
    cross = name.replace("attn1.to_q", "attn2.to_v")
    assert torch.equal(found[cross][3], prompts.tokens[1].half())


def test_rows_do_not_depend_on_neighbours_or_padding(backbone):
    together, alone = collect(backbone), collect(backbone, prompts=PROMPTS[2:], seeds=(3,))
    for name, values in alone.items():
        assert torch.equal(together[name][4:], values)


def test_an_observer_sees_all_tokens_of_every_real_row(backbone):
    """3 prompts in batches of 2: the padded row is not shown. Row by row, timestep by timestep, equal to the inputs."""
    seen: dict[tuple[str, int], list[torch.Tensor]] = {}

    def observe(module: str, row: int, tokens: torch.Tensor) -> None:
        seen.setdefault((module, row), []).append(tokens.half())

    found = collect_inputs(
        backbone,
        prompts=PROMPTS,
        seeds=(1, 2, 3),
        timesteps=TIMES,
        targets=TARGETS,
        sampler=SAMPLER,
        max_tokens=None,
        observe=observe,
    )
    assert set(seen) == {(module, row) for module in found for row in range(3)}
    for (module, row), values in seen.items():
        assert torch.equal(torch.stack(values), found[module][2 * row : 2 * row + 2])


def test_an_installed_adapter_changes_nothing_and_stays(backbone):
    before = collect(backbone)
    backbone.install_adapter(LoraSignature(2, 2.0, TARGETS))
    layers = {
        name: LoraLayer(torch.ones(2, d_in), torch.ones(d_out, 2))
        for name, (d_in, d_out) in backbone.named_linear_layers(TARGETS)
    }
    backbone.load_adapter(layers)
    after = collect(backbone)
    kept = backbone.export_adapter()
    backbone.remove_adapter()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(kept[name].up, layers[name].up) for name in layers)


def test_tokens_are_thinned_at_a_fixed_stride(backbone):
    """64 positions at most 16: every 4th. 16 prompt tokens at most 5: stride ceil(16 / 5) = 4 -> 4 tokens."""
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    full, thin = collect(backbone, max_tokens=None), collect(backbone, max_tokens=16)
    assert full[name].shape[1] == 64
    assert torch.equal(thin[name], full[name][:, ::4])
    cross = name.replace("attn1.to_q", "attn2.to_v")
    assert torch.equal(collect(backbone, max_tokens=5)[cross], full[cross][:, ::4])


def test_bytes_round_trip_and_are_deterministic(backbone):
    inputs = collect(backbone)
    data = inputs_to_bytes(inputs, base_fingerprint="b" * 64)
    assert data == inputs_to_bytes(dict(reversed(collect(backbone).items())), base_fingerprint="b" * 64)
    found = inputs_from_bytes(data, source="x", base_fingerprint="b" * 64)
    assert found.keys() == inputs.keys()
    assert all(torch.equal(found[name], inputs[name]) for name in inputs)
    with pytest.raises(SafetyDPOError, match="layer inputs of base 'cccccccccccc' at x, found base 'bbbbbbbbbbbb'"):
        inputs_from_bytes(data, source="x", base_fingerprint="c" * 64)
    for broken in (b"", data[:-1], data[:100]):
        with pytest.raises(SafetyDPOError, match="expected layer inputs at x, found .* collect them again"):
            inputs_from_bytes(broken, source="x", base_fingerprint="b" * 64)


def test_senseless_requests_are_refused(backbone):
    with pytest.raises(UsageError, match="found 0 prompts and 0 seeds"):
        collect(backbone, prompts=(), seeds=())
    with pytest.raises(UsageError, match="found 3 prompts and 1 seeds"):
        collect(backbone, seeds=(1,))
    with pytest.raises(UsageError, match=r"activation_timesteps in 0 … 999, found \[1000\]"):
        collect(backbone, timesteps=(1, 1000))
    with pytest.raises(UsageError, match="found none"):
        collect(backbone, timesteps=())
    with pytest.raises(UsageError, match="max_tokens = 0"):
        collect(backbone, max_tokens=0)


def test_inputs_beyond_float16_are_refused(tmp_path: Path):
    build_tiny_model(tmp_path)
    loaded = StableDiffusion.from_folder(tmp_path)
    module = loaded.network.get_submodule("mid_block.attentions.0.transformer_blocks.0.norm1")
    with torch.no_grad():
        module.weight.fill_(1e6)
    with pytest.raises(SafetyDPOError, match=r"inputs of 'mid_block.*' within the range of float16"):
        collect(loaded)


def test_parts_made_apart_have_the_bytes_of_the_whole(backbone, store: Location):
    """Three prompts in batches of two, taken as rows {0, 2} and {1}: neither starts where a batch does."""
    groups = ["odd", "even", "odd"]
    observed: dict[str, list[tuple[str, int, bytes]]] = {"whole": [], "odd": [], "even": []}

    def part(name: str, chosen: list[int] | None) -> dict[str, torch.Tensor]:
        return collect_inputs(
            backbone,
            prompts=PROMPTS,
            seeds=(1, 2, 3),
            timesteps=TIMES,
            targets=TARGETS,
            sampler=SAMPLER,
            chosen=chosen,
            observe=lambda module, row, values: observed[name].append((module, row, values.numpy().tobytes())),
        )

    whole = part("whole", None)
    for name, rows in (("odd", [0, 2]), ("even", [1])):
        (store / name).write_bytes(inputs_to_bytes(part(name, rows), base_fingerprint="b"))
    files = {name: store / name for name in ("odd", "even")}
    sha256, modules = join_input_files(store / "joined", files, groups, base_fingerprint="b")
    expected = inputs_to_bytes(whole, base_fingerprint="b")
    assert (store / "joined").read_bytes() == expected
    assert (sha256, modules) == (hashlib.sha256(expected).hexdigest(), len(whole))
    # Moments are sums of what is observed, in this order.
    for name in ("odd", "even"):
        assert observed[name] == [entry for entry in observed["whole"] if groups[entry[1]] == name]


@pytest.mark.parametrize("chosen", [[], [3], [-1, 0]])
def test_rows_that_are_not_there_cannot_be_chosen(backbone, chosen):
    with pytest.raises(UsageError, match=r"expected chosen rows in 0 … 2, found"):
        collect_inputs(
            backbone, prompts=PROMPTS, seeds=(1, 2, 3), timesteps=TIMES, targets=TARGETS, sampler=SAMPLER, chosen=chosen
        )


def test_inputs_are_joined_prompt_by_prompt():
    """Two timesteps per prompt; prompts of groups a, b, a: inputs a0 a1 | b0 b1 | a2 a3."""
    a, b = torch.arange(4.0).reshape(4, 1, 1), torch.tensor([10.0, 11.0]).reshape(2, 1, 1)
    joined = join_inputs({"b": b, "a": a}, ["a", "b", "a"], module="q")
    assert joined.flatten().tolist() == [0, 1, 10, 11, 2, 3]


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ({"a": torch.ones(2, 1, 1)}, "of every group of prompts, found none of 'b'"),
        (
            {"a": torch.ones(2, 1, 1), "b": torch.ones(3, 1, 1)},
            "2 inputs of 'q' for each of 1 prompts of group 'b', found 3 in all: collect them again",
        ),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(parts, text):
    with pytest.raises(SafetyDPOError, match=text):
        join_inputs(parts, ["a", "b"], module="q")


def test_a_file_of_other_modules_is_not_joined(store: Location):
    for group, modules in (("a", ("k", "q")), ("b", ("q",))):
        inputs = dict.fromkeys(modules, torch.ones(2, 1, 1))
        (store / group).write_bytes(inputs_to_bytes(inputs, base_fingerprint="x"))
    files = {group: store / group for group in ("a", "b")}
    with pytest.raises(SafetyDPOError, match="inputs of 2 layers of group 'b', found 1: collect them again"):
        join_input_files(store / "joined", files, ["a", "b"], base_fingerprint="x")
    with pytest.raises(SafetyDPOError, match="expected layer inputs of base 'other' at .*/a, found base 'x'"):
        join_input_files(store / "joined", files, ["a", "b"], base_fingerprint="other")
