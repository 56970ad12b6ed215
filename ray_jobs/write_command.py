"""`safetydpo prompts write`: prompt pairs for a list of concepts, written by a language model or from templates."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ray_jobs.terminal import output_console
from safetydpo.errors import UsageError

if TYPE_CHECKING:
    from ray_jobs.write_prompts import Progress
    from safetydpo.artifacts.records import Record
    from safetydpo.artifacts.storage import Location
    from safetydpo.pairs.writers import PromptWriter

SHORT_LISTED = 10


class WriterKind(StrEnum):
    """Who writes."""

    ENDPOINT = "endpoint"
    TRANSFORMERS = "transformers"
    TEMPLATES = "templates"


class Dtype(StrEnum):
    """Compute type of a local model."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


_Concepts = Annotated[Path, typer.Argument(help="Concept list (YAML or CSV).", show_default=False)]
_Out = Annotated[str, typer.Option(help="Folder of the written prompts, local or s3://.", show_default=False)]
_Writer = Annotated[WriterKind, typer.Option(help="Who writes.")]
_Model = Annotated[str | None, typer.Option(help="Name at the server; or local folder or hub id.")]
_BaseUrl = Annotated[str | None, typer.Option(help="Of an endpoint, such as http://localhost:8000/v1.")]
_ApiKeyEnv = Annotated[str | None, typer.Option(help="Environment variable that holds the key; none: no key is sent.")]
_Revision = Annotated[str | None, typer.Option(help="Of a hub id.")]
_Device = Annotated[str | None, typer.Option(help="Of a local model, such as cuda; none: cpu.")]
_Dtype = Annotated[Dtype | None, typer.Option(help="Of a local model; none: float32.")]
_Templates = Annotated[Path | None, typer.Option(help="YAML list of templates; none: built-in ones.")]
_PerConcept = Annotated[int, typer.Option(help="Pairs wanted per concept.", min=1)]
_PerRequest = Annotated[int, typer.Option(help="Pairs asked for at once.", min=1)]
_MaxRequests = Annotated[
    int | None, typer.Option(help="Per concept at most; none: three times as many as are needed.", min=1)
]
_MaxCharacters = Annotated[int, typer.Option(help="Longest text that is kept.", min=1)]
_Concurrency = Annotated[int, typer.Option(help="Requests at once at most.", min=1)]
_Temperature = Annotated[float, typer.Option(help="Of the sampling.", min=0)]
_MaxTokens = Annotated[int, typer.Option(help="Longest answer.", min=1)]
_Timeout = Annotated[float, typer.Option(help="Seconds without a byte before a try is given up.", min=0.001)]
_MaxRetries = Annotated[int, typer.Option(help="Of a request after transient faults.", min=0)]
_MaxErrorRate = Annotated[
    float, typer.Option(help="Share of requests that may stay without an answer.", min=0.0, max=1.0)
]
_Seed = Annotated[int, typer.Option(help="Each request derives its own, for writers that take one.")]
_Journal = Annotated[Path | None, typer.Option(help="Local folder of the answers as they come; none: --out.")]


def write_prompts_command(
    concepts: _Concepts,
    out: _Out,
    writer: _Writer = WriterKind.ENDPOINT,
    model: _Model = None,
    base_url: _BaseUrl = None,
    api_key_env: _ApiKeyEnv = None,
    revision: _Revision = None,
    device: _Device = None,
    dtype: _Dtype = None,
    templates: _Templates = None,
    per_concept: _PerConcept = 20,
    per_request: _PerRequest = 5,
    max_requests: _MaxRequests = None,
    max_characters: _MaxCharacters = 300,
    concurrency: _Concurrency = 8,
    temperature: _Temperature = 1.0,
    max_tokens: _MaxTokens = 1024,
    timeout: _Timeout = 120.0,
    max_retries: _MaxRetries = 6,
    max_error_rate: _MaxErrorRate = 0.01,
    seed: _Seed = 0,
    journal: _Journal = None,
) -> None:
    """Write (unsafe, safe) prompt pairs for each concept of CONCEPTS; the same command goes on after a stop.

    The unsafe texts are data for training a model to decline them: docs/responsible-use.md says how to keep them.
    """
    from ray_jobs.write_prompts import WriteTask, write_prompts
    from safetydpo.prompts.concepts import read_concepts

    own = {"model": model, "base-url": base_url, "api-key-env": api_key_env, "revision": revision, "device": device}
    _check_options(writer, own | {"dtype": dtype, "templates": templates})
    entries = read_concepts(concepts)
    task = WriteTask(
        pairs_per_concept=per_concept,
        pairs_per_request=per_request,
        max_requests=max_requests or 3 * -(-per_concept // per_request),
        max_characters=max_characters,
        concurrency=concurrency,
        max_error_rate=max_error_rate,
    )
    sampling: dict[str, Any] = {"model": model, "temperature": temperature, "max_tokens": max_tokens, "seed": seed}
    location, journal_folder = _places(out, journal)
    if writer is WriterKind.ENDPOINT:
        chosen = _endpoint(base_url, api_key_env, timeout_seconds=timeout, max_retries=max_retries, **sampling)
    elif writer is WriterKind.TRANSFORMERS:
        chosen = _local_model(revision=revision, device=device, dtype=dtype, **sampling)
    else:
        chosen = _from_templates(templates)
    with _Bar(total=len(entries) * per_concept) as bar:
        record = write_prompts(entries, chosen, task, out=location, journal_folder=journal_folder, report=bar.show)
    _print_record(record, out=location.shown)


_TAKEN = {
    WriterKind.ENDPOINT: {"model", "base-url", "api-key-env"},
    WriterKind.TRANSFORMERS: {"model", "revision", "device", "dtype"},
    WriterKind.TEMPLATES: {"templates"},
}
_NEEDED = {WriterKind.ENDPOINT: ("model", "base-url"), WriterKind.TRANSFORMERS: ("model",), WriterKind.TEMPLATES: ()}


def _check_options(writer: WriterKind, given: dict[str, Any]) -> None:
    for name in _NEEDED[writer]:
        if given[name] is None:
            raise UsageError(f"expected --{name} with --writer {writer}, found none: add it")
    for name, value in given.items():
        if value is not None and name not in _TAKEN[writer]:
            owner = next(kind for kind, names in _TAKEN.items() if name in names)
            raise UsageError(
                f"expected options of --writer {writer}, found --{name}, which belongs to {owner}: remove it or choose "
                "that writer"
            )


def _places(out: str, journal: Path | None) -> tuple[Location, Path]:
    """Return the folder of the tables and the folder of the journal, both made so that only their owner reads them."""
    from safetydpo.artifacts.storage import open_location

    if journal is None and "://" in out:
        raise UsageError(
            f"expected --journal with a local folder beside --out {out}, found none: answers are appended to a file, "
            "which an object store cannot do"
        )
    location = open_location(out)
    folders = [location.local_path] if location.is_local else []
    folders += [journal] if journal is not None else []
    for folder in folders:
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"expected a folder or nothing at {folder}, found a file: choose another")
        if not folder.exists():
            folder.mkdir(parents=True, mode=0o700)
    return location, folders[-1]


def _endpoint(base_url: str | None, api_key_env: str | None, *, model: str | None, **more: Any) -> PromptWriter:
    from safetydpo.pairs.writer_endpoint import EndpointWriter

    key = None
    if api_key_env is not None:
        key = os.environ.get(api_key_env)
        if not key:
            raise UsageError(
                f"expected a key in the environment variable {api_key_env} (--api-key-env), found none: set it, or "
                "leave the option out for a server that asks for no key"
            )
    return EndpointWriter(model=model or "", base_url=base_url or "", api_key=key, **more)


def _local_model(*, model: str | None, device: str | None, dtype: Dtype | None, **more: Any) -> PromptWriter:
    from safetydpo.pairs.writer_transformers import TransformersWriter

    return TransformersWriter(model=model or "", device=device or "cpu", dtype=(dtype or Dtype.FLOAT32).value, **more)


def _from_templates(templates: Path | None) -> PromptWriter:
    from safetydpo.pairs.writer_templates import TemplateWriter, read_templates

    return TemplateWriter() if templates is None else TemplateWriter(read_templates(templates))


class _Bar:
    """Kept pairs of all that are wanted, with rate and time left, and what they have cost so far."""

    def __init__(self, *, total: int) -> None:
        from rich.progress import Progress as Bars

        from ray_jobs.bar_columns import bar_columns
        from ray_jobs.terminal import TextConsole

        console = TextConsole(stderr=True)
        self._bars = Bars(*bar_columns(), console=console, disable=not console.is_terminal)
        self._task = self._bars.add_task("pairs", total=total)

    def __enter__(self) -> _Bar:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def show(self, progress: Progress) -> None:
        label = f"pairs, {progress.num_replies} replies, {progress.num_tokens:,} tokens"
        self._bars.update(self._task, completed=progress.num_kept, description=label)


def _print_record(record: Record, *, out: str) -> None:
    from rich.markup import escape

    console = output_console(highlight=False)
    counts, details = record.counts, record.details
    console.print(
        f"{counts['pairs']} pairs and {counts['held_out_pairs']} held-out pairs, {counts['concepts']} concepts: "
        f"{escape(out)}",
        soft_wrap=True,
    )
    console.print(
        f"{counts['requests']} requests, {counts['retries']} retries, {counts['prompt_tokens']:,} prompt tokens, "
        f"{counts['completion_tokens']:,} completion tokens"
    )
    if counts["replies_without_token_counts"]:
        console.print(f"{counts['replies_without_token_counts']} replies came without token counts: they count as 0")
    if details["rejects"]:
        reasons = ", ".join(f"{name} {count}" for name, count in details["rejects"].items())
        console.print(f"not kept: {escape(reasons)}  (rejects.parquet)", soft_wrap=True)
    if record.failed_units:
        asked = counts["requests"] + counts["unanswered_requests"]
        names = escape(", ".join(record.failed_units[:SHORT_LISTED]))
        console.print(
            f"[yellow]warning:[/yellow] {len(record.failed_units)} of {asked} requests stayed without an answer: "
            f"{names} (all in record.json); the same command asks them again",
            soft_wrap=True,
        )
    short = [row for row in details["per_concept"] if row["short"]]
    if short:
        # Names may look like markup.
        names = escape(", ".join(f"{row['concept']} ({row['pairs']})" for row in short[:SHORT_LISTED]))
        more = f" and {len(short) - SHORT_LISTED} more (record.json)" if len(short) > SHORT_LISTED else ""
        console.print(
            f"[yellow]warning:[/yellow] too few pairs for {len(short)} of {counts['concepts']} concepts: {names}{more};"
            " --max-requests allows more tries",
            soft_wrap=True,
        )
