"""Check a finished run's world: `python -m ray_jobs.accept_world CONFIG [key=value …]`; exit code 1 if it fails.

The demo's drawings and weights live in a room that sees no judge's report; whether its world can tell merges apart
shows only here, once the chain stands.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ray_jobs.failures import run_guarded, split_debug
from ray_jobs.run import Run, with_absolute_paths
from ray_jobs.search_merges import validation_prompts
from ray_jobs.terminal import output_console
from safetydpo.artifacts.json_text import parse_json
from safetydpo.artifacts.layout import IDENTITY_FILE, stage_folder, summary_file
from safetydpo.artifacts.records import read_pointers
from safetydpo.artifacts.schemas import TRIALS
from safetydpo.artifacts.tables import read_table
from safetydpo.config.load import load_config, parse_config
from safetydpo.config.schema import Config
from safetydpo.errors import UsageError
from safetydpo.evaluation.acceptance import MergePoint, WorldCheck, check_world, trial_point
from safetydpo.evaluation.summary import parse_summary


def accept_world(config: Config) -> list[WorldCheck]:
    """Return the checks on the run that CONFIG's run folder holds.

    Raises:
        UsageError: if the run is not finished.
    """
    run = Run(with_absolute_paths(config))
    location = summary_file(run.run_dir)
    if not location.is_file():
        raise UsageError(
            f"expected a finished run in {run.run_dir}, found no {location.name}: run `safetydpo run` with this config"
        )
    summary = parse_summary(location.read_bytes().decode())
    return check_world(summary, _trial_points(run))


def _trial_points(run: Run) -> list[MergePoint]:
    """Return the measured trials of the run's search; the run's own settings say how many prompts each had."""
    pointer = read_pointers(run.run_dir).get("search")
    if pointer is None:
        return []
    identity = parse_json((run.run_dir / IDENTITY_FILE).read_bytes())
    own = run.config.model_copy(
        update={"identity": parse_config({"identity": identity}, source=str(run.run_dir / IDENTITY_FILE)).identity}
    )
    n = sum(prompt.prompt_set == "unsafe" for prompt in validation_prompts(Run(own)))
    rows = read_table(stage_folder(run.store, "search") / pointer["folder"] / "trials", TRIALS).to_pylist()
    points = []
    for row in sorted(rows, key=lambda row: row["trial"]):
        if row["status"] == "ok":
            metrics: dict[str, float] = parse_json(row["metrics"])
            candidate: dict[str, Any] = parse_json(row["candidate"])
            name = f"trial {row['trial']} ({candidate['method']} × {candidate['global_scale']:.2f})"
            points.append(trial_point(name, ip=metrics["ip_select"], n=n, neutral_rate=metrics["neutral_rate"]))
    return points


def print_checks(checks: Sequence[WorldCheck]) -> None:
    """Print a table for people and one JSON line for programs."""
    from rich.table import Table

    table = Table(title="Acceptance of the world", show_lines=True)
    for column in ("wanted", "found", "met"):
        table.add_column(column)
    for check in checks:
        table.add_row(check.wanted, check.found, "yes" if check.met else "no")
    output_console(width_of_a_log=170).print(table)
    # An expert without any effect has an infinite ratio, and JSON knows no infinity.
    values = [
        asdict(check) | {"value": check.value if check.value is not None and math.isfinite(check.value) else None}
        for check in checks
    ]
    content = {"met": all(check.met for check in checks), "checks": values}
    print(json.dumps(content, ensure_ascii=False, allow_nan=False))


def main(arguments: Sequence[str]) -> int:
    """Check and print; return the exit code."""
    rest, debug = split_debug(arguments)
    if not rest or "--help" in rest:
        print(
            "usage: python -m ray_jobs.accept_world [--debug] CONFIG [key=value …]",
            file=sys.stdout if rest else sys.stderr,
        )
        return 0 if rest else 2
    checks: list[WorldCheck] = []
    code = run_guarded(lambda: checks.extend(accept_world(load_config(rest[0], rest[1:]))), debug=debug)
    if code != 0:
        return code
    print_checks(checks)
    return 0 if all(check.met for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
