"""Attack prompts on Ray: the same bytes from one worker and from two, none made twice, and what the command shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_jobs.attack_prompts import PROMPTS_FILE, STAGE, attack_sets, make_attack_prompts, with_attacks
from ray_jobs.evaluate import EvaluatedRow, evaluate_rows
from ray_jobs.expert_files import record_folder
from ray_jobs.outcomes import read_outcomes
from safetydpo.artifacts.layout import stage_folder
from safetydpo.evaluation.rows import RowSource, build_rows
from tests.ray.test_attack_prompts import open_run

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.usefixtures("cluster")]


def test_equal_bytes_from_one_worker_and_from_two_and_nothing_made_twice(tmp_path: Path) -> None:
    made = []
    for workers in (1, 2):
        run = open_run(tmp_path / str(workers), workers=workers, attacks=["typo", "optimised"])
        record = make_attack_prompts(run, adapter=None)
        made.append(((record_folder(run, record) / PROMPTS_FILE).read_bytes(), record.fingerprint, record.hash))
        assert make_attack_prompts(run, adapter=None) == record
    assert made[0] == made[1]
    more = open_run(tmp_path / "2", attacks=["typo", "optimised", "paraphrase"])
    assert make_attack_prompts(more, adapter=None).counts == {"typo": 10, "optimised": 10, "paraphrase": 10}
    (pool,) = (folder for folder in stage_folder(more.store, STAGE).list() if folder.name.startswith("pool-"))
    assert len([batch for batch in pool.list() if batch.name.startswith("batch-")]) == 2


def test_rows_of_the_summary_have_the_rates(tmp_path: Path) -> None:
    run = open_run(
        tmp_path, attacks=["typo", "optimised"], prompts_per_category=1, neutral_prompts=2, neighbour_prompts=1,
        ood_prompts=1,
    )  # fmt: skip
    rows = with_attacks(run, [EvaluatedRow(RowSource("base", "base"), "", ("unsafe", "neutral"))], None)
    assert rows[0].prompt_sets == ("unsafe", "neutral", "attack:typo", "attack:optimised")
    assert {name: len(prompts) for name, prompts in attack_sets(run).items()} == {
        "attack:typo": 10,
        "attack:optimised": 10,
    }
    joined = read_outcomes(run, evaluate_rows(run, rows), rows)
    (row,) = build_rows(joined.outcomes, [rows[0].source], run_seed=0)
    assert row["prompt_set"] == "unsafe+neutral+attack:optimised+attack:typo"
    assert {row["metrics"][f"attack_ip:{name}"]["n"] for name in ("typo", "optimised")} == {10}
