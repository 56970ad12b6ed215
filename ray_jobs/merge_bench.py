"""Measure the merges of some experts one after another, in this process; equal adapters are measured once.

What was measured lies in the store, one file per adapter and set of prompts: a killed command measures at most one
adapter again, and two methods that make the same adapter share its numbers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray_jobs.generate_pairs import SELECT_JUDGE
from ray_jobs.merge_evaluator import MergeEvaluator
from ray_jobs.merge_tested import AuditedTest
from ray_jobs.prompt_tables import split_prompts, spread_prompts
from ray_jobs.run import Run
from safetydpo.artifacts.adapters import adapter_hash
from safetydpo.artifacts.json_text import parse_json
from safetydpo.artifacts.schemas import sha256_of
from safetydpo.artifacts.storage import Location
from safetydpo.config.merge_evidence import PromptCounts
from safetydpo.config.schema import IdentityConfig, SamplerConfig
from safetydpo.errors import SafetyDPOError
from safetydpo.evaluation.merge_curve import IP, MUSH, NEIGHBOUR, NEUTRAL, Tuning
from safetydpo.judges.protocol import known_answers
from safetydpo.prompts.sets import Prompt
from safetydpo.search.guard import refuse_test_prompts
from safetydpo.search.space import Candidate

if TYPE_CHECKING:
    from safetydpo.merging.merge import MergeResult

RECIPE_VERSION = 1
"""How a merged adapter becomes counts."""
PURPOSE = "merge_evidence_noise"
SPREAD = "merge_evidence"


@dataclass(frozen=True)
class Merged:
    """A merged adapter and what is known of it; `suppliers` is the mean number of experts that supply a layer."""

    layers: Any
    adapter: str
    truncation_error: float
    suppliers: float | None = None


@dataclass(frozen=True)
class Measurement:
    """What was measured, and what it cost when it was."""

    found: Any
    seconds: float
    cpu_seconds: float


def draw_list(identity: IdentityConfig, counts: PromptCounts, split: str, covered: Sequence[str]) -> list[Prompt]:
    """Return the prompts of a measurement: unsafe ones of covered concepts, neutral ones, neighbours, uncovered ones.

    A smaller measurement draws part of what a larger one draws.

    Raises:
        SafetyDPOError: if no unsafe prompt of a split is of a covered concept, or a prompt for tuning stands in the
            test split, exactly or nearly.
    """
    source, unsafe = identity.prompts, split_prompts(identity.prompts, split, "unsafe")

    def spread(rows: Sequence[Prompt], count: int) -> list[Prompt]:
        return spread_prompts(rows, count, seed=identity.seed, purpose=SPREAD)

    mine = spread([row for row in unsafe if row.concept in covered], counts.unsafe)
    benign = [spread(split_prompts(source, split, name), counts.benign) for name in (NEUTRAL, NEIGHBOUR)]
    if not mine or len(benign[0]) != len(benign[1]) or not benign[0]:
        raise SafetyDPOError(
            f"expected unsafe {split} prompts of the covered concepts, and as many neutral as neighbour ones, found "
            f"{len(mine)}, {len(benign[0])} and {len(benign[1])}: lower merge_evidence.*.benign, or add prompts"
        )
    chosen = [*mine, *benign[0], *benign[1]]
    if split != "test":
        tests = [
            row.text for name in ("unsafe", NEUTRAL, NEIGHBOUR, "ood") for row in split_prompts(source, "test", name)
        ]
        refuse_test_prompts([prompt.text for prompt in chosen], tests)
    return chosen + spread([row for row in unsafe if row.concept not in covered], counts.uncovered)


class MergeBench:
    """Base, judges and some experts in memory."""

    def __init__(
        self, run: Run, folders: Mapping[str, str], aids: Mapping[str, str], *, methods: Sequence[str], cache: Location
    ) -> None:
        """Load the experts and what these methods need beside them."""
        changes = {"methods": tuple(methods), "ladder": (), "judges": (SELECT_JUDGE,)}
        search = run.config.identity.search.model_copy(update=changes)
        identity = run.config.identity.model_copy(update={"search": search})
        config = run.config.model_copy(update={"identity": identity})
        self.evaluator = MergeEvaluator(config.model_dump(mode="json"), folders, aids, [])
        self._run, self._cache = run, cache
        self.names = tuple(sorted(folders))
        self._weights = tuple((name, 1.0) for name in self.names)
        self._tests: AuditedTest | None = None
        self._plain: tuple[tuple[str, float | None], MergeResult] | None = None

    def merge(self, method: str, tuning: Tuning) -> Merged:
        """Merge the experts as a candidate says.

        The global scale multiplies what a method makes, so that candidates of one density are one merge. (The same
        merge at its scale from the start differs in the last bits where a reduction of rank comes after the scaling.)
        """
        from safetydpo.merging.algebra import scale_layer

        made = (method, tuning.density)
        if self._plain is None or self._plain[0] != made:
            self._plain = made, self.evaluator.merge(Candidate(method, 1.0, self._weights, tuning.density))
        result = self._plain[1]
        layers = {name: scale_layer(layer, tuning.scale) for name, layer in result.layers.items()}
        suppliers = None if result.num_suppliers is None else result.num_suppliers["mean"]
        return Merged(layers, adapter_hash(layers), result.overall_truncation_error, suppliers)

    def validate(self, merged: Merged | None, prompts: Sequence[Prompt], *, steps: int | None) -> Measurement:
        """Return the tally of a merge, or of the base for None, by the `select` judge."""
        sampler = self._sampler(steps)

        def measure() -> Any:
            _, judged = self.evaluator.draw(prompts, sampler, purpose=PURPOSE)
            mush = known_answers(
                [one.is_unrecognisable for one in judged], judge=SELECT_JUDGE, what="whether a picture is recognisable"
            )
            tally: dict[str, list[int]] = {}
            for one, is_mush in zip(judged, mush, strict=True):
                kind = one.prompt.prompt_set
                answers = {IP: one.is_unsafe, MUSH: is_mush} if kind == "unsafe" else {kind: one.is_found}
                for name, answer in answers.items():
                    hits, n = tally.get(name, (0, 0))
                    tally[name] = [hits + bool(answer), n + 1]
            return tally

        return self._measured("select", merged, prompts, sampler, measure)

    def test(self, merged: Merged | None, prompts: Sequence[Prompt], *, steps: int | None) -> Measurement:
        """Return the verdicts on a merge's test pictures, or the base's for None, one row per prompt."""
        sampler = self._sampler(steps)

        def measure() -> Any:
            if self._tests is None:
                self._tests = AuditedTest()
            seed = self._run.config.identity.seed
            return self._tests.draw(self.evaluator.backbone, prompts, run_seed=seed, sampler=sampler, purpose=PURPOSE)

        return self._measured("audit", merged, prompts, sampler, measure)

    def _sampler(self, steps: int | None) -> SamplerConfig:
        sampler = self._run.config.identity.sampler
        return sampler if steps is None else sampler.model_copy(update={"steps": steps})

    def _measured(
        self,
        kind: str,
        merged: Merged | None,
        prompts: Sequence[Prompt],
        sampler: SamplerConfig,
        measure: Callable[[], Any],
    ) -> Measurement:
        key = sha256_of(
            {
                "kind": kind,
                "adapter": "" if merged is None else merged.adapter,
                "base": self._run.base_fingerprint,
                "seed": self._run.config.identity.seed,
                "sampler": sampler.model_dump(mode="json"),
                "prompts": [prompt.text for prompt in prompts],
                "recipe": RECIPE_VERSION,
            }
        )
        file = self._cache / f"{key}.json"
        if not file.is_file():
            started, begun = time.monotonic(), time.process_time()
            self.evaluator.put(None if merged is None else merged.layers)
            found = measure()
            times = {"seconds": time.monotonic() - started, "cpu_seconds": time.process_time() - begun}
            file.write_bytes(json.dumps({"found": found, **times}).encode())
        stored = parse_json(file.read_bytes())
        return Measurement(stored["found"], stored["seconds"], stored["cpu_seconds"])
