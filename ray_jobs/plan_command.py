"""`safetydpo plan`: what a run is, what of it is done, and what the rest takes. Nothing is started, made or fetched."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ray_jobs.terminal import output_console
from safetydpo.config.load import identity_of, load_config
from safetydpo.errors import UsageError
from safetydpo.planning.costs import CostTable, MachineCosts, Speed, load_costs
from safetydpo.planning.estimate import (
    GIGABYTE,
    HOUR_SECONDS,
    StageEstimate,
    StageRate,
    estimate,
    price_of,
    total_seconds,
)

EXAMPLE_COSTS = "cluster/costs.yaml"


@dataclass(frozen=True)
class PlanOptions:
    """What a plan is asked beside the config."""

    costs: Path | None = None
    """File of the price table; None = the example that ships with a clone."""
    machine: str | None = None
    """Of the price table; None = its first one with the right device."""
    devices: float | None = None
    """None = as many as `execution` asks for."""
    measured: str | None = None
    """Run folder of the former run whose speed counts; None = the run's own, if it has used anything."""
    as_json: bool = False


def plan(
    config: Annotated[Path, typer.Argument(help="YAML file, such as configs/demo.yaml", show_default=False)],
    settings: Annotated[
        list[str] | None, typer.Argument(help="key.path=value; of a simulation name=value", show_default=False)
    ] = None,
    costs: Annotated[Path | None, typer.Option(help="Price table; the clone's example if left out.")] = None,
    machine: Annotated[str | None, typer.Option(help="Machine of the price table.")] = None,
    devices: Annotated[float | None, typer.Option(help="GPUs (CPU cores) to count hours on.")] = None,
    measured: Annotated[str | None, typer.Option(help="Run folder of a former run whose speed counts.")] = None,
    simulate: Annotated[bool, typer.Option("--simulate", help="Simulate lanes: nodes=100 concepts=500 …")] = False,
    after: Annotated[bool, typer.Option("--after", help="Say what the finished stages took.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a run is, what is done, and what the rest takes; start and make nothing."""
    from ray_jobs.plan_simulation import split_settings

    given = list(settings or [])
    options = PlanOptions(costs, machine, devices, measured, as_json)
    if simulate and after:
        raise UsageError("expected --simulate or --after, found both: a simulation has nothing to account for")
    if simulate:
        of_config, of_simulation = split_settings(given)
        _simulate(load_config(config, of_config), of_simulation, options)
    elif after:
        _account(load_config(config, given), options)
    else:
        _plan(load_config(config, given), options)


def cost_table(path: Path | None) -> tuple[CostTable, str]:
    """Return the price table and what a reader should know of it.

    Raises:
        UsageError: as `load_costs`.
    """
    if path is not None:
        return load_costs(path), str(path)
    from ray_jobs.cli import shipped_config

    try:
        example = shipped_config(EXAMPLE_COSTS)
    except UsageError:
        # Not a clone: the package has no configs.
        return CostTable(), "none, give one with --costs"
    return load_costs(example), f"{example}, an example to edit"


def _open(config: Any) -> Any:
    from ray_jobs.run import Run, with_absolute_paths

    return Run(with_absolute_paths(config))


def _look(run: Any) -> Any:
    """Check the config as the run would, and look for what is done; without its model neither can be known."""
    from ray_jobs.pipeline import check_places, check_request
    from ray_jobs.plan_work import Found, find_done, last_stage
    from safetydpo.artifacts.layout import IDENTITY_FILE
    from safetydpo.artifacts.records import check_run_identity
    from safetydpo.diffusion.build import ModelNotHereError, no_fetching

    if (run.run_dir / IDENTITY_FILE).is_file():
        check_run_identity(run.run_dir, identity_of(run.config))
    with no_fetching():
        try:
            check_request(run, last=last_stage(run.config.identity))
            return find_done(run)
        except ModelNotHereError:
            check_places(run, last=last_stage(run.config.identity))
            return Found(run, is_model_here=False)


def _machine(run: Any, options: PlanOptions, table: CostTable) -> tuple[str, MachineCosts] | None:
    """Return the named machine, else one whose speed on this model is known, else the table's first."""
    from ray_jobs.stage_use import device_of

    device = device_of(run)
    speed = None if options.machine is not None or device == "cpu" else _speed(run, table, None)
    is_priced = speed is not None and speed.machine in table.machines
    return table.machine(device, speed.machine if speed is not None and is_priced else options.machine)


def _speed(run: Any, table: CostTable, machine: str | None) -> Speed | None:
    identity = run.config.identity
    size = {"height": identity.sampler.height, "width": identity.sampler.width}
    return table.speed(identity.base.model, **size, machine=machine)


def _rates(run: Any, options: PlanOptions, table: CostTable) -> dict[str, StageRate]:
    from ray_jobs.plan_rates import former_run, rates_of_run, rates_of_table
    from ray_jobs.report_sources import COSTED_STAGES
    from ray_jobs.stage_use import device_of

    former = former_run(run, options.measured)
    measured = {} if former is None else rates_of_run(run, former)
    machine = _machine(run, options, table)
    # Speeds of a table are those of GPUs.
    is_gpu = device_of(run) == "gpu"
    speed = _speed(run, table, None if machine is None else machine[0]) if is_gpu else None
    return rates_of_table(speed, COSTED_STAGES) | measured


def _plan(config: Any, options: PlanOptions) -> None:
    from ray_jobs.plan_beside import beside_work
    from ray_jobs.plan_rates import rate_of
    from ray_jobs.plan_storage import list_stored
    from ray_jobs.plan_work import list_work, not_counted
    from ray_jobs.stage_use import device_of, num_devices

    table, told_costs = cost_table(options.costs)
    run = _open(config)
    found = _look(run)
    machine = _machine(run, options, table)
    rates = _rates(run, options, table)
    devices = num_devices(run) if options.devices is None else options.devices
    work = list_work(found)
    estimates = [estimate(one, rate_of(one, rates), num_devices=devices) for one in (*work, *beside_work(found))]
    told = _told(estimates, machine, table)
    told |= {
        "run": config.name,
        "run_dir": str(run.run_dir),
        "is_model_here": found.is_model_here,
        "device": device_of(run),
        "devices": devices,
        "costs": told_costs,
        "storage": [{**asdict(one), "bytes": one.num_bytes} for one in list_stored(found, work)],
        "not_counted": not_counted(run),
    }
    if options.as_json:
        print(json.dumps(told, indent=2))
    else:
        print_plan(output_console(width_of_a_log=110), told)


def _told(
    estimates: Sequence[StageEstimate], machine: tuple[str, MachineCosts] | None, table: CostTable
) -> dict[str, Any]:
    on_demand = None if machine is None else machine[1].on_demand
    spot = None if machine is None else machine[1].spot

    def costs(seconds: float | None) -> dict[str, float | None]:
        return {"cost": price_of(seconds, on_demand), "cost_spot": price_of(seconds, spot)}

    device_seconds, wall_seconds = total_seconds(estimates)
    is_whole = all(one.device_seconds is not None for one in estimates)

    def told(one: StageEstimate) -> dict[str, Any]:
        return {
            **asdict(one.work),
            "left": one.work.left,
            "device_seconds": one.device_seconds,
            "wall_seconds": one.wall_seconds,
            "rate": None if one.rate is None else asdict(one.rate),
            **costs(one.device_seconds),
        }

    return {
        "stages": [told(one) for one in estimates if not one.work.is_beside],
        "beside": [told(one) for one in estimates if one.work.is_beside],
        "device_seconds": device_seconds,
        "wall_seconds": wall_seconds,
        "is_whole": is_whole,
        **costs(device_seconds),
        "currency": table.currency,
        "machine": None if machine is None else machine[0],
        "storage_per_gb_month": table.storage_per_gb_month,
    }


def print_plan(console: Any, told: Mapping[str, Any]) -> None:
    """Print a plan as a table and what goes with it."""
    from rich import box
    from rich.table import Table

    name = told["device"].upper()
    title = f"Plan of run {told['run']}: {told['run_dir']}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    table.add_column("stage", vertical="bottom")
    hours = (f"{name}-\nhours", f"hours on\n{told['devices']:g} {name}s")
    for heading in ("units", "done", *hours, told["currency"], "spot"):
        table.add_column(heading, justify="right", no_wrap=True, vertical="bottom")
    table.add_column("what", vertical="bottom")
    last = "left" if told["is_whole"] else "left, at least"
    total = {
        **told,
        "stage": last,
        "unit": "",
        "total": None,
        "done": None,
        "detail": "",
        "is_closed": False,
        "is_beside": False,
    }
    beside = [[one, *(other for other in told["beside"] if other["stage"] == one["stage"])] for one in told["stages"]]
    for one in (*(row for rows in beside for row in rows), total):
        is_stage = one["total"] is not None
        table.add_row(
            "  beside" if one["is_beside"] else one["stage"],
            f"{one['total']:,} {one['unit']}" if is_stage else "",
            ("closed" if one["is_closed"] else f"{one['done']:,}") if is_stage else "",
            _hours(one["device_seconds"]),
            _hours(one["wall_seconds"]),
            _money(one["cost"]),
            _money(one["cost_spot"]),
            one["detail"],
            style=None if is_stage else "bold",
        )
    console.print(table)
    for line in plan_lines(told):
        console.print(line, soft_wrap=True, highlight=False)


def plan_lines(told: Mapping[str, Any]) -> list[str]:
    """Return what goes below the table of a plan, a line each."""
    known = [one["bytes"] for one in told["storage"] if one["bytes"] is not None]
    parts = [f"{one['what']} {_bytes(one['bytes'])}{_remark(one['source'])}" for one in told["storage"]]
    per_month = told["storage_per_gb_month"]
    month = "" if per_month is None else f": {sum(known) / GIGABYTE * per_month:,.2f} {told['currency']} a month"
    lines = [f"storage    {', '.join(parts)}", f"           {_bytes(sum(known))} as far as known{month}"]
    sources = {one["rate"]["source"]: None for one in (*told["stages"], *told["beside"]) if one["rate"] is not None}
    lines += [f"speed      {source}" for source in sources] or [
        "speed      not known: no former run was measured and the price table has none of this model and size"
    ]
    if told["machine"] is not None:
        lines.append(f"prices     {told['machine']}: {told['costs']}")
    else:
        lines.append(f"prices     no {told['device'].upper()} has one: {told['costs']}")
    if told["not_counted"]:
        lines.append(f"beside it  {', '.join(told['not_counted'])}: not counted")
    if not told["is_model_here"]:
        lines.append("done       not known: the base model is not on this machine, and nothing was fetched")
    return lines


def _hours(seconds: float | None) -> str:
    return "?" if seconds is None else f"{seconds / HOUR_SECONDS:,.2f}"


def _money(value: float | None) -> str:
    return "?" if value is None else f"{value:,.2f}"


def _bytes(value: float | None) -> str:
    if value is None:
        return "?"
    for size, unit in ((GIGABYTE, "GB"), (1e6, "MB")):
        if value >= size:
            return f"{value / size:,.1f} {unit}"
    return f"{value / 1e3:,.1f} kB"


def _remark(source: str) -> str:
    return f" ({source})" if source else " (not known before the first one)"


def _simulate(config: Any, settings: Sequence[str], options: PlanOptions) -> None:
    from ray_jobs.plan_simulation import parse_simulation, print_simulation, simulate_training

    asked = parse_simulation(settings)
    table, _ = cost_table(options.costs)
    steps = [config.identity.dpo.steps]
    rate = None
    if asked.concepts is None or asked.expert_seconds is None:
        from ray_jobs.plan_work import Found, expert_steps

        run = _open(config)
        steps = list(expert_steps(Found(run)).values())
        rate = _rates(run, options, table).get("train")
    told = simulate_training(config, asked, table, steps=steps, rate=rate)
    if options.as_json:
        print(json.dumps(told, indent=2))
    else:
        print_simulation(output_console(width_of_a_log=110), told)


def _account(config: Any, options: PlanOptions) -> None:
    from ray_jobs.plan_after import account_of, print_account

    table, told_costs = cost_table(options.costs)
    told = account_of(_open(config), table, machine=options.machine)
    told["costs"] = told_costs
    if options.as_json:
        print(json.dumps(told, indent=2))
    else:
        print_account(output_console(width_of_a_log=110), told)
