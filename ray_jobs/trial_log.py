"""The log of a search: one Parquet file per finished trial, one per measurement; only numbers and text are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from safetydpo.artifacts.json_text import parse_json
from safetydpo.artifacts.schemas import MEASUREMENTS, TRIALS
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import read_table, table_from_rows, write_table
from safetydpo.config.search import SearchConfig
from safetydpo.search.budget import Span
from safetydpo.search.objective import best_index, judge_metrics
from safetydpo.search.plans import OK, STOPPED
from safetydpo.search.replay import LoggedTrial
from safetydpo.search.space import Candidate

BASE = "base"
"""In place of a candidate's hash: the model without an adapter."""


@dataclass(frozen=True)
class TrialLog:
    """One Parquet file per finished trial; a command is the only writer while it runs, so files are read once."""

    folder: Location
    known: dict[str, dict[str, Any]] = field(default_factory=dict, compare=False)
    """Rows that count no more, by candidate: the same candidate, asked again, need not be measured again."""

    @cached_property
    def _rows(self) -> dict[int, dict[str, Any]]:
        return {row["trial"]: row for row in _read(self.folder, TRIALS)}

    def rows(self) -> list[dict[str, Any]]:
        """Return the finished trials in order."""
        return [self._rows[number] for number in sorted(self._rows)]

    def row(self, number: int) -> dict[str, Any] | None:
        """Return a finished trial."""
        return self._rows.get(number)

    def find(self, candidate: Candidate) -> dict[str, Any] | None:
        """Return the row of an equal candidate that was measured in full."""
        equal = [row for row in self.rows() if row["candidate_hash"] == candidate.hash and row["status"] == OK]
        return equal[0] if equal else self.known.get(candidate.hash)

    def forget_failures(self, generation_size: int | None) -> None:
        """Take out failed trials, so that a new run of the command tries them again: their cause may be mended.

        Later generations were asked with the failures as answers. They leave the log as well, but not the memory:
        if the trials fail again, the same candidates are asked and found. Without generations (None) all others stay.
        """
        rows = self.rows()
        failed = [row["trial"] for row in rows if row["status"] not in (OK, STOPPED)]
        if not failed:
            return
        stop = len(rows) + failed[-1] + 1
        if generation_size is not None:
            stop = (failed[0] // generation_size + 1) * generation_size
        for row in reversed(rows):
            is_kept = row["status"] in (OK, STOPPED)
            if is_kept and row["trial"] < stop:
                continue
            if row["status"] == OK:
                self.known[row["candidate_hash"]] = row
            self._file(row["trial"]).delete()
            del self._rows[row["trial"]]

    def add(self, number: int, candidate: Candidate, result: Mapping[str, Any]) -> None:
        """Write one finished trial."""
        row: dict[str, Any] = {
            "trial": number,
            "candidate_hash": candidate.hash,
            "candidate": candidate.to_json(),
            "status": result["status"],
            "objective": float(result["objective"]),
            "metrics": result["metrics"],
            "error": result["error"],
        }
        # Read before the file is there, or a first look would find it twice.
        rows = self._rows
        write_table(self._file(number), table_from_rows([row], TRIALS))
        rows[number] = row

    def logged(self) -> list[LoggedTrial]:
        """Return the finished trials as a plan takes them, without what samplers of several objectives are told."""
        return [
            LoggedTrial(
                row["trial"],
                Candidate.from_json(row["candidate"]),
                row["objective"],
                stopped_at=parse_json(row["metrics"])["stopped_at"] if row["status"] == STOPPED else None,
            )
            for row in self.rows()
        ]

    def _file(self, number: int) -> Location:
        return self.folder / f"trial-{number:05d}.parquet"


@dataclass(frozen=True)
class MeasurementLog:
    """One Parquet file per measurement: what came out, when it ran and for how long, and how many pictures it drew.

    It is what a rung's answers are found in again, and what was spent; the trials themselves stand in `TrialLog`.
    """

    folder: Location

    @cached_property
    def _rows(self) -> list[dict[str, Any]]:
        return _read(self.folder, MEASUREMENTS)

    @cached_property
    def _known(self) -> dict[tuple[str, int], dict[str, Any]]:
        return {(row["candidate_hash"], row["rung"]): row for row in self._rows if row["status"] == OK}

    def rows(self) -> list[dict[str, Any]]:
        """Return all measurements in the order of their start."""
        return sorted(self._rows, key=lambda row: (row["started_at"], row["candidate_hash"], row["rung"]))

    def find(self, candidate_hash: str, rung: int) -> dict[str, Any] | None:
        """Return a measurement of this candidate at this rung that did not fail."""
        return self._known.get((candidate_hash, rung))

    def spans(self, rung: int | None = None) -> list[Span]:
        """Return when measurements ran, of one rung or of all."""
        return [Span(row["started_at"], row["seconds"]) for row in self._rows if rung in (None, row["rung"])]

    def add(self, candidate: Candidate | None, rung: int, result: Mapping[str, Any]) -> None:
        """Write one measurement."""
        row: dict[str, Any] = {
            "candidate_hash": BASE if candidate is None else candidate.hash,
            "candidate": "" if candidate is None else candidate.to_json(),
            "rung": rung,
            "status": result["status"],
            "value": float(result["objective"]),
            "metrics": result["metrics"],
            "error": result["error"],
            "started_at": float(result["started_at"]),
            "seconds": float(result["seconds"]),
            "pictures": int(result["pictures"]),
        }
        known = self._known
        name = f"{row['candidate_hash'][:16]}-{rung:02d}-{int(1000 * row['started_at'])}.parquet"
        write_table(self.folder / name, table_from_rows([row], MEASUREMENTS))
        self._rows.append(row)
        if row["status"] == OK:
            known[row["candidate_hash"], rung] = row


def measured_merges(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows of what was measured in full and has an adapter: all but the base, which may be a trial too."""
    return [row for row in rows if row["status"] == OK and not Candidate.from_json(row["candidate"]).is_base]


def best_trial(
    rows: Sequence[Mapping[str, Any]], *, base: Mapping[str, float], search: SearchConfig
) -> dict[str, Any] | None:
    """Return `trial`, `method`, `global_scale`, `objective`, `feasible` of the best; None if none was measured in full.

    `base` are the base's rates.
    """
    measured = measured_merges(rows)
    objectives = [judge_metrics(parse_json(row["metrics"]), base=base, search=search) for row in measured]
    best = best_index(objectives)
    if best is None:
        return None
    candidate = Candidate.from_json(measured[best]["candidate"])
    return {
        "trial": measured[best]["trial"],
        "method": candidate.method,
        "global_scale": candidate.global_scale,
        "objective": objectives[best].value,
        "feasible": objectives[best].feasible,
    }


def _read(folder: Location, schema: Any) -> list[dict[str, Any]]:
    # On an object store the folder is there with its first file.
    if not folder.is_folder():
        return []
    rows: list[dict[str, Any]] = read_table(folder, schema).to_pylist()
    return rows
