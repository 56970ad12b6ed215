"""The report's plots: matplotlib figures as inline SVG whose colours are the page's CSS variables.

Each plot is made twice, for a wide and for a narrow page; the page shows the one that fits, so that letters keep
their size on a phone. Text stays text (searchable, in the page's font). Equal input gives equal bytes.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from safetydpo.evaluation.plot_findings import find_rates, find_search, find_tradeoff, find_training
from safetydpo.evaluation.report_records import SearchTrials, TrainingCurve
from safetydpo.evaluation.summary import SummaryRow

Layout = Literal["wide", "narrow"]
WIDTH_INCHES: dict[Layout, float] = {"wide": 10.4, "narrow": 4.5}

# Stand-ins that matplotlib can draw with; each becomes a CSS variable, so that one SVG fits both themes.
INK, MUTED, LINE, ACCENT, CARD = "#010101", "#020202", "#030303", "#040404", "#050505"
SERIES = tuple(f"#0a0a{number:02d}" for number in range(1, 9))
CSS_VARIABLES: dict[str, str] = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    ACCENT: "var(--accent)",
    CARD: "var(--card)",
    **{colour: f"var(--series-{number})" for number, colour in enumerate(SERIES, start=1)},
}
MOST_NAMED_CURVES = 12
"""Experts that a plot tells apart by colour and name; of hundreds it shows the bundle."""
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "h")
STYLE: dict[str, object] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.labelcolor": MUTED,
    "axes.grid": True,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.color": LINE,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


@dataclass(frozen=True)
class Plot:
    """One plot in both layouts, with the sentence that stands for it where it cannot be seen."""

    wide: str
    narrow: str
    description: str


def plot_category_rates(
    rows: Sequence[SummaryRow], *, categories: Sequence[str], highlight: str, prefix: str = "ip:"
) -> Plot:
    """Return IP per category and row as dots with exact 95 % intervals; `highlight` names the row in colour.

    With another `prefix`, such as `attack_ip:`, the places are what follows it in the names of metrics.
    """

    def draw(layout: Layout) -> Figure:
        upright = layout == "wide"
        height = 3.9 if upright else 0.9 + len(categories) * (0.16 * len(rows) + 0.22)
        figure = Figure(figsize=(WIDTH_INCHES[layout], height), layout="constrained")
        axes = figure.add_subplot()
        step = 0.78 / max(len(rows), 1)
        for index, row in enumerate(rows):
            colour, marker = row_style(rows, index, highlight=highlight)
            places, values, below, above = [], [], [], []
            for place, category in enumerate(categories):
                metric = row["metrics"].get(f"{prefix}{category}")
                if metric is not None:
                    places.append(place + (index - (len(rows) - 1) / 2) * step)
                    values.append(metric["value"])
                    below.append(metric["value"] - metric["low"])
                    above.append(metric["high"] - metric["value"])
            strong = row["name"] == highlight
            look: dict[str, Any] = {
                "fmt": marker,
                "color": colour,
                "markersize": 6.4 if strong else 5.2,
                "elinewidth": 1.8 if strong else 1.1,
                "label": row["name"],
                "zorder": 3 if strong else 2,
                "markeredgewidth": 0,
            }
            if upright:
                axes.errorbar(places, values, yerr=[below, above], **look)
            else:
                axes.errorbar(values, places, xerr=[below, above], **look)
        _name_categories(axes, categories, upright=upright)
        figure.legend(loc="outside upper left", ncols=4 if upright else 3, handletextpad=0.2, columnspacing=1.2)
        return figure

    return both_layouts(draw, find_rates(rows, categories, prefix=prefix, highlight=highlight))


def _name_categories(axes: Axes, categories: Sequence[str], *, upright: bool) -> None:
    titles = [category.replace("_", "\n" if upright else " ") for category in categories]
    places = list(range(len(categories)))
    borders = [place + 0.5 for place in places[:-1]]
    if upright:
        axes.set(ylim=(-0.03, 1.03), xlim=(-0.5, len(categories) - 0.5), ylabel="IP (less is safer)")
        axes.set_xticks(places, titles)
        axes.grid(visible=False, axis="x")
        for border in borders:
            axes.axvline(border, color=LINE, linewidth=0.6)
    else:
        axes.set(xlim=(-0.03, 1.03), ylim=(len(categories) - 0.5, -0.5), xlabel="IP (less is safer)")
        axes.set_yticks(places, titles)
        axes.grid(visible=False, axis="y")
        for border in borders:
            axes.axhline(border, color=LINE, linewidth=0.6)


def row_style(rows: Sequence[SummaryRow], index: int, *, highlight: str) -> tuple[str, str]:
    """Return colour and marker of a row: ink for the base, the accent for the highlighted one, else a series."""
    row = rows[index]
    marker = MARKERS[index % len(MARKERS)]
    if row["kind"] == "base":
        return INK, marker
    if row["name"] == highlight:
        return ACCENT, marker
    return SERIES[index % len(SERIES)], marker


KEPT = (("neutral_rate", "neutral concepts found"), ("neighbour_retention", "neighbours kept"))


def plot_tradeoff(rows: Sequence[SummaryRow], *, highlight: str) -> Plot:
    """Return IP of every row against what harmless pictures keep, both with 95 % intervals; top left is best."""

    def draw(layout: Layout) -> Figure:
        wide = layout == "wide"
        figure = Figure(figsize=(WIDTH_INCHES[layout], 3.9 if wide else 6.6), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True) if wide else figure.subplots(2, 1, sharex=True)
        for axes, (name, title) in zip(panels, KEPT, strict=True):
            for index, row in enumerate(rows):
                ip, kept = row["metrics"].get("ip"), row["metrics"].get(name)
                if ip is None or kept is None:
                    continue
                colour, marker = row_style(rows, index, highlight=highlight)
                strong = row["name"] == highlight
                axes.errorbar(
                    [ip["value"]], [kept["value"]],
                    xerr=[[ip["value"] - ip["low"]], [ip["high"] - ip["value"]]],
                    yerr=[[kept["value"] - kept["low"]], [kept["high"] - kept["value"]]],
                    fmt=marker, color=colour, markersize=8 if strong else 6, elinewidth=1.6 if strong else 0.9,
                    markeredgewidth=0, label=row["name"], zorder=4 if strong else 3,
                )  # fmt: skip
            axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.05), title=title)
        panels[-1].set_xlabel("IP (less is safer)")
        if wide:
            panels[0].set_xlabel("IP (less is safer)")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=7 if wide else 3, handletextpad=0.2)
        return figure

    return both_layouts(draw, find_tradeoff(rows, highlight=highlight))


def plot_search(trials: SearchTrials) -> Plot:
    """Return safety against quality of every trial: left is safer, up keeps more of the base's skill.

    One panel per floor; hollow trials break a floor, the line joins the Pareto front, a ring marks the chosen one.
    """
    methods = tuple(dict.fromkeys(trial.method for trial in trials.trials))

    def draw(layout: Layout) -> Figure:
        wide = layout == "wide"
        figure = Figure(figsize=(WIDTH_INCHES[layout], 4.2 if wide else 6.8), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True) if wide else figure.subplots(2, 1, sharex=True)
        _draw_trials(panels[0], trials, methods, quality="neutral")
        _draw_trials(panels[1], trials, methods, quality="neighbour")
        if not wide:
            panels[0].set_xlabel("")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=6 if wide else 3, handletextpad=0.2)
        return figure

    return both_layouts(draw, find_search(trials))


def _draw_trials(
    axes: Axes, trials: SearchTrials, methods: Sequence[str], *, quality: Literal["neutral", "neighbour"]
) -> None:
    title = "neutral concepts found" if quality == "neutral" else "neighbours kept"
    floor = trials.neutral_floor if quality == "neutral" else trials.neighbour_floor
    for index, method in enumerate(methods):
        colour, marker = SERIES[index % len(SERIES)], MARKERS[index % len(MARKERS)]
        for feasible in (True, False):
            shown = [t for t in trials.trials if t.method == method and t.feasible is feasible]
            axes.scatter(
                [trial.price for trial in shown],
                [getattr(trial, quality) for trial in shown],
                s=34,
                marker=marker,
                facecolors=colour if feasible else CARD,
                edgecolors=colour,
                linewidths=1.2,
                label=method if feasible else None,
                zorder=3,
            )
    front = sorted((t.price, getattr(t, quality)) for t in trials.trials if t.on_front)
    axes.plot([x for x, _ in front], [y for _, y in front], color=ACCENT, linewidth=1.1, zorder=2, label="front")
    chosen = [trial for trial in trials.trials if trial.chosen]
    axes.scatter(
        [trial.price for trial in chosen],
        [getattr(trial, quality) for trial in chosen],
        s=150,
        facecolors="none",
        edgecolors=ACCENT,
        linewidths=1.8,
        label="chosen" if chosen else None,
        zorder=4,
    )
    axes.axhline(floor, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(f"floor {floor:.2f}", (0.995, floor), (0, -11), xycoords=("axes fraction", "data"), ha="right",
                  textcoords="offset points", color=MUTED, fontsize=8.5)  # fmt: skip
    axes.set(xlim=(-0.03, 1.03), xlabel="IP + unrecognisable, validation prompts", title=f"{title}, share of base")


def plot_training(curves: Sequence[TrainingCurve]) -> Plot:
    """Return one panel per logged series with one line per expert; more than a dozen go without colour and name."""
    names = tuple(dict.fromkeys(name for curve in curves for name in curve.values))
    is_named = len(curves) <= MOST_NAMED_CURVES

    def draw(layout: Layout) -> Figure:
        columns = min(len(names), 3 if layout == "wide" else 1)
        lines = math.ceil(len(names) / columns)
        height = 0.6 + (2.5 if layout == "wide" else 2.0) * lines
        figure = Figure(figsize=(WIDTH_INCHES[layout], height), layout="constrained")
        grid = figure.subplots(lines, columns, squeeze=False)
        for place, axes in enumerate(grid.flat):
            if place >= len(names):
                axes.set_axis_off()
                continue
            for index, curve in enumerate(curves):
                if names[place] in curve.values:
                    values = curve.values[names[place]]
                    colour = SERIES[index % len(SERIES)] if is_named else MUTED
                    label = curve.expert if is_named else f"{len(curves)} experts"
                    axes.plot(curve.steps, values, color=colour, linewidth=1.3 if is_named else 0.6, label=label)
            axes.set(title=names[place].replace("_", " "))
            axes.margins(x=0.01)
            if place >= len(names) - columns:
                axes.set_xlabel("optimizer step")
        handles = {
            label: handle for axes in grid.flat for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(
            list(handles.values()),
            list(handles),
            loc="outside upper left",
            ncols=4 if layout == "wide" else 2,
            handlelength=1.2,
        )
        return figure

    return both_layouts(draw, find_training(curves))


def both_layouts(draw: Callable[[Layout], Figure], description: str) -> Plot:
    """Return one figure in both layouts, in the page's style."""
    with mpl.rc_context(STYLE):
        return Plot(
            wide=_to_svg(draw("wide"), salt=f"{draw.__qualname__}/{description}/wide"),
            narrow=_to_svg(draw("narrow"), salt=f"{draw.__qualname__}/{description}/narrow"),
            description=description,
        )


def _to_svg(figure: Figure, *, salt: str) -> str:
    """Return the figure as an SVG element: ids unique to `salt`, no fixed size, page font and page colours."""
    buffer = io.StringIO()
    no_metadata: Mapping[str, None] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with mpl.rc_context({"svg.hashsalt": salt}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata=no_metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = svg.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)
    # Groups carry plain ids such as "figure_1", which would repeat between the plots of one page.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    # Both spellings occur: the shorthand `font: 9.5px 'DejaVu Sans'` and `font-family: 'DejaVu Sans'`.
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--font)", svg)
    for colour, variable in CSS_VARIABLES.items():
        svg = svg.replace(colour, variable)
    return svg.strip()
