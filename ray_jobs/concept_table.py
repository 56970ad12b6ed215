"""What `safetydpo pairs` says at its end: kept and dropped pairs of each concept, and which concepts have too few."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from safetydpo.artifacts.records import Record
from safetydpo.artifacts.schemas import MEMBERSHIPS, SELECTIONS
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import read_table
from safetydpo.config.pairs import PairsConfig
from safetydpo.errors import shown_name
from safetydpo.pairs.concepts import NO_CONCEPT, concepts_below, count_reasons, fewest_kept_first
from safetydpo.pairs.select import KEPT

MAX_ROWS = 60
"""Concepts that are printed; all of them stand in `per_concept.parquet`."""


def read_reasons(folder: Location) -> tuple[dict[str, Counter[str]], Counter[str]]:
    """Return (reasons per concept, reasons of all pairs) of a pairs artifact, of any version."""
    chosen = read_table(folder / "selections.parquet", SELECTIONS, columns=["pair_id", "reason"]).to_pylist()
    members = read_table(folder / "memberships.parquet", MEMBERSHIPS, columns=["pair_id", "concept"]).to_pylist()
    reasons = {row["pair_id"]: row["reason"] for row in chosen}
    concepts = count_reasons(((row["pair_id"], row["concept"]) for row in members), reasons)
    return concepts, Counter(reasons.values())


def concept_table(concepts: Mapping[str, Counter[str]], totals: Counter[str]) -> Table:
    """Return one row per concept, fewest kept pairs first, one column per reason that occurs, and a row of sums."""
    dropped = sorted(reason for reason in totals if reason != KEPT)
    table = Table(title="Pairs by concept", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    table.add_column("concept", overflow="fold")
    for heading in ("pairs", KEPT, *dropped):
        table.add_column(heading, justify="right", vertical="bottom")
    fewest_first = fewest_kept_first(concepts)
    for concept in fewest_first[:MAX_ROWS]:
        found = concepts[concept]
        # Names may look like markup.
        name = escape(concept or NO_CONCEPT)
        table.add_row(name, *(str(count) for count in (found.total(), found[KEPT], *(found[r] for r in dropped))))
    if len(fewest_first) > MAX_ROWS:
        table.add_row(f"… {len(fewest_first) - MAX_ROWS} more concepts in per_concept.parquet")
    table.add_section()
    sums = (totals.total(), totals[KEPT], *(totals[reason] for reason in dropped))
    table.add_row(f"all {len(set(concepts) - {''})} concepts", *map(str, sums), style="bold")
    return table


def concept_warnings(concepts: Mapping[str, Counter[str]], record: Record, rules: PairsConfig) -> list[str]:
    """Return what a person should know of a closed pairs artifact: rules that nobody judged, concepts with too few."""
    warnings = []
    if record.details.get("not_judged"):
        settings = ", ".join(f"identity.pairs.{name}" for name in record.details["not_judged"])
        warnings.append(f"no judge of {', '.join(rules.judges)} could answer for {settings}: it dropped no pair")
    # A concept of which nothing is left will not be learned, whether or not anybody asked for a minimum.
    minimum = max(1, rules.min_kept_per_concept)
    short = concepts_below(concepts, minimum=minimum)
    if short:
        listed = ", ".join(f"{shown_name(concept)}: {count}" for concept, count in short.items())
        named = len(set(concepts) - {""})
        warnings.append(
            f"expected at least {minimum} kept pairs per concept (identity.pairs.min_kept_per_concept), found fewer "
            f"for {len(short)} of {named}: {listed}; write more prompt pairs for them or loosen the rules of "
            "identity.pairs"
        )
    return warnings


def print_concepts(console: Console, folder: Location, record: Record, rules: PairsConfig, *, whole: bool) -> None:
    """Print the warnings, and before them the `whole` table."""
    concepts, totals = read_reasons(folder)
    if whole:
        console.print(concept_table(concepts, totals))
    for warning in concept_warnings(concepts, record, rules):
        console.print(f"[yellow]warning:[/yellow] {escape(warning)}", soft_wrap=True, highlight=False)


def print_pairs(console: Any, chain: Any, *, whole: bool) -> None:
    """Print the same for the pairs of a chain, if it has got that far."""
    if chain.pairs is not None:
        print_concepts(console, chain.pairs_folder, chain.pairs, chain.run.config.identity.pairs, whole=whole)
