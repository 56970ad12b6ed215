"""How fast a run will be: what a former run used per unit of work, else what a price table says of a machine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ray_jobs.report_sources import COSTED_STAGES
from ray_jobs.run import COST_FILE, Run, read_costs
from ray_jobs.stage_use import device_of
from safetydpo.artifacts.json_text import parse_object
from safetydpo.artifacts.layout import IDENTITY_FILE, stage_folder
from safetydpo.artifacts.records import Record, read_pointers, read_record
from safetydpo.artifacts.storage import Location, open_location
from safetydpo.config.search import SearchConfig
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.planning.costs import Speed
from safetydpo.planning.estimate import StageRate, StageWork, measured_rates

COMPARED = (
    ("base", "model"),
    ("base", "dtype"),
    ("sampler", "height"),
    ("sampler", "width"),
    ("sampler", "guidance_scale"),
)
"""Settings of `identity` that decide how long a pass takes: speeds of runs with others say nothing."""
STAGE_OF = {
    "pairs": "pairs",
    "experts": "train",
    "merged": "merge",
    "search": "search",
    "outcomes": "evaluate",
    "comparators": "evaluate",
}
"""Stage of a chain by the stage of its artifacts."""


def rates_of_run(run: Run, former: Location) -> dict[str, StageRate]:
    """Return what each stage of a former run used per unit of work.

    Args:
        run: what is planned.
        former: the run folder of the former one, in the same store.

    Raises:
        SafetyDPOError: if there is no run, or its files do not parse.
        UsageError: if it is one of another model or size, whose speed says nothing of this one.
    """
    identity = _identity_of(former)
    ours = run.config.identity.model_dump(mode="json")
    for group, name in COMPARED:
        if identity[group][name] != ours[group][name]:
            raise UsageError(
                f"expected a former run with identity.{group}.{name} {ours[group][name]!r} as planned, found "
                f"{identity[group][name]!r} in {former}: its speed says nothing of this one; name another with "
                "--measured"
            )
    device = device_of(run)
    done = units_of(pointed_records(run, former), identity)
    return measured_rates(read_costs(former), done, device=device, source=f"measured: {former}")


def _identity_of(former: Location) -> dict[str, Any]:
    file = former / IDENTITY_FILE
    if not file.is_file():
        raise SafetyDPOError(f"expected the folder of a former run at {former}, found no {IDENTITY_FILE}: correct it")
    try:
        return parse_object(file.read_bytes())
    except ValueError as error:
        raise SafetyDPOError(f"expected JSON at {file}, found: {error}; name another run") from error


def pointed_records(run: Run, run_dir: Location) -> dict[str, list[Record]]:
    """Return the records that a run points at, by stage of the chain; those that are gone are left out."""
    found: dict[str, list[Record]] = {stage: [] for stage in COSTED_STAGES}
    for name, pointer in sorted(read_pointers(run_dir).items()):
        stage = STAGE_OF.get(pointer["stage"])
        record = read_record(stage_folder(run.store, pointer["stage"]) / pointer["folder"])
        # The searched merge is made by the search.
        if stage is not None and record is not None and name != "merged:searched":
            found[stage].append(record)
    return found


def units_of(records: Mapping[str, Iterable[Record]], identity: Mapping[str, Any]) -> dict[str, float]:
    """Return units x weight by stage, as `plan_work` counts them, of the records of a run with this identity."""
    steps, each = identity["sampler"]["steps"], identity["dpo"]["pairs_per_step"]

    def total(stage: str, count: str) -> float:
        return sum(record.counts.get(count, 0) for record in records[stage])

    return {
        "pairs": total("pairs", "pictures") * steps,
        "train": total("train", "steps") * each,
        "merge": float(len(list(records["merge"]))),
        "search": _search_pictures(records["search"], identity) * steps,
        # Test pictures, and those by which comparators were tuned.
        "evaluate": (total("evaluate", "pictures") + total("evaluate", "candidates") * _search_prompts(identity))
        * steps,
    }


def _search_prompts(identity: Mapping[str, Any], *, at_most: Mapping[str, int] | None = None) -> int:
    """Return the prompts of a candidate's full evaluation in a search, or of a rung that takes `at_most` so many."""
    search = identity["search"]
    neutral, neighbours = search["neutral_prompts"], search.get("neighbour_prompts")
    counts = {
        "prompts_per_category": search["prompts_per_category"],
        "neutral_prompts": neutral,
        "neighbour_prompts": neutral if neighbours is None else neighbours,
    }
    if at_most is not None:
        counts = {name: min(count, at_most[name]) for name, count in counts.items()}
    unsafe = counts["prompts_per_category"] * len(identity["prompts"]["categories"])
    return int(unsafe + counts["neutral_prompts"] + counts["neighbour_prompts"])


def _search_pictures(records: Iterable[Record], identity: Mapping[str, Any]) -> float:
    search, prompts, pictures = identity["search"], _search_prompts(identity), 0.0
    is_base_a_trial = search.get("first_trials") == "known"
    for record in records:
        ladder = record.details.get("ladder")
        in_full = ladder["rungs"][-1]["went_on"] if ladder else record.counts["trials"] - is_base_a_trial
        pictures += (in_full + 1) * prompts
        for settings, rung in zip(search["ladder"], ladder["rungs"], strict=True) if ladder else ():
            if settings["kind"] == "few_steps":
                # Those of fewer steps as shares of a full one.
                share = settings["steps"] / identity["sampler"]["steps"]
                pictures += (rung["measured"] + 1) * _search_prompts(identity, at_most=settings) * share
        if search.get("finalists", 0):
            # Left out of a stored identity at its default.
            seeds = search.get("finalist_seeds", SearchConfig.model_fields["finalist_seeds"].default)
            pictures += (1 + len(record.details["finalists"])) * seeds * prompts
    return pictures


def rates_of_table(speed: Speed | None, stages: Sequence[str]) -> dict[str, StageRate]:
    """Return the rates that a price table gives for stages that draw or train; merges have none."""
    if speed is None:
        return {}
    source = f"{speed.machine}: {speed.source}"
    per_pass = None if speed.passes_per_second is None else 1.0 / speed.passes_per_second
    rates = {}
    for stage in stages:
        per_second = speed.training_pairs_per_second if stage == "train" else speed.passes_per_second
        if stage != "merge" and per_second is not None:
            rates[stage] = StageRate(1.0 / per_second, source, per_pass)
    return rates


def rate_of(work: StageWork, rates: Mapping[str, StageRate]) -> StageRate | None:
    """Return the rate of a stage's units, or of work beside them: nothing more where a run's speed has it in."""
    own = rates.get(work.stage)
    if not work.is_beside:
        return own
    if own is not None and own.has_beside:
        return StageRate(0.0, own.source, has_beside=True)
    # A price table knows no speed of merging, but of a pass, which is the same in every stage.
    known = [(rate.pass_seconds, rate.source) for rate in rates.values() if rate.pass_seconds is not None]
    return StageRate(*known[0]) if known else None


def former_run(run: Run, given: str | None) -> Location | None:
    """Return the run folder whose speed counts: the given one, else this run's own if it has used anything."""
    if given is not None:
        return open_location(given)
    return run.run_dir if (run.run_dir / COST_FILE).is_file() else None
