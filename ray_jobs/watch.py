"""How a run gets on, from the files of its run folder and store alone. No Ray, nothing started or changed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import ValidationError

from ray_jobs.run import Run, read_costs, read_seconds
from ray_jobs.run_progress import read_progress
from ray_jobs.search_watch import SearchState, find_search, read_search
from safetydpo.artifacts.attempts import FAILED_FOLDER, newest_owner
from safetydpo.artifacts.layout import IDENTITY_FILE, RECORD_FILE, report_record
from safetydpo.artifacts.records import read_pointers, read_record
from safetydpo.artifacts.storage import Location, open_location
from safetydpo.config.schema import Config
from safetydpo.errors import SafetyDPOError

STAGES = ("pairs", "train", "merge", "search", "evaluate", "report")
POINTERS = {"pairs": "pairs", "train": "expert:", "merge": "merged:", "search": "search", "evaluate": "outcomes"}
"""What the name of a pointer begins with that a stage writes at its end."""
SILENT_SECONDS = 120.0
"""Without a word for so long a command has ended without saying so, or its clock is another one."""
READERS = 16


@dataclass(frozen=True)
class WorkState:
    """One kind of unit of a stage."""

    label: str
    done: int
    total: int
    per_second: float | None
    """Since it began; None = not known yet."""
    seconds_left: float | None
    """At that rate; None = not known, or nothing is left."""


@dataclass(frozen=True)
class StageState:
    """One stage: `waiting`, `running`, `silent`, `done`, `stopped` or `failed`."""

    stage: str
    standing: str
    seconds: float | None
    """Wall time of all commands so far; None = none was finished or interrupted yet."""
    work: tuple[WorkState, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class ExpertsState:
    """Experts of the newest training: how many are what, and which each lane holds."""

    counts: Mapping[str, int] = field(default_factory=dict)
    """`done`, `failed`, `running`, `open`."""
    lanes: Mapping[str, str] = field(default_factory=dict)
    """{lane: the expert that it trains}."""


@dataclass(frozen=True)
class RunState:
    """All that is known of a run at one moment."""

    run: str
    run_id: str
    run_dir: str
    store: str
    stages: tuple[StageState, ...]
    pairs: Mapping[str, int]
    """Counts of the closed pairs; empty before."""
    experts: ExpertsState
    search: SearchState | None
    spend: Mapping[str, float | None]
    """`seconds`, `cpu_seconds`, `gpu_seconds`, `cost` of what has ended; None = not measured."""

    @property
    def is_over(self) -> bool:
        """Whether the report is there and nothing is at work."""
        return self.stages[-1].standing == "done" and all(each.standing != "running" for each in self.stages)


def pace(work: Mapping[str, Any], *, updated: float) -> WorkState:
    """Return how fast a told piece of work goes: `units made / seconds since it began`, by its command's own clock."""
    seconds = (work["ended"] or updated) - work["began"]
    made = work["done"] - work["done_before"]
    rate = made / seconds if made > 0 and seconds > 0 else None
    left = work["total"] - work["done"]
    is_known = rate is not None and left > 0 and work["ended"] is None
    return WorkState(work["label"], work["done"], work["total"], rate, left / rate if is_known and rate else None)


class RunReader:
    """Reads the state of one run again and again; what cannot change any more is read once."""

    def __init__(self, run_dir: Location, *, store: str | None = None) -> None:
        """Read nothing yet; `store` stands in for the place that the run's commands named.

        Raises:
            SafetyDPOError: if there is no run.
        """
        if not (run_dir / IDENTITY_FILE).is_file():
            raise SafetyDPOError(
                f"expected the folder of a run that was started at {run_dir}, found no {IDENTITY_FILE}: name its "
                "execution.run_dir, such as runs/demo or s3://bucket/runs/demo"
            )
        self._run_dir, self._store = run_dir, store
        self._done: set[str] = set()

    def read(self) -> RunState:
        """Return how the run stands now."""
        told = {stage: content for stage in STAGES if (content := read_progress(self._run_dir, stage)) is not None}
        newest = max(told.values(), key=lambda content: content["updated"], default={})
        run = self._run_of(newest)
        pointers = read_pointers(self._run_dir)
        seconds = read_seconds(self._run_dir)
        search = _search_of(run)
        return RunState(
            run=newest.get("run", self._run_dir.name),
            run_id=newest.get("run_id", ""),
            run_dir=str(self._run_dir),
            store="" if run is None else run.config.execution.store,
            stages=tuple(self._stage(stage, told.get(stage), pointers, seconds.get(stage)) for stage in STAGES),
            pairs=_pairs_of(run, pointers),
            experts=self._experts(run, told.get("train")),
            search=search,
            spend=_spend_of(run, seconds, read_costs(self._run_dir)),
        )

    def _run_of(self, content: Mapping[str, Any]) -> Run | None:
        if not content:
            return None
        try:
            config = Config.model_validate(content["config"])
        except ValidationError as error:
            raise SafetyDPOError(
                f"expected a config of this version in {self._run_dir}/progress, found: {str(error).splitlines()[0]}; "
                "watch it with the version of safetydpo that runs it"
            ) from error
        place = {"store": self._store or content["store"]}
        return Run(config.model_copy(update={"execution": config.execution.model_copy(update=place)}))

    def _stage(
        self, stage: str, told: Mapping[str, Any] | None, pointers: Mapping[str, Any], seconds: float | None
    ) -> StageState:
        if stage == "report":
            is_closed = report_record(self._run_dir).is_file()
        else:
            is_closed = any(name.startswith(POINTERS[stage]) for name in pointers)
        if told is None:
            return StageState(stage, "done" if is_closed else "waiting", seconds)
        work = tuple(pace(each, updated=told["updated"]) for each in told["work"])
        standing = told["standing"]
        if standing == "running" and time.time() - told["updated"] > SILENT_SECONDS:
            standing = "silent"
        if standing != "running":
            work = tuple(replace(each, seconds_left=None) for each in work)
        return StageState(stage, standing, seconds, work, told["error"])

    def _experts(self, run: Run | None, told: Mapping[str, Any] | None) -> ExpertsState:
        if run is None or told is None:
            return ExpertsState()
        experts = told["experts"]
        with ThreadPoolExecutor(READERS) as readers:
            found = list(readers.map(lambda each: self._expert(run.store / each["folder"]), experts))
        counts = Counter(standing for standing, _ in found)
        lanes = {lane: each["name"] for each, (_, lane) in zip(experts, found, strict=True) if lane}
        return ExpertsState(dict(counts), dict(sorted(lanes.items())))

    def _expert(self, folder: Location) -> tuple[str, str]:
        if folder.path in self._done or (folder / RECORD_FILE).is_file():
            self._done.add(folder.path)
            return "done", ""
        _, lease = newest_owner(folder)
        if lease is not None:
            return "running", str(lease["lane"])
        return ("failed" if (folder / FAILED_FOLDER).list() else "open"), ""


def _search_of(run: Run | None) -> SearchState | None:
    if run is None:
        return None
    try:
        return read_search(run, find_search(run))
    except SafetyDPOError:
        # None was begun yet.
        return None


def _pairs_of(run: Run | None, pointers: Mapping[str, Mapping[str, str]]) -> dict[str, int]:
    pointer = pointers.get("pairs")
    if run is None or pointer is None:
        return {}
    record = read_record(run.store / pointer["stage"] / pointer["folder"])
    return {} if record is None else dict(record.counts)


def _spend_of(
    run: Run | None, seconds: Mapping[str, float], costs: Mapping[str, Mapping[str, float | None]]
) -> dict[str, float | None]:
    spend: dict[str, float | None] = {"seconds": sum(seconds.values())}
    for name in ("cpu_seconds", "gpu_seconds"):
        spend[name] = _sum([cost.get(name) for cost in costs.values()])
    prices = None if run is None else run.config.execution.search
    spend["cost"] = None
    if prices is not None and (prices.price_per_cpu_hour or prices.price_per_gpu_hour):
        parts = [
            None if used is None and price else (used or 0.0) / 3600 * price
            for used, price in (
                (spend["cpu_seconds"], prices.price_per_cpu_hour),
                (spend["gpu_seconds"], prices.price_per_gpu_hour),
            )
        ]
        spend["cost"] = _sum(parts)
    return spend


def _sum(parts: Sequence[float | None]) -> float | None:
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def run_folder(place: str, settings: Sequence[str] = ()) -> Location:
    """Return the run folder that `place` is, or that of the config file `place`.

    Raises:
        UsageError: if the config cannot be read.
    """
    from pathlib import Path

    from safetydpo.config.load import load_config

    if "://" not in place and Path(place).is_file():
        return Run(load_config(place, settings)).run_dir
    return open_location(place)
