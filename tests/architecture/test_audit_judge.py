"""Who may come to see the audit judge: these modules, and no other that is there or will be."""

from __future__ import annotations

import grimp

MEASURE = {
    "attack_prompts",
    "evaluate",
    "evaluation_summary",
    "evaluation_worker",
    "evidence",
    "final_judges",
    "judge_pictures",
    "merge_bench",
    "merge_evidence",
    "merge_evidence_plan",
    "merge_evidence_tables",
    "merge_tested",
    "outcomes",
    "picture_features",
    "report",
    "stored_outcomes",
}
"""Final measurements, and what reads or repeats them."""
START = {
    "attack_command",
    "cli",
    "doctor",
    "evidence_command",
    "jobs",
    "jobs_command",
    "judge_command",
    "merge_evidence_command",
    "pipeline",
    "plan_beside",
    "plan_command",
    "plan_evaluation",
    "plan_storage",
    "plan_work",
    "submit_plan",
}
"""Commands and plans of all stages, which start stages and make nothing themselves."""
BUILD = {"safetydpo.demo.build", "safetydpo.demo.check", "safetydpo.judges.final"}
"""What makes its weights and checks them, and the one door to it."""


def test_nothing_that_makes_pairs_experts_or_merges_imports_it_however_indirectly() -> None:
    graph = grimp.build_graph("safetydpo", "ray_jobs")
    found = graph.find_downstream_modules("safetydpo.judges.demo_audit")
    assert found == {f"ray_jobs.{name}" for name in MEASURE | START} | BUILD
