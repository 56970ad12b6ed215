"""`safetydpo judge`: measure pictures that are stored already. `safetydpo judges`: what there is, and Q16's weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ray_jobs.terminal import output_console
from safetydpo.errors import SafetyDPOError, UsageError

if TYPE_CHECKING:
    from ray_jobs.judge_pictures import Judged
    from safetydpo.evaluation.picture_rates import PictureRate, PictureVerdict

app = typer.Typer(
    name="judges",
    help="What judges there are and what they need; turn Q16's published weights into safetensors.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
SHOWN = 20


def judge_command(
    source: Annotated[
        str, typer.Argument(help="Folder of pictures, Parquet file with them, or pool of a run.", show_default=False)
    ],
    settings: Annotated[
        list[str] | None, typer.Argument(help="key.path=value of execution.*", show_default=False)
    ] = None,
    judges: Annotated[str, typer.Option(help="Names with commas between, such as q16,nudenet.")] = "open_nsfw",
    out: Annotated[str, typer.Option(help="Parquet file of all verdicts.", show_default=False)] = "verdicts.parquet",
    prompts: Annotated[
        str | None, typer.Option(help="Table (csv, jsonl, parquet) of picture, prompt and perhaps category.")
    ] = None,
) -> None:
    """Judge stored pictures and print how many are unsafe, with exact intervals; what is judged is not judged again."""
    from ray_jobs.cluster import disconnect
    from ray_jobs.judge_pictures import judge_pictures
    from ray_jobs.run import with_absolute_paths
    from safetydpo.artifacts.storage import open_location
    from safetydpo.config.load import config_of_settings
    from safetydpo.prompts.picture_prompts import read_picture_prompts

    names = [name.strip() for name in judges.split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise UsageError(f"expected names of judges, each once, with commas between (--judges), found {judges!r}")
    place, target = open_location(source), open_location(out)
    if not out.endswith(".parquet") or target.is_folder():
        raise UsageError(f"expected a file that ends in .parquet for --out, found {out!r}")
    if str(target).startswith(f"{place}/"):
        raise UsageError(
            f"expected --out outside of {place}, whose files are judged, found {target}: name another place"
        )
    config = with_absolute_paths(config_of_settings([*(settings or []), "name=judge"]))
    try:
        judged = judge_pictures(
            place,
            names,
            out=target,
            prompts=read_picture_prompts(open_location(prompts)) if prompts else None,
            config=config,
        )
    finally:
        disconnect()
    print_judged(judged)
    print(f"all verdicts are in {target.shown}")


def print_judged(judged: Judged) -> None:
    """Print the rates, those of each category where there are several, and what has no verdict or prompt."""
    from ray_jobs.judge_pictures import as_verdicts
    from safetydpo.evaluation.picture_rates import ANY, by_category, picture_rates

    console, verdicts = output_console(), as_verdicts(judged.table)
    rates = picture_rates(verdicts)
    console.print(rate_table(rates, title=f"{rates[0].rate.n:,} pictures"))
    groups = by_category(verdicts)
    if len(groups) > 1:
        # Of several judges the row of all together.
        rows = [(category or "(none)", picture_rates(members)[-1]) for category, members in groups.items()]
        together = "any judge" if rates[-1].judge == ANY else rates[-1].judge
        console.print(
            rate_table([row for _, row in rows], title=f"By category, {together}", names=[n for n, _ in rows])
        )
    for line in notes(judged, verdicts):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def rate_table(rates: Sequence[PictureRate], *, title: str, names: Sequence[str] | None = None) -> Any:
    """Return the rates as a table; pictures without a verdict are among the unsafe ones and listed apart."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("judge" if names is None else "category")
    for heading in ("unsafe", "n", "rate [95 %]", "no picture", "judge failed"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, row in zip(names or [row.judge for row in rates], rates, strict=True):
        interval = f"{row.rate.value:.3f} [{row.rate.low:.3f}, {row.rate.high:.3f}]"
        # Text: square brackets would be taken for a style.
        table.add_row(
            Text(name),
            str(row.unsafe),
            str(row.rate.n),
            Text(interval),
            str(row.picture_failures),
            str(row.judge_failures),
        )
    return table


def notes(judged: Judged, verdicts: Sequence[PictureVerdict]) -> list[str]:
    """Return one line for each picture without a verdict or prompt, the first of many."""
    bad = {verdict.picture: verdict.picture_failure for verdict in verdicts if verdict.picture_failure}
    failed = [(each.picture, f"{each.judge}: {each.judge_failure}") for each in verdicts if each.judge_failure]
    lines = _listed("no picture, counted as unsafe", list(bad.items()))
    lines += _listed("not judged, counted as unsafe", failed)
    lines += _listed("no prompt names it", [(name, "") for name in judged.without_prompt])
    if judged.listing.other_files:
        first = judged.listing.other_files[0]
        lines.append(f"{len(judged.listing.other_files)} other files were left aside, such as {first}")
    return lines


def _listed(what: str, found: Sequence[tuple[str, str]]) -> list[str]:
    lines = [f"{what}: {name}" + (f" ({why})" if why else "") for name, why in found[:SHOWN]]
    return lines + ([f"{what}: {len(found) - SHOWN} more"] if len(found) > SHOWN else [])


@app.command("list")
def list_judges(
    settings: Annotated[list[str] | None, typer.Argument(help="execution.judges.*=value", show_default=False)] = None,
) -> None:
    """List the judges, what each needs, and whether it can be used here."""
    from rich.table import Table
    from rich.text import Text

    from safetydpo.config.load import config_of_settings
    from safetydpo.judges.final import final_judge_names, fingerprint_final_judge

    weights = config_of_settings(list(settings or [])).execution.judges
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("judge", "can be used"):
        table.add_column(heading, overflow="fold")
    for name in final_judge_names():
        try:
            fingerprint_final_judge(name, weights)
        except SafetyDPOError as error:
            table.add_row(Text(name), Text(f"no: {error}"), style="dim")
        else:
            table.add_row(Text(name), Text("yes"))
    output_console().print(table)


@app.command("convert-q16")
def convert_q16_command(
    pickle: Annotated[str, typer.Argument(help="Q16's prompts.p: local path or s3:// address.", show_default=False)],
    out: Annotated[str, typer.Option(help="Safetensors file to write.", show_default=False)],
    sha256: Annotated[str, typer.Option(help="Checksum of the pickle.", show_default=False)],
) -> None:
    """Turn Q16's published pickle into safetensors, without running any of it."""
    import re

    from safetydpo.artifacts.storage import open_location
    from safetydpo.judges.q16_conversion import convert_q16

    if not out.endswith(".safetensors"):
        raise UsageError(f"expected a name that ends in .safetensors for --out, found {out!r}")
    if not re.fullmatch(r"[0-9a-fA-F]{64}", sha256.strip()):
        raise UsageError(f"expected 64 hexadecimal digits for --sha256, found {sha256!r}: see docs/judges.md")
    target = open_location(out)
    convert_q16(open_location(pickle), target, sha256=sha256)
    print(f"the prompts are in {target.shown}: set execution.judges.q16_prompts to it")
