"""`safetydpo benchmarks`: what the benchmarks of the field are, and whether a file is one of them. No Ray."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ray_jobs.terminal import output_console
from safetydpo.errors import SafetyDPOError, UsageError

if TYPE_CHECKING:
    from safetydpo.prompts.benchmark_entries import BenchmarkEntry, HubFile
    from safetydpo.prompts.benchmark_files import BenchmarkFile

app = typer.Typer(
    name="benchmarks",
    help="The benchmarks of the field: where each comes from, and whether a file of yours is it. None ships with the "
    "project.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Name = Annotated[
    str, typer.Argument(help="Name of a benchmark, or a YAML file with an entry of yours.", show_default=False)
]
File = Annotated[str, typer.Argument(help="Your copy: local path or s3:// address.", show_default=False)]
Accept = Annotated[
    bool, typer.Option("--accept-other-bytes", help="Take a file whose sha256 or counts are not the benchmark's.")
]


@app.command("list")
def list_() -> None:
    """List the benchmarks that the project knows."""
    from rich.table import Table

    from safetydpo.prompts.benchmark_entries import list_entries

    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("name", no_wrap=True)
    table.add_column("rows", justify="right", no_wrap=True)
    table.add_column("sha256", no_wrap=True)
    table.add_column("access", no_wrap=True)
    table.add_column("title", overflow="fold")
    for entry in list_entries().values():
        rows = "unknown" if entry.num_rows is None else f"{entry.num_rows:,}"
        known = "known" if entry.known_hashes else "unknown"
        table.add_row(entry.name, rows, known, entry.access, entry.title)
    output_console(highlight=False, markup=False).print(table)


@app.command()
def show(name: Name) -> None:
    """Print all that is known of a benchmark: source, revision, checksum, licence, columns, counts."""
    from rich.table import Table

    from safetydpo.prompts.benchmark_entries import describe_entry, find_entry

    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for field, text in describe_entry(find_entry(name)):
        table.add_row(field, text)
    output_console(highlight=False, markup=False).print(table)


@app.command()
def check(name: Name, file: File, accept_other_bytes: Accept = False) -> None:
    """Say whether FILE is the benchmark NAME, and count what is in it; exit code 1 if it is another file."""
    _print_file(_read(name, file, accept_other_bytes))


@app.command("import")
def import_(
    name: Name,
    file: File,
    out: Annotated[str, typer.Option(help="Parquet file to write: local path or s3:// address.", show_default=False)],
    accept_other_bytes: Accept = False,
) -> None:
    """Check FILE and write its prompts as one table, with a record of its sha256 beside it."""
    from safetydpo.artifacts.storage import open_location
    from safetydpo.artifacts.tables import write_table
    from safetydpo.prompts.benchmark_files import check_recorded, record_beside, recorded

    if not out.endswith(".parquet"):
        raise UsageError(f"expected a name that ends in .parquet for --out, found {out!r}")
    target = open_location(out)
    if target.is_folder():
        raise UsageError(f"expected a file or nothing at {out} (--out), found a folder: name a file in it")
    found = _read(name, file, accept_other_bytes)
    check_recorded(found, target, accept_other_bytes=accept_other_bytes)
    write_table(target, found.imported.table)
    record_beside(target).write_bytes(json.dumps(recorded(found), indent=2).encode() + b"\n")
    _print_file(found)
    output_console(highlight=False, markup=False).print(
        f"{found.imported.table.num_rows:,} rows are in {target.shown}", soft_wrap=True
    )


@app.command()
def fetch(
    name: Name,
    out: Annotated[Path, typer.Option(help="File to write; its folder must be there.", show_default=False)],
    file: Annotated[str | None, typer.Option(help="Name of the file on the hub, where the entry has none.")] = None,
    accept_other_bytes: Accept = False,
) -> None:
    """Load a benchmark from the Hugging Face hub and check it; nothing else here uses the network.

    One behind a form needs your token (HF_TOKEN) after its authors have let you in.
    """
    from safetydpo.prompts.benchmark_entries import find_entry

    entry = find_entry(name)
    if entry.hub is None:
        raise UsageError(
            f"expected a benchmark that is on the hub, found {entry.name}, which is not: take the copy that `safetydpo "
            f"benchmarks show {entry.name}` names"
        )
    wanted = file or entry.hub.file
    if wanted is None:
        raise UsageError(
            f"expected the name of the file in {entry.hub.repository} (--file), found none: look at the data set's page"
        )
    if not out.parent.is_dir():
        raise UsageError(f"expected a folder at {out.parent} for --out, found none: create it")
    loaded = _download(entry.hub, wanted)
    found = _read_as(entry, str(loaded), accept_other_bytes)
    shutil.copyfile(loaded, out)
    _print_file(found)
    output_console(highlight=False, markup=False).print(
        f"{wanted} of {entry.hub.repository} is in {out}", soft_wrap=True
    )


def _download(hub: HubFile, file: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(hub.repository, file, repo_type="dataset", revision=hub.revision))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        said = " ".join(str(error).split())[:200]
        raise SafetyDPOError(
            f"expected {file} of the data set {hub.repository} from the hub, found {type(error).__name__} ({said}): "
            "ask for access on its page and set HF_TOKEN, check the name and the network, or fetch it by hand"
        ) from error


def _read(name: str, file: str, accept: bool) -> BenchmarkFile:
    from safetydpo.prompts.benchmark_entries import find_entry

    return _read_as(find_entry(name), file, accept)


def _read_as(entry: BenchmarkEntry, file: str, accept: bool) -> BenchmarkFile:
    from safetydpo.artifacts.storage import open_location
    from safetydpo.prompts.benchmark_files import read_benchmark

    return read_benchmark(entry, open_location(file), accept_other_bytes=accept)


def _print_file(found: BenchmarkFile) -> None:
    from ray_jobs.prompts_command import category_table, summary_table

    console = output_console(highlight=False, markup=False)
    console.print(f"{found.entry.name}: {found.state}", soft_wrap=True)
    console.print(f"sha256 {found.sha256}", soft_wrap=True)
    console.print(summary_table(found.imported.summary))
    if set(found.imported.summary.memberships) - {"(none)"}:
        console.print(category_table(found.imported.summary))
