"""`safetydpo compare`: two runs side by side, pair by pair where both keep what their pictures were. No Ray."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from ray_jobs.terminal import output_console
from safetydpo.errors import UsageError

if TYPE_CHECKING:
    from safetydpo.artifacts.storage import Location
    from safetydpo.evaluation.compare import Difference, Method
    from safetydpo.evaluation.picture_outcomes import StoredOutcomes

SCHEMA_VERSION = 1
METHODS = {
    "paired": "pairs of one prompt and seed: Newcombe's interval for pairs, bootstrap over concepts, McNemar's test",
    "unpaired": "unrelated pictures: Newcombe's interval for rates, square-and-add of both intervals for the rest",
}


@dataclass(frozen=True)
class Comparison:
    """What was compared, how, and what came out."""

    row_a: str
    row_b: str
    method: Method
    notes: tuple[str, ...]
    differences: tuple[Difference, ...]


def compare(
    run_a: Annotated[str, typer.Argument(help="Run folder or summary.json; local or s3://.", show_default=False)],
    run_b: Annotated[str, typer.Argument(help="The other one; the difference is A - B.", show_default=False)],
    row: Annotated[str | None, typer.Option(help="Row of both; `searched` if left out.")] = None,
    other_row: Annotated[str | None, typer.Option(help="Row of RUN_B, if it is another one.")] = None,
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Compare the pairs there are, if some pictures have no partner.")
    ] = False,
    unpaired: Annotated[bool, typer.Option("--unpaired", help="Compare the summaries only.")] = False,
    any_judges: Annotated[
        bool, typer.Option("--any-judges", help="Although the judges differ, or a run does not say who they were.")
    ] = False,
    json_file: Annotated[str | None, typer.Option("--json", help="Write all of it as JSON to this file.")] = None,
) -> None:
    """Print the differences A - B of every rate and of the CLIP score, with intervals."""
    from safetydpo.artifacts.storage import open_location

    if json_file is not None and open_location(json_file).is_folder():
        raise UsageError(f"expected a file or nothing at {json_file} (--json), found a folder: name a file in it")
    found = compare_runs(
        run_a,
        run_b,
        row=row,
        other_row=other_row or row,
        allow_partial=allow_partial,
        unpaired=unpaired,
        any_judges=any_judges,
    )
    if json_file is not None:
        document = {"schema_version": SCHEMA_VERSION, "run_a": run_a, "run_b": run_b, **asdict(found)}
        text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        open_location(json_file).write_bytes(text.encode())
    print_comparison(found, run_a, run_b)


def compare_runs(
    run_a: str,
    run_b: str,
    *,
    row: str | None,
    other_row: str | None,
    allow_partial: bool,
    unpaired: bool,
    any_judges: bool,
) -> Comparison:
    """Compare a row of one run with a row of another.

    Raises:
        UsageError: if a run or a row is not there.
        SafetyDPOError: if the judges differ or are not known, or pictures have no partner.
    """
    from safetydpo.evaluation.compare import check_judges, compare_pairs, compare_summaries, pair_pictures
    from safetydpo.evaluation.gate import choose_row
    from safetydpo.evaluation.stored_summaries import read_summary

    read = [read_summary(run) for run in (run_a, run_b)]
    rows = [choose_row(summary, name) for (summary, _), name in zip(read, (row, other_row), strict=True)]
    stored = [_stored(place) for _, place in read]
    names = [chosen["name"] for chosen in rows]
    notes: list[str] = []
    known = [found for found in stored if found is not None]
    if len(known) == 2 and not any_judges:
        check_judges(known[0].judges, known[1].judges)
    elif len(known) < 2 and not any_judges:
        _refuse_unknown_judges([str(place) for (_, place), found in zip(read, stored, strict=True) if found is None])
    if len(known) < 2 or unpaired:
        return Comparison(names[0], names[1], "unpaired", tuple(notes), tuple(compare_summaries(rows[0], rows[1])))
    sides = [found.rows.get(name, ()) for found, name in zip(known, names, strict=True)]
    pairing = pair_pictures(sides[0], sides[1], allow_partial=allow_partial)
    if pairing.alone_a or pairing.alone_b:
        notes.append(f"left out: {pairing.alone_a:,} and {pairing.alone_b:,} pictures without a partner")
    if known[0].run_seed != known[1].run_seed:
        notes.append(
            f"the runs' seeds differ ({known[0].run_seed}, {known[1].run_seed}): pairs share a prompt, not the noise"
        )
    return Comparison(names[0], names[1], "paired", tuple(notes), tuple(compare_pairs(pairing)))


def _stored(place: Location) -> StoredOutcomes | None:
    """Return the pictures' outcomes beside a summary, None if there are none."""
    from safetydpo.artifacts.layout import PICTURE_OUTCOMES_FILE
    from safetydpo.evaluation.picture_outcomes import read_picture_outcomes

    file = place.parent / PICTURE_OUTCOMES_FILE
    return read_picture_outcomes(file) if place.name.endswith(".json") and file.is_file() else None


def _refuse_unknown_judges(places: list[str]) -> None:
    from safetydpo.artifacts.layout import PICTURE_OUTCOMES_FILE

    raise UsageError(
        f"expected {PICTURE_OUTCOMES_FILE}, which names the judges, beside {' and '.join(places)}, found none: make "
        "the report of that run again, or compare the summaries alone with --any-judges"
    )


def print_comparison(found: Comparison, run_a: str, run_b: str) -> None:
    """Print the method and one line per metric."""
    from rich import box
    from rich.table import Table

    console = output_console(highlight=False, markup=False)
    console.print(f"A = row {found.row_a} of {run_a}, B = row {found.row_b} of {run_b}", soft_wrap=True)
    console.print(f"{found.method}: {METHODS[found.method]}", soft_wrap=True)
    for note in found.notes:
        console.print(note, soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    table.add_column("metric", no_wrap=True)
    for heading in ("A", "B", "A - B [95 %]", "over concepts", "n"):
        table.add_column(heading, justify="right", no_wrap=True)
    if found.method == "paired":
        table.add_column("only A / B", justify="right", no_wrap=True)
        table.add_column("p", justify="right", no_wrap=True)
    for item in found.differences:
        over = "–" if item.cluster_low is None else f"[{item.cluster_low:+.3f}, {item.cluster_high:+.3f}]"
        count = f"{item.n_a:,}" if item.n_a == item.n_b else f"{item.n_a:,} / {item.n_b:,}"
        cells = [f"{item.value_a:.3f}", f"{item.value_b:.3f}"]
        cells += [f"{item.value:+.3f} [{item.low:+.3f}, {item.high:+.3f}]", over, count]
        if found.method == "paired":
            cells += ["–", "–"] if item.p_value is None else [f"{item.only_a} / {item.only_b}", f"{item.p_value:.2g}"]
        table.add_row(item.metric, *cells)
    console.print(table)
