"""Where experts and what merges need beside them lie, and how a worker reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray_jobs.expert_plan import is_grouped
from ray_jobs.run import Run
from safetydpo.artifacts.adapters import LoraLayer, adapter_hash, read_adapter, read_adapter_metadata
from safetydpo.artifacts.layout import ADAPTER_FILE
from safetydpo.artifacts.records import ArtifactKey, Record, artifact_folder, files_folder
from safetydpo.artifacts.storage import Location
from safetydpo.errors import SafetyDPOError
from safetydpo.merging.method import MergeMethod
from safetydpo.merging.registry import find_method

MERGE_RECIPE_VERSION = 2
"""How experts become a merged adapter."""
INPUTS_FILE = "layer_inputs.safetensors"
MOMENTS_FILE = "moments.safetensors"
MAX_EXPERT_BYTES = 2 << 30
"""Experts whose files are larger than this together are not kept in memory while they are merged."""
MAX_INPUT_BYTES = 1 << 30
"""Layer inputs that are larger are read one layer at a time, and moments likewise."""


@dataclass(frozen=True)
class MergeAids:
    """What some methods need beside the experts; None where no method of a run asks for it."""

    layer_inputs: Record | None = None
    distilled: Record | None = None

    def needed_by(self, methods: Sequence[MergeMethod]) -> MergeAids:
        """Return only what these methods need."""
        return MergeAids(
            self.layer_inputs if any(method.needs_base for method in methods) else None,
            self.distilled if any(method.needs_distilled for method in methods) else None,
        )

    def fingerprints(self) -> dict[str, str]:
        """Return {name: fingerprint}, empty where there is none: inputs of an artifact's key."""
        return {name: record.fingerprint if record else "" for name, record in self._records().items()}

    def folders(self, run: Run) -> dict[str, str]:
        """Return {name: path of its artifact folder} of those that are there."""
        return {name: record_folder(run, record).path for name, record in self._records().items() if record}

    def _records(self) -> dict[str, Record | None]:
        return {"layer_inputs": self.layer_inputs, "distilled": self.distilled}


def record_folder(run: Run, record: Record) -> Location:
    """Return the folder in which a record's artifact stands."""
    key = ArtifactKey(record.stage, record.name, record.identity, record.inputs, record.recipe_version)
    return artifact_folder(run.store, key)


def record_files(run: Run, record: Record) -> Location:
    """Return the folder in which the files of a record's artifact stand."""
    return files_folder(record_folder(run, record), record)


def expert_folders(run: Run, experts: Mapping[str, Record]) -> dict[str, str]:
    """Return {expert name: path of the folder of its files}."""
    return {name: record_files(run, record).path for name, record in experts.items()}


def expert_categories(run: Run, experts: Mapping[str, Record]) -> dict[str, tuple[str, ...]]:
    """Return the categories that each expert is made for; where experts are others than one per category, its file says
    it.

    Raises:
        SafetyDPOError: if an adapter's file is missing or cut short.
    """
    if not is_grouped(run.config.identity.experts):
        return {name: (name,) for name in experts}
    return {
        name: read_adapter_metadata(record_files(run, record) / ADAPTER_FILE).categories
        for name, record in experts.items()
    }


def check_expert_files(run: Run, experts: Mapping[str, Record]) -> None:
    """Refuse a damaged or foreign adapter before workers are started; only headers are read.

    Raises:
        SafetyDPOError: if an adapter's file is missing or cut short, or was trained for another base model.
    """
    for name, record in experts.items():
        location = record_files(run, record) / ADAPTER_FILE
        found = read_adapter_metadata(location).base_fingerprint
        if found != run.base_fingerprint:
            raise SafetyDPOError(
                f"expected expert {name!r} of base model {run.base_fingerprint[:12]}, found one of base model "
                f"{found[:12] or 'unknown'} in {location}: delete its folder and run the same command again, "
                "which trains it"
            )


def load_experts(run: Run, folders: Mapping[str, str], *, max_bytes: int = MAX_EXPERT_BYTES) -> list[Any]:
    """Read expert adapters from the folders of their files.

    If they are larger than `max_bytes` together, their layers are read one at a time, whenever they are needed.
    """
    from safetydpo.artifacts.lazy_tensors import LazyLayers
    from safetydpo.merging.merge import Expert

    files = {name: Location(run.store.filesystem, path) / ADAPTER_FILE for name, path in folders.items()}
    is_lazy = sum(file.size_bytes() for file in files.values()) > max_bytes
    experts = []
    for name, file in files.items():
        layers: Mapping[str, LoraLayer]
        if is_lazy:
            layers = LazyLayers(file)
            metadata = layers.metadata
        else:
            layers, metadata = read_adapter(file)
        experts.append(Expert(name, adapter_hash(layers), layers, metadata))
    return experts


def read_aids(run: Run, folders: Mapping[str, str], *, methods: Sequence[str]) -> dict[str, Any]:
    """Read what these methods need, from `MergeAids.folders`, as the arguments of `prepare_experts`.

    What is not needed is not read and None.
    """
    from safetydpo.merging.activations import METADATA_KEY, inputs_from_bytes
    from safetydpo.merging.collected import open_collected
    from safetydpo.merging.moments import moments_from_bytes, open_moments

    chosen = [find_method(name) for name in methods]
    found: dict[str, Any] = dict.fromkeys(("inputs", "moments", "distilled"))
    collected = {"base_fingerprint": run.base_fingerprint}
    if "layer_inputs" in folders and any(method.needs_inputs for method in chosen):
        location = Location(run.store.filesystem, folders["layer_inputs"]) / INPUTS_FILE
        if location.size_bytes() > MAX_INPUT_BYTES:
            found["inputs"] = open_collected(location, kind=METADATA_KEY, what="layer inputs", **collected)
        else:
            found["inputs"] = inputs_from_bytes(location.read_bytes(), source=str(location), **collected)
    if "layer_inputs" in folders and any(method.needs_moments for method in chosen):
        location = Location(run.store.filesystem, folders["layer_inputs"]) / MOMENTS_FILE
        if location.size_bytes() > MAX_INPUT_BYTES:
            found["moments"] = open_moments(location, **collected)
        else:
            found["moments"] = moments_from_bytes(location.read_bytes(), source=str(location), **collected)
    if "distilled" in folders and any(method.needs_distilled for method in chosen):
        found["distilled"], _ = read_adapter(Location(run.store.filesystem, folders["distilled"]) / ADAPTER_FILE)
    return found
