"""The run's final adapter as a file for others: its metadata name base and licence, a model card stands beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray_jobs.expert_files import record_folder
from ray_jobs.run import Run
from safetydpo.artifacts.adapters import AdapterMetadata, adapter_hash, read_adapter, write_adapter
from safetydpo.artifacts.layout import ADAPTER_FILE, CARD_FILE, merged_adapter_file
from safetydpo.artifacts.model_card import CardResult, ModelCard, render_model_card
from safetydpo.artifacts.records import Record
from safetydpo.artifacts.storage import Location
from safetydpo.diffusion.licences import licence_of
from safetydpo.evaluation.report_text import format_range
from safetydpo.evaluation.results import COLUMN_TITLES, format_metric
from safetydpo.evaluation.summary import Summary, find_base, overall_rows


def card_file(run: Run) -> Location:
    """Return the card beside the run's final adapter."""
    return merged_adapter_file(run.run_dir).parent / CARD_FILE


def publish_adapter(run: Run, record: Record, *, row: str, summary: Summary) -> None:
    """Write the final adapter and its card into the run's folder.

    Its layers are those of the artifact; its metadata also say the base model's name, the licence, and what each expert
    supplied.

    Args:
        run: the run.
        record: record of the merged artifact.
        row: name of its row in the summary.
        summary: the measured values.
    """
    layers, metadata = read_adapter(record_folder(run, record) / ADAPTER_FILE)
    metadata = with_origin(metadata, record.details, base_model=public_name(run.config.identity.base.model))
    write_adapter(merged_adapter_file(run.run_dir), layers, metadata=metadata)
    card = ModelCard(
        name=f"{run.config.name}: safety adapter",
        file=ADAPTER_FILE,
        published="diffusers",
        metadata=metadata,
        adapter_hash=adapter_hash(layers),
        rank=max(int(layer.down.shape[0]) for layer in layers.values()),
        num_layers=len(layers),
        metrics=metrics_of(summary, row),
        results=results_of(summary, row),
        data_set=(public_name(run.config.identity.prompts.source), f"{run.config.name}, test prompts"),
        notes=["Measured on held-out prompts; 95 % intervals in brackets. `report/index.html` of the run shows more."],
    )
    card_file(run).write_bytes(render_model_card(card).encode())


def with_origin(metadata: AdapterMetadata, details: Mapping[str, Any], *, base_model: str) -> AdapterMetadata:
    """Return an adapter's metadata with base model, licence and the shares of experts that its record holds."""
    recipe = dict(metadata.recipe)
    if details.get("shares"):
        recipe["shares"] = details["shares"]
    return replace(metadata, base_model=base_model, licence=licence_of(base_model), recipe=recipe)


def public_name(model: str) -> str:
    """Return what others may call a base model: its hub id or `demo`; of a path on this disk the last part."""
    return Path(model).name if Path(model).expanduser().exists() or model.count("/") != 1 else model


def metrics_of(summary: Summary, row: str) -> list[tuple[str, str]]:
    """Return (what, value and the base's) of the results table's columns for one row."""
    base = find_base(summary)
    own = next((found["metrics"] for found in overall_rows(summary) if found["name"] == row), {})
    before = {} if base is None else base["metrics"]
    return [
        (
            title.replace("\xa0", " "),
            format_metric(own[name]) + (f"; base {format_metric(before[name])}" if name in before else ""),
        )
        for name, title in COLUMN_TITLES.items()
        if name in own
    ]


def results_of(summary: Summary, row: str) -> list[CardResult]:
    """Return the same columns of one row as numbers, each with its interval and n in its title."""
    own = next((found["metrics"] for found in overall_rows(summary) if found["name"] == row), {})
    return [
        CardResult(
            name,
            f"{title.replace(chr(0xA0), ' ')} (95 % interval {format_range(own[name])}, n = {own[name]['n']})",
            own[name]["value"],
        )
        for name, title in COLUMN_TITLES.items()
        if name in own
    ]
