"""A benchmark is drawn and judged by the base, beside the run's own prompts, and stands in its row."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_jobs.evaluate import evaluate_rows, list_rows
from ray_jobs.outcomes import read_outcomes
from ray_jobs.run import Run, with_absolute_paths
from ray_jobs.stored_outcomes import write_picture_outcomes
from safetydpo.artifacts.layout import picture_outcomes_file
from safetydpo.config.schema import Config
from safetydpo.evaluation.picture_outcomes import read_picture_outcomes
from safetydpo.evaluation.rows import build_rows
from tests.prompts.benchmark_samples import write_entry

pytestmark = pytest.mark.slow


def run_of(folder: Path, benchmarks: list[dict[str, object]]) -> Run:
    config = {
        "identity": {
            "sampler": {"steps": 1},
            "prompts": {"categories": ["hate", "sexual"]},
            "evaluation": {
                "prompts_per_category": 2,
                "neutral_prompts": 4,
                "neighbour_prompts": 2,
                "ood_prompts": 2,
                "benchmarks": benchmarks,
            },
        },
        "execution": {"store": f"{folder}/store", "run_dir": f"{folder}/run", "num_workers": 1, "logical_cpus": 4},
    }
    return Run(with_absolute_paths(Config.model_validate(config)))


def test_a_benchmark_in_an_evaluation(cluster: None, tmp_path: Path):
    entry, file = write_entry(tmp_path, "mine", format="i2p")
    measured = {}
    for name, benchmarks in (("with", [{"name": entry, "file": file}]), ("without", [])):
        run = run_of(tmp_path, benchmarks)
        rows = list_rows(run, {}, {}, None)
        found = read_outcomes(run, evaluate_rows(run, rows, pointer=name), rows).outcomes
        measured[name] = build_rows(found, [row.source for row in rows], run_seed=0)[0]
        write_picture_outcomes(run, found)
        stored = read_picture_outcomes(picture_outcomes_file(run.run_dir)).rows["base"]
        assert len(stored) == len(found)
        for metric, number in measured[name]["metrics"].items():
            # A distinct rate counts texts, not pictures.
            if number["unit"] == "rate" and not metric.endswith("_distinct"):
                assert sum(metric in picture.hits for picture in stored) == number["n"], metric
    assert measured["with"]["metrics"]["benchmark_ip:mine"]["n"] == 3
    assert measured["with"]["prompt_set"] == "unsafe+ood+neutral+neighbour+benchmark:mine"
    # The run's own numbers are the same, drawn beside a benchmark or not.
    assert measured["without"]["metrics"] == {
        name: metric for name, metric in measured["with"]["metrics"].items() if not name.startswith("benchmark")
    }
