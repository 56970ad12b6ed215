"""Plots of what experts are to one another: how alike their changes are, and who supplies which layers of a merge."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from safetydpo.evaluation.plot_findings import find_overlap, find_winners
from safetydpo.evaluation.plots import ACCENT, LINE, MUTED, SERIES, WIDTH_INCHES, Layout, Plot, both_layouts
from safetydpo.evaluation.report_records import ExpertOverlap, LayerWinners

MOST_NAMED_EXPERTS = 24
"""Experts with a row and a column of their own; of more, a heat map shows means per category."""
MOST_LARGE_NAMES = 14
"""Experts up to which their names are set in letters of the usual size."""
MOST_NUMBERED_EXPERTS = 9
"""Experts up to which the cells have room for their numbers."""
SQUARE_INCHES, LABEL_INCHES = 2.9, 1.5
"""Side of a heat map, and what its title and the names below it take."""
MOST_COLOURS = len(SERIES)
FULL_OPACITY = 0.62
"""Opacity of a cell of 1: letters in the page's ink stay readable on it in both themes."""
NO_CATEGORY = "no category"
PANELS = (
    ("cosine", "cosine of their changes"),
    ("columns", "shared output space"),
    ("rows", "shared input space"),
)
MOST_BLOCK_NAMES: dict[Layout, int] = {"wide": 16, "narrow": 7}


def plot_overlap(overlap: ExpertOverlap) -> Plot:
    """Return heat maps of cosine, output and input overlap between experts; of many experts, means per category."""
    shown = overlap if len(overlap.names) <= MOST_NAMED_EXPERTS else cluster_by_category(overlap)

    def draw(layout: Layout) -> Figure:
        wide = layout == "wide"
        # The width leaves each panel a square of this side, whatever the number of its cells.
        height = SQUARE_INCHES + LABEL_INCHES if wide else len(PANELS) * (SQUARE_INCHES + LABEL_INCHES)
        figure = Figure(figsize=(WIDTH_INCHES[layout], height), layout="constrained")
        panels = figure.subplots(1, len(PANELS), sharey=True) if wide else figure.subplots(len(PANELS), 1)
        for axes, (name, title) in zip(panels, PANELS, strict=True):
            _draw_cells(axes, getattr(shown, name), shown.names, title=title)
        return figure

    return both_layouts(draw, find_overlap(shown, num_experts=len(overlap.names)))


def cluster_by_category(overlap: ExpertOverlap) -> ExpertOverlap:
    """Return the same per category: means over the pairs of two different experts of the two categories.

    An expert of several categories counts in its first. A category's only expert is like itself.
    """
    of_expert = [categories[0] if categories else NO_CATEGORY for categories in overlap.categories]
    groups = sorted(set(of_expert), key=lambda name: (name == NO_CATEGORY, name))
    members = {group: [index for index, name in enumerate(of_expert) if name == group] for group in groups}

    def mean(values: Sequence[Sequence[float]], one: str, other: str) -> float:
        pairs = [values[i][j] for i in members[one] for j in members[other] if i != j]
        return sum(pairs) / len(pairs) if pairs else 1.0

    def clustered(values: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(mean(values, one, other) for other in groups) for one in groups)

    return ExpertOverlap(
        names=tuple(f"{group} ({len(members[group])})" for group in groups),
        categories=tuple((group,) for group in groups),
        cosine=clustered(overlap.cosine),
        columns=clustered(overlap.columns),
        rows=clustered(overlap.rows),
    )


def _draw_cells(axes: Axes, values: Sequence[Sequence[float]], names: Sequence[str], *, title: str) -> None:
    count = len(names)
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            colour = ACCENT if value >= 0 else SERIES[1]
            axes.add_patch(
                Rectangle((column - 0.47, row - 0.47), 0.94, 0.94, facecolor=colour, linewidth=0,
                          alpha=FULL_OPACITY * min(abs(value), 1.0))
            )  # fmt: skip
            if count <= MOST_NUMBERED_EXPERTS:
                text = f"{value:.2f}".replace("-0.00", "0.00").replace("-", "−")
                axes.text(column, row, text, ha="center", va="center", fontsize=7.5)
    titles = [name.replace("_", " ") for name in names]
    axes.set(xlim=(-0.5, count - 0.5), ylim=(count - 0.5, -0.5), title=title, aspect="equal")
    size = 8 if count <= MOST_LARGE_NAMES else 6
    axes.set_xticks(range(count), titles, rotation=90, fontsize=size)
    axes.set_yticks(range(count), titles, fontsize=size)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)


def plot_winners(winners: LayerWinners) -> Plot:
    """Return the share of each layer's rows that every expert supplies, and how many experts supply any.

    More experts than there are colours are shown by category.
    """
    experts = sorted({name for _, counts in winners.layers for name in counts})
    everyone = sorted(winners.categories) or experts
    by_category = len(experts) > MOST_COLOURS
    shares = layer_shares(winners, by_category=by_category)
    groups = sorted({name for line in shares for name in line}, key=lambda name: (name == NO_CATEGORY, name))
    suppliers = [len(counts) for _, counts in winners.layers]
    names = [layer for layer, _ in winners.layers]

    def draw(layout: Layout) -> Figure:
        figure = Figure(figsize=(WIDTH_INCHES[layout], 4.4), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        edges = list(range(len(names) + 1))
        bottom = [0.0] * len(names)
        for index, group in enumerate(groups):
            top = [low + line.get(group, 0.0) for low, line in zip(bottom, shares, strict=True)]
            colour = SERIES[index % len(SERIES)]
            upper.fill_between(edges, [*bottom, bottom[-1]], [*top, top[-1]], step="post", color=colour, linewidth=0,
                               alpha=0.85, label=group.replace("_", " "))  # fmt: skip
            bottom = top
        lower.stairs(suppliers, edges, baseline=None, color=ACCENT, linewidth=1.4)
        lower.yaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
        upper.set(ylim=(0, 1), xlim=(0, len(names)), ylabel="share of rows")
        lower.set(ylim=(0, len(everyone) + 0.5), ylabel="suppliers")
        lower.axhline(len(everyone), color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        _name_blocks((upper, lower), names, most=MOST_BLOCK_NAMES[layout])
        figure.legend(loc="outside upper left", ncols=6 if layout == "wide" else 3, handlelength=1.0, columnspacing=1.2)
        return figure

    return both_layouts(draw, find_winners(winners, by_category=by_category))


def layer_shares(winners: LayerWinners, *, by_category: bool) -> list[dict[str, float]]:
    """Return the share of each layer's rows by expert, or by the first category of its expert."""
    shares = []
    for _, counts in winners.layers:
        total = sum(counts.values())
        line: dict[str, float] = {}
        for name, count in counts.items():
            of_expert = winners.categories.get(name, ())
            group = name if not by_category else of_expert[0] if of_expert else NO_CATEGORY
            line[group] = line.get(group, 0.0) + count / total
        shares.append(line)
    return shares


def _name_blocks(panels: Sequence[Axes], names: Sequence[str], *, most: int) -> None:
    """Name each block of the network where its first layer stands, as many as have room."""
    starts: Mapping[str, int] = {block_of(name): place for place, name in reversed(list(enumerate(names)))}
    ordered = sorted(starts.items(), key=lambda entry: entry[1])
    step = -(-len(ordered) // most)
    shown = ordered[::step]
    for axes in panels:
        axes.grid(visible=False, axis="x")
        for _, place in shown:
            axes.axvline(place, color=LINE, linewidth=0.8, zorder=3)
    panels[-1].set_xticks([place for _, place in shown], [block for block, _ in shown], fontsize=8, ha="left")


def block_of(layer: str) -> str:
    """Return the short name of the block that a module stands in, such as `down 1`, `mid` or `layer 12`."""
    found = re.match(r"(down|up)_blocks\.(\d+)|(mid)_block|(?:single_)?transformer_blocks\.(\d+)", layer)
    if found is None:
        return layer.partition(".")[0]
    side, number, middle, deep = found.groups()
    single = "single " if layer.startswith("single") else "layer "
    return f"{side} {number}" if side else middle or f"{single}{deep}"
