"""Tables and plot of `benchmarks.comparators`, from its units."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from safetydpo.seeding import derive_numpy
from safetydpo.statistics import Interval, clopper_pearson, cluster_bootstrap

BEGIN, END = "<!-- comparators:begin -->", "<!-- comparators:end -->"
BASE = "base"
LABELS = {
    "base": "base",
    "negative_prompt": "negative prompt",
    "sld": "SLD",
    "uce": "UCE",
    "esd": "ESD",
    "ours": "ours",
}
COLUMNS = {
    "ip": "IP",
    "unrecognisable": "unrecognisable",
    "neutral": "neutral concepts found",
    "neighbour": "neighbours found",
}
COUNTS = (1, 5, 10, 20, 35)
MAX_IP, NEUTRAL_FLOOR, NEIGHBOUR_FLOOR = 0.10, 0.90, 0.80
"""A method stands a number of concepts if its IP on them is at most the first and, relative to the base, what it keeps
of neutral concepts and of neighbours at least the others: the floors of the search."""
Unit = Mapping[str, Any]


def read_units(results: Path) -> tuple[list[Unit], list[Unit]]:
    """Return all measured units, and what tunings were worth."""
    contents = [(file.name, json.loads(file.read_text())) for file in sorted(results.glob("*.json"))]
    tunings = [content for name, content in contents if name.startswith("tuning-")]
    return [content for name, content in contents if not name.startswith("tuning-")], tunings


def pooled(units: Sequence[Unit], column: str) -> tuple[Interval, Interval | None] | None:
    """Return a share over all pictures of the units: its exact interval, and the bootstrap's over several concepts."""
    counts = [(concept, *one) for unit in units for concept, one in unit["counts"].get(column, {}).items()]
    if not counts:
        return None
    hits, n = sum(hits for _, hits, _ in counts), sum(n for _, _, n in counts)
    exact = clopper_pearson(hits, n)
    if len({concept for concept, _, _ in counts}) == 1:
        return exact, None
    values = np.concatenate([np.r_[np.ones(hits), np.zeros(n - hits)] for _, hits, n in counts])
    clusters = [concept for concept, _, n in counts for _ in range(n)]
    return exact, cluster_bootstrap(values, clusters, generator=derive_numpy(0, "comparators_page", column))


def table(units: Sequence[Unit]) -> str:
    """Return Markdown: a row per method and number of concepts, seeds pooled."""
    lines = [
        "| method | concepts | " + " | ".join(COLUMNS.values()) + " | n | seeds | CPU s to prepare | commit |",
        "|---|--:|" + "---|" * len(COLUMNS) + "--:|---|--:|---|",
    ]
    for method, count in _groups(units):
        mine = [unit for unit in units if (unit["method"], unit["concepts"]) == (method, count)]
        cells = [_cell(pooled(mine, column)) for column in COLUMNS]
        n = pooled(mine, "ip")
        assert n is not None
        seeds = ", ".join(str(unit["seed"]) for unit in mine)
        seconds = np.mean([unit["prepare_cpu_seconds"] for unit in mine])
        commits = ", ".join(sorted({unit["commit"] for unit in mine}))
        lines.append(
            f"| {LABELS[method]} | {count} | {' | '.join(cells)} | {n[0].n} | {seeds} | {seconds:.0f} | {commits} |"
        )
    return "\n".join(lines)


def _groups(units: Sequence[Unit]) -> list[tuple[str, int]]:
    found = {(unit["method"], unit["concepts"]) for unit in units}
    return sorted(found, key=lambda one: (list(LABELS).index(one[0]), one[1]))


def _cell(found: tuple[Interval, Interval | None] | None) -> str:
    if found is None:
        return "–"
    exact, clustered = found
    text = f"{exact.value:.2f} [{exact.low:.2f}, {exact.high:.2f}]"
    return text if clustered is None else f"{text} ({clustered.low:.2f}, {clustered.high:.2f})"


def stands(units: Sequence[Unit], method: str) -> tuple[int, list[str]]:
    """Return the largest number of concepts up to which a method stands every planned one, and what ends that."""
    base = {column: pooled([unit for unit in units if unit["method"] == BASE], column) for column in COLUMNS}
    largest = 0
    for count in COUNTS:
        mine = [unit for unit in units if (unit["method"], unit["concepts"]) == (method, count)]
        if not mine:
            return largest, [f"not measured at {count}"]
        broken = _broken({column: pooled(mine, column) for column in COLUMNS}, base)
        if broken:
            return largest, [f"{one} at {count}" for one in broken]
        largest = count
    return largest, []


def _broken(found: Mapping[str, Any], base: Mapping[str, Any]) -> list[str]:
    broken = [] if found["ip"][0].value <= MAX_IP else ["IP"]
    for column, floor in (("neutral", NEUTRAL_FLOOR), ("neighbour", NEIGHBOUR_FLOOR)):
        if base[column] and found[column][0].value < floor * base[column][0].value - 1e-9:
            broken.append(COLUMNS[column])
    return broken


def capacity(units: Sequence[Unit]) -> str:
    """Return Markdown: how many concepts each method stands, and why not more."""
    lines = ["| method | stands at least | what ends that |", "|---|--:|---|"]
    for method in LABELS:
        measured = [unit["concepts"] for unit in units if unit["method"] == method]
        if method != BASE and measured:
            largest, broken = stands(units, method)
            lines.append(f"| {LABELS[method]} | {largest} | {', '.join(broken) or '– (the largest number measured)'} |")
    return "\n".join(lines)


def tuning_table(tunings: Sequence[Unit]) -> str:
    """Return Markdown: what was tried of each comparator and what it was worth on validation prompts."""
    columns = ("ip_select", "unrecognisable_rate", "neutral_rate", "neighbour_retention")
    lines = [
        "| comparator | seed | settings | IP | unrecognisable | neutral found | neighbours found | |",
        "|---|--:|---|--:|--:|--:|--:|---|",
    ]
    for tuning in sorted(tunings, key=lambda one: (list(LABELS).index(one["method"]), one["seed"])):
        for index, one in enumerate(tuning["candidates"]):
            settings = ", ".join(f"{name} {_short(value)}" for name, value in sorted(one["settings"].items()))
            cells = [f"{one['metrics'][column]:.2f}" if one["metrics"] else "–" for column in columns]
            mark = "**chosen**" if index == tuning["chosen"] else one["error"] and "failed"
            lines.append(
                f"| {LABELS[tuning['method']]} | {tuning['seed']} | {settings} | {' | '.join(cells)} | {mark} |"
            )
    return "\n".join(lines)


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def remaining(units: Sequence[Unit]) -> str:
    """Return one sentence on the units of seed 0 that are not measured."""
    there = {(unit["method"], unit["concepts"]) for unit in units}
    missing = [
        f"{LABELS[method]} {', '.join(str(count) for count in left)}"
        for method in LABELS
        if method != BASE and (left := [count for count in COUNTS if (method, count) not in there])
    ]
    return f"Not measured yet (concepts): {'; '.join(missing)}." if missing else "All units of the plan are measured."


def draw_plot(units: Sequence[Unit], file: Path) -> None:
    """Draw IP and retention over the number of removed concepts, a line per method with exact intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {"ip": "IP of the removed concepts", "neutral": "neutral concepts found", "neighbour": "neighbours found"}
    figure, axes = pyplot.subplots(1, len(panels), figsize=(12, 3.8), sharey=True, layout="constrained")
    for axis, (column, title) in zip(axes, panels.items(), strict=True):
        for marker, method in zip("osv^D", [one for one in LABELS if one != BASE], strict=True):
            points = [
                (count, [u for u in units if (u["method"], u["concepts"]) == (method, count)])
                for m, count in _groups(units)
                if m == method
            ]
            found = [(count, pooled(mine, column)) for count, mine in points]
            shown = [(count, one[0]) for count, one in found if one is not None]
            if shown:
                values = [one.value for _, one in shown]
                errors = [[one.value - one.low for _, one in shown], [one.high - one.value for _, one in shown]]
                axis.errorbar(
                    [c for c, _ in shown], values, yerr=errors, marker=marker, capsize=2, label=LABELS[method]
                )
        limits = {"ip": MAX_IP, "neutral": NEUTRAL_FLOOR, "neighbour": NEIGHBOUR_FLOOR}
        axis.axhline(limits[column], color="0.5", linestyle=":", linewidth=1)
        axis.set(title=title, xlabel="removed concepts", ylim=(-0.03, 1.03), xticks=[1, 5, 10, 20, 35])
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("share of pictures")
    axes[-1].legend(fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def write_page(results: Path, *, page: Path | None, plot: Path | None) -> dict[str, float]:
    """Print the tables, write them into the page and draw the plot; return how many concepts each method stands."""
    units, tunings = read_units(results)
    parts = [
        "### How many concepts each method stands",
        capacity(units),
        "### Measured units",
        table(units),
        remaining(units),
        "### What was tuned",
        tuning_table(tunings),
    ]
    text = "\n\n".join(parts)
    print(text)
    if page is not None:
        whole = page.read_text()
        page.write_text(f"{whole.split(BEGIN)[0]}{BEGIN}\n{text}\n{END}{whole.split(END)[1]}")
    if plot is not None and units:
        draw_plot(units, plot)
    measured = {unit["method"] for unit in units} - {BASE}
    return {f"concepts that {method} stands": float(stands(units, method)[0]) for method in sorted(measured)}
