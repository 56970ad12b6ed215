"""One picture of an expert's training, for people: losses, errors, sampled rates over optimizer steps."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from safetydpo.dpo.watch import Validation

STYLE: dict[str, object] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "text.parse_math": False,
}
SAFE, UNSAFE, OTHER = "#1b7f5c", "#c0392b", "#2c5aa0"
DOTS: dict[str, Any] = {"marker": "o", "markersize": 4, "linewidth": 1.2}

Row = Mapping[str, float]


def plot_training(
    history: Sequence[Row],
    validations: Sequence[Validation] = (),
    *,
    title: str,
    published: int | None = None,
    dots_per_inch: int = 110,
) -> bytes:
    """Return a PNG of one training: six panels over optimizer steps.

    Args:
        history: rows of `training.jsonl`.
        validations: rows of `validations.jsonl`; dots.
        title: heading, such as the expert's name.
        published: step of the published state, drawn as a vertical line; None = the last.
        dots_per_inch: 110 gives 1210 x 660 pixels.

    Equal input gives equal bytes on one version of matplotlib.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 6), layout="constrained", dpi=dots_per_inch)
        panels = figure.subplots(2, 3).flat
        for axes, draw in zip(panels, (_losses, _accuracy, _margin, _errors, _gradient, _rates), strict=True):
            draw(axes, history, validations)
            if published is not None:
                axes.axvline(published, color="#777777", linewidth=1, linestyle=(0, (4, 3)))
            axes.margins(x=0.02)
            axes.set_xlabel("optimizer step")
        note = "" if published is None else f"   (dashed: the published state, after {published} steps)"
        figure.suptitle(f"{title}{note}", x=0.01, ha="left", fontsize=11)
        buffer = io.BytesIO()
        FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def _line(axes: Axes, history: Sequence[Row], name: str, **look: Any) -> None:
    axes.plot([row["step"] for row in history], [row[name] for row in history], linewidth=1.1, **look)


def _dots(axes: Axes, validations: Sequence[Validation], name: str, **look: Any) -> None:
    if validations:
        axes.plot([one.step for one in validations], [getattr(one, name) for one in validations], **{**DOTS, **look})


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best")


def _losses(axes: Axes, history: Sequence[Row], validations: Sequence[Validation]) -> None:
    _line(axes, history, "loss", color=OTHER, label="loss")
    _line(axes, history, "preference_loss", color="#999999", label="preference alone")
    _dots(axes, validations, "held_out_loss", color=UNSAFE, label="held-out pairs")
    axes.set_title("loss")
    _legend(axes)


def _accuracy(axes: Axes, history: Sequence[Row], validations: Sequence[Validation]) -> None:
    _line(axes, history, "implicit_accuracy", color=OTHER, label="training pairs")
    _dots(axes, validations, "held_out_accuracy", color=UNSAFE, label="held-out pairs")
    axes.set(title="implicit accuracy", ylim=(-0.03, 1.03))
    _legend(axes)


def _margin(axes: Axes, history: Sequence[Row], validations: Sequence[Validation]) -> None:
    _line(axes, history, "margin", color=OTHER, label="training pairs")
    _dots(axes, validations, "held_out_margin", color=UNSAFE, label="held-out pairs")
    axes.axhline(0, color="#777777", linewidth=0.8)
    axes.set_title("margin (mean logit)")
    _legend(axes)


def _errors(axes: Axes, history: Sequence[Row], validations: Sequence[Validation]) -> None:
    # Relative to the reference, because the error itself follows the drawn timesteps up and down.
    for side, colour in (("safe", SAFE), ("unsafe", UNSAFE)):
        # Without a reference (MaPO) its errors are 0; the first step's stand for them.
        errors = [row[f"error_policy_{side}"] for row in history]
        ratios = [
            error / (row[f"error_reference_{side}"] or errors[0]) for error, row in zip(errors, history, strict=True)
        ]
        axes.plot([row["step"] for row in history], ratios, linewidth=1.1, color=colour, label=f"{side} picture")
        if validations:
            first = getattr(validations[0], f"held_out_error_{side}")
            held_out = [getattr(one, f"held_out_error_{side}") / first for one in validations]
            axes.plot([one.step for one in validations], held_out, **{**DOTS, "linewidth": 0}, color=colour)
    axes.axhline(1, color="#777777", linewidth=0.8)
    axes.set_title("error of the policy / of the reference")
    _legend(axes)


def _gradient(axes: Axes, history: Sequence[Row], _validations: Sequence[Validation]) -> None:
    _line(axes, history, "gradient_norm", color=OTHER)
    axes.set(title="gradient norm before clipping", yscale="log")
    # The default labels of a logarithmic axis are formulas.
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _place: f"{value:g}"))


def _rates(axes: Axes, _history: Sequence[Row], validations: Sequence[Validation]) -> None:
    axes.set(title="sampled pictures, shares", ylim=(-0.03, 1.03))
    if not validations:
        axes.text(0.5, 0.5, "no validation", ha="center", va="center", transform=axes.transAxes, color="#777777")
    _dots(axes, validations, "unsafe_rate", color=UNSAFE, label="unsafe")
    _dots(axes, validations, "unrecognisable_rate", color="#999999", label="unrecognisable")
    _dots(axes, validations, "neutral_rate", color=SAFE, label="neutral intact")
    _dots(axes, validations, "neighbour_rate", color=OTHER, label="neighbours intact")
    _legend(axes)
