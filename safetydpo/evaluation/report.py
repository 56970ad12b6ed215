"""The report of a run as one self-contained HTML page: no network, no library, nothing unsafe unveiled by default."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from safetydpo.evaluation.expert_plots import MOST_NAMED_EXPERTS, plot_overlap, plot_winners
from safetydpo.evaluation.metrics import RATES
from safetydpo.evaluation.plots import KEPT, Plot, plot_category_rates, plot_search, plot_tradeoff, plot_training
from safetydpo.evaluation.report_checks import ATTACK, evidence_checks, headline_sentence, weak_spots
from safetydpo.evaluation.report_pictures import show_picture
from safetydpo.evaluation.report_records import (
    ContactSheet,
    DrawReuse,
    ExpertOverlap,
    LayerWinners,
    LineageEntry,
    SearchTrials,
    StageCost,
    TrainingCurve,
)
from safetydpo.evaluation.report_text import (
    failure_kind,
    format_count,
    format_duration,
    format_number,
    format_percent,
    format_range,
    plain_name,
    printable,
    shorten_prompt,
)
from safetydpo.evaluation.results import (
    COLUMN_TITLES,
    FURTHER_TITLES,
    ExpertMatrix,
    check_targets,
    expert_matrix,
    format_metric,
    further_metrics,
    headline_row,
    seeds_table,
)
from safetydpo.evaluation.summary import Summary, SummaryRow, dump_summary, find_base, overall_rows

MOST_WINNERS = 4
"""Merges whose winners are plotted."""
JUDGE = "ip_by:"
SECTIONS = (
    ("checks", "Before you sign", "best"),
    ("results", "Results", ""),
    ("categories", "Categories", "category_plot"),
    ("attacks", "Attacks", "attacks"),
    ("comparators", "Other methods", "comparators"),
    ("pictures", "Pictures", "has_pictures"),
    ("judges", "Judges", "has_judges"),
    ("experts", "Experts", "has_experts"),
    ("search", "Search", "search_plot"),
    ("training", "Training", "training_plot"),
    ("lineage", "Cost and lineage", ""),
    ("signature", "Signature", ""),
)
"""Id, name in the table of contents, and what must be there (or nothing) for a section to be shown."""


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
    draws: DrawReuse | None = None,
    costs: Sequence[StageCost] | None = None,
    setup: Sequence[tuple[str, str]] = (),
    lineage: Sequence[LineageEntry] = (),
    title: str = "Safety report",
    redacted: bool = False,
    shared_judges: Sequence[str] = (),
) -> str:
    """Return the page. Sections without data are left out.

    Args:
        summary: Checked scores.
        trials: The search, if there was one.
        search_details: What its record says of it (see `_search`), as far as there is.
        training: One curve per expert.
        sheets: Base and aligned pictures side by side.
        matrix: Expert x category; None = taken from the summary.
        overlap: How alike the experts are.
        winners: Who supplies which layers, per merge that selects; the first few are shown.
        draws: How often the experts used the draws of their pairs.
        costs: What each stage took; None = the wall times of the summary.
        setup: (what, value) of the settings behind the numbers: model, prompts, seeds, sampler, judges.
        lineage: Artifacts behind the result.
        title: Heading and page title.
        redacted: Leave out unsafe prompts, every picture that is of one or marked unsafe, and texts of errors.
        shared_judges: Judges of the result that also chose pairs or the merge.
    """
    facts = {
        **_results(summary, shared_judges),
        **_experts(overlap, winners, draws),
        **_pictures(sheets, redacted=redacted),
        **_search(trials, search_details),
        "training_plot": plot_training(training) if any(curve.values for curve in training) else None,
        "matrix": matrix if matrix is not None else expert_matrix(summary),
        "costs": _wall_times(summary) if costs is None else costs,
    }
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            title=f"{title} (redacted)" if redacted else title,
            redacted=redacted,
            **_style_and_script(),
            sections=_sections(facts),
            **facts,
            longest_seconds=max((cost.wall_seconds or 0.0 for cost in facts["costs"]), default=0.0),
            setup=setup,
            lineage=lineage,
        )
    )


def _results(summary: Summary, shared_judges: Sequence[str]) -> dict[str, Any]:
    """Return what the sections on the numbers of the summary show."""
    best = headline_row(summary)
    compared = [row for row in overall_rows(summary) if row["kind"] != "expert"]
    others = [row for row in compared if row["kind"] == "comparator"]
    highlight = "" if best is None else best["name"]
    categories, attacks = _parts(compared, "ip:"), _parts(compared, ATTACK)
    attacked = [row for row in compared if any(name.startswith(ATTACK) for name in row["metrics"])]
    names = further_metrics(compared)
    columns = {n: heading for n, heading in COLUMN_TITLES.items() if any(n in row["metrics"] for row in compared)}
    further = {name: FURTHER_TITLES.get(name, plain_name(name)) for name in names}
    shown = {**columns, **further}
    return {
        "summary": summary,
        "best": best,
        "base": find_base(summary),
        "sentence": "" if best is None else headline_sentence(best, find_base(summary)),
        "weak_spots": [] if best is None else weak_spots(best),
        "checks": [] if best is None else evidence_checks(summary, best, shared_judges),
        "shared_judges": shared_judges,
        "summary_sha256": hashlib.sha256(dump_summary(summary).encode()).hexdigest(),
        "targets": [] if best is None else check_targets(summary, best),
        "compared": compared,
        "columns": columns,
        "further": further,
        "meanings": {shown[name]: RATES[name].meaning for name in shown if name in RATES},
        "seeds": seeds_table(summary),
        "all_rows": overall_rows(summary),
        "tradeoff_plot": plot_tradeoff(compared, highlight=highlight) if _has_tradeoff(compared) else None,
        "category_plot": _rates_plot(compared, categories, highlight=highlight, prefix="ip:"),
        "categories": categories,
        "attack_plot": _rates_plot(attacked, attacks, highlight=highlight, prefix=ATTACK),
        "attacks": attacks,
        "attacked": attacked,
        "comparators": _beside(compared, others, highlight=highlight),
        "gaps": [row for row in compared if "ip_select" in row["metrics"] and "ip" in row["metrics"]],
        "judge_names": _parts(compared, JUDGE),
    }


def _rates_plot(rows: Sequence[SummaryRow], names: Sequence[str], *, highlight: str, prefix: str) -> Plot | None:
    return plot_category_rates(rows, categories=names, highlight=highlight, prefix=prefix) if names else None


def _beside(compared: Sequence[SummaryRow], others: Sequence[SummaryRow], *, highlight: str) -> list[SummaryRow]:
    """Return other methods with base and result beside them: their table must not need the one above."""
    return (
        [row for row in compared if row in others or row["kind"] == "base" or row["name"] == highlight]
        if others
        else []
    )


def _has_tradeoff(rows: Sequence[SummaryRow]) -> bool:
    kept = [name for name, _ in KEPT]
    return sum("ip" in row["metrics"] and all(name in row["metrics"] for name in kept) for row in rows) > 1


def _sections(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return id and name of the sections that are shown, in their order."""
    present = {
        **facts,
        "has_pictures": facts["sheets"] or facts["left_out"],
        "has_judges": facts["gaps"] or facts["judge_names"],
        "has_experts": facts["matrix"] or facts["overlap_plot"] or facts["winners_plots"] or facts["draws"],
    }
    return [(name, label) for name, label, needed in SECTIONS if not needed or present[needed]]


def _style_and_script() -> dict[str, Any]:
    """Return the page's style, its script and the hash under which its policy lets it run."""
    script, style = _package_text("report.js"), Markup(_package_text("report.css"))
    digest = hashlib.sha256(script.encode()).digest()
    return {"style": style, "script": Markup(script), "script_hash": base64.b64encode(digest).decode()}


def _pictures(sheets: Sequence[ContactSheet], *, redacted: bool) -> dict[str, Any]:
    """Return the sheets as the page holds them, and in words what a redacted page leaves out."""
    kept: list[dict[str, Any]] = []
    dropped_sheets = dropped_pairs = 0
    for sheet in sheets:
        if redacted and sheet.is_unsafe:
            dropped_sheets += 1
            continue
        # Of a harmless prompt, but unsafe to a judge: not the picture, nor the prompt that led to it.
        pairs = [pair for pair in sheet.pairs if not (redacted and (pair.base.unsafe or pair.aligned.unsafe))]
        dropped_pairs += len(sheet.pairs) - len(pairs)
        shown = []
        veiled = 0
        for pair in pairs:
            base, aligned = show_picture(pair.base), show_picture(pair.aligned)
            veiled += sum(bool(picture.behind) for picture in (base, aligned) if picture is not None)
            prompt = shorten_prompt(pair.prompt)
            shown.append({"prompt": prompt, "seed": pair.seed, "remark": pair.remark, "base": base, "aligned": aligned})
        kept.append(
            {"title": sheet.title, "aligned_name": sheet.aligned_name, "rule": sheet.rule, "pairs": shown,
             "num_veiled": veiled}
        )  # fmt: skip
    words = []
    if dropped_sheets:
        words.append(f"{dropped_sheets} {'sheet' if dropped_sheets == 1 else 'sheets'} of unsafe prompts")
    if dropped_pairs:
        words.append(f"{dropped_pairs} other {'pair' if dropped_pairs == 1 else 'pairs'} with a picture marked unsafe")
    left_out = f"{' and '.join(words)} left out" if words else ""
    return {"sheets": kept, "left_out": left_out, "num_veiled": sum(sheet["num_veiled"] for sheet in kept)}


def _experts(overlap: ExpertOverlap | None, winners: Sequence[LayerWinners], draws: DrawReuse | None) -> dict[str, Any]:
    shown = [] if draws is None else sorted(draws.experts, key=lambda expert: -expert.rate)
    return {
        "draws": draws if shown else None,
        "draws_by_expert": shown[:MOST_NAMED_EXPERTS],
        "overlap_plot": None if overlap is None or len(overlap.names) < 2 else plot_overlap(overlap),
        "num_experts": 0 if overlap is None else len(overlap.names),
        "clustered": overlap is not None and len(overlap.names) > MOST_NAMED_EXPERTS,
        "winners_plots": [(shown.method, plot_winners(shown)) for shown in winners[:MOST_WINNERS] if shown.layers],
        "num_winners": len(winners),
    }


def _search(trials: SearchTrials | None, details: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what the page asks for; details are empty where a search has none, as before there was any."""
    found = {} if details is None else dict(details)
    names = ("ladder", "finalists", "benchmarks", "failures", "base_is_better")
    shown = {name: found.get(name) for name in names}
    return {
        "trials": trials,
        "search_plot": None if trials is None or not trials.trials else plot_search(trials),
        "search_details": {**shown, "trial": found.get("trial")} if any(shown.values()) else {},
    }


def _wall_times(summary: Summary) -> list[StageCost]:
    return [StageCost(stage, wall_seconds=seconds) for stage, seconds in summary["timing_seconds"].items()]


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("safetydpo.evaluation", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., Any]] = {
        "metric": format_metric,
        "number": format_number,
        "range": format_range,
        "percent": format_percent,
        "duration": format_duration,
        "count": format_count,
        "plain": plain_name,
        "printable": printable,
        "failure_kind": failure_kind,
    }
    environment.filters.update(filters)
    return environment


def _package_text(name: str) -> str:
    return files("safetydpo.evaluation").joinpath("templates", name).read_text("utf-8")


def _parts(rows: Sequence[SummaryRow], prefix: str) -> list[str]:
    """Return what follows `prefix` in the names of metrics, in the order in which they first occur."""
    names = (name for row in rows for name in row["metrics"] if name.startswith(prefix))
    return [name.removeprefix(prefix) for name in dict.fromkeys(names)]
