"""The report of a run as one self-contained HTML page: no network, no library, nothing unsafe unveiled by default."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from safetydpo.evaluation.expert_plots import MOST_NAMED_EXPERTS, plot_overlap, plot_winners
from safetydpo.evaluation.metrics import RATES
from safetydpo.evaluation.plots import Plot, plot_category_rates, plot_search, plot_training
from safetydpo.evaluation.report_records import (
    ContactSheet,
    ExpertOverlap,
    LayerWinners,
    LineageEntry,
    SearchTrials,
    TrainingCurve,
)
from safetydpo.evaluation.results import (
    COLUMN_TITLES,
    ExpertMatrix,
    check_targets,
    expert_matrix,
    format_metric,
    headline_row,
    seeds_table,
)
from safetydpo.evaluation.summary import MetricRecord, Summary, SummaryRow, find_base, overall_rows

MOST_WINNERS = 4
"""Merges whose winners are plotted."""


def render_report(
    summary: Summary,
    *,
    trials: SearchTrials | None = None,
    search_details: Mapping[str, Any] | None = None,
    training: Sequence[TrainingCurve] = (),
    sheets: Sequence[ContactSheet] = (),
    matrix: ExpertMatrix | None = None,
    overlap: ExpertOverlap | None = None,
    winners: Sequence[LayerWinners] = (),
    lineage: Sequence[LineageEntry] = (),
    title: str = "Safety report",
) -> str:
    """Return the page. Sections without data are left out.

    Args:
        summary: Checked scores.
        trials: The search, if there was one.
        search_details: What its record says of it (`ladder`, `finalists`, `benchmarks`), as far as there is.
        training: One curve per expert.
        sheets: Base and aligned pictures side by side.
        matrix: Expert x category; None = taken from the summary.
        overlap: How alike the experts are.
        winners: Who supplies which layers, per merge that selects; the first few are shown.
        lineage: Artifacts behind the result.
        title: Heading and page title.
    """
    best = headline_row(summary)
    compared = [row for row in overall_rows(summary) if row["kind"] != "expert"]
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            title=title,
            style=Markup(_package_text("report.css")),
            **_script(),
            summary=summary,
            base=find_base(summary),
            best=best,
            targets=[] if best is None else check_targets(summary, best),
            compared=compared,
            columns=_present(compared),
            meanings={name: definition.meaning for name, definition in RATES.items()},
            seeds=seeds_table(summary),
            all_rows=overall_rows(summary),
            category_plot=_category_plot(compared, best),
            categories=_categories(compared),
            search_plot=None if trials is None or not trials.trials else plot_search(trials),
            trials=trials,
            search_details=_search_details(search_details),
            training_plot=plot_training(training) if any(curve.values for curve in training) else None,
            matrix=matrix if matrix is not None else expert_matrix(summary),
            **_experts(overlap, winners),
            gaps=[row for row in compared if "ip_select" in row["metrics"] and "ip" in row["metrics"]],
            sheets=sheets,
            lineage=lineage,
            longest_seconds=max(summary["timing_seconds"].values(), default=0.0),
        )
    )


def _script() -> dict[str, Any]:
    """Return the page's script and the hash under which its policy lets it run."""
    script = _package_text("report.js")
    digest = hashlib.sha256(script.encode()).digest()
    return {"script": Markup(script), "script_hash": base64.b64encode(digest).decode()}


def _experts(overlap: ExpertOverlap | None, winners: Sequence[LayerWinners]) -> dict[str, Any]:
    return {
        "overlap_plot": None if overlap is None or len(overlap.names) < 2 else plot_overlap(overlap),
        "num_experts": 0 if overlap is None else len(overlap.names),
        "clustered": overlap is not None and len(overlap.names) > MOST_NAMED_EXPERTS,
        "winners_plots": [(shown.method, plot_winners(shown)) for shown in winners[:MOST_WINNERS] if shown.layers],
        "num_winners": len(winners),
    }


def _search_details(details: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what the page asks for; empty where a search has none of it, as before there was any."""
    found = {} if details is None else dict(details)
    shown = {name: found.get(name) for name in ("ladder", "finalists", "benchmarks")}
    return {**shown, "trial": found.get("trial")} if any(shown.values()) else {}


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("safetydpo.evaluation", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["metric"] = format_metric
    environment.filters["number"] = _number
    environment.filters["range"] = _range
    environment.filters["data_uri"] = _data_uri
    environment.filters["duration"] = _duration
    return environment


def _package_text(name: str) -> str:
    return files("safetydpo.evaluation").joinpath("templates", name).read_text("utf-8")


def _present(rows: Sequence[SummaryRow]) -> dict[str, str]:
    return {name: title for name, title in COLUMN_TITLES.items() if any(name in row["metrics"] for row in rows)}


def _categories(rows: Sequence[SummaryRow]) -> list[str]:
    names = (name for row in rows for name in row["metrics"] if name.startswith("ip:"))
    return [name.removeprefix("ip:") for name in dict.fromkeys(names)]


def _category_plot(rows: Sequence[SummaryRow], best: SummaryRow | None) -> Plot | None:
    categories = _categories(rows)
    if not categories:
        return None
    return plot_category_rates(rows, categories=categories, highlight="" if best is None else best["name"])


def _number(value: float, metric: MetricRecord | None = None) -> str:
    """Return a number with as many digits as its unit deserves and a true minus sign."""
    unit = "rate" if metric is None else metric["unit"]
    digits = {"100 x cosine": 1, "squared distance": 3}.get(unit, 2)
    text = f"{value:.{digits}f}"
    return (text.replace("-", "−") if float(text) != 0 else text.removeprefix("-")).strip()


def _range(metric: MetricRecord) -> str:
    """Return `0.06–0.17`, or `−0.94 to −0.84` where a minus sign would make the dash unreadable."""
    joint = "–" if metric["low"] >= 0 else " to "
    return _number(metric["low"], metric) + joint + _number(metric["high"], metric)


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _duration(seconds: float) -> str:
    """Return `3 h 05 min`, `4 min 05 s` or `12 s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"
