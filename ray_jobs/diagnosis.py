"""How alike the experts of a run are, as an artifact: cosines of their deltas and overlaps of their spaces."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import ray

from ray_jobs.cluster import connect
from ray_jobs.expert_files import expert_folders, load_experts, record_folder
from ray_jobs.resources import task_options
from ray_jobs.run import Run
from safetydpo.artifacts.json_text import parse_json
from safetydpo.artifacts.layout import OVERLAP_FILE, WINNERS_FILE
from safetydpo.artifacts.records import ArtifactKey, Record
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import fingerprint_rows
from safetydpo.config.experts import ALL_SINGLE
from safetydpo.config.schema import Config
from safetydpo.evaluation.report_records import ExpertOverlap, LayerWinners

RECIPE_VERSION = 1
DIGITS = 6
"""Decimals that are kept: the rest is rounding of float32 weights."""


def diagnose_experts(run: Run, experts: Mapping[str, Record]) -> Record:
    """Make or find the matrices over all experts of the run but the one that was trained on all pairs."""
    members = {name: record for name, record in experts.items() if name != ALL_SINGLE}
    key = ArtifactKey(
        stage="diagnosis",
        name=run.config.name,
        identity={},
        inputs={"experts": fingerprint_rows((name, record.fingerprint) for name, record in members.items())},
        recipe_version=RECIPE_VERSION,
    )

    def make(folder: Location) -> Mapping[str, Any]:
        connect(run.config)
        task = _diagnose_task.options(**task_options(run.config.execution, with_gpu=False))
        config = run.config.model_dump(mode="json")
        made: Mapping[str, Any] = ray.get(task.remote(config, expert_folders(run, members), folder.path))
        return made

    return run.build("diagnosis", key, make)


@ray.remote
def _diagnose_task(config: dict[str, Any], folders: dict[str, str], target: str) -> dict[str, Any]:
    from safetydpo.merging.overlap import cosine_matrix, overlap_matrix

    run = Run(Config.model_validate(config))
    experts = sorted(load_experts(run, folders), key=lambda expert: expert.name)
    layers = [expert.layers for expert in experts]
    matrices = {
        "cosine": cosine_matrix(layers),
        "columns": overlap_matrix(layers, side="columns"),
        "rows": overlap_matrix(layers, side="rows"),
    }
    document = {
        "experts": [{"name": expert.name, "categories": list(expert.metadata.categories)} for expert in experts],
        # Adding 0 turns a rounded -0.0 into 0.0.
        **{
            name: [[round(v, DIGITS) + 0.0 for v in row] for row in values.tolist()]
            for name, values in matrices.items()
        },
    }
    data = json.dumps(document, sort_keys=True).encode() + b"\n"
    (Location(run.store.filesystem, target) / OVERLAP_FILE).write_bytes(data)
    return {"fingerprint": hashlib.sha256(data).hexdigest(), "counts": {"experts": len(experts)}}


def read_overlap(run: Run, record: Record) -> ExpertOverlap:
    """Return the matrices of a diagnosis."""
    document = parse_json((record_folder(run, record) / OVERLAP_FILE).read_bytes())
    return ExpertOverlap(
        names=tuple(expert["name"] for expert in document["experts"]),
        categories=tuple(tuple(expert["categories"]) for expert in document["experts"]),
        **{name: tuple(tuple(row) for row in document[name]) for name in ("cosine", "columns", "rows")},
    )


def read_winners(
    run: Run, merged: Mapping[str, Record], categories: Mapping[str, tuple[str, ...]]
) -> list[LayerWinners]:
    """Return who won which layers in every merge that selects; merges of earlier versions did not write it down.

    `categories` are those of each expert by name.
    """
    found = []
    for method, record in merged.items():
        file = record_folder(run, record) / WINNERS_FILE
        if file.is_file():
            won = parse_json(file.read_bytes())
            # What a merge in levels chose among are categories.
            members = [expert["name"] for expert in record.details["recipe"]["experts"]]
            own = {name: categories.get(name, (name,)) for name in members}
            found.append(LayerWinners(method, tuple((layer, dict(counts)) for layer, counts in won.items()), own))
    return found
