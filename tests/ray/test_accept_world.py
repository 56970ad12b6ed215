"""The acceptance job on a run folder made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ray_jobs.accept_world import accept_world, main
from ray_jobs.run import Run, with_absolute_paths
from safetydpo.artifacts.records import ArtifactKey, write_pointer
from safetydpo.artifacts.schemas import TRIALS
from safetydpo.artifacts.tables import table_from_rows, write_table
from safetydpo.config.load import load_config
from safetydpo.evaluation.summary import dump_summary
from tests.evaluation.synthetic import make_summary


@pytest.fixture
def arguments(configs: Path, tmp_path: Path) -> list[str]:
    """A closed run: a summary and two trials of 7 x 8 unsafe prompts."""
    settings = [f"store={tmp_path}/store", f"run_dir={tmp_path}/run", "identity.search.prompts_per_category=8"]
    run = Run(with_absolute_paths(load_config(configs / "demo.yaml", settings)))
    run.open()
    (run.run_dir / "report" / "summary.json").write_bytes(dump_summary(make_summary()).encode())
    key = ArtifactKey("search", "demo", {}, {}, 1)
    for number, hits in enumerate((2, 54)):
        row = {
            "trial": number,
            "candidate_hash": str(number),
            "candidate": json.dumps({"method": "sum", "global_scale": 1.0 + number}),
            "status": "ok",
            "objective": hits / 56,
            "metrics": json.dumps({"ip_select": hits / 56, "neutral_rate": 0.9}),
            "error": "",
        }
        write_table(run.folder(key) / "trials" / f"trial-{number:05d}.parquet", table_from_rows([row], TRIALS))
    write_pointer(run.run_dir, "search", key)
    # Another number of prompts in the config given now must not change what the run's trials rest on.
    return [str(configs / "demo.yaml"), *settings[:2], "identity.search.prompts_per_category=9"]


def test_rows_and_trials_are_judged(arguments: list[str]) -> None:
    checks = {check.name: check for check in accept_world(load_config(arguments[0], arguments[1:]))}
    assert set(checks) == {"expert_spill", "sum_cost", "merge_spread", "all_single_ip"}
    spread = checks["merge_spread"]
    assert spread.met
    assert spread.value == pytest.approx(52 / 56)
    assert spread.found.startswith("trial 0 (sum × 1.00) 0.04 [0.00, 0.12] against trial 1 (sum × 2.00) 0.96 [0.88")


def test_the_job_prints_a_table_and_one_json_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code = main(arguments)
    out = capsys.readouterr().out
    content = json.loads(out.splitlines()[-1])
    assert "Acceptance of the world" in out
    assert content["met"] == all(check["met"] for check in content["checks"])
    assert code == (0 if content["met"] else 1)


def test_one_check_that_fails_is_exit_code_1(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run" / "report" / "summary.json"
    summary = json.loads(file.read_text())
    summary["rows"] = [row for row in summary["rows"] if row["name"] != "all_single"]
    file.write_text(json.dumps(summary))
    assert main(arguments) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["met"] is False


def test_an_unfinished_run_and_no_config_are_refused(
    configs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(configs / "demo.yaml"), f"run_dir={tmp_path}/nothing"]) == 2
    assert capsys.readouterr().err == (
        f"error: expected a finished run in {tmp_path}/nothing, found no summary.json: "
        "run `safetydpo run` with this config\n"
    )
    assert main([]) == 2
    assert capsys.readouterr().err.startswith("usage: python -m ray_jobs.accept_world")
