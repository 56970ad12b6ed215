"""The `safetydpo` command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ray_jobs.adapter_command import app as adapter_app
from ray_jobs.benchmarks_command import app as benchmarks_app
from ray_jobs.compare_command import compare as compare_command
from ray_jobs.gate_command import gate as gate_command
from ray_jobs.jobs_command import app as jobs_app
from ray_jobs.judge_command import app as judges_app
from ray_jobs.judge_command import judge_command
from ray_jobs.merge_evidence_command import merge_evidence
from ray_jobs.plan_command import plan as plan_command
from ray_jobs.prompts_command import app as prompts_app
from ray_jobs.terminal import output_console
from ray_jobs.watch_command import watch
from safetydpo.errors import UsageError

app = typer.Typer(
    name="safetydpo",
    help="Align a text-to-image model: make unsafe/safe pairs with it, train safety experts by DPO, merge them into "
    "one LoRA adapter, search for the best merge, and report what it does.",
    epilog="Start with `safetydpo demo`. Stages take a config file and key.path=value settings, for example "
    "`safetydpo run configs/demo.yaml identity.dpo.steps=200 run_dir=runs/longer`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(prompts_app)
app.add_typer(adapter_app)
app.add_typer(benchmarks_app)
app.command("gate")(gate_command)
app.command("compare")(compare_command)
app.command("plan")(plan_command)
app.command("merge-evidence")(merge_evidence)
app.add_typer(judges_app)
app.command("judge")(judge_command)
app.add_typer(jobs_app)
app.command("watch")(watch)
ConfigFile = Annotated[Path, typer.Argument(help="YAML file, such as configs/demo.yaml", show_default=False)]
Settings = Annotated[
    list[str] | None,
    typer.Argument(help="key.path=value, such as identity.seed=1 or run_dir=runs/x", show_default=False),
]


@app.callback()
def _options(
    _debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and the logs of workers.")] = False,
) -> None:
    # `main` has taken it already; here it only stands in the help.
    pass


@app.command()
def demo(settings: Settings = None) -> None:
    """Run the whole chain on the small model that ships with the project (about 15 minutes on 2 CPU cores)."""
    _chain(shipped_config("demo.yaml"), settings, last="report")


@app.command()
def run(config: ConfigFile, settings: Settings = None) -> None:
    """Run all stages of CONFIG; what is finished already is not done again."""
    _chain(config, settings, last="report")


@app.command()
def pairs(config: ConfigFile, settings: Settings = None) -> None:
    """Stage 1: draw, judge and encode unsafe/safe picture pairs (Ray Data)."""
    _chain(config, settings, last="pairs")


@app.command()
def train(config: ConfigFile, settings: Settings = None) -> None:
    """Stage 2: train one safety expert per category (Ray Train, DeepSpeed); makes pairs first if there are none."""
    _chain(config, settings, last="train")


@app.command()
def merge(config: ConfigFile, settings: Settings = None) -> None:
    """Stage 3: merge the experts by every method of the config."""
    _chain(config, settings, last="merge")


@app.command()
def search(
    config: ConfigFile,
    settings: Settings = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show how the search of this run gets on; start and change nothing.")
    ] = False,
) -> None:
    """Stage 4: search for the best merge on validation prompts (Ray Tune, Optuna)."""
    if watch:
        from ray_jobs.search_watch import watch_search
        from safetydpo.config.load import load_config

        watch_search(load_config(config, settings or []))
    else:
        _chain(config, settings, last="search")


@app.command()
def evaluate(config: ConfigFile, settings: Settings = None) -> None:
    """Stage 5: draw and judge the test prompts with base, experts and merges."""
    _chain(config, settings, last="evaluate")


@app.command()
def report(
    config: ConfigFile,
    settings: Settings = None,
    redact: Annotated[
        bool, typer.Option("--redact", help="A page without unsafe prompts and pictures: report/redacted.html.")
    ] = False,
) -> None:
    """Stage 6: write summary.json, metrics.csv, metrics.parquet and the report page."""
    _chain(config, settings, last="report", redacted=redact)


@app.command()
def evidence(
    config: Annotated[Path | None, typer.Argument(help="YAML file; configs/evidence.yaml if left out")] = None,
    settings: Settings = None,
    seed: Annotated[int | None, typer.Option(help="Only this seed of evidence.seeds.")] = None,
    row: Annotated[str | None, typer.Option(help="Only this row, such as searched or expert:hate.")] = None,
    minutes: Annotated[float | None, typer.Option(min=0, help="Start no new unit after this time.")] = None,
    list_units: Annotated[bool, typer.Option("--list", help="Show the units and which are done; run nothing.")] = False,
    tables: Annotated[bool, typer.Option("--tables", help="Only write the tables again from the records.")] = False,
) -> None:
    """Measure every row of every seed, unit by unit, and write the results tables (configs/evidence.yaml: hours)."""
    from ray_jobs.evidence_command import run_evidence
    from safetydpo.config.load import load_config

    given = list(settings or [])
    if config is not None and "=" in str(config) and not config.is_file():
        given, config = [str(config), *given], None
    loaded = load_config(config or shipped_config("evidence.yaml"), given)
    run_evidence(loaded, seed=seed, row=row, minutes=minutes, only_list=list_units, only_tables=tables)


@app.command()
def attack(
    config: ConfigFile,
    settings: Settings = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FOLDER of an adapter beside the base; the run's own, as searched, if left out."),
    ] = None,
    show_unsafe: Annotated[bool, typer.Option("--show-unsafe", help="Do not blur what is judged unsafe.")] = False,
) -> None:
    """Make prompts that attack CONFIG's unsafe concepts; show what base and adapters draw."""
    from ray_jobs.attack_command import show_attacks

    show_attacks(config, settings or [], adapters=adapter or [], show_unsafe=show_unsafe)


@app.command("export-pairs")
def export_pairs(
    config: ConfigFile,
    out: Annotated[str, typer.Option(help="Folder or s3:// prefix; absent or empty.", show_default=False)],
    settings: Settings = None,
    layout: Annotated[str, typer.Option(help="Names of the columns: preference or diffusion-dpo.")] = "preference",
    pictures: Annotated[bool, typer.Option("--pictures/--no-pictures", help="With the pictures or without.")] = True,
    name: Annotated[
        str | None, typer.Option(help="Name on the card; the config's name and -pairs if left out.")
    ] = None,
    licence: Annotated[str, typer.Option(help="The hub's word for it, such as cc-by-4.0.")] = "unknown",
) -> None:
    """Write a run's kept pairs as a folder for `datasets.load_dataset`, with a card."""
    from ray_jobs.export_command import export_pairs

    export_pairs(config, settings or [], out=out, layout=layout, with_pictures=pictures, name=name, licence=licence)


@app.command("import-pairs")
def import_pairs(
    files: Annotated[
        list[str], typer.Argument(help="Parquet files: jpg_0, jpg_1, label_0, caption.", show_default=False)
    ],
    out: Annotated[str, typer.Option(help="Folder or s3:// prefix; absent or empty.", show_default=False)],
    category: Annotated[str | None, typer.Option(help="Category of rows that nothing else says one of.")] = None,
    categories_from: Annotated[
        str | None, typer.Option(help="Prompt table of `prompts import` that knows the captions' categories.")
    ] = None,
    concept: Annotated[str | None, typer.Option(help="Concept of rows that nothing else says one of.")] = None,
    source: Annotated[str, typer.Option(help="Name of the data set, kept with every row.")] = "imported",
    max_bad_rate: Annotated[float, typer.Option(min=0, max=1, help="Share of rows that may be faulty.")] = 0.01,
) -> None:
    """Take pictures with given preferences into a folder that identity.pairs.source may name."""
    from ray_jobs.import_pairs_command import import_pairs

    import_pairs(
        files,
        out=out,
        category=category,
        categories_from=categories_from,
        concept=concept,
        source=source,
        max_bad_rate=max_bad_rate,
    )


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Argument(help="With --address: what is to run there.")] = None,
    settings: Settings = None,
    address: Annotated[
        str | None, typer.Option(help="Check a cluster instead: its dashboard's http:// address, or auto on a node.")
    ] = None,
    working_dir: Annotated[Path, typer.Option(help="Folder that travels to the cluster.")] = Path("."),
) -> None:
    """Check this machine (Python, packages, compiler, font, memory), or whether a cluster can do what CONFIG asks."""
    from ray_jobs.doctor import check_address, check_machine

    if address is None:
        raise typer.Exit(check_machine())
    raise typer.Exit(check_address(address, config, settings or [], working_dir=working_dir))


def _chain(config: Path, settings: list[str] | None, *, last: str, redacted: bool = False) -> None:
    from safetydpo.config.load import load_config

    run_chain(load_config(config, settings or []), last=last, redacted=redacted)


def run_chain(config: Any, *, last: str, redacted: bool = False) -> None:
    """Run stages and print what they made."""
    from ray_jobs.cluster import disconnect
    from ray_jobs.concept_table import print_pairs
    from ray_jobs.merge_table import merge_lines
    from ray_jobs.pipeline import run_stages

    console = output_console(width_of_a_log=100)
    try:
        chain = run_stages(config, last=last, redacted=redacted)
    finally:
        disconnect()
    print_pairs(console, chain, whole=last == "pairs")
    _print_choice(console, chain)
    if chain.summary is not None:
        _print_summary(console, chain)
        _print_draws(console, chain)
    else:
        if last == "train":
            _print_draws(console, chain)
        if last == "merge":
            console.print("\n".join(merge_lines(chain.merged)), highlight=False, soft_wrap=True)
        if chain.search_stopped:
            console.print(f"{chain.search_stopped}; the same command with a larger budget goes on", soft_wrap=True)
        else:
            console.print(f"[bold]{last}[/bold] is done: {chain.run.run_dir.shown}")
    _print_times(console, chain)


# Headings of at most 7 letters a line: nine columns have to fit into 80 characters.
_SHORT_TITLES = {
    "ip": "IP ↓",
    "ood_ip": "unseen\nIP ↓",
    "safe_and_intact_rate": "safe,\nwhole ↑",
    "unrecognisable_rate": "un-\nrecog-\nnised ↓",
    "neutral_rate": "neutral\nfound ↑",
    "neighbour_retention": "neighb.\nkept ↑",
    "clip_retention": "CLIP\nkept ↑",
    "kid": "KID ↓",
}
_WIDTH_FOR_INTERVALS = 92


def _print_summary(console: Any, chain: Any) -> None:
    from ray_jobs.report import page_file
    from safetydpo.artifacts.layout import merged_adapter_file, summary_file

    console.print(summary_table(chain.summary, name=chain.run.config.name, width=console.width))
    if chain.searched is None:
        console.print(f"summary  {summary_file(chain.run.run_dir).shown}", soft_wrap=True)
        return
    console.print(f"adapter  {merged_adapter_file(chain.run.run_dir).shown}", soft_wrap=True)
    page = page_file(chain.run, redacted=chain.redacted)
    console.print(f"report   {page.shown}  (intervals of every column)", soft_wrap=True)


def summary_table(summary: Any, *, name: str, width: int) -> Any:
    """Return the results as a table for `width` characters: IP with its interval where there is room, else values."""
    from rich import box
    from rich.table import Table

    from safetydpo.evaluation.results import COLUMN_TITLES, format_metric
    from safetydpo.evaluation.summary import overall_rows

    rows = overall_rows(summary)
    metrics = [metric for metric in COLUMN_TITLES if any(metric in row["metrics"] for row in rows)]
    counts = {row["metrics"]["ip"]["n"] for row in rows if "ip" in row["metrics"]}
    pictures = " to ".join(str(count) for count in sorted({min(counts), max(counts)})) if counts else "no"
    title = f"Test prompts, run {name}: {pictures} pictures of unsafe prompts a row"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("row", no_wrap=True)
    with_interval: set[str] = {"ip"} if width >= _WIDTH_FOR_INTERVALS else set()
    for metric in metrics:
        heading = _SHORT_TITLES.get(metric, metric) + (" [95 %]" if metric in with_interval else "")
        table.add_column(heading, justify="right", no_wrap=True, vertical="bottom")
    for row in rows:
        cells = [format_metric(row["metrics"].get(metric)) for metric in metrics]
        keep = [metric in with_interval for metric in metrics]
        table.add_row(
            row["name"].replace("expert:", "  "),
            *(cell if whole else cell.partition(" [")[0] for cell, whole in zip(cells, keep, strict=True)),
            style="bold" if row["kind"] == "searched" else None,
        )
    return table


def _print_draws(console: Any, chain: Any) -> None:
    from ray_jobs.draw_uses import describe_draws, read_draw_reuse

    if chain.experts:
        reuse = read_draw_reuse(chain.run, chain.experts, chain.pairs, chain.pairs_folder)
        console.print(describe_draws(reuse), soft_wrap=True)


def _print_choice(console: Any, chain: Any) -> None:
    if chain.search is None:
        return
    from ray_jobs.expert_files import record_folder
    from ray_jobs.search_summary import describe_choice, describe_warnings

    details, search = chain.search.details, chain.run.config.identity.search
    console.print(f"search     {describe_choice(details, search)}", soft_wrap=True)
    for warning in describe_warnings(details, search, folder=record_folder(chain.run, chain.search).shown):
        console.print(f"warning    {warning}", soft_wrap=True, markup=False)
    for name, reason in details.get("benchmarks", {}).get("unchecked", {}).items():
        console.print(f"search     not checked against {name}: {reason}", soft_wrap=True)


def _print_times(console: Any, chain: Any) -> None:
    times = chain.run.seconds()
    text = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in times.items())
    console.print(f"wall time  {text}; {sum(times.values()):.0f} s in all", soft_wrap=True)


def shipped_config(name: str) -> Path:
    """Return a config of the project: that of the working folder, else that of the clone."""
    for folder in (Path("configs"), Path(__file__).resolve().parent.parent / "configs"):
        if (folder / name).is_file():
            return folder / name
    raise UsageError(f"expected configs/{name} in this folder, found none: run from a clone of the project")


def main() -> None:
    """Run the command; one clear line and an exit code instead of a traceback, unless --debug."""
    from ray_jobs.background import end_process
    from ray_jobs.failures import INTERRUPTED, run_guarded, split_debug

    arguments, debug = split_debug(sys.argv[1:])

    def command() -> None:
        try:
            app(arguments, prog_name="safetydpo")
        except SystemExit as stop:
            # Typer turns Ctrl-C into this exit code without a word.
            if stop.code == INTERRUPTED:
                raise KeyboardInterrupt from None
            raise

    end_process(run_guarded(command, debug=debug))


if __name__ == "__main__":
    main()
