"""Trials of a search that fail; in a module of their own, so that Ray's actors can import them."""

from __future__ import annotations

import os
import signal
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ray_jobs.merge_evaluator import Measured
from ray_jobs.merge_searcher import MergeTrial
from ray_jobs.run import Run
from ray_jobs.run_context import enter
from safetydpo.config.schema import Config
from safetydpo.search.space import Candidate

BASE = {"neutral_rate": 0.8, "neighbour_retention": 1.0, "ip_select": 0.9, "unrecognisable_rate": 0.0}


class ToyEvaluator:
    """Says that a merge is the better the nearer its scale is to 1; some candidates it cannot measure."""

    def __init__(
        self,
        config: Mapping[str, Any],
        prompts: Sequence[Any],
        raises: Collection[str] = (),
        dies: Collection[str] = (),
    ) -> None:
        self.run = Run(Config.model_validate(config))
        self._raises, self._dies = raises, dies

    def measure_rung(self, candidate: Candidate, rung: int) -> Measured:
        """Measure one, raise what no code of ours raises, or end this process as the kernel does without memory."""
        if candidate.hash in self._raises:
            raise RuntimeError("the device has had enough")
        if candidate.hash in self._dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return Measured({**BASE, "ip_select": min(1.0, abs(candidate.global_scale - 1.0))}, 10)


class ToyTrial(MergeTrial):
    """A trial as it is, with that evaluator."""

    def setup(self, config: dict[str, Any]) -> None:
        """Load nothing."""
        enter(config["context"])
        self._evaluator = ToyEvaluator(**config["evaluator"])  # type: ignore[assignment]
        self._base, self._candidate = config["base_rates"], config["trial"]
