"""Benchmarks that the final evaluation draws beside the test prompts of the run's own source."""

from __future__ import annotations

from pydantic import Field

from safetydpo.config.fields import Frozen


class EvaluationBenchmark(Frozen):
    """Prompts of one benchmark."""

    name: str
    """Name of a shipped entry (`safetydpo benchmarks list`), or a YAML file with one of your own."""
    file: str | None = None
    """Your copy of its file, local or `s3://`; None = the one of that name in `execution.benchmarks`."""
    prompts: int | None = Field(None, ge=1)
    """Distinct prompts that are drawn, spread evenly over its categories; None = all of them."""
    accept_other_bytes: bool = False
    """Whether a file is used whose sha256 or counts are not those of the entry; its numbers are then not comparable."""


def each_named_once(benchmarks: tuple[EvaluationBenchmark, ...]) -> tuple[EvaluationBenchmark, ...]:
    """Return the benchmarks, or refuse two of one name, whose metrics would have one name too."""
    names = [benchmark.name for benchmark in benchmarks]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"expected each benchmark once, found {name!r} {names.count(name)} times")
    return benchmarks
