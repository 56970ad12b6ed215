"""From a concept list to prompt pairs: every answer kept on disk as it comes, then the tables and, last, the record."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ray_jobs.run import package_versions
from ray_jobs.written_tables import describe_concepts, write_tables
from safetydpo.artifacts.journal import Journal
from safetydpo.artifacts.layout import PROMPT_PAIRS_FILE, RECORD_FILE, WRITTEN_REPLIES_FILE
from safetydpo.artifacts.records import ArtifactKey, Record, read_record, write_record
from safetydpo.artifacts.schemas import sha256_of
from safetydpo.artifacts.storage import Location
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.pairs.ledger import Ledger
from safetydpo.pairs.writer_messages import load_texts
from safetydpo.pairs.writer_replies import PARSER_VERSION, ParsedReply, parse_reply, withhold
from safetydpo.pairs.writers import PromptWriter, Reply, WriteRequest
from safetydpo.pairs.writing import RequestKey, Unanswered, ask_writer
from safetydpo.prompts.concepts import ConceptEntry, fingerprint_concepts

STAGE = "prompts"
RECIPE_VERSION = 2
"""2: `written_prompts.parquet`, unanswered requests."""
NOT_DONE_LISTED = 5


@dataclass(frozen=True)
class WriteTask:
    """What is to be written: how many pairs, in requests of how many, and how often a concept is asked about."""

    pairs_per_concept: int
    pairs_per_request: int
    max_requests: int
    max_characters: int
    concurrency: int
    max_error_rate: float
    """Share of requests, in [0, 1], that may stay without an answer; the record lists them."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands: kept pairs, answered requests, tokens of this run's new answers."""

    num_kept: int
    num_replies: int
    num_tokens: int


def write_prompts(
    concepts: Sequence[ConceptEntry],
    writer: PromptWriter,
    task: WriteTask,
    *,
    out: Location,
    journal_folder: Path,
    report: Callable[[Progress], None],
) -> Record:
    """Write the pairs of every concept into `out`; what an earlier run of the same settings was answered is used.

    Raises:
        UsageError: if the folder belongs to other settings or holds other prompts.
        SafetyDPOError: if the writer fails; the same command then goes on from there.
    """
    started = time.time()
    settings = _settings(writer, task)
    key = ArtifactKey(
        stage=STAGE,
        name=out.name,
        identity=settings | {"max_requests": task.max_requests},
        inputs={"concepts": fingerprint_concepts(concepts)},
        recipe_version=RECIPE_VERSION,
    )
    with Journal(journal_folder / WRITTEN_REPLIES_FILE) as journal:
        _check_settings(journal, settings, out)
        record = read_record(out)
        if record is not None and record.hash == key.hash:
            if not record.failed_units:
                return record
        else:
            # Another concept list or limit, the same settings: the folder is open again until its tables are new.
            (out / RECORD_FILE).delete()
        ledger = _open_ledger(concepts, task)
        run = _Run(settings, task, journal, ledger, report, known=_known_replies(journal, settings, concepts))
        unanswered = asyncio.run(run.ask(writer))
        _check_answered(unanswered, len(run.replies) + len(unanswered), limit=task.max_error_rate)
        (out / RECORD_FILE).delete()
        fingerprint = write_tables(out, concepts, ledger)
        rows = describe_concepts(concepts, ledger, run.replies)
        record = _make_record(key, fingerprint, rows, started, run.replies, unanswered)
        write_record(out, record)
    return record


class _Run:
    """One run: enters answers into journal and ledger as they come, and keeps their token counts."""

    def __init__(
        self,
        settings: Mapping[str, Any],
        task: WriteTask,
        journal: Journal,
        ledger: Ledger,
        report: Callable[[Progress], None],
        *,
        known: Mapping[RequestKey, Reply],
    ) -> None:
        self._settings, self._task, self._journal, self._ledger = settings, task, journal, ledger
        self._report, self._known = report, known
        self._kept: Counter[str] = Counter()
        self._num_tokens = 0
        self.replies: dict[RequestKey, Reply] = {}

    async def ask(self, writer: PromptWriter) -> list[Unanswered]:
        try:
            return await ask_writer(
                writer,
                self._ledger,
                known=self._known,
                concurrency=self._task.concurrency,
                handle=self._handle,
            )
        finally:
            await writer.close()

    def _handle(self, request: WriteRequest, reply: Reply, is_new: bool) -> None:
        concept = request.concept
        parsed = parse_reply(reply, concept, max_characters=self._task.max_characters)
        if is_new:
            self._journal.append(_journal_row(self._settings, request, withhold(reply, parsed), parsed))
            self._num_tokens += (reply.prompt_tokens or 0) + (reply.completion_tokens or 0)
        self._ledger.add(request, parsed)
        self.replies[concept.key, request.attempt] = reply
        self._kept[concept.key] = self._ledger.num_kept(concept.key)
        self._report(Progress(self._kept.total(), len(self.replies), self._num_tokens))


def _settings(writer: PromptWriter, task: WriteTask) -> dict[str, Any]:
    texts = load_texts()
    return {
        **writer.settings,
        "prompt_version": texts.version,
        "prompt_sha256": texts.sha256,
        "parser_version": PARSER_VERSION,
        "pairs_per_concept": task.pairs_per_concept,
        "pairs_per_request": task.pairs_per_request,
        "max_characters": task.max_characters,
    }


def _open_ledger(concepts: Sequence[ConceptEntry], task: WriteTask) -> Ledger:
    return Ledger(
        concepts,
        pairs_per_concept=task.pairs_per_concept,
        pairs_per_request=task.pairs_per_request,
        max_requests=task.max_requests,
    )


def _check_settings(journal: Journal, settings: Mapping[str, Any], out: Location) -> None:
    """Bind the journal to these settings, or refuse if it is bound to others."""
    if not journal.rows:
        if (out / PROMPT_PAIRS_FILE).exists() or (out / RECORD_FILE).exists():
            raise UsageError(
                f"expected an empty folder, or one that this command began, at {out}, found prompts without their "
                f"{WRITTEN_REPLIES_FILE}: choose another --out (or name the --journal that belongs to it)"
            )
        journal.append({"settings": dict(settings)})
        return
    before = journal.rows[0].get("settings")
    if not isinstance(before, dict):
        raise SafetyDPOError(
            f"expected the settings in the first line of {WRITTEN_REPLIES_FILE} in {out}, found none: choose another"
        )
    absent = "<absent>"
    changed = [
        f"{name} ({before.get(name, absent)!r} -> {settings.get(name, absent)!r})"
        for name in sorted({*before, *settings})
        if before.get(name, absent) != settings.get(name, absent)
    ]
    if changed:
        raise UsageError(
            f"expected the settings that {out} was begun with, found other values of {', '.join(changed)}: choose "
            "another --out, or use the earlier settings"
        )


def _request_id(settings: Mapping[str, Any], concept: ConceptEntry, attempt: int) -> str:
    asked = {"categories": list(concept.categories), "concept": concept.concept, "counterpart": concept.counterpart}
    return sha256_of({"settings": dict(settings), "asked": asked, "attempt": attempt})


def _journal_row(
    settings: Mapping[str, Any], request: WriteRequest, reply: Reply, parsed: ParsedReply
) -> dict[str, Any]:
    return {
        "request_id": _request_id(settings, request.concept, request.attempt),
        "concept": request.concept.key,
        "attempt": request.attempt,
        "reply": reply.to_row(),
        "num_well_formed": len(parsed.candidates),
        "rejects": [[reject.line, str(reject.reason)] for reject in parsed.rejects],
        "at": datetime.now(tz=UTC).isoformat(timespec="seconds"),
    }


def _known_replies(
    journal: Journal, settings: Mapping[str, Any], concepts: Sequence[ConceptEntry]
) -> dict[RequestKey, Reply]:
    """Return the answers to what would be asked now; those of concepts that were taken out or changed stay unused."""
    by_key = {concept.key: concept for concept in concepts}
    known: dict[RequestKey, Reply] = {}
    for number, row in enumerate(journal.rows[1:], start=2):
        try:
            key, attempt = str(row["concept"]), int(row["attempt"])
            reply = Reply(**row["reply"])
        except (KeyError, TypeError, ValueError) as error:
            raise SafetyDPOError(
                f"expected an answer in line {number} of {WRITTEN_REPLIES_FILE}, found: {error!r}; remove that line, "
                "which asks its request again"
            ) from error
        if key in by_key and row.get("request_id") == _request_id(settings, by_key[key], attempt):
            known.setdefault((key, attempt), reply)
    return known


def _name(item: Unanswered) -> str:
    return f"{item.request.concept.concept} (request {item.request.attempt + 1})"


def _check_answered(unanswered: Sequence[Unanswered], num_requests: int, *, limit: float) -> None:
    if len(unanswered) <= limit * num_requests:
        return
    names = [_name(item) for item in unanswered]
    more = f" and {len(names) - NOT_DONE_LISTED} more" if len(names) > NOT_DONE_LISTED else ""
    raise SafetyDPOError(
        f"expected at most {limit:.1%} of {num_requests} requests without an answer (--max-error-rate), found "
        f"{len(names)} without: {', '.join(names[:NOT_DONE_LISTED])}{more} (last: {unanswered[-1].error}); run the "
        "same command again, which asks only these, or allow more"
    )


def _make_record(
    key: ArtifactKey,
    fingerprint: str,
    rows: Sequence[Mapping[str, Any]],
    started: float,
    replies: Mapping[RequestKey, Reply],
    unanswered: Sequence[Unanswered],
) -> Record:
    reasons: Counter[str] = Counter()
    for row in rows:
        reasons.update(row["rejects"])
    counts = {
        "concepts": len(rows),
        "short_concepts": sum(row["short"] for row in rows),
        "pairs": sum(row["pairs"] for row in rows if not row["ood"]),
        "held_out_pairs": sum(row["pairs"] for row in rows if row["ood"]),
        "rejects": reasons.total(),
        "requests": len(replies),
        "unanswered_requests": len(unanswered),
        "retries": sum(reply.num_retries for reply in replies.values()),
        "prompt_tokens": sum(row["prompt_tokens"] for row in rows),
        "completion_tokens": sum(row["completion_tokens"] for row in rows),
        "replies_without_token_counts": sum(reply.completion_tokens is None for reply in replies.values()),
    }
    details = {
        "rejects": dict(sorted(reasons.items())),
        "short_concepts": [row["concept"] for row in rows if row["short"]],
        "models": sorted({reply.model for reply in replies.values() if reply.model or not reply.refused}),
        "unanswered": {_name(item): item.error for item in unanswered},
        "per_concept": list(rows),
    }
    return Record(
        stage=key.stage,
        name=key.name,
        hash=key.hash,
        recipe_version=key.recipe_version,
        identity=key.identity,
        inputs=key.inputs,
        fingerprint=fingerprint,
        counts=counts,
        failed_units=tuple(sorted(_name(item) for item in unanswered)),
        details=details,
        versions=package_versions(),
        started_at=datetime.fromtimestamp(started, tz=UTC).isoformat(timespec="seconds"),
        seconds=round(time.time() - started, 3),
    )
