"""A measurement of merges as small as it goes, on the smoke config."""

from __future__ import annotations

from pathlib import Path

from safetydpo.evaluation.merge_page import MARKS

EMPTY_PAGE = f"# Merging\n\n{MARKS[0]}\n{MARKS[1]}\n"
TINY = [
    "identity.experts={group_by: concept, all_single: false}",
    "identity.prompts.pairs_per_concept=2",
    "identity.dpo.steps=2",
    "identity.sampler.steps=4",
    "execution.num_workers=1",
    "merge_evidence.seeds=[3]",
    "merge_evidence.screen_count=2",
    "merge_evidence.screened=[sum, ties]",
    "merge_evidence.scales=[0.5]",
    "merge_evidence.densities=[0.3]",
    "merge_evidence.scale_factors=[1.0]",
    "merge_evidence.validated=1",
    "merge_evidence.small={unsafe: 2, benign: 2, steps: 4}",
    "merge_evidence.full={unsafe: 4, benign: 2}",
    "merge_evidence.test={unsafe: 4, benign: 4, uncovered: 2}",
]


def tiny_settings(folder: Path) -> list[str]:
    """Return settings that keep every file of a test in its own folder; the page stands there."""
    (folder / "page.md").write_text(EMPTY_PAGE)
    return [
        f"store={folder}/store",
        f"run_dir={folder}/run",
        f"merge_evidence.results={folder}/results",
        f"merge_evidence.page={folder}/page.md",
        f"merge_evidence.images={folder}/images",
        *TINY,
    ]
