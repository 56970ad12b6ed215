"""What a diagnosis writes and what the report reads of it; the work itself in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ray_jobs import diagnosis
from ray_jobs.diagnosis import diagnose_experts, read_overlap, read_winners
from ray_jobs.expert_files import record_folder
from ray_jobs.run import Run, with_absolute_paths
from safetydpo.artifacts.adapters import AdapterMetadata, LoraLayer, adapter_hash, write_adapter
from safetydpo.artifacts.layout import ADAPTER_FILE
from safetydpo.artifacts.records import Record
from safetydpo.config.experts import ALL_SINGLE
from safetydpo.config.schema import Config


@pytest.fixture
def run(tmp_path: Path) -> Run:
    execution = {"store": f"{tmp_path}/store", "run_dir": f"{tmp_path}/run"}
    return Run(with_absolute_paths(Config.model_validate({"name": "test", "execution": execution})))


def expert(run: Run, name: str, up: list[float]) -> Record:
    """Write a rank-1 expert whose delta is `up` times e1'."""
    layers = {"q": LoraLayer(down=torch.tensor([[1.0, 0.0]]), up=torch.tensor(up)[:, None])}
    record = Record("experts", name, "0" * 64, 1, {}, {}, adapter_hash(layers))
    write_adapter(record_folder(run, record) / ADAPTER_FILE, layers, metadata=AdapterMetadata(categories=(name,)))
    return record


def test_a_diagnosis_by_hand(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """(1, 0) and (1, 1): cosine 0.707107, output spaces 45 degrees apart (0.5), equal input spaces. No all_single."""
    names = {"violence": [1.0, 1.0], "hate": [1.0, 0.0], ALL_SINGLE: [0.0, 1.0]}
    experts = {name: expert(run, name, up) for name, up in names.items()}

    class Task:
        @staticmethod
        def options(**_: object) -> type[Task]:
            return Task

        remote = staticmethod(diagnosis._diagnose_task._function)

    monkeypatch.setattr(diagnosis, "connect", lambda config: None)
    monkeypatch.setattr(diagnosis, "_diagnose_task", Task)
    monkeypatch.setattr("ray.get", lambda made: made)
    record = diagnose_experts(run, experts)
    found = read_overlap(run, record)
    assert found.names == ("hate", "violence")
    assert found.categories == (("hate",), ("violence",))
    assert found.cosine == ((1.0, 0.707107), (0.707107, 1.0))
    assert found.columns == ((1.0, 0.5), (0.5, 1.0))
    assert found.rows == ((1.0, 1.0), (1.0, 1.0))
    assert record.counts == {"experts": 2}
    # Found closed: nothing is made again.
    monkeypatch.setattr(diagnosis, "_diagnose_task", None)
    assert diagnose_experts(run, experts).fingerprint == record.fingerprint


def test_winners_are_read_where_a_merge_selected(run: Run) -> None:
    """A merge in levels chooses among categories, which are none of the experts."""
    details = {"recipe": {"experts": [{"name": "hate"}, {"name": "violence"}]}}
    merged = {name: Record("merged", name, "0" * 64, 1, {}, {}, "f", details=details) for name in ("co_merge", "sum")}
    place = record_folder(run, merged["co_merge"]) / "winners.json"
    place.write_bytes(json.dumps({"q": {"hate": 3}, "v": {"hate": 1, "violence": 2}}).encode())
    (found,) = read_winners(run, merged, {"hate": ("hate", "harassment"), "skull": ("shocking",)})
    assert found.method == "co_merge"
    assert found.layers == (("q", {"hate": 3}), ("v", {"hate": 1, "violence": 2}))
    assert found.categories == {"hate": ("hate", "harassment"), "violence": ("violence",)}
