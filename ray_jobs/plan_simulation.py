"""`safetydpo plan CONFIG --simulate nodes=100 concepts=500`: the lanes of a training that nobody has paid for yet."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import psutil

from safetydpo.config.load import parse_settings
from safetydpo.config.safe_yaml import YamlError, parse_yaml
from safetydpo.config.schema import Config
from safetydpo.errors import UsageError
from safetydpo.planning.choose_workers import (
    ONE_WORKER,
    Choice,
    SimulationSettings,
    best_choice,
    expert_durations,
    head_bytes,
    simulate_choices,
)
from safetydpo.planning.costs import CostTable
from safetydpo.planning.estimate import StageRate
from safetydpo.planning.simulate import HOUR_SECONDS, Faults

NAMES = frozenset(SimulationSettings.model_fields)
MEGABYTE = 2**20


def split_settings(settings: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the settings of the config and those of the simulation, which are named without a dot."""
    ours = [setting for setting in settings if setting.partition("=")[0] in NAMES]
    return [setting for setting in settings if setting not in ours], ours


def parse_simulation(settings: Sequence[str]) -> SimulationSettings:
    """Return what a simulation is asked.

    Raises:
        UsageError: if `nodes` is missing or a value is of the wrong type.
    """
    content = {}
    for setting in settings:
        name, _, text = setting.partition("=")
        try:
            content[name] = parse_yaml(text)
        except YamlError as error:
            raise UsageError(f"expected a value for {name} with --simulate, found: {error}") from error
    if "nodes" not in content:
        raise UsageError(
            "expected nodes=NUMBER with --simulate, found none: say what to simulate, for example "
            "`safetydpo plan configs/sdxl.yaml --simulate nodes=100 concepts=500`"
        )
    return parse_settings(SimulationSettings, content, source="--simulate")


def simulate_training(
    config: Config, settings: SimulationSettings, table: CostTable, *, steps: Sequence[int], rate: StageRate | None
) -> dict[str, Any]:
    """Simulate the training of a run's experts; return what is told of it.

    Args:
        config: of the run.
        settings: what is asked.
        table: speed-ups, what lanes cost, how often nodes go.
        steps: of each expert of the config.
        rate: device seconds per training pair, if known.

    Raises:
        UsageError: if nothing says how long an expert takes.
    """
    dpo, before = config.identity.dpo, psutil.Process().memory_info().rss
    step_seconds, source = _step_seconds(config, settings, rate)
    wanted = [dpo.steps] * settings.concepts if settings.concepts is not None else list(steps)
    durations = expert_durations(wanted, step_seconds=step_seconds, spread=settings.spread, seed=config.identity.seed)
    every = settings.checkpoint_seconds
    rate_of_loss = settings.preemption_rate
    faults = Faults(
        preemption_rate=table.preemption_rate if rate_of_loss is None else rate_of_loss,
        failure_rate=settings.failure_rate,
        checkpoint_seconds=dpo.checkpoint_every * step_seconds if every is None else every,
        detection_seconds=settings.detection_seconds,
        replacement_seconds=settings.replacement_seconds,
    )
    started = time.process_time()
    choices = simulate_choices(
        durations,
        settings,
        speed_ups=table.speed_up or ONE_WORKER,
        lanes=table.lanes,
        faults=faults,
        max_attempts=config.execution.expert_attempts,
        seed=config.identity.seed,
    )
    best = best_choice(choices)
    running = min(best.lanes, len(durations))
    return {
        "experts": len(durations),
        "expert_seconds": dpo.steps * step_seconds,
        "expert_seconds_source": source,
        "faults": asdict(faults),
        "choices": [_told(choice, len(durations)) for choice in choices],
        "chosen": best.speed_up.workers,
        "head_mb": head_bytes(running, table.lanes) / MEGABYTE,
        "head_mb_per_lane": table.lanes.head_mb,
        "head_mb_of_keeper": table.lanes.keeper_mb,
        "lanes_running": running,
        "simulation_seconds": time.process_time() - started,
        "simulation_mb": max(0, psutil.Process().memory_info().rss - before) / MEGABYTE,
    }


def _step_seconds(config: Config, settings: SimulationSettings, rate: StageRate | None) -> tuple[float, str]:
    dpo = config.identity.dpo
    if settings.expert_seconds is not None:
        return settings.expert_seconds / dpo.steps, "given"
    if rate is None:
        raise UsageError(
            "expected to know how long an expert takes, found no former run and no speed of this model and size in the "
            "price table: add expert_seconds=NUMBER, or name a run with --measured"
        )
    return rate.seconds * dpo.pairs_per_step, rate.source


def _told(choice: Choice, experts: int) -> dict[str, Any]:
    first = choice.runs[0]
    return {
        "workers": choice.speed_up.workers,
        "speed_up": choice.speed_up.times,
        "source": choice.speed_up.source,
        "lanes": choice.lanes,
        "gpus": choice.gpus,
        "experts_per_lane": experts / choice.lanes,
        "bound_seconds": choice.bound_seconds,
        "makespan_seconds": choice.makespan_seconds,
        "over_bound": choice.over_bound,
        "worst_over_bound": choice.worst_over_bound,
        "utilisation": choice.utilisation,
        "efficiency": choice.efficiency,
        "preemptions": sum(run.preemptions for run in choice.runs) / len(choice.runs),
        "attempts": sum(run.attempts for run in choice.runs) / len(choice.runs),
        "given_up": sum(run.given_up for run in choice.runs) / len(choice.runs),
        "driver_seconds": first.driver_seconds,
        "launcher_looks": first.launcher_looks,
        "looks_per_lane": first.lane_looks / max(1, first.lanes_started),
    }


def print_simulation(console: Any, told: dict[str, Any]) -> None:
    """Print a simulation as a table and what goes with it."""
    from rich import box
    from rich.table import Table

    table = Table(title=_title(told), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    for heading in (
        "workers",
        "speed-up",
        "lanes",
        "experts\na lane",
        "bound h",
        "makespan h",
        "over\nbound",
        "GPUs\nused",
    ):
        table.add_column(heading, justify="right", vertical="bottom")
    table.add_column("of that\nby one worker", justify="right", vertical="bottom")
    for one in told["choices"]:
        table.add_row(
            str(one["workers"]),
            f"{one['speed_up']:g} {one['source']}",
            f"{one['lanes']:,}",
            f"{one['experts_per_lane']:.1f}",
            f"{one['bound_seconds'] / HOUR_SECONDS:.2f}",
            f"{one['makespan_seconds'] / HOUR_SECONDS:.2f}",
            f"{one['over_bound']:.3f}",
            f"{one['utilisation']:.1%}",
            f"{one['efficiency']:.1%}",
            style="bold" if one["workers"] == told["chosen"] else None,
        )
    console.print(table)
    for line in simulation_lines(told):
        console.print(line, soft_wrap=True, highlight=False)


def _title(told: dict[str, Any]) -> str:
    length, gpus = f"{told['expert_seconds']:.0f} s ({told['expert_seconds_source']})", told["choices"][0]["gpus"]
    return f"{told['experts']:,} experts of {length} on {gpus:,} devices"


def simulation_lines(told: dict[str, Any]) -> list[str]:
    """Return what goes below the table of a simulation, a line each."""
    chosen = next(one for one in told["choices"] if one["workers"] == told["chosen"])
    faults = told["faults"]
    lines = [
        f"chosen     {told['chosen']} worker{'s' if told['chosen'] > 1 else ''} an expert; longest of the repeats "
        f"{chosen['worst_over_bound']:.3f} x the bound",
        f"faults     {faults['preemption_rate']:.1%} of nodes an hour, {faults['failure_rate']:.1%} of attempts: "
        f"{chosen['preemptions']:.1f} nodes lost, {chosen['attempts']:.0f} attempts, {chosen['given_up']:.1f} given up",
        f"command    {chosen['driver_seconds']:.2f} s of scheduling, {chosen['launcher_looks']:,} questions to the "
        f"ledger, {chosen['looks_per_lane']:,.0f} of each lane",
        f"head       {told['head_mb'] / 1024:.1f} GB for {told['lanes_running']:,} lanes "
        f"({told['head_mb_per_lane']:g} MB each and {told['head_mb_of_keeper']:g}, from the price table)",
        f"simulated  in {told['simulation_seconds']:.1f} s and {told['simulation_mb']:.0f} MB",
    ]
    if any(one["source"] == "assumed" for one in told["choices"]):
        lines.append("           speed-ups that say assumed were never measured: the choice is as good as they are")
    return lines
