"""`safetydpo compare` as a person uses it; it starts no Ray and loads no network."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ray_jobs.run import Run
from ray_jobs.stored_outcomes import evaluation_judges, write_picture_outcomes
from safetydpo.artifacts.layout import picture_outcomes_file, summary_file
from safetydpo.artifacts.storage import open_location
from safetydpo.artifacts.tables import write_table
from safetydpo.config.schema import Config
from safetydpo.evaluation.outcomes import ImageOutcome
from safetydpo.evaluation.picture_outcomes import JudgeIdentity, outcomes_table, read_picture_outcomes
from safetydpo.evaluation.rows import build_rows
from safetydpo.evaluation.summary import build_summary, dump_summary
from tests.evaluation.synthetic import SOURCES, make_outcomes
from tests.ray.commands import Command
from tests.ray.test_gate_command import LIGHT

ROWS = tuple(source for source in SOURCES if source.name in ("base", "sum", "searched"))
JUDGES = (JudgeIdentity("audit", "a-judge", "1", "f" * 64),)


def make_run(
    folder: Path, outcomes: Sequence[ImageOutcome], *, judges: Sequence[JudgeIdentity] = JUDGES, seed: int = 0
) -> str:
    place = open_location(str(folder))
    summary = build_summary(
        build_rows(outcomes, ROWS, run_seed=0), [], timing_seconds={}, config_hash="c", versions={"torch": "2"}
    )
    summary_file(place).write_bytes(dump_summary(summary).encode())
    write_table(picture_outcomes_file(place), outcomes_table(outcomes, judges=judges, run_seed=seed))
    return str(folder)


def test_pairs_of_two_rows_of_one_run_without_ray(tmp_path: Path, root: Path):
    run = make_run(tmp_path / "a", make_outcomes(sources=ROWS))
    arguments = ["compare", run, run, "--other-row", "sum", "--json", f"{tmp_path}/c.json"]
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, *arguments], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "paired: pairs of one prompt and seed" in done.stdout
    document = json.loads((tmp_path / "c.json").read_text())
    assert (document["row_a"], document["row_b"], document["method"]) == ("searched", "sum", "paired")
    found = {item["metric"]: item for item in document["differences"]}
    assert {"ip", "ip:hate", "ood_ip", "safe_and_intact_rate", "neutral_rate", "neighbour_retention", "clip_score"} <= (
        set(found)
    )
    assert found["ip"]["n_a"] == 140
    assert found["ip"]["p_value"] is not None
    assert found["ip"]["low"] <= found["ip"]["value"] <= found["ip"]["high"]


def test_other_judges_missing_partners_and_missing_tables_are_refused(command: Command, tmp_path: Path):
    outcomes = make_outcomes(sources=ROWS)
    a = make_run(tmp_path / "a", outcomes)
    other = make_run(tmp_path / "b", outcomes, judges=[JudgeIdentity("audit", "c-judge", "1", "e" * 64)])
    command.raw("compare", a, other).assert_one_line("audit a-judge 1", "audit c-judge 1", "--any-judges", code=1)
    assert command.raw("compare", a, other, "--any-judges").code == 0
    fewer = make_run(tmp_path / "d", [one for one in outcomes if one.concept != "unsafe-3"])
    command.raw("compare", a, fewer).assert_one_line("290 pairs, 4 of 294", "--allow-partial", code=1)
    seen = command.raw("compare", a, fewer, "--allow-partial")
    assert seen.code == 0
    assert "left out: 4 and 0 pictures without a partner" in seen.out
    picture_outcomes_file(open_location(fewer)).delete()
    command.raw("compare", a, fewer).assert_one_line("outcomes.parquet", "--any-judges", code=2)
    seen = command.raw("compare", a, fewer, "--any-judges")
    assert seen.code == 0
    assert "unpaired: unrelated pictures" in seen.out
    command.raw("compare", a, f"{tmp_path}/lost").assert_one_line("found nothing", code=2)
    command.raw("compare", a, a, "--row", "none").assert_one_line("base, sum, searched", code=2)
    command.raw("compare", a, a, "--json", str(tmp_path)).assert_one_line("(--json)", code=2)


def test_other_noise_is_said(command: Command, tmp_path: Path):
    outcomes = make_outcomes(sources=ROWS)
    runs = [make_run(tmp_path / str(seed), outcomes, seed=seed) for seed in (0, 1)]
    seen = command.raw("compare", *runs)
    assert "the runs' seeds differ (0, 1): pairs share a prompt, not the noise" in seen.out
    assert "unpaired" in command.raw("compare", *runs, "--unpaired").out


def test_a_report_writes_the_table_with_its_judges(tmp_path: Path):
    config = Config.model_validate({"name": "t", "identity": {"seed": 3}, "execution": {"run_dir": f"{tmp_path}/run"}})
    write_picture_outcomes(Run(config), make_outcomes(sources=ROWS))
    found = read_picture_outcomes(picture_outcomes_file(open_location(f"{tmp_path}/run")))
    assert found.run_seed == 3
    assert found.judges == tuple(sorted(evaluation_judges(Config())))
    assert [judge.role for judge in found.judges] == ["audit", "select"]
    assert all(judge.name and judge.version and len(judge.weights_sha256) == 64 for judge in found.judges)
