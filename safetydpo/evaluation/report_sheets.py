"""Which pictures the report shows: the worst of each group first, then a seeded draw from the rest, never a choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from safetydpo.evaluation.attack_metrics import ATTACK_PREFIX
from safetydpo.evaluation.benchmark_metrics import is_of_benchmark
from safetydpo.evaluation.outcomes import ImageOutcome
from safetydpo.evaluation.report_records import ContactSheet, SheetPair, SheetPicture
from safetydpo.evaluation.report_text import failure_kind, format_count, plain_name
from safetydpo.seeding import derive_numpy

PAIRS_PER_SHEET = 12
MOST_PAIRS = 240
"""Pairs of pictures on a page; many groups get fewer each."""
TITLES = {
    "ood": "Unseen concepts",
    "neutral": "Neutral prompts",
    "neighbour": "Neighbours: harmless look-alikes",
}
HARMFUL = ("unsafe", "ood")
FINE = 5
"""Badness of a picture that nothing speaks against."""
PictureKey = tuple[str, str, int]
"""Row name, prompt id, seed."""


@dataclass(frozen=True)
class ChosenPair:
    """One prompt and seed of a sheet: what is veiled and why it is shown."""

    prompt_id: str
    seed: int
    prompt: str
    veil_base: bool
    veil_aligned: bool
    remark: str


@dataclass(frozen=True)
class ChosenSheet:
    """A contact sheet before its pictures are read."""

    title: str
    is_unsafe: bool
    rule: str
    pairs: tuple[ChosenPair, ...]


def choose_sheets(outcomes: Sequence[ImageOutcome], *, aligned: str, base: str, run_seed: int) -> list[ChosenSheet]:
    """Return one sheet per category, and one each of unseen concepts, neutral prompts, neighbours and attacks.

    Half of a sheet are its worst pictures of the row `aligned`: judged unsafe, failed, unrecognisable, not what was
    asked. The others are drawn with a generator of `run_seed` from all that remain.
    """
    of_base: dict[tuple[str, str, int], ImageOutcome] = {
        (o.prompt_set, o.prompt_id, o.seed): o for o in outcomes if o.row_name == base
    }
    groups: dict[str, list[ImageOutcome]] = {}
    for outcome in outcomes:
        # Pictures of a benchmark are many, and of prompts that only their licence's readers may see.
        if outcome.row_name == aligned and not is_of_benchmark(outcome.prompt_set):
            groups.setdefault(_title(outcome), []).append(outcome)
    each = min(PAIRS_PER_SHEET, max(1, MOST_PAIRS // max(len(groups), 1)))
    return [
        _choose(title, members, of_base, most=each, run_seed=run_seed)
        for title, members in list(groups.items())[:MOST_PAIRS]
    ]


def picture_keys(sheets: Sequence[ChosenSheet], *, aligned: str, base: str) -> list[PictureKey]:
    """Return what has to be read for these sheets."""
    return [(row, pair.prompt_id, pair.seed) for sheet in sheets for pair in sheet.pairs for row in (base, aligned)]


def fill_sheets(
    sheets: Sequence[ChosenSheet], pictures: Mapping[PictureKey, bytes | None], *, aligned: str, base: str
) -> list[ContactSheet]:
    """Return the sheets with their pictures; one that is missing or None is shown as failed."""
    return [
        ContactSheet(
            title=sheet.title,
            aligned_name=aligned,
            is_unsafe=sheet.is_unsafe,
            rule=sheet.rule,
            pairs=tuple(
                SheetPair(
                    prompt=pair.prompt,
                    seed=pair.seed,
                    base=SheetPicture(pictures.get((base, pair.prompt_id, pair.seed)), unsafe=pair.veil_base),
                    aligned=SheetPicture(pictures.get((aligned, pair.prompt_id, pair.seed)), unsafe=pair.veil_aligned),
                    remark=pair.remark,
                )
                for pair in sheet.pairs
            ),
        )
        for sheet in sheets
    ]


def badness(outcome: ImageOutcome) -> tuple[int, str]:
    """Return how bad a picture is (0 = worst, `FINE` = nothing speaks against it), and in which way."""
    audit, select = outcome.verdicts.get("audit"), outcome.verdicts.get("select")
    if audit is not None and audit.unsafe:
        return 0, "judged unsafe"
    if outcome.failure is not None:
        return 1, f"failed: {failure_kind(outcome.failure)}"
    if select is not None and select.unsafe:
        return 2, "unsafe to the select judge only"
    if audit is not None and audit.unrecognisable:
        return 3, "unrecognisable"
    # A judge may not know; then nothing is said against the picture.
    if audit is not None and not _is_harmful(outcome.prompt_set) and audit.concept_found is False:
        return 4, "not what was asked"
    return FINE, ""


def _title(outcome: ImageOutcome) -> str:
    if outcome.prompt_set == "unsafe":
        return plain_name(outcome.category or "unsafe prompts")
    attack = outcome.prompt_set.removeprefix(ATTACK_PREFIX)
    return TITLES[outcome.prompt_set] if attack == outcome.prompt_set else f"Attack: {attack.replace('_', ' ')}"


def _is_harmful(prompt_set: str) -> bool:
    return prompt_set in HARMFUL or prompt_set.startswith(ATTACK_PREFIX)


def _choose(
    title: str,
    members: Sequence[ImageOutcome],
    of_base: Mapping[tuple[str, str, int], ImageOutcome],
    *,
    most: int,
    run_seed: int,
) -> ChosenSheet:
    ordered = sorted(members, key=lambda o: (o.prompt_set, o.prompt_id, o.seed))
    generator = derive_numpy(run_seed, "report.sheet", title)
    ranked = [ordered[int(place)] for place in generator.permutation(len(ordered))]
    bad = sorted((o for o in ranked if badness(o)[0] < FINE), key=lambda o: badness(o)[0])
    # A sheet that shows all of its pictures shows the bad ones first too.
    worst = bad if len(ordered) <= most else bad[: (most + 1) // 2]
    shown = {id(o) for o in worst}
    # Drawn anew: the bad ones left over stand late in the first order, and would hardly be drawn from it.
    rest = [
        ordered[int(place)] for place in generator.permutation(len(ordered)) if id(ordered[int(place)]) not in shown
    ]
    drawn = rest[: most - len(worst)]
    pairs = [_pair(o, of_base) for o in (*worst, *drawn)]
    return ChosenSheet(
        title=title,
        is_unsafe=_is_harmful(members[0].prompt_set),
        rule=_rule(len(pairs), len(members), worst=len(worst), bad=len(bad), seed=run_seed),
        pairs=tuple(pairs),
    )


def _rule(shown: int, total: int, *, worst: int, bad: int, seed: int) -> str:
    against = (
        "the one with something against it" if bad == 1 else f"the {format_count(bad)} with something against them"
    )
    if shown == total:
        return f"All {total} pairs, {against} first." if bad else f"All {total} pairs."
    if not bad:
        return f"{shown} of {format_count(total)} pairs, drawn at random (seed {seed}); nothing speaks against any."
    which = against if worst == bad else f"{worst} of {against}"
    return (
        f"{shown} of {format_count(total)} pairs: {which}, worst first, then {shown - worst} drawn at random "
        f"(seed {seed}) from the rest."
    )


def _pair(outcome: ImageOutcome, of_base: Mapping[tuple[str, str, int], ImageOutcome]) -> ChosenPair:
    harmful = _is_harmful(outcome.prompt_set)
    before = of_base.get((outcome.prompt_set, outcome.prompt_id, outcome.seed))
    return ChosenPair(
        prompt_id=outcome.prompt_id,
        seed=outcome.seed,
        prompt=outcome.text,
        veil_base=harmful or before is None or _is_doubtful(before),
        veil_aligned=_is_doubtful(outcome),
        remark=badness(outcome)[1],
    )


def _is_doubtful(outcome: ImageOutcome) -> bool:
    """Return whether a judge calls the picture unsafe, or none has judged it: unjudged never counts as safe."""
    return not outcome.verdicts or any(verdict.unsafe for verdict in outcome.verdicts.values())
