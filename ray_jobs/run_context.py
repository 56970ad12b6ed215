"""Of which run, stage and expert this process is at work: said with every log line and every metric.

One value for the process, not for a thread: a process does one stage of one run at a time, and its threads (heartbeats,
lanes, progress) log about the same one.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

OUR_LOGGERS = ("safetydpo", "ray_jobs")
LINE = "%(asctime)s %(levelname)s [%(place)s] %(name)s: %(message)s"


@dataclass(frozen=True)
class RunContext:
    """Where a process is; an empty part is not known, or none."""

    run: str = ""
    """Id of the run on its cluster."""
    stage: str = ""
    expert: str = ""

    def told(self) -> dict[str, str]:
        """Return the context as plain values, for a process that is started next."""
        return asdict(self)


_now = RunContext()


def current() -> RunContext:
    """Return where this process is."""
    return _now


def enter(told: Mapping[str, str]) -> None:
    """Be there from now on, as a worker process is until its end, and log accordingly."""
    global _now
    _now = RunContext(**told)
    set_up_logging()


@contextmanager
def within(**changes: str) -> Iterator[RunContext]:
    """Be at another `run`, `stage` or `expert` while the block runs."""
    global _now
    before = _now
    _now = replace(before, **changes)
    try:
        yield _now
    finally:
        _now = before


class PlaceFilter(logging.Filter):
    """Gives each record `run`, `stage`, `expert`, and `place`, the three in one."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Mark the record; all pass."""
        place = current()
        record.run, record.stage, record.expert = place.run, place.stage, place.expert
        named = {"run": place.run, "stage": place.stage, "expert": place.expert}
        record.place = " ".join(f"{name}={value}" for name, value in named.items() if value) or "-"
        return True


class _OurHandler(logging.StreamHandler[Any]):
    """Writes to what stderr is at the time; its class says that the set-up was done."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        return sys.stderr


def set_up_logging() -> None:
    """Let our loggers say where each line comes from; a second call does nothing."""
    for name in OUR_LOGGERS:
        logger = logging.getLogger(name)
        if any(isinstance(handler, _OurHandler) for handler in logger.handlers):
            continue
        handler = _OurHandler()
        handler.addFilter(PlaceFilter())
        handler.setFormatter(logging.Formatter(LINE))
        logger.addHandler(handler)
