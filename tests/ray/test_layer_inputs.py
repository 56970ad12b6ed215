"""One more expert leaves the layer inputs as they are, and the part of one group is told by its prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ray_jobs import layer_inputs
from ray_jobs.layer_inputs import BENIGN_FACTOR, chosen_prompts, collect_layer_inputs
from ray_jobs.run import Run, with_absolute_paths
from safetydpo.config.schema import Config
from safetydpo.merging.moments import BENIGN


def open_run(place: Path, **experts: Any) -> Run:
    config: dict[str, Any] = {
        "name": "test",
        "identity": {
            "prompts": {"categories": ["violence", "hate"]},
            "merge": {"activation_prompts_per_category": 2},
            "experts": experts,
        },
        "execution": {"store": str(place / "store"), "run_dir": str(place / "run")},
    }
    return Run(with_absolute_paths(Config.model_validate(config)))


def test_prompts_are_unsafe_ones_by_category_and_then_benign_ones(tmp_path: Path) -> None:
    prompts = chosen_prompts(open_run(tmp_path))
    assert [prompt.group for prompt in prompts] == ["violence"] * 2 + ["hate"] * 2 + [BENIGN] * 2 * BENIGN_FACTOR
    assert len({prompt.text for prompt in prompts}) == len(prompts)


def test_other_experts_find_what_is_collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An expert per category, then one per concept: one collection, and no pass through the base for the second."""
    made = []

    def collect(run: Run, folder: Any, prompts: Any) -> dict[str, Any]:
        made.append(folder.path)
        return {"fingerprint": "f" * 64}

    monkeypatch.setattr(layer_inputs, "_make", collect)
    first = collect_layer_inputs(open_run(tmp_path))
    second = collect_layer_inputs(open_run(tmp_path, group_by="concept"))
    assert first.hash == second.hash
    assert len(made) == 1
