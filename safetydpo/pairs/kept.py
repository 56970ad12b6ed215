"""The kept pairs of a closed pairs artifact, as one table; and the counts of all its pairs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from safetydpo.artifacts.schemas import IMAGE_MANIFEST, MEMBERSHIPS, PROMPT_PAIRS, SELECTIONS
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import read_table
from safetydpo.errors import SafetyDPOError
from safetydpo.pairs.dataset_card import Group, PairCounts


@dataclass(frozen=True)
class KeptPairs:
    """The kept pairs in order of (concept, pair id), and the counts of all pairs.

    Columns of `table`: pair_id, seed, unsafe_text, safe_text, categories, concept, source, unsafe_id, safe_id.
    """

    table: pa.Table
    counts: PairCounts


def read_kept_pairs(folder: Location) -> KeptPairs:
    """Join the tables of a pairs artifact.

    Raises:
        SafetyDPOError: if a table is missing or broken, or no pair was kept, or a kept one has no prompt or pictures.
    """
    selections = read_table(folder / "selections.parquet", SELECTIONS)
    texts = read_table(folder / "prompt_pairs.parquet", PROMPT_PAIRS)
    members = _memberships(read_table(folder / "memberships.parquet", MEMBERSHIPS))
    counts = _count(selections, members)
    kept = selections.filter(selections.column("kept")).select(["pair_id", "seed"])
    if not kept.num_rows:
        raise SafetyDPOError(f"expected kept pairs in {folder}, found none of {selections.num_rows}: nothing to export")
    kept = _look_up(kept, kept.column("pair_id"), texts, "pair_id", what=f"prompts in {folder}")
    kept = _look_up(kept, kept.column("pair_id"), members, "pair_id", what=f"categories in {folder}")
    manifest = read_table(folder / "images.parquet", IMAGE_MANIFEST)
    for side in ("unsafe", "safe"):
        rows = manifest.filter(pc.equal(manifest.column("side"), side))
        pictures = pa.table({"key": _keys(rows, "owner_id"), f"{side}_id": rows.column("image_id")})
        kept = _look_up(kept, _keys(kept, "pair_id"), pictures, "key", what=f"{side} pictures in {folder}")
    return KeptPairs(kept.sort_by([("concept", "ascending"), ("pair_id", "ascending")]), counts)


def _keys(table: pa.Table, owner: str) -> pa.ChunkedArray:
    return pc.binary_join_element_wise(table.column(owner), pc.cast(table.column("seed"), pa.string()), ":")


def _memberships(table: pa.Table) -> pa.Table:
    """One row per pair: all categories, the first concept and source."""
    grouped = table.group_by("pair_id", use_threads=False).aggregate(
        [("category", "list"), ("concept", "first"), ("source", "first")]
    )
    columns = ["pair_id", "category_list", "concept_first", "source_first"]
    return grouped.select(columns).rename_columns(["pair_id", "categories", "concept", "source"])


def _look_up(table: pa.Table, keys: pa.ChunkedArray, other: pa.Table, key: str, *, what: str) -> pa.Table:
    """Add the columns of `other` whose `key` is the row's in `keys`."""
    places = pc.index_in(keys, value_set=other.column(key))
    if places.null_count:
        raise SafetyDPOError(
            f"expected {what} of all {table.num_rows} kept pairs, found {places.null_count} without: delete that "
            "folder and run `safetydpo pairs` again"
        )
    for name in other.column_names:
        if name != key:
            table = table.append_column(name, other.column(name).take(places))
    return table


def _count(selections: pa.Table, members: pa.Table) -> PairCounts:
    places = pc.index_in(selections.column("pair_id"), value_set=members.column("pair_id")).to_pylist()
    names = {name: members.column(name).to_pylist() for name in ("categories", "concept")}
    tallies: dict[str, Counter[tuple[str, bool]]] = {"categories": Counter(), "concept": Counter()}
    flags = selections.column("kept").to_pylist()
    for place, kept in zip(places, flags, strict=True):
        if place is not None:
            tallies["categories"].update((category, kept) for category in names["categories"][place])
            tallies["concept"][names["concept"][place], kept] += 1
    reasons = Counter(selections.filter(pc.invert(selections.column("kept"))).column("reason").to_pylist())
    return PairCounts(
        kept=sum(flags),
        dropped=len(flags) - sum(flags),
        by_category=_groups(tallies["categories"]),
        by_concept=_groups(tallies["concept"]),
        reasons=tuple(reasons.most_common()),
    )


def _groups(tally: Counter[tuple[str, bool]]) -> tuple[Group, ...]:
    return tuple(Group(name, tally[name, True], tally[name, False]) for name in sorted({name for name, _ in tally}))
