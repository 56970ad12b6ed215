"""What a search is refused for before anything of it is started."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from safetydpo.config.pairs import GENERATE
from safetydpo.config.rungs import HeldOutRung
from safetydpo.config.schema import Config, IdentityConfig
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.search.guard import refuse_overlap
from safetydpo.search.space import build_space, known_candidates


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


def check_benchmarks(names: Sequence[str], prompts: Sequence[str], *, folder: str | None = None) -> dict[str, Any]:
    """Refuse search prompts that occur, exactly or nearly, in a named benchmark; return what was looked at.

    A name is a prompt file, `BENCHMARK=FILE`, or the name of a benchmark whose file stands in `folder`. `checked` has
    the number of texts of each file that could be read, `unchecked` why each other one could not.

    Raises:
        SafetyDPOError: naming the file and the first few prompts.
    """
    from safetydpo.prompts.benchmark_files import read_named_texts

    checked: dict[str, int] = {}
    unchecked: dict[str, str] = {}
    for name in names:
        try:
            texts = read_named_texts(name, folder=folder)
        except (SafetyDPOError, OSError) as error:
            # A search may go on without a benchmark that its machine does not have; its record says so.
            unchecked[name] = " ".join(str(error).split())
            continue
        refuse_overlap(prompts, texts, where=f"the benchmark {name} (identity.search.benchmarks)")
        checked[name] = len(texts)
    return {"checked": checked, "unchecked": unchecked}
