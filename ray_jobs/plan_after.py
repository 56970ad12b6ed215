"""`safetydpo plan CONFIG --after`: what the finished stages of a run took, from what its records hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ray_jobs.plan_rates import pointed_records
from ray_jobs.report_sources import read_costs
from ray_jobs.run import Run
from ray_jobs.stage_use import device_of, num_devices
from safetydpo.errors import SafetyDPOError
from safetydpo.planning.costs import CostTable


def account_of(run: Run, table: CostTable, *, machine: str | None) -> dict[str, Any]:
    """Return wall time, device seconds, utilisation and cost of each stage that ran.

    Raises:
        UsageError: if the price table has no such machine.
        SafetyDPOError: if no stage of the run has ended.
    """
    device = device_of(run)
    priced = table.machine(device, machine)
    costs = read_costs(run, pointed_records(run, run.run_dir), per_hour=None if priced is None else priced[1].on_demand)
    stages = [asdict(cost) for cost in costs if cost.wall_seconds is not None]
    if not stages:
        raise SafetyDPOError(
            f"expected a run that has begun in {run.run_dir}, found no stage that took time: run it first, or name "
            "its run_dir"
        )
    return {
        "run": run.config.name,
        "run_dir": str(run.run_dir),
        "device": device,
        "devices": num_devices(run),
        "currency": table.currency,
        "machine": None if priced is None else priced[0],
        "stages": stages,
    }


def print_account(console: Any, told: Mapping[str, Any]) -> None:
    """Print an account as a table."""
    from rich import box
    from rich.table import Table

    title = f"What run {told['run']} took: {told['run_dir']}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    table.add_column("stage", vertical="bottom")
    for heading in ("wall\nseconds", "CPU-\nseconds", "GPU-\nseconds", "used", told["currency"]):
        table.add_column(heading, justify="right", no_wrap=True, vertical="bottom")
    table.add_column("what it made", vertical="bottom")
    for one in told["stages"]:
        table.add_row(
            one["stage"],
            *(_number(one[name]) for name in ("wall_seconds", "cpu_seconds", "gpu_seconds")),
            "–" if one["utilisation"] is None else f"{one['utilisation']:.0%}",
            "–" if one["cost"] is None else f"{one['cost']:,.4f}",
            one["detail"],
        )
    console.print(table)
    held = f"{told['devices']:g} {told['device'].upper()}s asked for"
    prices = f"{told['machine'] or 'none'} on demand, {told['costs']}"
    console.print(f"used       of {held}; prices: {prices}", soft_wrap=True, highlight=False)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"
