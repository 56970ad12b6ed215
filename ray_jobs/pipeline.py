"""The whole chain, from pairs to report: `python -m ray_jobs.pipeline CONFIG [key=value …]`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from ray_jobs.cost_meter import CostMeter
from ray_jobs.resources import for_stage
from ray_jobs.run import Run, run_id, with_absolute_paths
from ray_jobs.run_context import set_up_logging, within
from ray_jobs.run_progress import telling
from safetydpo.artifacts.records import Record
from safetydpo.artifacts.storage import Location, open_location
from safetydpo.config.load import load_config
from safetydpo.config.pairs import GENERATE
from safetydpo.config.schema import Config, IdentityConfig
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.prompts.imported import is_imported

STAGES = ("pairs", "train", "merge", "search", "evaluate", "report")
STAGES_WITH_SEARCH = ("search", "report")
"""Those that need a search, and so a judge of the run's pictures (`identity.search.judges`)."""
Result = TypeVar("Result")


@dataclass
class Chain:
    """A run in progress: what each finished stage handed on."""

    run: Run
    pairs: Record | None = None
    experts: dict[str, Record] = field(default_factory=dict)
    merged: dict[str, Record] = field(default_factory=dict)
    diagnosis: Record | None = None
    search: Record | None = None
    search_stopped: str = ""
    """Which budget ended the search before its last trial, and how far it got; then no later stage ran."""
    searched: Record | None = None
    outcomes: Record | None = None
    rows: list[Any] = field(default_factory=list)
    summary: Any = None
    redacted: bool = False
    """The report is written without unsafe prompts and pictures."""

    @property
    def pairs_folder(self) -> Location:
        """Where the pairs stand."""
        from ray_jobs.expert_files import record_folder

        assert self.pairs is not None
        return record_folder(self.run, self.pairs)


def run_stages(config: Config, *, last: str = "report", redacted: bool = False) -> Chain:
    """Run every stage up to `last`; a stage whose artifacts are closed costs a look at them.

    The report is `redacted`: without unsafe prompts and pictures, in a file of its own.
    """
    set_up_logging()
    run = Run(with_absolute_paths(config))
    check_request(run, last=last)
    run.open()
    chain = Chain(run, redacted=redacted)
    for stage in stages_to(last, config.identity):
        chain.run = for_stage(run, stage)
        with within(run=run_id(run.config), stage=stage), telling(chain.run, stage):
            _timed(run, stage, partial(_STEPS[stage], chain))
        if chain.search_stopped:
            break
    return chain


def stages_to(last: str, identity: IdentityConfig) -> tuple[str, ...]:
    """Return the stages up to `last`, without the search if no judge of it takes the run's pictures."""
    from ray_jobs.search_judges import can_search

    stages = STAGES[: STAGES.index(last) + 1]
    return stages if can_search(identity) else tuple(stage for stage in stages if stage != "search")


def check_request(run: Run, *, last: str = "report") -> None:
    """Refuse what a later stage, up to `last`, would refuse, before anything is written or started.

    Raises:
        UsageError: if a merge method, a judge, a LoRA target or the base model does not exist or cannot do what is
            asked, or a path is of another kind.
        SafetyDPOError: if a category has no prompt pair, or the base model's files are incomplete.
    """
    from ray_jobs.attack_prompts import check_attacks
    from ray_jobs.baselines import check_comparators
    from ray_jobs.expert_plan import group_prompt_pairs, is_grouped
    from ray_jobs.expert_watch import check_watch
    from ray_jobs.given_pairs import check_given
    from ray_jobs.merge_settings import check_blocks
    from ray_jobs.picture_features import network_fingerprints
    from ray_jobs.prompt_tables import all_pairs
    from ray_jobs.search_checks import check_search
    from ray_jobs.search_judges import asks_demo_judge, check_can_be_found
    from ray_jobs.search_merges import validation_prompts
    from ray_jobs.verify_pairs import check_verification
    from safetydpo.diffusion.build import check_targets

    identity = run.config.identity
    _check_methods(identity)
    check_attacks(identity)
    if "search" in stages_to(last, identity):
        check_search(run.config)
    if STAGES.index(last) >= STAGES.index("evaluate"):
        check_comparators(identity)
    # First, because what comes next fetches the model.
    _check_judges(run.config, last=last)
    if last == "report":
        # Names the weights that are missing.
        network_fingerprints(identity.evaluation.measures)
    is_given = identity.pairs.source != GENERATE
    if not is_given:
        check_verification(identity, run.config.execution.judges)
    check_places(run, last=last)
    if "search" in stages_to(last, identity) and not asks_demo_judge(identity):
        check_can_be_found(run.config, validation_prompts(run))
    if STAGES.index(last) >= STAGES.index("train"):
        check_watch(run.config)
    if is_given:
        check_given(identity)
    else:
        all_pairs(identity.prompts)
        if is_grouped(identity.experts):
            group_prompt_pairs(identity)
    # Computed once per run and kept: asking here costs nothing.
    _ = run.base_fingerprint
    layers = check_targets(identity.base, identity.lora.layer_targets, attention=identity.lora.attention)
    check_blocks(identity, layers)


def _check_judges(config: Config, *, last: str) -> None:
    from ray_jobs.final_judges import check_final_judges
    from ray_jobs.search_judges import can_search, check_search_judges
    from safetydpo.judges.build import DEMO_SIDE

    identity = config.identity
    sampler = identity.sampler
    if last in STAGES_WITH_SEARCH and not can_search(identity):
        raise UsageError(
            f"expected pictures of {DEMO_SIDE} x {DEMO_SIDE} (identity.sampler) for the stage {last!r}, whose judge "
            f"knows the drawings of the demo world only, found {sampler.height} x {sampler.width}: name judges of real "
            "pictures (identity.search.judges, such as [open_nsfw]) and a folder with a CLIP model "
            "(identity.search.clip), or run `safetydpo evaluate`, which needs no search"
        )
    if "search" in stages_to(last, identity):
        check_search_judges(config)
    if STAGES.index(last) >= STAGES.index("evaluate"):
        check_final_judges(config)


def _check_methods(identity: IdentityConfig) -> None:
    from ray_jobs.merge_settings import check_merge_settings
    from safetydpo.merging.registry import find_method

    for setting, names in (
        ("merge.methods", identity.merge.methods),
        ("search.methods", identity.search.methods),
        ("merge.distill.start_method", [identity.merge.distill.start_method]),
    ):
        for name in names:
            try:
                find_method(name)
            except UsageError as error:
                raise UsageError(f"{error}: correct identity.{setting}") from error
    check_merge_settings(identity)
    start = identity.merge.distill.start_method
    if find_method(start).needs_distilled:
        raise UsageError(
            f"expected a merge that a distillation can start from in identity.merge.distill.start_method, found "
            f"{start!r} itself: use sum or another merge"
        )


def check_places(run: Run, *, last: str) -> None:
    """Refuse a store, a run folder or a source of prompts that cannot be one.

    Raises:
        UsageError: if something else stands there.
        SafetyDPOError: if the object store does not answer.
    """
    for location in (run.store, run.run_dir):
        location.check_reachable()
    if run.run_dir.is_file():
        raise UsageError(
            f"expected a folder or nothing at {run.run_dir} (execution.run_dir), found a file: choose another"
        )
    prompts = run.config.identity.prompts
    source = prompts.source
    is_given = run.config.identity.pairs.source != GENERATE
    if source == "demo" or (is_given and not prompts.retention_prompts and last in ("pairs", "train")):
        return
    place = open_location(source)
    place.check_reachable()
    if place.is_folder() or is_imported(place):
        return
    found = "a file" if place.is_file() else "nothing"
    raise UsageError(
        f"expected a folder of prompts at {source} (identity.prompts.source), found {found}: name one with "
        "prompt_pairs.parquet, memberships.parquet and prompts.parquet, a folder made by `safetydpo prompts write`, "
        "a file made by `safetydpo prompts import`, or `demo`"
    )


def _timed(run: Run, stage: str, work: Callable[[], None]) -> None:
    started, made = time.time(), len(run.made)
    meter = CostMeter(run.config.execution)
    try:
        with meter:
            work()
    except BaseException as error:
        try:
            run.add_seconds(stage, time.time() - started)
            run.add_cost(stage, meter.cost())
        except SafetyDPOError as second:
            # Where the stage's place is gone, its time cannot be kept either; the first error says more.
            error.add_note(str(second))
        raise
    # A look at closed artifacts is no work; adding it up would make every repeat look slower.
    if len(run.made) > made or stage not in run.seconds():
        run.add_seconds(stage, time.time() - started)
        run.add_cost(stage, meter.cost())


def _pairs(chain: Chain) -> None:
    from ray_jobs.generate_pairs import generate_pairs
    from ray_jobs.given_pairs import take_given_pairs

    is_given = chain.run.config.identity.pairs.source != GENERATE
    chain.pairs = take_given_pairs(chain.run) if is_given else generate_pairs(chain.run)


def _train(chain: Chain) -> None:
    from ray_jobs.train_experts import train_experts

    assert chain.pairs is not None
    chain.experts = train_experts(chain.run, chain.pairs, chain.pairs_folder)


def _merge(chain: Chain) -> None:
    from ray_jobs.diagnosis import diagnose_experts
    from ray_jobs.merge_experts import merge_experts

    assert chain.pairs is not None
    chain.merged = merge_experts(chain.run, chain.experts, chain.pairs, chain.pairs_folder)
    chain.diagnosis = diagnose_experts(chain.run, chain.experts)


def _search(chain: Chain) -> None:
    from ray_jobs.merge_searcher import BudgetError
    from ray_jobs.search_merges import search_merges

    assert chain.pairs is not None
    try:
        chain.search, chain.searched = search_merges(chain.run, chain.experts, chain.pairs, chain.pairs_folder)
    except BudgetError as reached:
        # What was asked for: not a failure, but nothing that a later stage could go on from.
        chain.search_stopped = str(reached)


def _evaluate(chain: Chain) -> None:
    from ray_jobs.baselines_tuning import tune_comparators
    from ray_jobs.evaluate import evaluate
    from ray_jobs.evaluation_summary import write_summary

    comparators = tune_comparators(chain.run)
    chain.outcomes, chain.rows = evaluate(chain.run, chain.experts, chain.merged, chain.searched, comparators)
    if chain.searched is None:
        # No report follows, which would write it.
        chain.summary = write_summary(chain.run, chain.outcomes, chain.rows)


def _report(chain: Chain) -> None:
    from ray_jobs.report import Finished, write_report

    assert chain.search is not None
    assert chain.searched is not None
    assert chain.outcomes is not None
    assert chain.diagnosis is not None
    finished = Finished(
        chain.experts, chain.search, chain.searched, chain.outcomes, chain.rows, chain.merged, chain.diagnosis,
        chain.pairs,
    )  # fmt: skip
    chain.summary = write_report(chain.run, finished, redacted=chain.redacted)


_STEPS: dict[str, Callable[[Chain], None]] = {
    "pairs": _pairs,
    "train": _train,
    "merge": _merge,
    "search": _search,
    "evaluate": _evaluate,
    "report": _report,
}


def main(arguments: Sequence[str]) -> int:
    """Run the chain of a config file; print one line on failure."""
    from ray_jobs.cli import run_chain
    from ray_jobs.failures import run_guarded, split_debug

    rest, debug = split_debug(arguments)
    if not rest or "--help" in rest:
        print(
            "usage: python -m ray_jobs.pipeline [--debug] CONFIG [key=value …]", file=sys.stdout if rest else sys.stderr
        )
        return 0 if rest else 2
    return run_guarded(lambda: run_chain(load_config(rest[0], rest[1:]), last="report"), debug=debug)


if __name__ == "__main__":
    from ray_jobs.background import end_process

    end_process(main(sys.argv[1:]))
