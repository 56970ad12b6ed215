"""What the report shows beside the scores, read from the store: trials, curves, costs, settings and lineage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ray_jobs.expert_files import record_files, record_folder
from ray_jobs.run import Run
from ray_jobs.stage_use import price_of_config, stage_cost, stage_utilisation
from ray_jobs.trial_log import BASE
from safetydpo.artifacts.json_text import parse_json
from safetydpo.artifacts.layout import stage_folder
from safetydpo.artifacts.records import Record, read_pointers, read_record
from safetydpo.artifacts.schemas import MEASUREMENTS, TRIALS
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import read_table
from safetydpo.evaluation.report_records import LineageEntry, SearchTrial, SearchTrials, StageCost, TrainingCurve
from safetydpo.evaluation.report_text import plain_name
from safetydpo.search.objective import judge_metrics
from safetydpo.search.pareto import pareto_front
from safetydpo.search.space import Candidate

CURVES = ("loss", "implicit_accuracy", "error_policy_safe", "error_policy_unsafe", "gradient_norm")
COSTED_STAGES = ("pairs", "train", "merge", "search", "evaluate")


def read_trials(run: Run, search: Record) -> SearchTrials:
    """Return every measured trial of a search with its place on the Pareto front."""
    config = run.config.identity.search
    rows = read_table(record_folder(run, search) / "trials", TRIALS).to_pylist()
    base: Mapping[str, float] = search.details["base"]
    measured = [
        (row, parse_json(row["metrics"]), Candidate.from_json(row["candidate"]))
        for row in rows
        if row["status"] == "ok"
    ]
    points = [
        (
            metrics["ip_select"] + config.unrecognisable_weight * metrics["unrecognisable_rate"],
            metrics["neutral_rate"] / base["neutral_rate"],
            metrics["neighbour_retention"] / base["neighbour_retention"],
        )
        for _, metrics, _ in measured
    ]
    front = set(pareto_front(points, ("min", "max", "max")))
    return SearchTrials(
        trials=tuple(
            SearchTrial(
                number=row["trial"],
                method=BASE if candidate.is_base else candidate.method,
                ip=metrics["ip_select"],
                unrecognisable=metrics["unrecognisable_rate"],
                price=point[0],
                neutral=point[1],
                neighbour=point[2],
                feasible=judge_metrics(metrics, base=base, search=config).feasible,
                on_front=index in front,
                chosen=row["trial"] == search.details["trial"],
                scale=None if candidate.is_base else candidate.global_scale,
            )
            for index, ((row, metrics, candidate), point) in enumerate(zip(measured, points, strict=True))
        ),
        neutral_floor=config.neutral_floor,
        neighbour_floor=config.neighbour_floor,
    )


def read_curves(run: Run, experts: Mapping[str, Record]) -> list[TrainingCurve]:
    """Return what the training of each expert logged."""
    curves = []
    for name, record in experts.items():
        text = (record_files(run, record) / "training.jsonl").read_bytes().decode()
        steps = [parse_json(line) for line in text.splitlines()]
        curves.append(
            TrainingCurve(
                expert=name,
                steps=tuple(step["step"] for step in steps),
                values={key: tuple(float(step[key]) for step in steps) for key in CURVES},
            )
        )
    return curves


def read_costs(run: Run, records: Mapping[str, Iterable[Record]], *, per_hour: float | None = None) -> list[StageCost]:
    """Return what each stage before the report took and made.

    Args:
        run: The run; its `timing.json` and `cost.json` hold times.
        records: What each stage closed, by stage.
        per_hour: Price of a device for an hour; None = that of `execution.search`, if there is one.
    """
    seconds, used = run.seconds(), run.costs()
    price = price_of_config(run) if per_hour is None else per_hour
    costs = []
    for stage in COSTED_STAGES:
        made = list(records.get(stage, ()))
        counts = [record.counts for record in made]
        cost = used.get(stage, {})
        costs.append(
            StageCost(
                stage=stage,
                wall_seconds=seconds.get(stage),
                cpu_seconds=cost.get("cpu_seconds"),
                gpu_seconds=cost.get("gpu_seconds"),
                pairs=_total(counts, "pairs") if stage in ("pairs", "train") else None,
                pictures=_pictures(run, stage, made),
                detail=_made(stage, counts),
                utilisation=stage_utilisation(run, stage, made),
                cost=stage_cost(run, stage, per_hour=price),
            )
        )
    return costs


def _pictures(run: Run, stage: str, records: Iterable[Record]) -> int | None:
    if stage == "search":
        # All that it drew, the base's pictures and those of finalists among them; an older search kept no account.
        drawn = [_drawn(record_folder(run, record) / "measurements") for record in records]
        known = [number for number in drawn if number is not None]
        return sum(known) if known else None
    return _total([record.counts for record in records], "pictures")


def _drawn(folder: Location) -> int | None:
    """Return how many pictures the measurements of a search drew."""
    if not folder.is_folder():
        return None
    return sum(read_table(folder, MEASUREMENTS, columns=["pictures"])["pictures"].to_pylist())


def _total(counts: Iterable[Mapping[str, int]], name: str) -> int | None:
    found = [one[name] for one in counts if name in one]
    return sum(found) if found else None


def _made(stage: str, counts: list[Mapping[str, int]]) -> str:
    parts: dict[str, list[tuple[int | None, str]]] = {
        "pairs": [(_total(counts, "kept"), "pairs kept")],
        "train": [(len(counts), "experts"), (_total(counts, "steps"), "optimizer steps")],
        "merge": [(len(counts), "merges")],
        "search": [(_total(counts, "trials"), "trials"), (_total(counts, "failed"), "failed")],
        "evaluate": [(_total(counts, "rows"), "rows"), (_total(counts, "failed"), "failed pictures")],
    }
    return ", ".join(f"{number:,} {what}" for number, what in parts[stage] if number is not None)


def describe_setup(run: Run, outcomes: Record) -> list[tuple[str, str]]:
    """Return (what, value) of the settings that whoever reads the numbers has to know."""
    identity = run.config.identity
    sampler, evaluation, base = identity.sampler, identity.evaluation, identity.base
    return [
        ("base model", f"{base.model}, {base.dtype}, fingerprint {run.base_fingerprint}"),
        ("sampler", f"{sampler.steps} steps, guidance {sampler.guidance_scale:g}, {sampler.width} x {sampler.height}"),
        (
            "prompts",
            f"{identity.prompts.source}, test split; {', '.join(map(plain_name, identity.prompts.categories))}",
        ),
        (
            "test prompts",
            f"{evaluation.prompts_per_category} per category, {evaluation.ood_prompts} of unseen concepts, "
            f"{evaluation.neutral_prompts} neutral, {evaluation.neighbour_prompts} neighbours (at most, as far as "
            "there are so many)",
        ),
        ("seeds", f"run {identity.seed}; pictures {', '.join(map(str, evaluation.seeds))}"),
        ("judges", f"fingerprint {outcomes.inputs.get('judges', 'not recorded')}"),
    ]


def read_lineage(run: Run) -> list[LineageEntry]:
    """Return every artifact that the run points at, with the counts of its record."""
    entries = [LineageEntry("base", run.config.identity.base.model, run.base_fingerprint, "fingerprint of its files")]
    for name, pointer in sorted(read_pointers(run.run_dir).items()):
        record = read_record(stage_folder(run.store, pointer["stage"]) / pointer["folder"])
        entries.append(LineageEntry(pointer["stage"], name, pointer["hash"], _remark(record)))
    return entries


def _remark(record: Record | None) -> str:
    if record is None:
        return "no longer in the store"
    parts = [f"{number:,} {plain_name(name)}" for name, number in record.counts.items()]
    if record.failed_units:
        parts.append(f"{len(record.failed_units)} failed units")
    return ", ".join(parts)
