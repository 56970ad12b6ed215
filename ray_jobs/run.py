"""What every stage of a run needs: config, store, run folder, closing of artifacts, times."""

from __future__ import annotations

import getpass
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from safetydpo.artifacts.json_text import parse_json
from safetydpo.artifacts.layout import scratch_folder
from safetydpo.artifacts.records import (
    ArtifactKey,
    Record,
    artifact_folder,
    check_run_identity,
    close_artifact,
    find_closed,
    hold_run_files,
    write_pointer,
)
from safetydpo.artifacts.schemas import sha256_of
from safetydpo.artifacts.storage import Location, open_location
from safetydpo.config.judges import JudgesConfig
from safetydpo.config.load import identity_of
from safetydpo.config.schema import Config
from safetydpo.errors import SafetyDPOError

Seconds = Annotated[float, Field(ge=0, le=2**53)]
TIMING_FILE, COST_FILE = "timing.json", "cost.json"
RECORDED_PACKAGES = ("safetydpo", "ray", "torch", "diffusers", "transformers", "peft", "deepspeed", "optuna", "pyarrow")


@dataclass(frozen=True)
class Run:
    """A config bound to its store and its run folder."""

    config: Config
    made: list[str] = field(default_factory=list, compare=False)
    """What this run has made itself rather than found closed, by name."""

    @cached_property
    def store(self) -> Location:
        """Where all artifacts lie."""
        return open_location(self.config.execution.store)

    @cached_property
    def run_dir(self) -> Location:
        """Pointers, merged adapter and report of this run."""
        return open_location(self.config.execution.run_dir.replace("{name}", self.config.name))

    @cached_property
    def scratch(self) -> Location:
        """Working files that no later run reads."""
        return scratch_folder(self.store, self.config.name)

    @cached_property
    def base_fingerprint(self) -> str:
        """Fingerprint of the base model's files."""
        from safetydpo.diffusion.build import base_fingerprint

        return base_fingerprint(self.config.identity.base)

    def open(self) -> None:
        """Bind the run folder to this config, or refuse naming the fields that differ."""
        check_run_identity(self.run_dir, identity_of(self.config))

    def folder(self, key: ArtifactKey) -> Location:
        """Return the folder of an artifact."""
        return artifact_folder(self.store, key)

    def build(self, pointer: str, key: ArtifactKey, make: Callable[[Location], Mapping[str, Any]]) -> Record:
        """Make or find the artifact `key` and point the run's `pointer` at it."""
        record = self.make(key, make)
        write_pointer(self.run_dir, pointer, key)
        return record

    def make(self, key: ArtifactKey, make: Callable[[Location], Mapping[str, Any]]) -> Record:
        """Return the record of `key`; if it is open, let `make(folder)` fill it, then close it.

        `make` returns the record's `fingerprint` and optionally `counts`, `failed_units` and `details`.
        """
        record = find_closed(self.store, key)
        if record is not None:
            return record
        started = time.time()
        record = make_record(key, make(self.folder(key)), started=started)
        close_artifact(self.store, key, record)
        self.made.append(key.folder_name)
        return record

    def add_seconds(self, stage: str, seconds: float) -> None:
        """Add wall time to a stage's sum in `timing.json`; an interrupted stage's parts add up."""
        with hold_run_files(self.run_dir):
            timing = self.seconds()
            # A clock that was set back in the meantime: no time rather than less than none, which nobody would read.
            timing[stage] = round(timing.get(stage, 0.0) + max(0.0, seconds), 3)
            (self.run_dir / TIMING_FILE).write_bytes(json.dumps(timing, indent=2).encode() + b"\n")

    def add_cost(self, stage: str, cost: Mapping[str, float | None]) -> None:
        """Add what a stage used (`cpu_seconds`, `gpu_seconds`) to its sums in `cost.json`.

        A sum with a part that was not measured is None, for good.
        """
        costs = self.costs()
        known = costs.get(stage, dict.fromkeys(cost, 0.0))
        used = {name: None if value is None else max(0.0, value) for name, value in cost.items()}
        costs[stage] = {name: add_known(known.get(name), value) for name, value in used.items()}
        (self.run_dir / COST_FILE).write_bytes(json.dumps(costs, indent=2).encode() + b"\n")

    def costs(self) -> dict[str, dict[str, float | None]]:
        """Return what each stage used so far; empty for runs of versions that did not measure it."""
        return read_costs(self.run_dir)

    def seconds(self) -> dict[str, float]:
        """Return the wall time of each stage so far."""
        return read_seconds(self.run_dir)


def read_seconds(run_dir: Location) -> dict[str, float]:
    """Return the wall time of each stage of the run in a folder; empty if none has ended.

    Raises:
        SafetyDPOError: if the file is damaged.
    """
    return _read_times(run_dir / TIMING_FILE, dict[str, Seconds])


def read_costs(run_dir: Location) -> dict[str, dict[str, float | None]]:
    """Return what each stage of the run in a folder used; empty if nothing was measured.

    Raises:
        SafetyDPOError: if the file is damaged.
    """
    return _read_times(run_dir / COST_FILE, dict[str, dict[str, Seconds | None]])


def _read_times(file: Location, form: Any) -> Any:
    if not file.is_file():
        return {}
    try:
        return TypeAdapter(form).validate_python(parse_json(file.read_bytes()))
    except ValueError as error:
        # A pydantic error is one too, of several lines.
        found = " ".join(str(error).split())[:300]
        raise SafetyDPOError(f"expected JSON of times at {file}, found: {found}; delete it, it counts anew") from error


def run_id(config: Config) -> str:
    """Return `NAME-HASH`, what a run is called on a cluster: two runs of one name are two if user or folders differ.

    It names processes and logs, and no result depends on it.
    """
    execution = config.execution
    places = [place if "://" in place else os.path.abspath(os.path.expanduser(place)) for place in
              (execution.store, execution.run_dir)]  # fmt: skip
    return f"{config.name}-{sha256_of([*places, _user()])[:8]}"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        # A container may run as a number without a name.
        return str(os.getuid())


def add_known(first: float | None, second: float | None) -> float | None:
    """Return a sum to milliseconds, None if a part is not known."""
    return None if first is None or second is None else round(first + second, 3)


def with_absolute_paths(config: Config) -> Config:
    """Return the config with absolute local paths: workers have other working directories than the driver."""
    execution = config.execution
    paths = {
        "store": str(open_location(execution.store)) if "://" not in execution.store else execution.store,
        "run_dir": str(open_location(execution.run_dir)) if "://" not in execution.run_dir else execution.run_dir,
    }
    judges = absolute_judges(execution.judges)
    return config.model_copy(update={"execution": execution.model_copy(update={**paths, "judges": judges})})


def absolute_judges(judges: JudgesConfig) -> JudgesConfig:
    """Return where judges' weights lie with absolute local paths."""
    names = ("clip_vit_l14", "q16_prompts", "multiheaded_heads", "shieldgemma")
    found = {name: _absolute(getattr(judges, name)) for name in names}
    vlm = judges.vlm.model_copy(update={"policy_file": _absolute(judges.vlm.policy_file)})
    return judges.model_copy(update={**found, "vlm": vlm})


def config_for_workers(config: Config) -> Config:
    """Return the config with absolute paths of local models.

    Workers of Ray Train have working directories of their own. For reading files only: these paths are part of the
    identity, which must stay as it was written.
    """
    base, dpo = config.identity.base, config.identity.dpo
    paths = {name: _absolute(getattr(base, name)) for name in ("model", "vae", "config")}
    validation = dpo.validation.model_copy(update={"clip": _absolute(dpo.validation.clip)})
    changes = {
        "base": base.model_copy(update=paths),
        "dpo": dpo.model_copy(update={"validation": validation}),
    }
    return config.model_copy(update={"identity": config.identity.model_copy(update=changes)})


def _absolute(path: str | None) -> str | None:
    """Return the absolute path of what stands on this machine; a hub id or the name of a shipped model stays."""
    if path is None or path == "demo" or not Path(path).expanduser().exists():
        return path
    return str(Path(path).expanduser().absolute())


@cache
def package_versions() -> Mapping[str, str]:
    """Return the versions of the packages that results may depend on; recorded, never hashed."""
    return {name: version(name) for name in RECORDED_PACKAGES}


def make_record(key: ArtifactKey, made: Mapping[str, Any], *, started: float) -> Record:
    """Return the record of what was made since `started` (Unix time in seconds)."""
    parts = dict(made)
    return Record(
        stage=key.stage,
        name=key.name,
        hash=key.hash,
        recipe_version=key.recipe_version,
        identity=dict(key.identity),
        inputs=dict(key.inputs),
        fingerprint=parts.pop("fingerprint"),
        counts=parts.pop("counts", {}),
        failed_units=tuple(parts.pop("failed_units", ())),
        details=parts.pop("details", {}),
        versions=dict(package_versions()),
        started_at=datetime.fromtimestamp(started, tz=UTC).isoformat(timespec="seconds"),
        seconds=round(time.time() - started, 3),
    )
