"""The sentence below each plot, which also stands for it where it cannot be seen: what it shows, with numbers."""

from __future__ import annotations

from collections.abc import Sequence

from safetydpo.evaluation.report_records import ExpertOverlap, LayerWinners, SearchTrial, SearchTrials, TrainingCurve
from safetydpo.evaluation.report_text import format_number, format_range, plain_name
from safetydpo.evaluation.summary import SummaryRow

Place = tuple[float, str]


def find_rates(rows: Sequence[SummaryRow], names: Sequence[str], *, prefix: str, highlight: str) -> str:
    """Say where the highlighted row has its highest and lowest rate, and between what the base's lie."""
    shown = next((row for row in rows if row["name"] == highlight), rows[-1])
    found = {name: shown["metrics"][prefix + name] for name in names if prefix + name in shown["metrics"]}
    if not found:
        return f"Rates with 95 % intervals of {', '.join(row['name'] for row in rows)}."
    worst = max(found, key=lambda name: (found[name]["value"], found[name]["high"]))
    metric = found[worst]
    text = (
        f"{shown['name']} is highest in {plain_name(worst)} with {format_number(metric['value'])} "
        f"(95 % interval {format_range(metric)}, n = {metric['n']}), lowest with "
        f"{format_number(min(one['value'] for one in found.values()))}"
    )
    base = next((row for row in rows if row["kind"] == "base" and row is not shown), None)
    before = (
        [] if base is None else [base["metrics"][prefix + n]["value"] for n in names if prefix + n in base["metrics"]]
    )
    if not before:
        return f"{text}."
    low, high = format_number(min(before)), format_number(max(before))
    return f"{text}; the base lies {f'at {low}' if low == high else f'between {low} and {high}'}."


def find_tradeoff(rows: Sequence[SummaryRow], *, highlight: str) -> str:
    """Say where the highlighted row stands between safety and what harmless pictures lose, and who else is as safe."""
    shown = next((row for row in rows if row["name"] == highlight), None)
    if shown is None or "ip" not in shown["metrics"]:
        return f"IP against harmless pictures kept, of {', '.join(row['name'] for row in rows)}."
    own = shown["metrics"]
    kept = [
        f"{label} {format_number(own[name]['value'])}"
        for name, label in (("neutral_rate", "neutral"), ("neighbour_retention", "neighbours"))
        if name in own
    ]
    text = (
        f"{highlight} draws IP {format_number(own['ip']['value'])} and keeps {' and '.join(kept) or 'nothing measured'}"
    )
    safer = [
        row["name"] for row in rows if "ip" in row["metrics"] and row["metrics"]["ip"]["value"] < own["ip"]["value"]
    ]
    return f"{text}; {'no row draws less' if not safer else 'less is drawn by ' + ', '.join(safer)}."


def find_search(trials: SearchTrials) -> str:
    """Say how many trials there were, how many kept the floors, and what was chosen."""
    count = len(trials.trials)
    kept = sum(trial.feasible for trial in trials.trials)
    front = sum(trial.on_front for trial in trials.trials)
    text = f"{count} trials: {kept} keep both floors, {front} lie on the Pareto front"
    chosen: SearchTrial | None = next((trial for trial in trials.trials if trial.chosen), None)
    if chosen is None:
        return f"{text}; none of them was chosen."
    return (
        f"{text}; chosen is trial {chosen.number} ({chosen.method}) with IP {format_number(chosen.ip)}, "
        f"{format_number(chosen.neutral)} of the base's neutral rate and {format_number(chosen.neighbour)} of its "
        "neighbours."
    )


def find_training(curves: Sequence[TrainingCurve]) -> str:
    """Say between what the last values of each series lie, and whose they are."""
    parts = []
    for name in dict.fromkeys(name for curve in curves for name in curve.values):
        last = [(curve.values[name][-1], curve.expert) for curve in curves if curve.values.get(name)]
        if last:
            (low, least), (high, most) = min(last), max(last)
            first = f"{plain_name(name)} ends at {_short(low)}"
            several = f"{first} ({plain_name(least)}) to {_short(high)} ({plain_name(most)})"
            parts.append(several if _short(low) != _short(high) else f"{first} in all")
    return f"Training of {len(curves)} {'expert' if len(curves) == 1 else 'experts'}: {'; '.join(parts)}."


def find_overlap(overlap: ExpertOverlap, *, num_experts: int) -> str:
    """Say which two rows are most and least alike."""
    count = len(overlap.names)
    pairs = [
        (overlap.cosine[i][j], f"{plain_name(overlap.names[i])} and {plain_name(overlap.names[j])}")
        for i in range(count)
        for j in range(i + 1, count)
    ]
    what = f"{count} experts" if count == num_experts else f"{count} rows, means per category of {num_experts} experts"
    if not pairs:
        return f"{what}."
    (low, least), (high, most) = min(pairs), max(pairs)
    return (
        f"{what}: the changes of {most} are most alike (cosine {format_number(high)}), those of {least} least "
        f"({format_number(low)})."
    )


def find_winners(winners: LayerWinners, *, by_category: bool) -> str:
    """Say how many experts supply a layer, and who supplies most rows."""
    suppliers = [len(counts) for _, counts in winners.layers]
    totals: dict[str, int] = {}
    for _, counts in winners.layers:
        for name, count in counts.items():
            totals[name] = totals.get(name, 0) + count
    most = max(sorted(totals), key=lambda name: totals[name])
    share = totals[most] / max(sum(totals.values()), 1)
    everyone = len(winners.categories) or len(totals)
    shown = ", shown by category" if by_category else ""
    mean = sum(suppliers) / len(suppliers)
    return (
        f"{winners.method}{shown}: on average {mean:.1f} of {everyone} experts supply a layer, at "
        f"least {min(suppliers)} and at most {max(suppliers)} in {len(suppliers)} layers; {plain_name(most)} supplies "
        f"most rows ({100 * share:.0f} %)."
    )


def _short(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")
