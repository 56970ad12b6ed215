"""`safetydpo gate`: may a run's model be released? No Ray."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ray_jobs.terminal import output_console
from safetydpo.errors import UsageError

if TYPE_CHECKING:
    from safetydpo.evaluation.gate import GateResult

STOPPED = 3
"""Exit code of a gate that is not passed."""
_COLOURS = {"passed": "green", "failed": "red", "not enough evidence": "yellow", "not measured": "red"}


def gate(
    run: Annotated[str, typer.Argument(help="Run folder, summary.json, or folder of measured units; local or s3://.")],
    policy: Annotated[Path | None, typer.Option(help="YAML file of thresholds; options go before it.")] = None,
    row: Annotated[str | None, typer.Option(help="Row to judge; `searched` if left out.")] = None,
    max_ip: Annotated[float | None, typer.Option(min=0, max=1, help="Unsafe pictures, all categories.")] = None,
    max_category_ip: Annotated[float | None, typer.Option(min=0, max=1, help="In each category.")] = None,
    category: Annotated[list[str] | None, typer.Option(help="A category that must be measured; several times.")] = None,
    max_concept_ip: Annotated[float | None, typer.Option(min=0, max=1, help="In each concept.")] = None,
    max_ood_ip: Annotated[float | None, typer.Option(min=0, max=1, help="On concepts no expert has seen.")] = None,
    max_attack_ip: Annotated[float | None, typer.Option(min=0, max=1, help="Under each attack.")] = None,
    max_benchmark_ip: Annotated[float | None, typer.Option(min=0, max=1, help="On each benchmark.")] = None,
    max_unrecognisable: Annotated[float | None, typer.Option(min=0, max=1, help="Broken pictures.")] = None,
    min_safe_and_intact: Annotated[float | None, typer.Option(min=0, max=1, help="Safe and whole pictures.")] = None,
    min_neutral: Annotated[float | None, typer.Option(min=0, max=1, help="Neutral prompts drawn.")] = None,
    min_neighbour: Annotated[float | None, typer.Option(min=0, max=1, help="Look-alikes drawn.")] = None,
    min_clip_retention: Annotated[float | None, typer.Option(min=0, help="Caption margin kept of the base's.")] = None,
    min_n: Annotated[int | None, typer.Option(min=1, help="Pictures behind a rate over all; 300.")] = None,
    min_category_n: Annotated[int | None, typer.Option(min=1, help="Behind the rate of a category; 50.")] = None,
    min_set_n: Annotated[int | None, typer.Option(min=1, help="Behind every other metric; 50.")] = None,
    min_concept_n: Annotated[int | None, typer.Option(min=1, help="Behind the rate of a concept; 20.")] = None,
    family_wise: Annotated[bool, typer.Option("--family-wise", help="All bounds together hold with 95 %.")] = False,
    json_file: Annotated[str | None, typer.Option("--json", help="Write all of it as JSON to this file.")] = None,
    junit_file: Annotated[str | None, typer.Option("--junit", help="Write it as JUnit XML to this file.")] = None,
) -> None:
    """Compare bounds (two-sided 95 %) of what RUN measured with thresholds; exit 0 = passed, 3 = not passed."""
    from safetydpo.config.load import load_policy

    options: dict[str, Any] = {
        "row": row,
        "max_ip": max_ip,
        "max_category_ip": max_category_ip,
        "categories": category or None,
        "max_concept_ip": max_concept_ip,
        "max_ood_ip": max_ood_ip,
        "max_attack_ip": max_attack_ip,
        "max_benchmark_ip": max_benchmark_ip,
        "max_unrecognisable": max_unrecognisable,
        "min_safe_and_intact": min_safe_and_intact,
        "min_neutral": min_neutral,
        "min_neighbour": min_neighbour,
        "min_clip_retention": min_clip_retention,
        "min_n": min_n,
        "min_category_n": min_category_n,
        "min_set_n": min_set_n,
        "min_concept_n": min_concept_n,
        "family_wise": family_wise or None,
    }
    given = {name: value for name, value in options.items() if value is not None}
    judged = judge_run(run, load_policy(policy, given), json_file=json_file, junit_file=junit_file)
    if judged.state != "passed":
        raise typer.Exit(STOPPED)


def judge_run(run: str, policy: Any, *, json_file: str | None, junit_file: str | None) -> GateResult:
    """Judge a run by a policy, write what was asked for, and print why."""
    from safetydpo.artifacts.storage import open_location
    from safetydpo.evaluation.gate import judge_row
    from safetydpo.evaluation.gate_concepts import read_concept_rates, with_concepts
    from safetydpo.evaluation.gate_output import dump_junit, dump_result
    from safetydpo.evaluation.stored_summaries import read_summary

    for option, name in (("--json", json_file), ("--junit", junit_file)):
        if name is not None and open_location(name).is_folder():
            raise UsageError(f"expected a file or nothing at {name} ({option}), found a folder: name a file in it")
    summary, source = read_summary(run)
    if policy.max_concept_ip is not None:
        summary = with_concepts(summary, read_concept_rates(source))
    result = judge_row(summary, policy)
    if json_file is not None:
        text = dump_result(result, source=source.shown, config_hash=summary["config_hash"])
        open_location(json_file).write_bytes(text.encode())
    if junit_file is not None:
        open_location(junit_file).write_bytes(dump_junit(result, source=source.shown).encode())
    print_result(result, source=source.shown)
    return result


def print_result(result: GateResult, *, source: str) -> None:
    """Print one line per threshold and the answer."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from safetydpo.evaluation.gate_output import describe_failures, describe_threshold

    console = output_console(highlight=False, markup=False)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    table.add_column("threshold", no_wrap=True)
    for heading in ("found", "bound", "n"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("why", overflow="fold")
    for check in result.checks:
        numbers = ("–" if number is None else f"{number:.3f}" for number in (check.value, check.bound))
        table.add_row(
            describe_threshold(check),
            *numbers,
            "–" if check.n is None else f"{check.n:,}",
            Text(check.state, style=_COLOURS[check.state]),
            check.why,
        )
    console.print(f"row {result.row} of {source}, bounds of {100 * result.confidence:.4g} % intervals", soft_wrap=True)
    console.print(table)
    if failures := describe_failures(result):
        console.print(failures, soft_wrap=True)
    kept = sum(check.state == "passed" for check in result.checks)
    console.print(
        Text(f"{result.state}: {kept} of {len(result.checks)} thresholds are kept", style=_COLOURS[result.state])
    )
