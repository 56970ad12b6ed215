"""The `safetydpo` command."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from safetydpo.errors import SafetyDPOError, UsageError

app = typer.Typer(
    name="safetydpo",
    help="Align a text-to-image model: make unsafe/safe pairs with it, train safety experts by DPO, merge them into "
    "one LoRA adapter, search for the best merge, and report what it does.",
    epilog="Start with `safetydpo demo`. Every command takes a config file and key.path=value settings, for example "
    "`safetydpo run configs/demo.yaml identity.dpo.steps=200 run_dir=runs/longer`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
ConfigFile = Annotated[Path, typer.Argument(help="YAML file, such as configs/demo.yaml", show_default=False)]
Settings = Annotated[
    list[str] | None,
    typer.Argument(help="key.path=value, such as identity.seed=1 or run_dir=runs/x", show_default=False),
]


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and the logs of workers.")] = False,
) -> None:
    if debug:
        os.environ["SAFETYDPO_DEBUG"] = "1"
        os.environ["SAFETYDPO_WORKER_LOGS"] = "1"


@app.command()
def demo(settings: Settings = None) -> None:
    """Run the whole chain on the small model that ships with the project (about 15 minutes on 2 CPU cores)."""
    _chain(_shipped("demo.yaml"), settings, last="report")


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
def search(config: ConfigFile, settings: Settings = None) -> None:
    """Stage 4: search for the best merge on validation prompts (Ray Tune, Optuna)."""
    _chain(config, settings, last="search")


@app.command()
def evaluate(config: ConfigFile, settings: Settings = None) -> None:
    """Stage 5: draw and judge the test prompts with base, experts and merges."""
    _chain(config, settings, last="evaluate")


@app.command()
def report(config: ConfigFile, settings: Settings = None) -> None:
    """Stage 6: write summary.json and the report page."""
    _chain(config, settings, last="report")


@app.command()
def doctor() -> None:
    """Check this machine: Python, packages, compiler, font, memory, cores."""
    from ray_jobs.doctor import check_machine

    raise typer.Exit(check_machine())


def _chain(config: Path, settings: list[str] | None, *, last: str) -> None:
    from safetydpo.config.load import load_config

    run_chain(load_config(config, settings or []), last=last)


def run_chain(config: Any, *, last: str) -> None:
    """Run stages and print what they made."""
    from rich.console import Console

    from ray_jobs.cluster import disconnect
    from ray_jobs.pipeline import run_stages

    # A log file has no width of its own; 80 columns would fold every cell.
    console = Console() if sys.stdout.isatty() else Console(width=170)
    try:
        chain = run_stages(config, last=last)
    finally:
        disconnect()
    if chain.summary is not None:
        _print_summary(console, chain)
    else:
        console.print(f"[bold]{last}[/bold] is done: {chain.run.run_dir}")
    _print_times(console, chain)


def _print_summary(console: Any, chain: Any) -> None:
    from rich.table import Table

    from safetydpo.artifacts.layout import merged_adapter_file, report_file
    from safetydpo.evaluation.results import results_table

    results = results_table(chain.summary)
    table = Table(title=f"Test prompts, run {chain.run.config.name}")
    for column in results.header:
        table.add_column(column)
    for row in results.rows:
        table.add_row(*row)
    console.print(table)
    console.print(f"adapter  {merged_adapter_file(chain.run.run_dir)}")
    console.print(f"report   {report_file(chain.run.run_dir)}")


def _print_times(console: Any, chain: Any) -> None:
    times = chain.run.seconds()
    text = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in times.items())
    console.print(f"wall time  {text}; {sum(times.values()):.0f} s in all")


def _shipped(name: str) -> Path:
    for folder in (Path("configs"), Path(__file__).resolve().parent.parent / "configs"):
        if (folder / name).is_file():
            return folder / name
    raise UsageError(f"expected configs/{name} in this folder, found none: run from a clone of the project")


def main() -> None:
    """Run the command; one clear line and an exit code instead of a traceback, unless --debug."""
    debug = "--debug" in sys.argv
    try:
        app(standalone_mode=True)
    except SafetyDPOError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
