from __future__ import annotations

from dataclasses import replace

from safetydpo.evaluation.outcomes import ImageOutcome
from safetydpo.evaluation.report_sheets import (
    MOST_PAIRS,
    PAIRS_PER_SHEET,
    badness,
    choose_sheets,
    fill_sheets,
    picture_keys,
)
from tests.evaluation.synthetic import make_outcome, make_outcomes, make_verdict

SAFE, UNSAFE = make_verdict(), make_verdict(unsafe=True)


def make_rows(
    count: int, *, bad: int = 0, prompt_set: str = "unsafe", category: str | None = "hate"
) -> list[ImageOutcome]:
    """`count` pictures of base and aligned; the audit judge calls the aligned ones below `bad` unsafe."""
    rows = []
    for number in range(count):
        common = {"prompt_set": prompt_set, "category": category}
        rows.append(make_outcome(number, audit=UNSAFE, select=UNSAFE, **common))  # type: ignore[arg-type]
        verdict = UNSAFE if number < bad else SAFE
        rows.append(make_outcome(number, row_name="best", audit=verdict, select=SAFE, **common))  # type: ignore[arg-type]
    return rows


def choose(outcomes: list[ImageOutcome], seed: int = 0):  # type: ignore[no-untyped-def]
    return choose_sheets(outcomes, aligned="best", base="base", run_seed=seed)


def test_badness_by_hand() -> None:
    """Worst is what the judge of the result calls unsafe; what a judge does not know is not held against a picture."""
    outcome = make_outcome(1, prompt_set="neutral", category=None, audit=SAFE, select=SAFE)
    assert badness(outcome) == (5, "")
    assert badness(replace(outcome, verdicts={"audit": UNSAFE, "select": SAFE})) == (0, "judged unsafe")
    assert badness(replace(outcome, verdicts={}, failure="corrupt: no PNG")) == (1, "failed: corrupt")
    assert badness(replace(outcome, verdicts={"audit": SAFE, "select": UNSAFE}))[0] == 2
    assert badness(replace(outcome, verdicts={"audit": make_verdict(mush=True)})) == (3, "unrecognisable")
    assert badness(replace(outcome, verdicts={"audit": make_verdict(found=False)})) == (4, "not what was asked")
    assert badness(replace(outcome, prompt_set="unsafe", verdicts={"audit": make_verdict(found=False)}))[0] == 5


def test_half_of_a_sheet_are_its_worst_and_the_rest_is_drawn() -> None:
    (sheet,) = choose(make_rows(100, bad=20))
    assert len(sheet.pairs) == PAIRS_PER_SHEET == 12
    assert [pair.remark for pair in sheet.pairs[:6]] == ["judged unsafe"] * 6
    assert sheet.rule == (
        "12 of 100 pairs: 6 of the 20 with something against them, worst first, then 6 drawn at random (seed 0) from "
        "the rest."
    )
    drawn = {pair.prompt_id for pair in sheet.pairs[6:]}
    assert drawn != {pair.prompt_id for pair in choose(make_rows(100, bad=20), seed=1)[0].pairs[6:]}


def test_few_bad_ones_are_all_shown() -> None:
    (sheet,) = choose(make_rows(100, bad=2))
    assert [pair.remark for pair in sheet.pairs] == ["judged unsafe"] * 2 + [""] * 10
    assert sheet.rule.startswith("12 of 100 pairs: the 2 with something against them, worst first, then 10 drawn")
    assert choose(make_rows(100))[0].rule == "12 of 100 pairs, drawn at random (seed 0); nothing speaks against any."
    assert choose(make_rows(5, bad=1))[0].rule == "All 5 pairs, the one with something against it first."
    assert choose(make_rows(5))[0].rule == "All 5 pairs."


def test_the_choice_does_not_depend_on_the_order_of_rows() -> None:
    outcomes = make_rows(100, bad=3)
    assert choose(outcomes) == choose(outcomes[::-1])


def test_the_drawn_half_is_no_better_than_what_it_is_drawn_from() -> None:
    """20 of 100 are bad, 6 are taken as worst: of the other 94 a draw of 6 holds 14/94 x 6 = 0.89 bad ones on average.

    Over 200 seeds the mean has a standard error of about 0.06.
    """
    counts = [
        sum(pair.remark != "" for pair in choose(make_rows(100, bad=20), seed=n)[0].pairs[6:]) for n in range(200)
    ]
    assert abs(sum(counts) / len(counts) - 14 / 94 * 6) < 0.25


def test_groups_of_a_whole_evaluation() -> None:
    sheets = choose_sheets(make_outcomes(), aligned="searched", base="base", run_seed=0)
    titles = [sheet.title for sheet in sheets]
    assert titles[:3] == ["hate", "sexual", "violence"]
    assert titles[-3:] == ["Unseen concepts", "Neutral prompts", "Neighbours: harmless look-alikes"]
    assert [sheet.is_unsafe for sheet in sheets] == [True] * 8 + [False] * 2


def test_what_is_veiled() -> None:
    """The base of an unsafe prompt always; another picture if a judge calls it unsafe, or nobody judged it."""
    (sheet,) = choose(make_rows(5, bad=1))
    assert [pair.veil_base for pair in sheet.pairs] == [True] * 5
    assert [pair.veil_aligned for pair in sheet.pairs] == [True] + [False] * 4
    harmless = make_rows(3, bad=1, prompt_set="neutral", category=None)
    harmless[0] = replace(harmless[0], verdicts={"audit": SAFE, "select": SAFE})
    harmless[5] = replace(harmless[5], verdicts={})
    (sheet,) = choose(harmless)
    veils = {pair.prompt_id: (pair.veil_base, pair.veil_aligned) for pair in sheet.pairs}
    assert veils == {"neutral-0": (False, True), "neutral-1": (True, False), "neutral-2": (True, True)}


def test_a_page_of_many_groups_stays_bounded() -> None:
    outcomes = [o for n in range(100) for o in make_rows(4, category=f"category_{n}")]
    outcomes = [replace(o, prompt_id=f"{o.category}-{o.prompt_id}") for o in outcomes]
    sheets = choose(outcomes)
    assert len(sheets) == 100
    assert sum(len(sheet.pairs) for sheet in sheets) <= MOST_PAIRS


def test_pictures_are_filled_in_and_a_lost_one_is_none() -> None:
    chosen = choose(make_rows(2))
    keys = picture_keys(chosen, aligned="best", base="base")
    assert len(keys) == len(set(keys)) == 4
    pictures = {key: key[0].encode() for key in keys[:-1]}
    (sheet,) = fill_sheets(chosen, pictures, aligned="best", base="base")
    assert [pair.base.png for pair in sheet.pairs] == [b"base"] * 2
    assert [pair.aligned.png for pair in sheet.pairs] == [b"best", None]
    assert sheet.rule == "All 2 pairs."
