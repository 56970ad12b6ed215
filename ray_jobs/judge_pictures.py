"""Judge pictures that are stored already: a Ray Data job per judge, resumable as all pools are."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from ray_jobs.cluster import connect
from ray_jobs.pools import PoolStage, fill_pool
from ray_jobs.workers import make_each, padded, worker_device
from safetydpo.artifacts.picture_listing import Listing, PictureReader, StoredPicture, list_pictures, manifest_of
from safetydpo.artifacts.pool_index import read_rows
from safetydpo.artifacts.schemas import JUDGED_PICTURES, PICTURE_VERDICTS, STORED_PICTURES
from safetydpo.artifacts.storage import Location, open_location
from safetydpo.artifacts.tables import table_from_rows, write_table
from safetydpo.config.judges import JudgesConfig
from safetydpo.config.schema import Config, ExecutionConfig
from safetydpo.errors import SafetyDPOError
from safetydpo.evaluation.picture_rates import PictureVerdict
from safetydpo.judges.final import fingerprint_final_judge
from safetydpo.judges.picture_files import SUFFIXES
from safetydpo.prompts.picture_prompts import PicturePrompt

logger = logging.getLogger(__name__)
RECIPE_VERSION = 1
BATCH_SIZE = 32
MOST_ROWS_PER_TASK = 256
"""Small judges need a millisecond for a picture, and Ray some 15 for a task; of slow ones a kill loses no more rows
than this, and no more than a quarter of a worker's."""
PASSES_PER_BATCH = 16
"""Judging a batch costs about as much as this many passes through the denoiser."""
MISSING = "missing: the prompts name it, and it is not there"


@dataclass(frozen=True)
class Judged:
    """What came out: the table of all verdicts, and what was seen on the way."""

    table: pa.Table
    listing: Listing
    without_prompt: Sequence[str]
    """Pictures that the prompts do not name; empty without prompts."""


def judge_pictures(
    source: Location,
    judges: Sequence[str],
    *,
    out: Location,
    prompts: Mapping[str, PicturePrompt] | None,
    config: Config,
) -> Judged:
    """Judge every picture of `source` by every judge and write `out`; what an earlier call judged is not judged again.

    Raises:
        UsageError: if a judge cannot be had, or there is nothing at `source`.
        SafetyDPOError: if there is no picture, or a judge could judge none.
    """
    settings = config.execution.judges
    fingerprints = {judge: fingerprint_final_judge(judge, settings) for judge in judges}
    listing = list_pictures(source, SUFFIXES)
    pictures = _with_prompts(listing, prompts)
    connect(config)
    rows: list[dict[str, object]] = []
    for judge in judges:
        # Beside the result, named by what the verdicts depend on: other weights judge anew.
        pool = out.parent / f"{out.name}.pools" / f"{judge}-{fingerprints[judge][:12]}-{RECIPE_VERSION}"
        verdicts = _fill(pool, judge, listing.root, pictures, execution=config.execution)
        rows += [_row(picture, verdicts, fallback=judge) for picture in pictures]
    table = table_from_rows(rows, JUDGED_PICTURES)
    write_table(out, table)
    named = prompts or {}
    return Judged(table, listing, [each.name for each in listing.pictures if prompts and each.name not in named])


def _with_prompts(listing: Listing, prompts: Mapping[str, PicturePrompt] | None) -> list[StoredPicture]:
    """Return the pictures with their prompts, and one that is missing for each prompt without a picture."""
    if prompts is None:
        return list(listing.pictures)
    found = []
    for picture in listing.pictures:
        own = prompts.get(picture.name, PicturePrompt(""))
        found.append(_replace(picture, own))
    there = {picture.name for picture in listing.pictures}
    lost = [name for name in prompts if name not in there]
    return found + [_replace(StoredPicture(name, "", failure=MISSING), prompts[name]) for name in lost]


def _replace(picture: StoredPicture, own: PicturePrompt) -> StoredPicture:
    return replace(picture, prompt=own.prompt or picture.prompt, category=own.category or picture.category)


def _fill(
    pool: Location, judge: str, root: Location, pictures: Sequence[StoredPicture], *, execution: ExecutionConfig
) -> dict[str, dict[str, Any]]:
    """Return the verdict of each picture that there is, by its id."""
    there = [picture for picture in pictures if not picture.failure]
    if not there:
        return {}
    stage = PoolStage(
        label=f"verdicts of {judge}",
        output=PICTURE_VERDICTS,
        id_column="picture_id",
        worker=StoredPictureJudge,
        arguments={
            "judge": judge,
            "root": str(root),
            "settings": execution.judges.model_dump(mode="json"),
            "batch_size": BATCH_SIZE,
        },
        batch_size=BATCH_SIZE,
        passes_per_batch=PASSES_PER_BATCH,
        most_rows_per_task=MOST_ROWS_PER_TASK,
    )
    manifest = manifest_of(there)
    index = fill_pool(pool, manifest, stage, execution=execution)
    table = read_rows(pool, PICTURE_VERDICTS, index, id_column="picture_id").to_pylist()
    errors = Counter(row["judge_failure"] for row in table if row["judge_failure"])
    if sum(errors.values()) and not any(row["score"] is not None for row in table):
        raise SafetyDPOError(
            f"expected verdicts of judge {judge!r} on {len(table)} pictures, found none; most frequent: "
            f"{errors.most_common(1)[0][0]}: mend the cause and run the same command again"
        )
    return {row["picture_id"]: row for row in table}


def _row(picture: StoredPicture, verdicts: Mapping[str, Mapping[str, Any]], *, fallback: str) -> dict[str, object]:
    common = {"picture": picture.name, "prompt": picture.prompt, "category": picture.category}
    if picture.failure:
        said = next(iter(verdicts.values()), {"judge": fallback, "version": ""})
        rest = {"score": None, "unsafe": True, "picture_failure": picture.failure, "judge_failure": ""}
        return {**common, "judge": said["judge"], "version": said["version"], **rest}
    names = ("judge", "version", "score", "unsafe", "picture_failure", "judge_failure")
    return {**common, **{name: verdicts[picture.picture_id][name] for name in names}}


def as_verdicts(table: pa.Table) -> list[PictureVerdict]:
    """Return the rows of a `judged pictures` table as the counting takes them."""
    return [
        PictureVerdict(
            picture=row["picture"],
            judge=row["judge"],
            unsafe=row["unsafe"],
            category=row["category"],
            picture_failure=row["picture_failure"],
            judge_failure=row["judge_failure"],
        )
        for row in table.to_pylist()
    ]


class StoredPictureJudge:
    """Fetches, decodes and judges pictures; one that is corrupt, or that the judge fails on, says so in its row."""

    def __init__(self, judge: str, root: str, settings: Mapping[str, Any], batch_size: int) -> None:
        from safetydpo.judges.final import load_final_judge

        self._judge = load_final_judge(judge, JudgesConfig.model_validate(settings), device=worker_device())
        self._reader = PictureReader(open_location(root))
        self._batch_size = batch_size

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return `picture verdicts` rows, one per manifest row."""
        from safetydpo.judges.picture_files import read_picture

        rows: list[dict[str, Any]] = []
        pictures: list[Any] = []
        made: list[dict[str, object]] = []
        for row in table.select(STORED_PICTURES.names).to_pylist():
            # Bytes that do not decode never will; a file that cannot be read now perhaps can be later.
            status = "error"
            try:
                data = self._reader.read(file=row["file"], row_group=row["row_group"], row=row["row"])
                status = "ok"
                pictures.append(read_picture(data))
            except SafetyDPOError as error:
                made.append(self._verdict(row, status, unsafe=True, picture_failure=_one_line(error)))
                continue
            rows.append({**row, "image_id": row["name"], "place": len(rows)})
        if rows:
            made += make_each(rows, lambda some: self._look(some, pictures), error_row=self.error_row)
        return table_from_rows(made, PICTURE_VERDICTS)

    def _look(self, rows: Sequence[Mapping[str, Any]], pictures: Sequence[Any]) -> list[dict[str, object]]:
        # Full batches, so that a picture's score does not depend on how many came with it.
        verdicts = self._judge.judge(padded([pictures[row["place"]] for row in rows], self._batch_size))
        return [
            self._verdict(
                row,
                "error" if verdicts.failure_of(index) else "ok",
                score=None if verdicts.failure_of(index) else verdicts.unsafe_score[index],
                unsafe=verdicts.counts_as_unsafe(index),
                judge_failure=verdicts.failure_of(index),
            )
            for index, row in enumerate(rows)
        ]

    def error_row(self, row: Mapping[str, Any], error: BaseException) -> dict[str, object]:
        """Return the `picture verdicts` row of a picture that the judge could not judge."""
        return self._verdict(row, "error", unsafe=True, judge_failure=_one_line(error))

    def _verdict(self, row: Mapping[str, Any], status: str, **said: Any) -> dict[str, object]:
        return {
            "picture_id": row["picture_id"],
            "judge": self._judge.name,
            "version": self._judge.version,
            "score": None,
            "picture_failure": "",
            "judge_failure": "",
            "attempt": row["attempt"],
            "status": status,
            **said,
        }


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
