"""What a search is refused for before anything of it is started."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from safetydpo.config.rungs import HeldOutRung
from safetydpo.config.schema import Config
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.search.guard import refuse_overlap


def check_search(config: Config) -> None:
    """Refuse settings of a search that cannot work, before hours of training.

    Raises:
        UsageError: if there is nothing to choose from, or a rung needs pairs that trainings do not hold out.
    """
    search = config.identity.search
    if not search.methods:
        raise UsageError(
            "expected at least one merge method to search in identity.search.methods, found none: add one, such as sum"
        )
    check_held_out(config)


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
