"""What a search is refused for before anything of it is started."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from safetydpo.config.pairs import GENERATE
from safetydpo.config.rungs import HeldOutRung
from safetydpo.config.schema import Config, IdentityConfig
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.search.guard import refuse_overlap
from safetydpo.search.space import build_space, known_candidates

SEARCH_SETTING = "identity.search.benchmarks"
EVALUATION_SETTING = "identity.evaluation.benchmarks"
NOTHING_NAMED: dict[str, Any] = {"checked": {}, "unchecked": {}}
"""What `check_benchmarks` says where a config names no benchmark."""


def check_search(config: Config) -> None:
    """Refuse settings of a search that cannot work, before hours of training.

    Raises:
        UsageError: if there is nothing to choose from, a rung needs pairs that trainings do not hold out, or there are
            fewer trials than known first ones.
    """
    search = config.identity.search
    if not search.methods:
        raise UsageError(
            "expected at least one merge method to search in identity.search.methods, found none: add one, such as sum"
        )
    check_held_out(config)
    if search.first_trials == "known":
        _check_first_trials(config.identity)


def check_held_out(config: Config) -> None:
    """Refuse a rung on held-out pairs where trainings hold none out.

    Raises:
        UsageError: naming both settings.
    """
    search, validation = config.identity.search, config.identity.dpo.validation
    needs = any(isinstance(rung, HeldOutRung) and rung.pairs == "held_out" for rung in search.ladder)
    if needs and validation.every_steps is None:
        raise UsageError(
            "expected trainings that keep pairs out (identity.dpo.validation.every_steps) for a rung of "
            "identity.search.ladder of kind 'held_out', found none: set it, or pairs: all for that rung"
        )


def _check_first_trials(identity: IdentityConfig) -> None:
    from ray_jobs.expert_plan import planned_names
    from safetydpo.merging.registry import density_methods, unweighted_methods
    from safetydpo.search.replay import check_known

    if identity.pairs.source != GENERATE or identity.experts.small_groups == "leave_out":
        # How many experts there will be is not known yet; the search itself counts them.
        return
    names = planned_names(identity)
    space = build_space(
        identity.search,
        names,
        density_methods=density_methods(),
        unweighted_methods=unweighted_methods(),
        groups={"all": names},
    )
    check_known(known_candidates(space, density_methods=density_methods()), trials=identity.search.trials)


@dataclass(frozen=True)
class NamedBenchmark:
    """A file or benchmark that a config names; the same one may be named by several settings."""

    name: str
    settings: tuple[str, ...]
    read: Callable[[], list[str]]
    """Reads its texts, of both sides of a pair."""


def named_benchmarks(config: Config) -> list[NamedBenchmark]:
    """Return every benchmark that a config names, each once: of the search first, then of the final evaluation.

    Names are those of `identity.search.benchmarks`; a benchmark of the evaluation is `NAME`, or `NAME=FILE`.
    """
    from ray_jobs.benchmark_prompts import read_evaluated
    from safetydpo.prompts.benchmark_files import read_named_texts

    folder = config.execution.benchmarks
    readers: dict[str, list[tuple[str, Callable[[], list[str]]]]] = {}
    for name in config.identity.search.benchmarks:
        readers.setdefault(name, []).append((SEARCH_SETTING, partial(read_named_texts, name, folder=folder)))
    for benchmark in config.identity.evaluation.benchmarks:
        name = benchmark.name if benchmark.file is None else f"{benchmark.name}={benchmark.file}"
        # Read as the evaluation reads it: an entry may be a file of its own, and other bytes may be accepted.
        readers.setdefault(name, []).append((EVALUATION_SETTING, partial(read_evaluated, benchmark, config)))
    return [
        NamedBenchmark(name, tuple(setting for setting, _ in found), found[-1][1]) for name, found in readers.items()
    ]


def check_benchmarks(named: Sequence[NamedBenchmark], prompts: Sequence[str]) -> dict[str, Any]:
    """Refuse search prompts that occur, exactly or nearly, in a named benchmark; return what was looked at.

    `checked` has the number of texts of each file that could be read, `unchecked` why each other one could not, with
    the setting that names it.

    Raises:
        SafetyDPOError: naming the file, the setting and the first few prompts.
    """
    checked: dict[str, int] = {}
    unchecked: dict[str, str] = {}
    for one in named:
        settings = " and ".join(one.settings)
        try:
            texts = one.read()
        except (SafetyDPOError, OSError) as error:
            # A search may go on without a benchmark that its machine does not have; its record says so.
            unchecked[one.name] = f"{' '.join(str(error).split())} ({settings})"
            continue
        refuse_overlap(prompts, texts, where=f"the benchmark {one.name} ({settings})")
        checked[one.name] = len(texts)
    return {"checked": checked, "unchecked": unchecked}
