"""Training state of an expert as one safetensors file, independent of strategy and number of processes.

Tensors: `parameter/<name>` and `average/<name>` (float32), `optimizer/<key>/<name>` (whatever the optimizer keeps, such
as `exp_avg`, in its own type), `history` (float64, one row per step done) and, where a training is validated,
`watched/<name>`. Metadata: one JSON string `training` with the format version, the identity, the step, the optimizer's
plain numbers, the loss scale and the count of the spike guard. Nothing else is needed to go on, because the rows and
draws of a step follow from its number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor

from safetydpo.artifacts.json_text import parse_object
from safetydpo.artifacts.schemas import canonical_json
from safetydpo.artifacts.tensor_files import parse_tensor_header, parse_tensors
from safetydpo.config.training import LoraConfig, TrainingConfig
from safetydpo.dpo.engine import EngineState
from safetydpo.dpo.loss_scale import LossScale
from safetydpo.dpo.optimizers import OptimizerState
from safetydpo.errors import SafetyDPOError

FORMAT_VERSION = 2
# These change how the work is done, not what comes out of it, so a run may go on under other values.
FREE_SETTINGS = (
    "strategy",
    "zero_stage",
    "base_offload",
    "activation_checkpointing",
    "pairs_per_forward",
    "checkpoint_every",
)


@dataclass(frozen=True)
class TrainingIdentity:
    """What a checkpoint belongs to; it is refused for anything else."""

    expert: str
    run_seed: int
    base_fingerprint: str
    data_fingerprint: str
    lora: dict[str, Any]
    dpo: dict[str, Any]


@dataclass(frozen=True)
class TrainingState:
    """State after a whole number of optimizer steps."""

    engine: EngineState
    spike_steps: int
    """Consecutive steps, up to this one, in which the error on the safe picture was above its limit."""
    history: Float[Tensor, "step metric"]
    """What was measured in each step so far, float64."""
    watched: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    """Validations so far and the best state among them; empty without validation."""


class OldCheckpointError(SafetyDPOError):
    """The checkpoint was written by an earlier version, in a format that no longer says all that is needed."""


def training_identity(
    *,
    expert: str,
    run_seed: int,
    base_fingerprint: str,
    data_fingerprint: str,
    lora: LoraConfig,
    dpo: TrainingConfig,
) -> TrainingIdentity:
    """Return the identity of one adapter's training, without the settings that cannot change its result."""
    settings = dpo.model_dump(mode="json", exclude=set(FREE_SETTINGS))
    return TrainingIdentity(
        expert, run_seed, base_fingerprint, data_fingerprint, lora.model_dump(mode="json"), settings
    )


def encode_checkpoint(state: TrainingState, identity: TrainingIdentity) -> bytes:
    """Return the content of a checkpoint file; equal states give equal bytes."""
    engine = state.engine
    groups = {
        "parameter": engine.parameters,
        "average": engine.average,
        **{f"optimizer/{key}": named for key, named in engine.optimizer.tensors.items()},
    }
    tensors = {
        f"{group}/{name}": tensor.detach().contiguous()
        for group, named in groups.items()
        for name, tensor in named.items()
    }
    tensors["history"] = state.history.double().contiguous()
    tensors |= {f"watched/{name}": tensor.contiguous() for name, tensor in state.watched.items()}
    training = {
        "format_version": FORMAT_VERSION,
        "identity": asdict(identity),
        "step": engine.step,
        "optimizer_numbers": engine.optimizer.numbers,
        "optimizer_shared": engine.optimizer.shared,
        "loss_scale": None if engine.loss_scale is None else asdict(engine.loss_scale),
        "spike_steps": state.spike_steps,
    }
    # A single metadata key: the order of several is not fixed by the format's writer.
    return bytes(save(tensors, metadata={"training": canonical_json(training).decode()}))


def decode_checkpoint(data: bytes, *, expected: TrainingIdentity, where: str) -> TrainingState:
    """Return the state in a checkpoint file, after checking that it belongs to this training.

    Raises:
        OldCheckpointError: if an earlier version wrote it in another format.
        SafetyDPOError: if the file is cut off or no checkpoint of ours, or belongs to another expert, base,
            data or setting; the message names the first field that differs.
    """
    try:
        tensors = parse_tensors(data)
        training = parse_object(parse_tensor_header(data)["__metadata__"]["training"])
        version = training["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise SafetyDPOError(
            f"expected a training checkpoint at {where}, found {len(data):,} bytes that are cut off or something else "
            f"({type(error).__name__}): delete the file to start this expert anew"
        ) from error
    if isinstance(version, int) and version < FORMAT_VERSION:
        raise OldCheckpointError(f"the checkpoint at {where} has format {version}, this version reads {FORMAT_VERSION}")
    if version != FORMAT_VERSION:
        raise SafetyDPOError(
            f"expected a checkpoint of format {FORMAT_VERSION} at {where}, found format {version}: "
            "delete the file to start this expert anew"
        )
    _check_identity(training.get("identity"), asdict(expected), where)
    try:
        engine = _engine_state(tensors, training)
        history, spike_steps = tensors["history"], int(training["spike_steps"])
        if history.dim() != 2 or history.dtype is not torch.float64:
            raise ValueError("a history of another form")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SafetyDPOError(
            f"expected the state of a training in the checkpoint at {where}, found something else ({error!r}): "
            "delete the file to start this expert anew"
        ) from error
    if history.shape[0] != engine.step:
        raise SafetyDPOError(
            f"expected a history of {engine.step} steps in the checkpoint at {where}, found "
            f"{history.shape[0]}: delete the file to start this expert anew"
        )
    return TrainingState(engine, spike_steps, history, _group(tensors, "watched/"))


def _group(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _engine_state(tensors: dict[str, Tensor], training: dict[str, Any]) -> EngineState:
    by_key: dict[str, dict[str, Tensor]] = {}
    for path, value in _group(tensors, "optimizer/").items():
        # No key of an optimizer and no name of a parameter holds a slash.
        key, _, name = path.partition("/")
        by_key.setdefault(key, {})[name] = value
    scale = training["loss_scale"]
    return EngineState(
        training["step"],
        _group(tensors, "parameter/"),
        OptimizerState(by_key, training["optimizer_numbers"], training["optimizer_shared"]),
        _group(tensors, "average/"),
        None if scale is None else LossScale(**scale),
    )


def _check_identity(found: Any, expected: dict[str, Any], where: str) -> None:
    flat_found, flat_expected = _flatten(found), _flatten(expected)
    for field in sorted(flat_expected.keys() | flat_found.keys()):
        before, now = flat_found.get(field, "nothing"), flat_expected.get(field, "nothing")
        if before != now:
            raise SafetyDPOError(
                f"expected a checkpoint with {field} = {now!r} at {where}, found {before!r}: "
                "use another run folder, or delete the file to start this expert anew"
            )


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        nested = (_flatten(item, f"{prefix}.{key}" if prefix else str(key)) for key, item in value.items())
        return {key: item for part in nested for key, item in part.items()}
    return {prefix: list(value) if isinstance(value, tuple) else value}


def empty_history(num_metrics: int) -> Float[Tensor, "step metric"]:
    """Return the history before the first step."""
    return torch.empty((0, num_metrics), dtype=torch.float64)
