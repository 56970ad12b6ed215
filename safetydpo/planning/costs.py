"""Price tables: what machines and storage cost, and how fast machines are where no run was measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from safetydpo.config.fields import Frozen, Rate
from safetydpo.config.load import parse_settings, read_yaml
from safetydpo.errors import UsageError

Device = Literal["gpu", "cpu"]


class MachineCosts(Frozen):
    """The price of one device: a GPU with its share of the node, or one CPU core."""

    device: Device
    """What `execution` counts there: GPUs or CPU cores."""
    on_demand: float = Field(ge=0)
    """Per device and hour."""
    spot: float | None = Field(None, ge=0)
    """Per device and hour where it may be taken away; None = not offered."""
    source: str = ""
    """Where the prices are from, and when."""


class Speed(Frozen):
    """How fast one device of a machine works on one base model, measured outside of any run."""

    base: str
    """`identity.base.model`."""
    machine: str
    """Name of the machine; it need not be among those with a price."""
    height: int = Field(ge=1)
    """Of the pictures, in pixels."""
    width: int = Field(ge=1)
    """Of the pictures, in pixels."""
    passes_per_second: float | None = Field(None, gt=0)
    """Sampling steps of one picture: pictures per second times `identity.sampler.steps`. None = not measured."""
    training_pairs_per_second: float | None = Field(None, gt=0)
    """Uses of a pair in training steps. None = not measured."""
    source: str
    """What was measured, and where it is written down."""


class SpeedUp(Frozen):
    """How much faster several workers train one expert than one does."""

    workers: int = Field(ge=1)
    """`execution.workers_per_expert`."""
    times: float = Field(gt=0)
    """Speed of all of them over that of one."""
    source: Literal["measured", "assumed"]
    """Whether anybody has seen it."""


class LaneCosts(Frozen):
    """What lanes cost beside the steps of their experts, in a simulation."""

    start_seconds: float = Field(20.0, ge=0)
    """Start of a lane until its first expert: Ray Train and the loading of the base model."""
    expert_seconds: float = Field(0.28, ge=0)
    """Per expert beside its steps."""
    look_seconds: float = Field(0.001, ge=0)
    """A lane's question to the ledger about one expert."""
    head_mb: float = Field(4.1, ge=0)
    """Memory on the head node per lane."""
    keeper_mb: float = Field(135.0, ge=0)
    """Memory on the head node of the one process that keeps the placement groups of all lanes of a command."""


class CostTable(Frozen):
    """A file of prices and speeds."""

    currency: str = Field("USD", min_length=1)
    """Of all prices."""
    machines: Mapping[str, MachineCosts] = {}
    """By name; the first one whose device a run asks for is taken if none is named."""
    storage_per_gb_month: float | None = Field(None, ge=0)
    """Price of 10^9 bytes for a month; None = not known."""
    speeds: tuple[Speed, ...] = ()
    """Taken where no former run was measured."""
    speed_up: tuple[SpeedUp, ...] = ()
    """Of several workers per expert; the first is one worker."""
    lanes: LaneCosts = LaneCosts()
    preemption_rate: Rate = 0.05
    """Probability that a spot node is taken away within an hour."""

    @model_validator(mode="after")
    def _speed_up_begins_with_one_worker(self) -> Self:
        workers = [entry.workers for entry in self.speed_up]
        if workers and (workers[0] != 1 or workers != sorted(set(workers)) or self.speed_up[0].times != 1):
            raise ValueError(
                "speed_up: expected rising numbers of workers from 1 on, which is 1 times as fast as itself, found "
                f"workers {workers}"
            )
        return self

    def machine(self, device: Device, name: str | None = None) -> tuple[str, MachineCosts] | None:
        """Return the machine of that name, or the first one with such a device; None if there is none.

        Raises:
            UsageError: if there is no machine of that name, or it has another device.
        """
        fitting = {key: value for key, value in self.machines.items() if value.device == device}
        if name is None:
            return next(iter(fitting.items()), None)
        if name not in fitting:
            raise UsageError(
                f"expected a machine of the price table with a {device.upper()}, which this run asks for, found "
                f"{name!r}; there are: {', '.join(fitting) or 'none'}"
            )
        return name, fitting[name]

    def speed(self, base: str, *, height: int, width: int, machine: str | None) -> Speed | None:
        """Return how fast a machine is on a base model and size; if it has no entry, or None is given, any machine."""
        found = [one for one in self.speeds if (one.base, one.height, one.width) == (base, height, width)]
        return next((one for one in found if one.machine == machine), found[0] if found else None)


def load_costs(path: Path) -> CostTable:
    """Read a price table.

    Raises:
        UsageError: if the file is missing, is not YAML, has an unknown key or a value of the wrong type.
    """
    return parse_settings(
        CostTable, read_yaml(path, what="a price table", hint="name one with --costs"), source=str(path)
    )
