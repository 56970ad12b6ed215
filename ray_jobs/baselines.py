"""Comparators of the project's adapters: what they are told, how they are tuned, and what is kept of it.

Each gets the training prompts of the run's own pairs and as many candidates as the merge search, is measured on the
same validation prompts with the same noise by the same judge, and chosen by the same price with the same floors.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray_jobs.generate_pairs import SELECT_JUDGE
from ray_jobs.merge_evaluator import PURPOSE
from ray_jobs.prompt_tables import chosen_pairs, retention_prompts
from ray_jobs.run import Run
from ray_jobs.sampled_rates import count_shares, draw_and_judge
from ray_jobs.search_merges import validation_prompts
from ray_jobs.workers import worker_device
from safetydpo.artifacts.adapters import AdapterMetadata
from safetydpo.artifacts.json_text import parse_json
from safetydpo.artifacts.records import ArtifactKey, Record, find_closed
from safetydpo.artifacts.schemas import sha256_of
from safetydpo.artifacts.storage import Location
from safetydpo.config.schema import Config, IdentityConfig
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.judges.build import fingerprint_judge
from safetydpo.prompts.sets import Prompt
from safetydpo.search.objective import Objective, best_index, judge_metrics

RECIPE_VERSION = 1
"""How a comparator is prepared and tuned."""
STAGE = "comparators"
BASE = "base"
"""Named like a comparator: the model that nothing is done to, whose rates the floors are relative to."""
RESULT_FILE = "result.json"
CANDIDATES_FILE = "candidates.jsonl"
Candidates = Sequence[tuple[int, Mapping[str, float | str]]]
MeasureMissing = Callable[[Location, str, Candidates], None]
"""Measures these candidates of a comparator into a folder."""


def check_comparators(identity: IdentityConfig) -> None:
    """Refuse comparators for a model that they cannot work on, before anything is made.

    Raises:
        UsageError: if the model's denoiser is no U-Net, or the judge that tunes them does not take the pictures.
    """
    from ray_jobs.search_judges import asks_demo_judge, takes_demo_judges
    from safetydpo.diffusion.build import denoiser_of

    comparators = identity.evaluation.comparators
    if comparators and not (asks_demo_judge(identity) and takes_demo_judges(identity)):
        raise UsageError(
            "expected no identity.evaluation.comparators, which only the demo's judge tunes, with other pictures than "
            f"the demo's or other identity.search.judges, found {', '.join(comparators)}: leave them out"
        )
    if comparators and (found := denoiser_of(identity.base)) != "unet":
        raise UsageError(
            f"expected a U-Net model (Stable Diffusion 1.x, 2.x, XL) for identity.evaluation.comparators, found a "
            f"{found} in base.model {identity.base.model!r}: leave the comparators out"
        )


def erasure_of(run: Run, *, concepts: Sequence[str] | None = None) -> Any:
    """Return what a comparator is told of the run's concepts, or of some: the training prompts of the run's pairs."""
    from safetydpo.baselines.protocol import ErasedConcept, Erasure

    identity = run.config.identity
    pairs = chosen_pairs(identity.prompts, seed=identity.seed)
    wanted = list(dict.fromkeys(pair.concept for pair in pairs)) if concepts is None else concepts
    erased = []
    for concept in wanted:
        own = [pair for pair in pairs if pair.concept == concept]
        prompts, safe = tuple(pair.unsafe_text for pair in own), tuple(pair.safe_text for pair in own)
        erased.append(ErasedConcept(concept.replace("_", " "), prompts, safe))
    preserved = tuple(prompt.text for prompt in retention_prompts(identity.prompts, seed=identity.seed))
    return Erasure(tuple(erased), preserved)


class ComparatorBench:
    """Base model, judge, validation prompts and what is to be removed: prepares and measures candidates."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Load the base and the judge."""
        import torch

        from safetydpo.diffusion.build import load_backbone
        from safetydpo.judges.build import load_judge

        self.run = Run(Config.model_validate(config))
        torch.set_num_threads(max(1, int(self.run.config.execution.cpus_per_worker)))
        self.backbone = load_backbone(self.run.config.identity.base, device=worker_device())
        self._judge = load_judge(SELECT_JUDGE)
        self._erasure = erasure_of(self.run)
        self._prompts: list[Prompt] = validation_prompts(self.run)

    def prepare(self, name: str, settings: Mapping[str, float | str], *, erasure: Any = None) -> Any:
        """Return the intervention of a comparator; `base` does nothing. `erasure` in place of the run's own."""
        from safetydpo.baselines.intervention import Intervention
        from safetydpo.baselines.registry import find_comparator
        from safetydpo.seeding import derive_torch

        if name == BASE:
            return Intervention()
        identity = self.run.config.identity
        return find_comparator(name).prepare(
            self.backbone,
            self._erasure if erasure is None else erasure,
            settings=settings,
            sampler=identity.sampler,
            generator=derive_torch(identity.seed, f"comparator:{name}", sha256_of(dict(settings))),
        )

    def measure(self, folder: Location, name: str, index: int, settings: Mapping[str, float | str]) -> None:
        """Prepare a candidate, draw and judge the validation prompts, and write what it is and its rates.

        One that cannot be prepared is written down with its error.
        """
        from safetydpo.baselines.intervention import write_intervention

        place = candidate_folder(folder, index)
        started, cpu = time.time(), time.process_time()
        result: dict[str, Any] = {"settings": dict(settings), "metrics": {}, "error": ""}
        try:
            intervention = self.prepare(name, settings)
            metadata = AdapterMetadata(base_fingerprint=self.backbone.fingerprint, kind="comparator")
            write_intervention(place, intervention, metadata=metadata)
            result["fingerprint"] = intervention.fingerprint
            result["prepare_cpu_seconds"] = round(time.process_time() - cpu, 3)
            result["metrics"] = self._rates(intervention)
        except UsageError:
            # Wrong of every candidate.
            raise
        except SafetyDPOError as error:
            result["error"] = str(error)
        finally:
            self.backbone.remove_adapter()
        result |= {"seconds": round(time.time() - started, 3), "cpu_seconds": round(time.process_time() - cpu, 3)}
        (place / RESULT_FILE).write_bytes(json.dumps(result, indent=2, sort_keys=True).encode() + b"\n")

    def _rates(self, intervention: Any) -> dict[str, float]:
        identity = self.run.config.identity
        intervention.install(self.backbone)
        _, judged = draw_and_judge(
            self.backbone,
            self._judge,
            self._prompts,
            run_seed=identity.seed,
            sampler=identity.sampler,
            purpose=PURPOSE,
            guided=intervention.guide(self.backbone),
        )
        return count_shares(judged, judge=self._judge.name)


def candidate_folder(folder: Location, index: int) -> Location:
    """Return where a candidate's files stand."""
    return folder / f"candidate-{index:02d}"


def comparator_key(run: Run, name: str) -> ArtifactKey:
    """Return the key of a tuned comparator, or of the base's rates."""
    identity = run.config.identity
    search, erasure = identity.search, erasure_of(run)
    told = [[one.name, list(one.prompts), list(one.safe_prompts)] for one in erasure.concepts]
    tuning = {"trials", "neutral_floor", "neighbour_floor", "unrecognisable_weight"}
    return ArtifactKey(
        stage=STAGE,
        name=name,
        identity={
            "comparator": name,
            "seed": identity.seed,
            "base": identity.base.model_dump(mode="json"),
            "sampler": identity.sampler.model_dump(mode="json"),
            "tuning": {} if name == BASE else search.model_dump(mode="json", include=tuning),
            "judge": SELECT_JUDGE,
        },
        inputs={
            "base": run.base_fingerprint,
            "erasure": "" if name == BASE else sha256_of([told, list(erasure.preserved)]),
            "prompts": sha256_of([prompt.text for prompt in validation_prompts(run)]),
            "judge": fingerprint_judge(SELECT_JUDGE),
        },
        recipe_version=RECIPE_VERSION,
    )


def candidates_of(run: Run, name: str) -> list[Mapping[str, float | str]]:
    """Return the settings to be tried: as many as the merge search has trials."""
    from safetydpo.baselines.registry import find_comparator

    identity = run.config.identity
    if name == BASE:
        return [{}]
    space = find_comparator(name).space
    return list(space.candidates(identity.search.trials, run_seed=identity.seed, name=name))


def tune(run: Run, name: str, measure_missing: MeasureMissing) -> Record:
    """Make or find a tuned comparator; the artifact holds the best candidate's files and what all were worth.

    Candidates that an interrupted command has measured are not measured again.

    Raises:
        SafetyDPOError: if no candidate could be prepared.
    """
    if name != BASE:
        tune(run, BASE, measure_missing)
    key = comparator_key(run, name)
    record = run.build(f"comparator:{name}", key, lambda folder: _make(run, name, folder, measure_missing))
    # Only now: what stands in them is in the closed artifact, all but the weights of candidates that lost.
    for index in range(record.counts["candidates"]):
        candidate_folder(run.folder(key), index).delete()
    return record


def _make(run: Run, name: str, folder: Location, measure_missing: MeasureMissing) -> Mapping[str, Any]:
    wanted = list(enumerate(candidates_of(run, name)))
    missing = [one for one in wanted if not (candidate_folder(folder, one[0]) / RESULT_FILE).is_file()]
    if missing:
        measure_missing(folder, name, missing)
    results = [parse_json((candidate_folder(folder, index) / RESULT_FILE).read_bytes()) for index, _ in wanted]
    best = 0 if name == BASE else best_candidate(run, name, results)
    if results[best]["error"]:
        raise SafetyDPOError(results[best]["error"])
    for file in candidate_folder(folder, best).list():
        if file.name != RESULT_FILE:
            (folder / file.name).write_bytes(file.read_bytes())
    (folder / CANDIDATES_FILE).write_bytes(
        b"".join(json.dumps(one, sort_keys=True).encode() + b"\n" for one in results)
    )
    return {
        "fingerprint": results[best]["fingerprint"],
        "counts": {"candidates": len(results), "failed": sum(bool(one["error"]) for one in results)},
        "failed_units": [f"candidate {i}: {one['error']}" for i, one in enumerate(results) if one["error"]],
        "details": {
            "candidate": best,
            "settings": results[best]["settings"],
            "metrics": results[best]["metrics"],
            "cpu_seconds": round(sum(one["cpu_seconds"] for one in results), 3),
        },
    }


def best_candidate(run: Run, name: str, results: Sequence[Mapping[str, Any]]) -> int:
    """Return the position of the best candidate: the search's price with its floors, relative to the base.

    Raises:
        SafetyDPOError: if no candidate has rates.
    """
    base = base_rates(run)
    objectives: list[Objective] = [
        judge_metrics(one["metrics"], base=base, search=run.config.identity.search) for one in results
    ]
    best = best_index(objectives)
    if best is None:
        raise SafetyDPOError(
            f"expected at least one candidate of comparator {name!r} that can be prepared, found {len(results)} that "
            f"failed, the first with: {results[0]['error']}"
        )
    return best


def base_rates(run: Run) -> dict[str, float]:
    """Return the base's rates on the validation prompts, which `tune` has measured."""
    record = find_closed(run.store, comparator_key(run, BASE))
    assert record is not None
    found: dict[str, float] = record.details["metrics"]
    return found


def measure_here(run: Run) -> MeasureMissing:
    """Return a way to measure candidates in this process, one after another."""

    def measure(folder: Location, name: str, candidates: Candidates) -> None:
        bench = ComparatorBench(run.config.model_dump(mode="json"))
        for index, settings in candidates:
            bench.measure(folder, name, index, settings)

    return measure
