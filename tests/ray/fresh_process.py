"""Work in a process of its own, as a worker's is: what other tests left in this one may change the last bits."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any


def in_fresh_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """Return `work(*arguments)`; both, and what comes of it, must be picklable."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()
