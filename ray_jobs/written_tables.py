"""The tables of written prompts: kept pairs, their memberships, rejects; held-out concepts in a folder apart."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from safetydpo.artifacts.layout import (
    HELD_OUT_FOLDER,
    MEMBERSHIPS_FILE,
    PROMPT_PAIRS_FILE,
    PROMPT_REJECTS_FILE,
    WRITTEN_PROMPTS_FILE,
)
from safetydpo.artifacts.schemas import (
    IMPORTED_PROMPTS,
    MEMBERSHIPS,
    PROMPT_PAIRS,
    PROMPT_REJECTS,
    make_pair_id,
    sha256_of,
)
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import fingerprint_rows, table_from_rows, write_table
from safetydpo.pairs.ledger import Ledger
from safetydpo.pairs.writers import Reply
from safetydpo.prompts.concepts import ConceptEntry
from safetydpo.prompts.importing import assign_splits, prompt_rows
from safetydpo.prompts.rows import FilePrompt


def write_tables(out: Location, concepts: Sequence[ConceptEntry], ledger: Ledger) -> str:
    """Write all tables in the order of the list; return the fingerprint of pairs and memberships.

    Pairs of concepts held out of training go to a folder of their own; in the table of prompts, which
    `identity.prompts.source` reads, they are `ood` prompts of the test split.
    """
    content: list[tuple[str, str]] = []
    # First of all, because it tells a folder of this command from others, finished or not.
    write_table(out / PROMPT_REJECTS_FILE, table_from_rows(_reject_rows(concepts, ledger), PROMPT_REJECTS))
    for folder, is_held_out in ((out, False), (out / HELD_OUT_FOLDER, True)):
        members = [concept for concept in concepts if concept.ood == is_held_out]
        pairs, memberships = _kept_rows(members, ledger)
        if members or not is_held_out:
            write_table(folder / PROMPT_PAIRS_FILE, table_from_rows(pairs, PROMPT_PAIRS))
            write_table(folder / MEMBERSHIPS_FILE, table_from_rows(memberships, MEMBERSHIPS))
        else:
            # The list held some out before; what was written of them must not outlive that.
            folder.delete()
        content += [(row["pair_id"], sha256_of([row, is_held_out])) for row in memberships]
    write_table(out / WRITTEN_PROMPTS_FILE, table_from_rows(_prompt_rows(concepts, ledger), IMPORTED_PROMPTS))
    return fingerprint_rows(content)


def describe_concepts(
    concepts: Sequence[ConceptEntry], ledger: Ledger, replies: Mapping[tuple[str, int], Reply]
) -> list[dict[str, Any]]:
    """Return for each concept its kept pairs, whether it is short, its rejects by reason, and what it cost."""
    rows = []
    by_key: dict[str, list[Reply]] = defaultdict(list)
    for (key, _), reply in replies.items():
        by_key[key].append(reply)
    for concept in concepts:
        own = by_key[concept.key]
        verdicts = ledger.verdicts(concept.key)
        rows.append(
            {
                "concept": concept.concept,
                "categories": list(concept.categories),
                "source": concept.source,
                "licence": concept.licence,
                "ood": concept.ood,
                "pairs": ledger.num_kept(concept.key),
                "short": ledger.is_short(concept.key),
                "requests": len(own),
                "prompt_tokens": sum(reply.prompt_tokens or 0 for reply in own),
                "completion_tokens": sum(reply.completion_tokens or 0 for reply in own),
                "rejects": dict(sorted(Counter(str(item.reason) for item in verdicts if item.reason).items())),
            }
        )
    return rows


def _kept_rows(concepts: Sequence[ConceptEntry], ledger: Ledger) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    pairs: list[dict[str, str]] = []
    memberships: list[dict[str, str]] = []
    for concept in concepts:
        for candidate in ledger.kept(concept.key):
            pair_id = make_pair_id(candidate.unsafe_text, candidate.safe_text)
            pairs.append({"pair_id": pair_id, "unsafe_text": candidate.unsafe_text, "safe_text": candidate.safe_text})
            memberships += [
                {"pair_id": pair_id, "category": category, "concept": concept.concept, "source": concept.source}
                for category in concept.categories
            ]
    return pairs, memberships


def _prompt_rows(concepts: Sequence[ConceptEntry], ledger: Ledger) -> list[dict[str, object]]:
    """Return the pairs as an import of them would: safe texts are neighbours, near duplicates share a split."""
    prompts: list[FilePrompt] = []
    owners: list[ConceptEntry] = []
    for concept in concepts:
        for candidate in ledger.kept(concept.key):
            unsafe = FilePrompt(
                row=len(prompts) // 2 + 1,
                text=candidate.unsafe_text,
                side="unsafe",
                pair_id=make_pair_id(candidate.unsafe_text, candidate.safe_text),
                categories=concept.categories,
                concept=concept.concept,
                split="test" if concept.ood else "",
                prompt_set="ood" if concept.ood else "",
            )
            prompts += [unsafe, replace(unsafe, text=candidate.safe_text, side="safe", prompt_set="")]
            owners += [concept, concept]
    rows = prompt_rows(
        prompts,
        [[(category, category) for category in prompt.categories] for prompt in prompts],
        assign_splits(prompts, "auto"),
        source="",
        format_name="written",
        file_sha256=sha256_of([prompt.pair_id for prompt in prompts]),
    )
    sources = [concept.source for concept in owners for _ in concept.categories]
    return [{**row, "source": source} for row, source in zip(rows, sources, strict=True)]


def _reject_rows(concepts: Sequence[ConceptEntry], ledger: Ledger) -> list[dict[str, object]]:
    return [
        {
            "concept": concept.concept,
            "attempt": verdict.attempt,
            "line": verdict.line,
            "reason": str(verdict.reason),
            "text": verdict.text,
        }
        for concept in concepts
        for verdict in ledger.verdicts(concept.key)
        if verdict.reason is not None
    ]
