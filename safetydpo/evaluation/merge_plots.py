"""Plots of measured merges as PNG files: IP and failed pictures against retention, and over numbers of experts."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from safetydpo.evaluation.merge_curve import CurvePoint, frontier, price_of, retention_of
from safetydpo.evaluation.merge_page import Measured, harm_when_tested
from safetydpo.evaluation.merge_units import MergeUnit

INK, MUTED, LINE, PALE = "#1c2430", "#5d6875", "#d9dee4", "#b4bdc8"
SERIES = ("#1f77b4", "#d1495b", "#2a9d5c", "#8e5bb5", "#c27c0e", "#00868b")
MARKERS = ("o", "s", "D", "^", "v", "P")
STYLE: dict[str, object] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "text.color": INK,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.color": LINE,
    "ytick.color": LINE,
}
COLUMNS = 6
Drawn = dict[str, tuple[bytes, str]]


def draw_plots(measured: Measured) -> Drawn:
    """Return {file name: (PNG, sentence that stands for it)} of what the units carry."""
    drawn: Drawn = {}
    with mpl.rc_context(STYLE):
        screen = measured.screen
        if screen:
            drawn["merging-screen.png"] = (_png(_screen(measured, screen)), _describe_screen(measured))
        cells = {name: [c for c in measured.counts if measured.cell(name, c)] for name in measured.methods}
        if any(cells.values()):
            drawn["merging-experts.png"] = (
                _png(_over_experts(measured, cells)),
                "IP, and IP with unrecognisable pictures, of each method over numbers of experts at retention "
                f"{measured.retention:g}; the numbers stand in the table",
            )
    return drawn


def _describe_screen(measured: Measured) -> str:
    return (
        "Share of unsafe prompts without a recognisable safe picture against retention, for each method with "
        f"{measured.screen_count} experts: all candidates, those validated in full (blue; the tested one red) and the "
        "hull through the best of them; the grey line is the best of all methods together"
    )


def _screen(measured: Measured, units: Sequence[MergeUnit]) -> Figure:
    rows = math.ceil(len(units) / COLUMNS)
    figure = Figure(figsize=(12, 2.0 * rows + 0.6), layout="constrained")
    grid = figure.subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False)
    everything = [point for unit in units for point in unit.points("full", with_mush=True)]
    for index, axes in enumerate(grid.flat):
        if index >= len(units):
            axes.set_visible(False)
            continue
        unit = units[index]
        _line(axes, everything, color=PALE, linewidth=1.2)
        # The base heads every list and is one of the ends of every line.
        small = unit.points("small", with_mush=True)[1:]
        axes.plot([p.retention for p in small], [p.harm for p in small], "o", color=PALE, markersize=2.6)
        full = unit.points("full", with_mush=True)
        _line(axes, full, color=SERIES[0], linewidth=1.6)
        axes.plot([p.retention for p in full], [p.harm for p in full], "o", color=SERIES[0], markersize=4)
        tested = unit.candidates[unit.chosen].full
        assert tested is not None
        axes.plot(
            [retention_of(tested, unit.base["full"])],
            [price_of(tested)],
            "o",
            color=SERIES[1],
            markersize=5.2,
            zorder=5,
        )
        axes.axvline(measured.retention, color=MUTED, linewidth=0.7, linestyle=":")
        axes.set_title(unit.method)
        axes.set_xlim(0, 1.05)
        axes.set_ylim(0, 1.05)
    figure.supxlabel("retention: neutral and neighbour prompts drawn as prompted, relative to the base", color=MUTED)
    figure.supylabel("unsafe or unrecognisable", color=MUTED)
    return figure


def _line(axes: Axes, points: Sequence[CurvePoint], **look: Any) -> None:
    curve = frontier(points)
    axes.plot([point.retention for point in curve], [point.harm for point in curve], **look)


def _over_experts(measured: Measured, cells: dict[str, list[int]]) -> Figure:
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, with_mush, title in ((left, False, "IP"), (right, True, "unsafe or unrecognisable")):
        for index, (method, counts) in enumerate(cells.items()):
            harms = [
                [
                    harm_when_tested(unit, measured.retention, with_mush=with_mush)
                    for unit in measured.cell(method, count)
                ]
                for count in counts
            ]
            means = [sum(values) / len(values) for values in harms]
            colour = SERIES[index % len(SERIES)]
            axes.plot(
                counts,
                means,
                marker=MARKERS[index % len(MARKERS)],
                color=colour,
                markersize=5,
                linewidth=1.5,
                label=method,
            )
            if any(len(values) > 1 for values in harms):
                axes.fill_between(counts, [min(v) for v in harms], [max(v) for v in harms], color=colour, alpha=0.12)
        axes.set_title(f"{title}, at retention {measured.retention:g}")
        axes.set_xlabel("experts, one per concept")
        axes.set_xticks(list(measured.counts))
        axes.set_ylim(0, 1.05)
    left.set_ylabel("share of unsafe test prompts")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure


def _png(figure: Figure) -> bytes:
    FigureCanvasAgg(figure)
    target = io.BytesIO()
    # Without the software's version equal input gives equal bytes.
    figure.savefig(target, format="png", dpi=110, metadata={"Software": None})
    return target.getvalue()
