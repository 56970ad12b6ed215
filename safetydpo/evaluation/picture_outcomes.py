"""What a report was computed from, picture by picture: which rates count a picture and which it is a hit of.

No picture and no prompt's text stands in it, so that it may be handed on with a report. Two of them can be compared
pair by pair (`compare`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from safetydpo.artifacts.evaluation_schemas import PICTURE_OUTCOMES
from safetydpo.artifacts.json_text import parse_json
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import read_table, table_from_rows
from safetydpo.errors import SafetyDPOError
from safetydpo.evaluation.benchmark_metrics import benchmark_pictures, is_of_benchmark
from safetydpo.evaluation.metrics import RATES, RateDefinition, count_hits
from safetydpo.evaluation.outcomes import ImageOutcome

_ABOUT = b"safetydpo"


@dataclass(frozen=True, order=True)
class JudgeIdentity:
    """Who judged: verdicts of two judges are comparable only if all of it is equal."""

    role: str
    name: str
    version: str
    weights_sha256: str

    def __str__(self) -> str:
        return f"{self.role} {self.name} {self.version} ({self.weights_sha256[:12]})"


@dataclass(frozen=True)
class PictureOutcome:
    """One picture of one row."""

    prompt_id: str
    seed: int
    prompt_set: str
    concept: str
    failed: bool
    hits: Mapping[str, bool]
    """Rate that counts the picture -> whether it is a hit."""
    clip_score: float | None

    @property
    def key(self) -> tuple[str, str, int]:
        """What pairs it with a picture of another row."""
        return self.prompt_set, self.prompt_id, self.seed


@dataclass(frozen=True)
class StoredOutcomes:
    """The pictures of all rows of a run, who judged them, and the run's seed."""

    rows: Mapping[str, Sequence[PictureOutcome]]
    judges: tuple[JudgeIdentity, ...]
    run_seed: int


def outcomes_table(
    outcomes: Sequence[ImageOutcome],
    *,
    judges: Sequence[JudgeIdentity],
    run_seed: int,
    definitions: Mapping[str, RateDefinition] = RATES,
) -> pa.Table:
    """Return the outcomes of all rows of a run as a table of `PICTURE_OUTCOMES`, judges and seed in its metadata.

    Raises:
        SafetyDPOError: as in `count_hits`.
    """
    by_row: dict[str, list[ImageOutcome]] = {}
    for outcome in outcomes:
        by_row.setdefault(outcome.row_name, []).append(outcome)
    rows = [found for own in by_row.values() for found in _rows(own, definitions)]
    about = {"judges": [asdict(judge) for judge in sorted(judges)], "run_seed": run_seed}
    return table_from_rows(rows, PICTURE_OUTCOMES).replace_schema_metadata({_ABOUT: json.dumps(about).encode()})


def _rows(outcomes: Sequence[ImageOutcome], definitions: Mapping[str, RateDefinition]) -> list[dict[str, object]]:
    hits: dict[int, dict[str, bool]] = {id(outcome): {} for outcome in outcomes}
    for name, definition in definitions.items():
        found, chosen = count_hits(outcomes, definition)
        for outcome, hit in zip(chosen, found, strict=True):
            hits[id(outcome)][name] = bool(hit)
            if name == "ip" and outcome.category is not None:
                hits[id(outcome)][f"ip:{outcome.category}"] = bool(hit)
    # A prompt of a benchmark is in one of its two sets only.
    places = {
        (outcome.prompt_set.partition(":")[2], outcome.prompt_id, outcome.seed): id(outcome)
        for outcome in outcomes
        if is_of_benchmark(outcome.prompt_set)
    }
    for name, pictures in benchmark_pictures(outcomes).items():
        found, chosen = count_hits(pictures, RATES["ip"])
        for outcome, hit in zip(chosen, found, strict=True):
            hits[places[name.partition(":")[2], outcome.prompt_id, outcome.seed]][name] = bool(hit)
    return [
        {
            "row": outcome.row_name,
            "prompt_id": outcome.prompt_id,
            "seed": outcome.seed,
            "prompt_set": outcome.prompt_set,
            "category": outcome.category or "",
            "concept": outcome.concept,
            "failed": outcome.failure is not None,
            "rates": list(hits[id(outcome)]),
            "hits": [name for name, hit in hits[id(outcome)].items() if hit],
            # Of neutral prompts, as in the summary; a failed picture scores 0.
            "clip_score": None if outcome.prompt_set != "neutral" else _score(outcome),
        }
        for outcome in outcomes
    ]


def _score(outcome: ImageOutcome) -> float | None:
    return 0.0 if outcome.failure is not None else outcome.clip_score


def read_picture_outcomes(location: Location) -> StoredOutcomes:
    """Read what `outcomes_table` made.

    Raises:
        SafetyDPOError: if the file is broken or does not say who judged.
    """
    table = read_table(location, PICTURE_OUTCOMES)
    about = _read_about(location)
    rows: dict[str, list[PictureOutcome]] = {}
    for row in table.to_pylist():
        hits = set(row["hits"])
        rows.setdefault(row["row"], []).append(
            PictureOutcome(
                prompt_id=row["prompt_id"],
                seed=row["seed"],
                prompt_set=row["prompt_set"],
                concept=row["concept"],
                failed=row["failed"],
                hits={name: name in hits for name in row["rates"]},
                clip_score=row["clip_score"],
            )
        )
    return StoredOutcomes(rows, about[0], about[1])


def _read_about(location: Location) -> tuple[tuple[JudgeIdentity, ...], int]:
    with location.open_random_access() as stream:
        metadata: Mapping[bytes, bytes] = pq.read_schema(stream).metadata or {}
    try:
        about: dict[str, Any] = parse_json(metadata[_ABOUT])
        return tuple(sorted(JudgeIdentity(**judge) for judge in about["judges"])), int(about["run_seed"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise SafetyDPOError(
            f"expected the judges of the pictures in the metadata of {location}, found {error!r}: make the report of "
            "that run again"
        ) from error
