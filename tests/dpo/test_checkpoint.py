from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save

from safetydpo.artifacts.schemas import canonical_json
from safetydpo.config.training import DpoConfig, LoraConfig
from safetydpo.dpo.checkpoint import (
    OldCheckpointError,
    TrainingIdentity,
    TrainingState,
    decode_checkpoint,
    empty_history,
    encode_checkpoint,
    training_identity,
)
from safetydpo.dpo.engine import EngineState, fresh_state
from safetydpo.dpo.loss_scale import LossScale
from safetydpo.dpo.optimizers import OptimizerState
from safetydpo.errors import SafetyDPOError


def identity(**changes: object) -> TrainingIdentity:
    arguments = {
        "expert": "hate",
        "run_seed": 1,
        "base_fingerprint": "base",
        "data_fingerprint": "data",
        "lora": LoraConfig(rank=2),
        "dpo": DpoConfig(),
        **changes,
    }
    return training_identity(**arguments)  # type: ignore[arg-type]


def state(step: int = 2) -> TrainingState:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(2, 3, generator=generator) for name in ("block.lora_A.weight", "block.lora_B.weight")}
    optimizer = OptimizerState(
        {
            "exp_avg": {name: tensor + 1 for name, tensor in tensors.items()},
            "state1": {name: torch.arange(6, dtype=torch.uint8) for name in tensors},
            "step": {name: torch.tensor(2.0) for name in tensors},
        },
        {"step_count": dict.fromkeys(tensors, 2)},
        {"d": 0.1 + 0.2, "k": 2},
    )
    average = {name: 2 * tensor for name, tensor in tensors.items()}
    engine = EngineState(step, tensors, optimizer, average, LossScale(2.0**14, 7, 3))
    return TrainingState(engine, spike_steps=1, history=torch.rand(step, 4, dtype=torch.float64, generator=generator))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one
    )


def test_round_trip_is_exact() -> None:
    """Tensors in their own types, numbers to the last bit and with their types."""
    before = state()
    after = decode_checkpoint(encode_checkpoint(before, identity()), expected=identity(), where="x")
    assert (after.engine.step, after.spike_steps) == (2, 1)
    assert torch.equal(after.history, before.history)
    assert same(after.engine.parameters, before.engine.parameters)
    assert same(after.engine.average, before.engine.average)
    found, expected = after.engine.optimizer, before.engine.optimizer
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(same(found.tensors[key], expected.tensors[key]) for key in expected.tensors)
    assert (found.numbers, found.shared) == (expected.numbers, expected.shared)
    assert isinstance(found.shared["k"], int)
    assert after.engine.loss_scale == before.engine.loss_scale


def test_equal_states_give_equal_bytes() -> None:
    assert encode_checkpoint(state(), identity()) == encode_checkpoint(state(), identity())


def test_step_zero_is_a_state_too() -> None:
    fresh = TrainingState(fresh_state({"a": torch.ones(2)}), 0, empty_history(4))
    after = decode_checkpoint(encode_checkpoint(fresh, identity()), expected=identity(), where="x")
    assert after.history.shape == (0, 4)
    assert after.engine.optimizer == OptimizerState()
    assert after.engine.average == {}
    assert after.engine.loss_scale is None


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": "single", "checkpoint_every": 7},
        {"strategy": "ddp", "pairs_per_forward": 4},
        {"strategy": "deepspeed", "zero_stage": 3, "base_offload": "cpu", "activation_checkpointing": True},
    ],
)
def test_settings_that_cannot_change_the_result_may_change(changes: dict[str, object]) -> None:
    other = identity(dpo=DpoConfig.model_validate(changes))
    decode_checkpoint(encode_checkpoint(state(), identity()), expected=other, where="x")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"expert": "sexual"}, "expert = 'sexual' at runs/x, found 'hate'"),
        ({"run_seed": 2}, "run_seed = 2 at runs/x, found 1"),
        ({"base_fingerprint": "other"}, "base_fingerprint = 'other'"),
        ({"data_fingerprint": "other"}, "data_fingerprint = 'other'"),
        ({"lora": LoraConfig(rank=4)}, "lora.rank = 4 at runs/x, found 2"),
        ({"lora": LoraConfig(rank=2, targets=("to_q",))}, "lora.targets"),
        ({"dpo": DpoConfig(beta=7.0)}, "dpo.beta = 7.0 at runs/x, found 100.0"),
        ({"dpo": DpoConfig(steps=240)}, "dpo.steps = 240 at runs/x, found"),
        ({"dpo": DpoConfig(optimizer="adafactor")}, "dpo.optimizer = 'adafactor' at runs/x, found 'nothing'"),
        ({"dpo": DpoConfig(ema_decay=0.99)}, "dpo.ema_decay = 0.99 at runs/x, found 'nothing'"),
    ],
)
def test_checkpoint_of_something_else_is_refused_by_name(changes: dict[str, object], field: str) -> None:
    data = encode_checkpoint(state(), identity())
    with pytest.raises(SafetyDPOError, match=field.replace(".", r"\.")):
        decode_checkpoint(data, expected=identity(**changes), where="runs/x")


@pytest.mark.parametrize("keep", [0, 4, 8, 60, 500, -1])
def test_truncated_file_is_refused_at_any_length(keep: int) -> None:
    data = encode_checkpoint(state(), identity())
    with pytest.raises(SafetyDPOError, match=r"expected a training checkpoint at runs/x, found .* bytes .* delete"):
        decode_checkpoint(data[:keep], expected=identity(), where="runs/x")


@pytest.mark.parametrize(
    "data",
    [
        b"not a checkpoint at all, but long enough to look at",
        save({"a": torch.ones(1)}),
        save({"a": torch.ones(1)}, metadata={"training": "{"}),
        save({"a": torch.ones(1)}, metadata={"training": "[]"}),
        save(
            {"a": torch.ones(1)},
            metadata={"training": json.dumps({"format_version": 2, "identity": {}, "step": 0})},
        ),
    ],
)
def test_other_files_are_refused(data: bytes) -> None:
    with pytest.raises(SafetyDPOError, match="expected a "):
        decode_checkpoint(data, expected=identity(), where="runs/x")


def of_format(version: int) -> bytes:
    content = canonical_json({"format_version": version}).decode()
    return bytes(save({"history": torch.ones(1)}, metadata={"training": content}))


def test_a_later_format_version_is_refused() -> None:
    with pytest.raises(SafetyDPOError, match="a checkpoint of format 2 at runs/x, found format 9: delete") as caught:
        decode_checkpoint(of_format(9), expected=identity(), where="runs/x")
    assert not isinstance(caught.value, OldCheckpointError)


def test_an_earlier_format_version_is_told_apart() -> None:
    """Its training is begun anew; see `test_resume`."""
    with pytest.raises(OldCheckpointError, match="the checkpoint at runs/x has format 1, this version reads 2"):
        decode_checkpoint(of_format(1), expected=identity(), where="runs/x")


def test_missing_tensors_are_refused() -> None:
    short = TrainingState(state().engine, 0, torch.zeros(1, 4, dtype=torch.float64))
    with pytest.raises(SafetyDPOError, match=r"expected a history of 2 steps .* found 1"):
        decode_checkpoint(encode_checkpoint(short, identity()), expected=identity(), where="runs/x")
