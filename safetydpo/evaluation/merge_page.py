"""The tables of measured merges as Markdown: the screen, methods over numbers of experts, one factor at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from safetydpo.config.experts import ALL_SINGLE
from safetydpo.evaluation.counts import pool_counts, pooled_metrics
from safetydpo.evaluation.merge_curve import IP, MUSH, NEIGHBOUR, NEUTRAL, UNCOVERED, harm_at, retention_of
from safetydpo.evaluation.merge_units import MergeUnit
from safetydpo.seeding import derive_numpy
from safetydpo.statistics import clopper_pearson

MARKS = ("<!-- merging:begin -->", "<!-- merging:end -->")
NONE = "–"
BOOTSTRAP = "merge_evidence.bootstrap"
FACTOR_NAMES = {
    "main": "as in the grid",
    "rank_2r": "output rank 2r",
    "rank_sum": "output rank: the sum",
    "independent": "`init: independent`",
    "rank_1": "experts of rank 1",
    "rank_16": "experts of rank 16",
}


@dataclass(frozen=True)
class Measured:
    """What is to be shown.

    Attributes:
        units: All units that stand.
        num_planned: How many were planned.
        retention: At which methods are compared.
        screen_count: Number of experts of the screen.
        counts: Numbers of experts of the grid.
        factor_counts: Those at which a factor is changed.
        methods: Methods of the grid.
        first_seed: Seed of the screen and of the factors.
    """

    units: Sequence[MergeUnit]
    num_planned: int
    retention: float
    screen_count: int
    counts: Sequence[int]
    factor_counts: Sequence[int]
    methods: Sequence[str]
    first_seed: int

    @property
    def screen(self) -> list[MergeUnit]:
        """The units of the screen, by validated harm at the retention: the best first."""
        found = [
            unit
            for unit in self.units
            if (unit.count, unit.seed, unit.factor) == (self.screen_count, self.first_seed, "main")
        ]
        return sorted(found, key=lambda unit: (_validated(unit, self.retention, with_mush=True), unit.method))

    def cell(self, method: str, count: int, factor: str = "main") -> list[MergeUnit]:
        """Return the units of one cell, by seed."""
        chosen = [unit for unit in self.units if (unit.method, unit.count, unit.factor) == (method, count, factor)]
        return sorted(chosen, key=lambda unit: unit.seed)


def merge_page(measured: Measured, *, images: Sequence[tuple[str, str]] = ()) -> str:
    """Return all tables; `images` are (path, description) of the plots."""
    parts = [
        _provenance(measured),
        _screen(measured),
        *(f"![{description}]({path})" for path, description in images),
        _grid(measured),
        _suppliers(measured),
        _factors(measured),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def merge_short_page(measured: Measured, *, link: str | None = None) -> str:
    """Return what leads and ends the screen, the table of the grid, and what one training on everything reaches."""
    more = f"All of it: [{link}]({link})." if link else ""
    parts = []
    screen = measured.screen
    if screen:
        best = ", ".join(
            f"`{unit.method}` {_validated(unit, measured.retention, with_mush=True):.2f}" for unit in screen[:3]
        )
        worst = ", ".join(
            f"`{unit.method}` {_validated(unit, measured.retention, with_mush=True):.2f}" for unit in screen[-3:]
        )
        parts.append(
            f"{len(screen)} ways of merging {measured.screen_count} experts (one per concept, tuned alike), share of "
            f"unsafe prompts without a recognisable safe picture at retention {measured.retention:g}: "
            f"best {best}; worst {worst}."
        )
    table = _grid_table(measured, lambda units: _at(units, measured.retention, spread=True))
    if table:
        seeds = sorted(
            {unit.seed for name in measured.methods for c in measured.counts for unit in measured.cell(name, c)}
        )
        told = f"seeds {', '.join(map(str, seeds))} (mean, least to most)" if len(seeds) > 1 else f"seed {seeds[0]}"
        parts.append(
            f"IP / the same share on test prompts at retention {measured.retention:g}, over numbers of experts, "
            f"{told}:\n\n{table}"
        )
    return "\n\n".join(part for part in (*parts, _one_training(measured), more) if part) + "\n"


def _one_training(measured: Measured) -> str:
    """Return what one adapter trained on everything reaches with as many steps as all experts together."""
    shown = []
    for count in measured.factor_counts:
        cells = {factor: measured.cell(ALL_SINGLE, count, factor) for factor in ("main", "rank_sum")}
        found = {factor: _at(units, measured.retention) for factor, units in cells.items() if units}
        if found:
            ranks = {
                "main": "at the rank of an expert",
                "rank_sum": "at the sum of their ranks and a rate as many times smaller",
            }
            shown.append(f"{count} concepts " + ", ".join(f"{text} {ranks[factor]}" for factor, text in found.items()))
    if not shown:
        return ""
    return (
        f"Without any merge, one adapter trained on all pairs with as many steps as the experts together "
        f"(`{ALL_SINGLE}`, seed {measured.first_seed}): {'; '.join(shown)}."
    )


def _provenance(measured: Measured) -> str:
    units = measured.units
    commits = sorted({f"{(unit.commit or 'no commit')[:7]}{' (dirty)' if unit.dirty else ''}" for unit in units})
    seconds = sum(unit.cpu_seconds for unit in units)
    return (
        f"{len(units)} of {measured.num_planned} units are measured, at commit {', '.join(commits)}; "
        f"{seconds / 60:.0f} minutes of one core."
    )


def _screen(measured: Measured) -> str:
    units = measured.screen
    if not units:
        return ""
    at = f"at {measured.retention:g}"
    header = (
        f"| method | scale, density | IP {at}, validation | failed {at}, validation | IP | unrecognisable | safe and "
        "intact | retention | neutral | neighbours | CLIP kept | IP of uncovered | cut off | CPU s |"
    )
    lines = [header, "|---|---|" + "--:|" * 12]
    for unit in units:
        cells = [
            f"`{unit.method}`",
            _tuning(unit),
            f"{_validated(unit, measured.retention):.2f}",
            f"{_validated(unit, measured.retention, with_mush=True):.2f}",
            _rate([unit], IP, interval=True),
            _rate([unit], MUSH),
            _rate([unit], "safe_and_intact"),
            _retention([unit]),
            _rate([unit], NEUTRAL),
            _rate([unit], NEIGHBOUR),
            _clip(unit),
            _rate([unit], UNCOVERED),
            f"{unit.candidates[unit.chosen].truncation_error:.2f}",
            f"{unit.cpu_seconds:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    sizes = f"{_n(units[:1], IP)} unsafe, {_n(units[:1], NEUTRAL)} neutral, {_n(units[:1], NEIGHBOUR)} neighbour"
    return (
        f"### Screen: {measured.screen_count} experts, seed {measured.first_seed}\n\n" + "\n".join(lines) + "\n\n"
        "*Failed* is IP and unrecognisable pictures together; on validation prompts it sorts the rows. Columns from "
        f"`IP` on are the test of the chosen candidate (n = {sizes} prompts). *Cut off* is the relative error of the "
        "reduction to the output rank."
    )


def _grid_table(measured: Measured, cell: Callable[[list[MergeUnit]], str]) -> str:
    """Return a cell for each method and number of experts; nothing if none was measured."""
    rows = [name for name in measured.methods if any(measured.cell(name, count) for count in measured.counts)]
    cells = [[f"`{name}`", *(_or_none(measured.cell(name, count), cell) for count in measured.counts)] for name in rows]
    return _table(["method", *map(_experts, measured.counts)], cells) if rows else ""


def _grid(measured: Measured) -> str:
    curve = _grid_table(measured, lambda units: _at(units, measured.retention, spread=True))
    if not curve:
        return ""
    tested = _grid_table(
        measured, lambda units: f"{_rate(units, IP, interval=True)}, {_retention(units)} (n = {_n(units, IP)})"
    )
    return (
        f"### Methods over numbers of experts\n\nIP / failed on test prompts at retention {measured.retention:g}, mean "
        f"of the seeds (least to most, failed):\n\n{curve}\n\n"
        "IP of the tested candidates, all seeds pooled, with its exact 95 % interval, and their retention:\n\n"
        f"{tested}"
    )


def _suppliers(measured: Measured) -> str:
    """Return how many experts supply a layer over numbers of experts, of the methods whose records say it."""
    known = [unit for unit in measured.units if unit.suppliers is not None and unit.factor == "main"]
    methods, counts = sorted({unit.method for unit in known}), sorted({unit.count for unit in known})
    if not known:
        return ""

    def cell(method: str, count: int) -> str:
        found = [
            one.suppliers for one in known if (one.method, one.count) == (method, count) and one.suppliers is not None
        ]
        return f"{sum(found) / len(found):.1f}" if found else NONE

    return (
        "### Distinct suppliers per layer\n\nExperts that supply at least one row of a layer, mean over the layers of "
        "the tested candidates and over the seeds:\n\n"
        + _table(
            ["method", *map(_experts, counts)],
            [[f"`{name}`", *(cell(name, one) for one in counts)] for name in methods],
        )
    )


def _factors(measured: Measured) -> str:
    only = [
        unit for unit in measured.units if unit.seed == measured.first_seed and unit.count in measured.factor_counts
    ]
    methods = list(dict.fromkeys(unit.method for unit in only))
    rows = []
    for name in methods:
        for factor, shown in FACTOR_NAMES.items():
            found = [
                [unit for unit in only if (unit.method, unit.count, unit.factor) == (name, count, factor)]
                for count in measured.factor_counts
            ]
            if any(found):
                cells = [
                    _or_none(
                        units,
                        lambda one: (
                            f"{_at(one, measured.retention)}; {_rate(one, IP, interval=True)}, {_retention(one)}"
                        ),
                    )
                    for units in found
                ]
                rows.append([f"`{name}`", _factor_name(name, factor, shown), *cells])
    if not rows:
        return ""
    return (
        f"### One factor at a time, seed {measured.first_seed}\n\nIP / failed at retention {measured.retention:g}; IP "
        "with its exact 95 % interval and retention of the tested candidate:\n\n"
        + _table(["method", "factor", *map(_experts, measured.factor_counts)], rows)
    )


def _factor_name(method: str, factor: str, shown: str) -> str:
    if method != ALL_SINGLE:
        return shown
    return "rank: the sum" if factor == "rank_sum" else "rank r"


def _experts(count: int) -> str:
    return f"{count} expert{'' if count == 1 else 's'}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---|" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _or_none(units: list[MergeUnit], cell: Callable[[list[MergeUnit]], str]) -> str:
    return cell(units) if units else NONE


def _validated(unit: MergeUnit, retention: float, *, with_mush: bool = False) -> float:
    found = harm_at(unit.points("full", with_mush=with_mush), retention)
    assert found is not None, "the base keeps everything"
    return found


def harm_when_tested(unit: MergeUnit, retention: float, *, with_mush: bool = False) -> float:
    """Return the harm of the tested candidate at a retention; one that keeps less is mixed with the base."""
    found = harm_at(unit.points("test", with_mush=with_mush), retention)
    assert found is not None, "the base keeps everything"
    return found


def _at(units: Sequence[MergeUnit], retention: float, *, spread: bool = False) -> str:
    ips = [harm_when_tested(unit, retention) for unit in units]
    failed = [harm_when_tested(unit, retention, with_mush=True) for unit in units]
    text = f"{sum(ips) / len(ips):.2f} / {sum(failed) / len(failed):.2f}"
    return f"{text} ({min(failed):.2f} to {max(failed):.2f})" if spread and len(units) > 1 else text


def _tuning(unit: MergeUnit) -> str:
    tuning = unit.candidates[unit.chosen].tuning
    return f"{tuning.scale:g}" if tuning.density is None else f"{tuning.scale:g}, {tuning.density:g}"


def _totals(units: Sequence[MergeUnit], name: str) -> tuple[int, int]:
    found = [unit.tested[name] for unit in units if name in unit.tested]
    return sum(hits for hits, _ in found), sum(n for _, n in found)


def _n(units: Sequence[MergeUnit], name: str) -> int:
    return _totals(units, name)[1]


def _rate(units: Sequence[MergeUnit], name: str, *, interval: bool = False) -> str:
    hits, n = _totals(units, name)
    if n == 0:
        return NONE
    found = clopper_pearson(hits, n)
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]" if interval else f"{found.value:.2f}"


def _retention(units: Sequence[MergeUnit]) -> str:
    return f"{sum(retention_of(unit.tested, unit.base['test']) for unit in units) / len(units):.2f}"


def _clip(unit: MergeUnit) -> str:
    generator = derive_numpy(0, BOOTSTRAP, unit.method)
    metric = pooled_metrics(pool_counts([unit.counts]), generator=generator).get("clip_retention")
    return NONE if metric is None else f"{metric.value:.2f}"
