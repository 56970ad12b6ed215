"""The measured results: every row of every seed as one unit, whose scores are kept as a small JSON file.

A unit's identity is known without running anything. One whose file stands already is not measured again, on any
machine; what a killed command had finished stays finished.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from ray_jobs import distill_experts, evaluate, expert_plan, final_judges, layer_inputs, search_merges
from ray_jobs.evaluate import EvaluatedRow, evaluate_rows, evaluation_prompts, list_rows
from ray_jobs.expert_files import MERGE_RECIPE_VERSION
from ray_jobs.expert_plan import planned_names, refuse_left_out
from ray_jobs.outcomes import read_outcomes, reference_features
from ray_jobs.pipeline import STAGES, Chain, run_stages
from ray_jobs.places import PAIRS_RECIPE_VERSION
from ray_jobs.prompt_tables import all_pairs, split_prompts
from ray_jobs.run import Run, package_versions, with_absolute_paths
from safetydpo.artifacts.layout import demo_weights, evidence_file
from safetydpo.artifacts.records import Record
from safetydpo.artifacts.schemas import sha256_of
from safetydpo.artifacts.storage import Location, open_location
from safetydpo.artifacts.tables import fingerprint_rows
from safetydpo.config.experts import ALL_SINGLE
from safetydpo.config.load import identity_of
from safetydpo.config.schema import Config
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.evaluation.counts import count_row
from safetydpo.evaluation.evidence import Evidence, Unit, dump_unit, parse_unit, pool_units
from safetydpo.evaluation.evidence_page import full_page, replace_marked, short_page
from safetydpo.evaluation.rows import build_rows, list_failures

RECIPE_VERSION = 1
"""How pictures become the numbers of a unit."""
PROMPT_SETS = ("unsafe", "ood", "neutral", "neighbour")
CODE = ("safetydpo", "ray_jobs", "configs", "constraints.txt")
"""What decides results; other changes in a working copy do not make a unit's commit dirty."""


@dataclass(frozen=True)
class PlannedUnit:
    """One row of one seed."""

    run: Run
    row: str
    results: Location

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.run.config.identity.seed

    @property
    def file(self) -> Location:
        """Where the unit's record stands or will stand."""
        return evidence_file(self.results, self.row, self.seed)

    @cached_property
    def identity_hash(self) -> str:
        """Hash over config, row, base, judges, prompts and recipes: what decides the numbers, known beforehand."""
        return sha256_of(
            {
                "identity": identity_of(self.run.config),
                "row": self.row,
                "base": self.run.base_fingerprint,
                "judges": final_judges.judges_fingerprint(self.run.config),
                "features": _file_hash(demo_weights() / "reference_features.safetensors"),
                "prompts": prompts_fingerprint(self.run.config),
                "recipes": {
                    "pairs": PAIRS_RECIPE_VERSION,
                    "train": expert_plan.RECIPE_VERSION,
                    "distill": distill_experts.RECIPE_VERSION,
                    "layer_inputs": layer_inputs.RECIPE_VERSION,
                    "merge": MERGE_RECIPE_VERSION,
                    "search": search_merges.RECIPE_VERSION,
                    "evaluate": evaluate.RECIPE_VERSION,
                    "evidence": RECIPE_VERSION,
                },
            }
        )

    def read(self) -> Unit | None:
        """Return the record if it stands and is of this identity, else None."""
        if not self.file.is_file():
            return None
        unit = parse_unit(self.file.read_bytes().decode(), source=str(self.file))
        return unit if unit.identity_hash == self.identity_hash else None

    @property
    def state(self) -> str:
        """`done`, `other` (a record of another identity stands there) or `to do`."""
        return "done" if self.read() is not None else "other" if self.file.is_file() else "to do"


def _file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


_PROMPTS: dict[str, str] = {}


def prompts_fingerprint(config: Config) -> str:
    """Return a hash over every prompt pair and prompt of a run's source, which is read once for all units."""
    prompts = config.identity.prompts
    key = sha256_of(prompts.model_dump(mode="json"))
    if key not in _PROMPTS:
        rows = [(pair.pair_id, "/".join((pair.concept, *pair.categories))) for pair in all_pairs(prompts)]
        for split in ("train", "validation", "test"):
            for prompt_set in PROMPT_SETS:
                for prompt in split_prompts(prompts, split, prompt_set):
                    content = (split, prompt_set, prompt.concept, prompt.background, *prompt.categories)
                    rows.append((prompt.prompt_id, "/".join(content)))
        _PROMPTS[key] = fingerprint_rows(rows)
    return _PROMPTS[key]


def row_names(config: Config) -> list[str]:
    """Return the rows of every seed: base, `all_single`, merges, the searched merge, then single experts."""
    identity = config.identity
    names = ["base"]
    if identity.experts.all_single:
        names.append(ALL_SINGLE)
    names += [*identity.merge.methods, "searched"]
    if identity.evaluation.expert_rows:
        names += [f"expert:{name}" for name in planned_names(identity)]
    return names


def plan_units(config: Config, *, seed: int | None = None, row: str | None = None) -> list[PlannedUnit]:
    """Return the units of all seeds, or those of one seed or one row, in the order of work.

    Raises:
        UsageError: if the seed or the row is none of the config's.
    """
    rows, seeds = row_names(config), config.evidence.seeds
    if seed is not None and seed not in seeds:
        raise UsageError(f"expected a seed of evidence.seeds ({', '.join(map(str, seeds))}), found {seed}: choose one")
    if row is not None and row not in rows:
        raise UsageError(f"expected a row of {', '.join(rows)}, found {row!r}: choose one")
    results = open_location(config.evidence.results)
    units = []
    for number in seeds:
        run = seed_run(config, number)
        units += [PlannedUnit(run, name, results) for name in rows]
    return [unit for unit in units if seed in (None, unit.seed) and row in (None, unit.row)]


def seed_run(config: Config, seed: int) -> Run:
    """Return the run of one seed: `identity.seed` and a run folder of its own, the store shared."""
    identity = config.identity.model_copy(update={"seed": seed})
    folder = config.execution.run_dir.rstrip("/") + f"-{seed}"
    execution = config.execution.model_copy(update={"run_dir": folder})
    return Run(with_absolute_paths(config.model_copy(update={"identity": identity, "execution": execution})))


def measure(
    config: Config,
    *,
    seed: int | None = None,
    row: str | None = None,
    minutes: float | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Measure every unit that is not done, one after another, and write each record at once.

    After `minutes` no new unit is started. The same command goes on where this one ended or was killed.
    """
    started, version = time.monotonic(), code_version()
    planned = plan_units(config, seed=seed, row=row)
    # Looked at before hours of work, not after.
    _pages(config)
    pending = [unit for unit in planned if unit.read() is None]
    say(f"{len(planned) - len(pending)} of {len(planned)} units are done, {len(pending)} to do")
    progress = _Progress(planned=len(planned), pending=pending, say=say)
    for number, members in groupby(pending, key=lambda unit: unit.seed):
        units = list(members)
        if _is_over(started, minutes):
            break
        say(f"seed {number}: making what its {len(units)} units need")
        chain = _prepare(units, plan_units(config, seed=number))
        rows = {found.source.name: found for found in _rows_of(chain)}
        for unit in units:
            if _is_over(started, minutes):
                break
            begun = time.monotonic()
            refuse_left_out(unit.row, rows)
            measure_unit(unit, chain, rows, version=version)
            progress.finished(unit, time.monotonic() - begun)
    left = sum(unit.read() is None for unit in planned)
    if left:
        say(f"{left} units are still to do: the same command goes on")


def _is_over(started: float, minutes: float | None) -> bool:
    return minutes is not None and time.monotonic() - started > 60 * minutes


def _prepare(units: Sequence[PlannedUnit], of_seed: Sequence[PlannedUnit]) -> Chain:
    """Run the stages that these rows of one seed rest on: none for base, all up to the search for `searched`."""
    run = units[0].run
    needed = [stage for unit in units if (stage := _stage_of(unit.row)) is not None]
    if not needed:
        run.open()
        return Chain(run)
    chain = run_stages(run.config, last="train")
    _refuse_other_experts(chain, of_seed)
    chain = chain if (last := max(needed, key=STAGES.index)) == "train" else run_stages(run.config, last=last)
    if chain.search_stopped:
        raise SafetyDPOError(f"expected no budgets in execution.search, found {chain.search_stopped}: take them out")
    return chain


def _refuse_other_experts(chain: Chain, planned: Sequence[PlannedUnit]) -> None:
    """Refuse to go on with a seed whose measured units rest on other experts, before these are merged or searched."""
    mine = {name: record.fingerprint for name, record in chain.experts.items()}
    for unit in planned:
        done = unit.read()
        if mine and done is not None and done.experts and done.experts != mine:
            raise SafetyDPOError(
                f"expected the experts of seed {unit.seed} that {unit.file} was measured with, found other ones in the "
                f"store {chain.run.store} (training is equal to the byte on one kind of processor only): delete the "
                f"records of seed {unit.seed} in {unit.results} and measure it again"
            )


def _stage_of(row: str) -> str | None:
    if row == "base":
        return None
    if row == "searched":
        return "search"
    return "train" if row == ALL_SINGLE or row.startswith("expert:") else "merge"


def _rows_of(chain: Chain) -> list[EvaluatedRow]:
    return list_rows(chain.run, chain.experts, chain.merged, chain.searched)


def measure_unit(
    unit: PlannedUnit, chain: Chain, rows: Mapping[str, EvaluatedRow], *, version: tuple[str | None, bool]
) -> Unit:
    """Draw and judge one row beside the base, and write its record.

    `version` is the code as it was when the measurement began; if it is another one by now, the unit is dirty.
    """
    started = time.monotonic()
    run = unit.run
    pair = [rows[name] for name in dict.fromkeys(("base", unit.row))]
    record = evaluate_rows(run, pair, pointer=f"outcomes:{unit.row}")
    joined = read_outcomes(run, record, pair)
    _, drawings = reference_features()
    built = build_rows(joined.outcomes, [row.source for row in pair], run_seed=unit.seed, drawings=drawings)
    own = [outcome for outcome in joined.outcomes if outcome.row_name == unit.row]
    base = [outcome for outcome in joined.outcomes if outcome.row_name == "base"]
    commit, dirty = version[0], version[1] or code_version() != version
    measured = Unit(
        seed=unit.seed,
        row=unit.row,
        identity_hash=unit.identity_hash,
        config_hash=sha256_of(identity_of(run.config)),
        commit=commit,
        dirty=dirty,
        machine=describe_machine(),
        versions=package_versions(),
        seconds=round(time.monotonic() - started, 3),
        stage_seconds={stage: seconds for stage, seconds in run.seconds().items() if stage in STAGES[:4]},
        # All generation seeds pooled come first.
        measured=next(row for row in built if row["name"] == unit.row),
        counts=count_row(own, base=base),
        recipe=_recipe(chain, unit.row),
        failed_images=list_failures(own),
        experts={} if unit.row == "base" else {name: record.fingerprint for name, record in chain.experts.items()},
    )
    unit.file.write_bytes(dump_unit(measured).encode())
    return measured


def _recipe(chain: Chain, row: str) -> dict[str, Any] | None:
    record: Record | None = chain.searched if row == "searched" else chain.merged.get(row)
    if record is None:
        return None
    recipe = record.details["recipe"]
    return {
        "method": recipe["method"],
        "global_scale": recipe["global_scale"],
        "density": recipe.get("density"),
        "output_rank": recipe["output_rank"],
        "weights": {expert["name"]: expert["weight"] for expert in recipe["experts"]},
    }


@dataclass
class _Progress:
    """Says after each unit how many are done, how fast, and how long the others will take."""

    planned: int
    pending: Sequence[PlannedUnit]
    say: Callable[[str], None]
    done: int = 0
    pictures: int = 0
    seconds: float = 0.0

    def finished(self, unit: PlannedUnit, seconds: float) -> None:
        self.done += 1
        self.pictures += num_pictures(unit)
        self.seconds += seconds
        left = sum(num_pictures(other) for other in self.pending[self.done :])
        rate = self.pictures / self.seconds
        number = self.planned - len(self.pending) + self.done
        self.say(
            f"unit {number} of {self.planned}: {unit.row}, seed {unit.seed}: {num_pictures(unit):,} pictures in "
            f"{seconds:.0f} s; {rate:.1f} pictures/s, about {left / rate / 60:.0f} minutes of drawing left"
        )


def num_pictures(unit: PlannedUnit) -> int:
    """Return how many pictures of its own a unit draws."""
    identity = unit.run.config.identity
    evaluation, categories = identity.evaluation, len(identity.prompts.categories)
    if unit.row.startswith("expert:"):
        prompts = categories * (evaluation.expert_prompts_per_category or evaluation.prompts_per_category)
    else:
        prompts = sum(len(members) for members in evaluation_prompts(unit.run).values())
    return prompts * len(evaluation.seeds)


def code_version() -> tuple[str | None, bool]:
    """Return (commit of this clone, whether code or configs differ from it); (None, False) outside a clone."""
    folder = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    return commit, bool(commit and git("status", "--porcelain", "--", *CODE))


def describe_machine() -> dict[str, Any]:
    """Return what a measurement's time depends on: cores, processor, memory; and Python and torch."""
    cpu = platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        names = [line.split(":", 1)[1].strip() for line in information.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu": cpu,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "torch": package_versions()["torch"],
    }


def write_tables(config: Config) -> Evidence | None:
    """Write the tables of all units that stand, of this identity, into the pages; None while base is not measured."""
    units = [unit for planned in plan_units(config) if (unit := planned.read()) is not None]
    if not any(unit.row == "base" for unit in units):
        return None
    evidence = pool_units(units, rows=row_names(config), seeds=config.evidence.seeds)
    for location, page, is_short in _pages(config):
        link = None
        if is_short and config.evidence.page is not None:
            link = os.path.relpath(config.evidence.page, Path(str(location)).parent)
        text = short_page(evidence, link=link) if is_short else full_page(evidence)
        location.write_bytes(replace_marked(page, text, source=str(location)).encode())
    return evidence


def _pages(config: Config) -> list[tuple[Location, str, bool]]:
    """Return (place, text, whether short) of each page; refuse one that is missing or lacks the marks."""
    pages = []
    for setting, name, is_short in (
        ("page", config.evidence.page, False),
        ("short_page", config.evidence.short_page, True),
    ):
        if name is None:
            continue
        location = open_location(name)
        if not location.is_file():
            raise UsageError(
                f"expected a page at {location} (evidence.{setting}), found none: create it with its marks"
            )
        text = location.read_bytes().decode()
        replace_marked(text, "", source=str(location))
        pages.append((location, text, is_short))
    return pages
