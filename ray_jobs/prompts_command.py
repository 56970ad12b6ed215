"""`safetydpo prompts`: take in prompt sets of any format, and check that one does not leak into another. No Ray."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ray_jobs.terminal import output_console
from ray_jobs.write_command import write_prompts_command
from safetydpo.errors import SafetyDPOError, UsageError

if TYPE_CHECKING:
    from safetydpo.prompts.importing import ImportSummary
    from safetydpo.prompts.leaks import LeakReport

app = typer.Typer(
    name="prompts",
    help="Take in prompt sets of any format; find prompts that stand in two sets; write pairs for a list of concepts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("write")(write_prompts_command)
SHOWN = 20


@app.command("import")
def import_(
    file: Annotated[str, typer.Argument(help="Prompt file: local path or s3:// address.", show_default=False)],
    out: Annotated[str, typer.Option(help="Parquet file to write: local path or s3:// address.", show_default=False)],
    format: Annotated[str | None, typer.Option(help="Format, if its columns do not tell.")] = None,
    column: Annotated[str | None, typer.Option(help="Column of the text, where a format has several.")] = None,
    side: Annotated[str | None, typer.Option(help="unsafe or benign, where a format does not tell.")] = None,
    split: Annotated[
        str | None, typer.Option(help="auto, train, validation or test; test for benchmarks if left out.")
    ] = None,
    partner: Annotated[str | None, typer.Option(help="Six-CD: the clean file of a malicious one.")] = None,
    source: Annotated[str | None, typer.Option(help="Name of the set; the format's if left out.")] = None,
    alias: Annotated[list[str] | None, typer.Option(help="NAME=CATEGORY, for a category of another name.")] = None,
    keep_unknown_categories: Annotated[
        bool, typer.Option("--keep-unknown-categories", help="Take categories of no known name as they are.")
    ] = False,
) -> None:
    """Read FILE, whatever its format, and write its prompts as one table."""
    from safetydpo.artifacts.storage import open_location
    from safetydpo.artifacts.tables import write_table
    from safetydpo.prompts.aliases import parse_aliases
    from safetydpo.prompts.importing import ImportOptions, import_prompts

    if not out.endswith(".parquet"):
        raise UsageError(f"expected a name that ends in .parquet for --out, found {out!r}")
    target = open_location(out)
    if target.is_folder():
        raise UsageError(f"expected a file or nothing at {out} (--out), found a folder: name a file in it")
    options = ImportOptions(
        format=format,
        column=column,
        side=_one_of("--side", side, ("unsafe", "benign")),
        split=_one_of("--split", split, ("auto", "train", "validation", "test")),
        source=source,
        aliases=parse_aliases(alias or []),
        keep_unknown_categories=keep_unknown_categories,
    )
    imported = import_prompts(open_location(file), options, partner=open_location(partner) if partner else None)
    write_table(target, imported.table)
    console = output_console(highlight=False, markup=False)
    console.print(summary_table(imported.summary))
    if imported.summary.num_memberships and set(imported.summary.memberships) != {"(none)"}:
        console.print(category_table(imported.summary))
    console.print(f"{imported.table.num_rows:,} rows are in {target.shown}", soft_wrap=True)


@app.command()
def check(
    file: Annotated[str, typer.Argument(help="Prompt file of any format, or imported table.", show_default=False)],
    against: Annotated[list[str], typer.Option(help="The other set; may be given several times.", show_default=False)],
    others: Annotated[list[str] | None, typer.Argument(help="More other sets.", show_default=False)] = None,
    near: Annotated[float | None, typer.Option(help="Least Jaccard index of near duplicates; 0.8 if left out.")] = None,
    show: Annotated[int, typer.Option(min=0, help="How many to list.")] = SHOWN,
    out: Annotated[str | None, typer.Option(help="CSV file with all of them.")] = None,
    fail_on_leak: Annotated[bool, typer.Option("--fail-on-leak", help="End with exit code 1 if there is any.")] = False,
) -> None:
    """Count and list the prompts of FILE that occur in other sets: exactly, after normalisation, nearly."""
    from safetydpo.artifacts.storage import open_location
    from safetydpo.prompts.duplicates import NEAR
    from safetydpo.prompts.leaks import find_leaks, leaks_as_csv, read_texts

    threshold = NEAR if near is None else near
    if not 0.0 < threshold <= 1.0:
        raise UsageError(f"expected a Jaccard index above 0 and up to 1 for --near, found {near}")
    texts = read_texts(open_location(file))
    names = [*against, *(others or [])]
    reports = [(name, find_leaks(texts, read_texts(open_location(name)), near=threshold)) for name in names]
    console = output_console(highlight=False, markup=False)
    console.print(leak_table(file, reports, near=threshold))
    for name, report in reports:
        _list_leaks(console, name, report, show)
    if out is not None:
        open_location(out).write_bytes(leaks_as_csv(reports))
        console.print(f"all of them are in {out}", soft_wrap=True)
    leaking = [f"{len(report.leaks)} in {name}" for name, report in reports if report.leaks]
    if fail_on_leak and leaking:
        raise SafetyDPOError(
            f"expected no prompt of {file} in another set (--fail-on-leak), found {', '.join(leaking)}: leave them out "
            "of one set"
        )


@app.command("formats")
def formats_() -> None:
    """List the formats, how each is recognised, and what a row becomes."""
    from rich.table import Table

    from safetydpo.prompts.formats import FORMATS

    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("format", "columns", "a row becomes"):
        table.add_column(heading, overflow="fold")
    for form in FORMATS:
        table.add_row(form.name, ", ".join(form.required) or "(none)", form.becomes)
    output_console(highlight=False, markup=False).print(table)


def summary_table(summary: ImportSummary) -> Any:
    """Return what was found in a file as a table of names and numbers."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    table.add_column(summary.file.rsplit("/", 1)[-1], overflow="fold")
    table.add_column(f"format {summary.format} ({summary.kind})", justify="right", overflow="fold")
    sides = ", ".join(f"{side} {count:,}" for side, count in summary.num_texts_by_side.items())
    splits = ", ".join(f"{split} {count:,}" for split, count in sorted(summary.splits.items()))
    lines: list[tuple[str, object]] = [
        ("rows", summary.num_rows),
        ("prompts", summary.num_prompts),
        ("pairs as the file counts them", summary.num_pairs_in_file),
        ("distinct pair ids (of the two texts)", summary.num_pair_ids),
        ("distinct texts", summary.num_texts),
        ("distinct texts by side", sides),
        ("memberships", summary.num_memberships),
        ("prompts by split", splits),
        *((f"duplicate: {name}", count) for name, count in summary.duplicates.items()),
        *((f"dropped: {name}", count) for name, count in summary.dropped.items()),
        *((f"note: {name}", count) for name, count in summary.notes.items()),
    ]
    if not summary.duplicates:
        lines.append(("duplicates", 0))
    if not summary.dropped:
        lines.append(("dropped", 0))
    for name, value in lines:
        table.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
    return table


def category_table(summary: ImportSummary) -> Any:
    """Return the memberships per category as a table."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    table.add_column("category")
    for heading in ("memberships", "distinct"):
        table.add_column(heading, justify="right")
    table.add_column("spelt in the file", overflow="fold")
    for name, (count, distinct) in summary.memberships.items():
        table.add_row(name, f"{count:,}", f"{distinct:,}", ", ".join(filter(None, summary.spellings[name])))
    return table


def leak_table(file: str, reports: list[tuple[str, LeakReport]], *, near: float) -> Any:
    """Return the counts of all comparisons; each text counts once, with its strongest likeness."""
    from rich import box
    from rich.table import Table

    from safetydpo.prompts.leaks import LIKENESSES

    first = reports[0][1]
    title = f"{file}: {first.num_rows:,} rows, {first.num_texts:,} distinct texts"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    table.add_column("against", overflow="fold")
    for heading in ("exact", "normalised", f"near (≥ {near:g})", "all"):
        table.add_column(f"{heading}\nrows / texts", justify="right")
    for name, report in reports:
        counts = [(report.rows(likeness), report.texts(likeness)) for likeness in LIKENESSES]
        counts.append((sum(rows for rows, _ in counts), len(report.leaks)))
        table.add_row(name, *(f"{rows:,} / {texts:,}" for rows, texts in counts))
    return table


def _list_leaks(console: Any, name: str, report: LeakReport, show: int) -> None:
    for leak in report.leaks[:show]:
        rows = ", ".join(map(str, leak.rows[:3])) + (" …" if len(leak.rows) > 3 else "")
        kind = leak.likeness if leak.likeness != "near" else f"near {leak.jaccard:.2f}"
        partner = "" if leak.likeness == "exact" else f" ~ {_short(leak.other_text)}"
        console.print(
            f"{kind:<10}  row {rows}: {_short(leak.text)}{partner}  ({name} row {leak.other_row})", soft_wrap=True
        )
    if show and len(report.leaks) > show:
        console.print(f"… and {len(report.leaks) - show:,} more in {name} (--show, --out)", soft_wrap=True)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= 70 else f"{line[:69]}…")


def _one_of(option: str, value: str | None, allowed: tuple[str, ...]) -> Any:
    if value is not None and value not in allowed:
        raise UsageError(f"expected one of {', '.join(allowed)} for {option}, found {value!r}")
    return value
