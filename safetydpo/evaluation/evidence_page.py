"""The tables of the evidence as Markdown, written between two marks of a page that people write around them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from safetydpo.errors import SafetyDPOError
from safetydpo.evaluation.evidence import Evidence
from safetydpo.evaluation.results import (
    COLUMN_TITLES,
    ResultsTable,
    check_targets,
    expert_matrix,
    format_metric,
    headline_row,
    markdown_table,
    results_table,
    seeds_table,
)
from safetydpo.evaluation.rows import to_record
from safetydpo.evaluation.summary import MetricRecord, Summary, SummaryRow, overall_rows

BEGIN = "<!-- evidence:begin -->"
END = "<!-- evidence:end -->"
HEADLINE_COLUMNS = (
    "ip",
    "ood_ip",
    "safe_and_intact_rate",
    "unrecognisable_rate",
    "neutral_rate",
    "neighbour_retention",
    "clip_retention",
)
CLUSTERED = ("ip", "safe_and_intact_rate", "unrecognisable_rate", "neutral_rate", "neighbour_retention")
WANTED_PICTURES = 1000
"""Least number of unsafe pictures behind each headline row."""


def replace_marked(page: str, text: str, *, source: str, marks: tuple[str, str] = (BEGIN, END)) -> str:
    """Return the page with `text` between its two marks.

    Raises:
        SafetyDPOError: if a mark is missing, stands twice, or the end comes first.
    """
    begin, end = marks
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise SafetyDPOError(
            f"expected one line {begin} and one line {end} after it in {source}, found {page.count(begin)} and "
            f"{page.count(end)}: add them where the tables belong"
        )
    before, after = page[: page.index(begin)], page[page.index(end) + len(end) :]
    return f"{before}{begin}\n{text.strip()}\n{end}{after}"


def full_page(evidence: Evidence) -> str:
    """Return all tables: headline, targets, intervals over concepts, judges, differences, experts, seeds, recipes."""
    parts = [
        _provenance(evidence),
        "### Headline rows\n\n" + markdown_table(_headline(evidence, HEADLINE_COLUMNS)),
        "Value [95 % interval], all seeds pooled: exact (Clopper–Pearson) for rates, over concepts (jackknife) for "
        "CLIP retention. n counts pictures of unsafe prompts.",
        "### Targets\n\n" + _targets(evidence),
        "### Intervals over concepts\n\n"
        "The same rates with a bootstrap over concepts (it collapses where every picture agrees).\n\n"
        + markdown_table(_clustered(evidence)),
        "### Two judges\n\nIP by the judge that chose nothing (`audit`) and by the one that filtered pairs and drove "
        "the search (`select`).\n\n" + markdown_table(_judges(evidence)),
        "### Paired differences\n\nSame prompts, same noise; bootstrap over concepts.\n\n"
        + markdown_table(_differences(evidence)),
        _experts(evidence),
        "### Single seeds\n\n" + markdown_table(seeds_table(evidence.summary)),
        _recipes(evidence),
        _failures(evidence),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def short_page(evidence: Evidence, *, link: str | None = None) -> str:
    """Return the headline table with its provenance and how many targets are met; `link` names the full page."""
    best = _better_merge(evidence)
    parts = [_provenance(evidence), markdown_table(_headline(evidence, HEADLINE_COLUMNS))]
    if best is not None:
        targets = check_targets(evidence.summary, best)
        missed = [f"{target.label} {target.wanted}, found {target.found}" for target in targets if not target.met]
        met = sum(1 for target in targets if target.met)
        parts.append(
            f"Targets met by `{best['name']}`: {met} of {len(targets)}"
            + ("." if not missed else f"; not met: {'; '.join(missed)}.")
        )
        parts.append(
            f"{_single_seeds(evidence, best['name'])} The intervals above take pictures as independent; over concepts "
            "they are wider, and what varies between seeds is in neither."
        )
    if link is not None:
        parts.append(f"All tables: [{link}]({link}).")
    return "\n\n".join(parts) + "\n"


def _single_seeds(evidence: Evidence, name: str) -> str:
    """Return the IP of each seed of a row, because a pool hides how much seeds differ."""
    singles = [row for row in evidence.summary["rows"] if row["name"] == name and row["seed"] is not None]
    values = ", ".join(f"{row['metrics']['ip']['value']:.2f} (seed {row['seed']})" for row in singles)
    return f"IP of `{name}` in each seed: {values}."


def _provenance(evidence: Evidence) -> str:
    commits = Counter((unit.commit, unit.dirty) for unit in evidence.units)
    named = ", ".join(
        f"{(commit or 'unknown')[:12]}{' with uncommitted changes' if dirty else ''}"
        + (f" ({count} units)" if len(commits) > 1 else "")
        for (commit, dirty), count in commits.items()
    )
    planned = len(evidence.rows) * len(evidence.seeds)
    sentences = [
        f"Measured by `safetydpo evidence` at commit {named}: seeds {', '.join(map(str, evidence.seeds))} (prompts, "
        f"initialisation, data order, search and generation noise all vary), {len(evidence.units)} of {planned} units."
    ]
    incomplete = [
        f"`{row}` {len(evidence.seeds_of(row))} of {len(evidence.seeds)} seeds"
        for row in evidence.rows
        if len(evidence.seeds_of(row)) < len(evidence.seeds)
    ]
    if incomplete:
        sentences.append(f"**Incomplete:** {', '.join(incomplete)}.")
    small = [
        f"`{row['name']}` n = {row['metrics']['ip']['n']:,}"
        for row in overall_rows(evidence.summary)
        if row["kind"] != "expert" and "ip" in row["metrics"] and row["metrics"]["ip"]["n"] < WANTED_PICTURES
    ]
    if small:
        sentences.append(f"Fewer than {WANTED_PICTURES:,} unsafe pictures: {', '.join(small)}.")
    machines = dict.fromkeys(f"{u.machine.get('cores', '?')} × {u.machine.get('cpu', '?')}" for u in evidence.units)
    # The stages of a seed are the same in each of its records, as far as the record's row needed them.
    stages = [
        max(sum(unit.stage_seconds.values()) for unit in evidence.units if unit.seed == seed)
        for seed in {unit.seed for unit in evidence.units}
    ]
    hours = (sum(unit.seconds for unit in evidence.units) + sum(stages)) / 3600
    sentences.append(f"{'; '.join(machines)}; {hours:.1f} hours in all.")
    return " ".join(sentences)


def _better_merge(evidence: Evidence) -> SummaryRow | None:
    """Return the better of the two rows that the targets speak of; no other merge stands in for them."""
    best = headline_row(evidence.summary)
    return best if best is not None and best["name"] in ("co_merge", "searched") else None


def _headline_only(summary: Summary) -> Summary:
    return {**summary, "rows": [row for row in summary["rows"] if row["kind"] != "expert"]}


def _headline(evidence: Evidence, columns: Sequence[str]) -> ResultsTable:
    table = results_table(_headline_only(evidence.summary), columns=columns)
    rows = tuple((row[0], _share_of_seeds(evidence, row[0]), *row[1:]) for row in table.rows)
    return ResultsTable(("row", "seeds", *table.header[1:]), rows)


def _share_of_seeds(evidence: Evidence, row: str) -> str:
    done, planned = len(evidence.seeds_of(row)), len(evidence.seeds)
    return str(planned) if done == planned else f"{done} of {planned}"


def _targets(evidence: Evidence) -> str:
    best = _better_merge(evidence)
    if best is None:
        return "Neither `co_merge` nor `searched` has been measured yet."
    answers = {True: "yes", False: "**no**", None: "not measured"}
    rows = tuple(
        (target.label, target.wanted, target.found, answers[target.met])
        for target in check_targets(evidence.summary, best)
    )
    note = f"Of `co_merge` and `searched` the better one is `{best['name']}`: most targets met, then least IP."
    return f"{note}\n\n{markdown_table(ResultsTable(('target', 'wanted', 'found', 'met'), rows))}"


def _clustered(evidence: Evidence) -> ResultsTable:
    pooled = overall_rows(_headline_only(evidence.summary))
    rows = tuple((row["name"], *(_over_concepts(row["metrics"].get(name)) for name in CLUSTERED)) for row in pooled)
    return ResultsTable(("row", *(COLUMN_TITLES[name] for name in CLUSTERED)), rows)


def _over_concepts(metric: MetricRecord | None) -> str:
    if metric is None or "cluster_low" not in metric:
        return "–"
    return f"{metric['value']:.2f} [{metric['cluster_low']:.2f}, {metric['cluster_high']:.2f}]"


def _judges(evidence: Evidence) -> ResultsTable:
    rows = tuple(
        (row["name"], *(format_metric(row["metrics"].get(name)) for name in ("ip", "ip_select", "ip_select_minus_ip")))
        for row in overall_rows(_headline_only(evidence.summary))
    )
    return ResultsTable(("row", "IP by audit", "IP by select", "select − audit"), rows)


def _differences(evidence: Evidence) -> ResultsTable:
    columns = (
        ("IP − base", "base", "ip"),
        ("IP − all_single", "all_single", "ip"),
        ("safe and intact − all_single", "all_single", "safe_and_intact_rate"),
        ("neutral found − base", "base", "neutral_rate"),
    )
    rows = []
    for row in overall_rows(_headline_only(evidence.summary)):
        if row["kind"] != "base":
            name = row["name"]
            cells = [
                None if name == other else evidence.difference(name, other, rate) for _title, other, rate in columns
            ]
            rows.append((name, *("–" if cell is None else format_metric(to_record(cell)) for cell in cells)))
    return ResultsTable(("row", *(title for title, _, _ in columns)), tuple(rows))


def _experts(evidence: Evidence) -> str:
    matrix = expert_matrix(evidence.summary)
    if matrix is None:
        return ""
    rows = tuple((name, *(format_metric(metric) for metric in cells)) for name, cells in matrix.rows)
    counts = sorted({cell["n"] for name, cells in matrix.rows if name != "base" for cell in cells if cell is not None})
    n = f"n = {counts[0]}" if len(counts) == 1 else f"n from {counts[0]} to {counts[-1]}"
    return f"### Single experts: IP per category\n\n{n} pictures per category and expert.\n\n" + markdown_table(
        ResultsTable(("row", *matrix.categories), rows)
    )


def _recipes(evidence: Evidence) -> str:
    chosen = [unit for unit in evidence.units if unit.row == "searched" and unit.recipe is not None]
    if not chosen:
        return ""
    rows = []
    for unit in chosen:
        recipe = unit.recipe or {}
        weights = ", ".join(f"{name} {weight:.2f}" for name, weight in recipe["weights"].items())
        density = "–" if recipe.get("density") is None else f"{recipe['density']:.2f}"
        rows.append((str(unit.seed), str(recipe["method"]), f"{recipe['global_scale']:.2f}", density, weights))
    return "### What the search chose\n\n" + markdown_table(
        ResultsTable(("seed", "method", "scale", "density", "weights"), tuple(rows))
    )


def _failures(evidence: Evidence) -> str:
    failed = evidence.summary["failed_images"]
    if not failed:
        return ""
    rows = Counter(image["row"] for image in failed)
    named = ", ".join(f"{row} {count}" for row, count in rows.items())
    return f"{len(failed)} pictures failed and count against their row: {named}."
