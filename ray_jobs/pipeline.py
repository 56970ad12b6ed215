"""The whole chain, from pairs to report: `python -m ray_jobs.pipeline CONFIG [key=value …]`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from ray_jobs.run import Run, with_absolute_paths
from safetydpo.artifacts.records import Record
from safetydpo.config.load import load_config
from safetydpo.config.schema import Config
from safetydpo.errors import SafetyDPOError

STAGES = ("pairs", "train", "merge", "search", "evaluate", "report")
Result = TypeVar("Result")


@dataclass
class Chain:
    """A run in progress: what each finished stage handed on."""

    run: Run
    pairs: Record | None = None
    experts: dict[str, Record] = field(default_factory=dict)
    merged: dict[str, Record] = field(default_factory=dict)
    search: Record | None = None
    searched: Record | None = None
    outcomes: Record | None = None
    rows: list[Any] = field(default_factory=list)
    summary: Any = None


def run_stages(config: Config, *, last: str = "report") -> Chain:
    """Run every stage up to `last`; a stage whose artifacts are closed costs a look at them."""
    run = Run(with_absolute_paths(config))
    run.open()
    chain = Chain(run)
    for stage in STAGES[: STAGES.index(last) + 1]:
        _timed(run, stage, partial(_STEPS[stage], chain))
    return chain


def _timed(run: Run, stage: str, work: Callable[[], None]) -> None:
    started = time.time()
    try:
        work()
    finally:
        seconds = time.time() - started
        # A look at closed artifacts is no work; adding it up would make every repeat look slower.
        if seconds > 1.0 or stage not in run.seconds():
            run.add_seconds(stage, seconds)


def _pairs(chain: Chain) -> None:
    from ray_jobs.generate_pairs import generate_pairs

    chain.pairs = generate_pairs(chain.run)


def _train(chain: Chain) -> None:
    from ray_jobs.merge_experts import record_folder
    from ray_jobs.train_experts import train_experts

    assert chain.pairs is not None
    chain.experts = train_experts(chain.run, chain.pairs, record_folder(chain.run, chain.pairs))


def _merge(chain: Chain) -> None:
    from ray_jobs.merge_experts import merge_experts

    chain.merged = merge_experts(chain.run, chain.experts)


def _search(chain: Chain) -> None:
    from ray_jobs.search_merges import search_merges

    chain.search, chain.searched = search_merges(chain.run, chain.experts)


def _evaluate(chain: Chain) -> None:
    from ray_jobs.evaluate import evaluate

    assert chain.searched is not None
    chain.outcomes, chain.rows = evaluate(chain.run, chain.experts, chain.merged, chain.searched)


def _report(chain: Chain) -> None:
    from ray_jobs.report import write_report

    assert chain.search is not None
    assert chain.searched is not None
    assert chain.outcomes is not None
    chain.summary = write_report(
        chain.run,
        experts=chain.experts,
        search=chain.search,
        searched=chain.searched,
        outcomes=chain.outcomes,
        rows=chain.rows,
    )


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

    if not arguments:
        print("usage: python -m ray_jobs.pipeline CONFIG [key=value …]", file=sys.stderr)
        return 2
    try:
        run_chain(load_config(arguments[0], list(arguments[1:])), last="report")
    except SafetyDPOError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
