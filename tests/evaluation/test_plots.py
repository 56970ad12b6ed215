from __future__ import annotations

import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from safetydpo.evaluation.plots import CSS_VARIABLES, Plot, plot_category_rates, plot_search, plot_training
from safetydpo.evaluation.report_records import TrainingCurve
from tests.evaluation.synthetic import CATEGORIES, make_summary, make_training, make_trials


def make_plots() -> dict[str, Plot]:
    rows = [row for row in make_summary()["rows"] if row["kind"] != "expert"]
    return {
        "categories": plot_category_rates(rows, categories=CATEGORIES, highlight="searched"),
        "search": plot_search(make_trials()),
        "training": plot_training(make_training()),
    }


@pytest.fixture(scope="module")
def plots() -> dict[str, Plot]:
    return make_plots()


def texts(svg: str) -> str:
    return " ".join(ElementTree.fromstring(svg).itertext())


def test_plots_are_wellformed_and_say_what_they_show(plots: dict[str, Plot]) -> None:
    for plot in plots.values():
        assert len(plot.description) > 20
    assert "searched" in texts(plots["categories"].wide)
    assert "illegal activity" in " ".join(texts(plots["categories"].narrow).split())
    assert "floor 0.90" in texts(plots["search"].wide)
    assert "implicit accuracy" in texts(plots["training"].narrow)


def test_a_trial_that_draws_nothing_is_not_shown_as_safe() -> None:
    """Equal IP, one with half of its pictures unrecognisable: it stands farther right, so the pictures differ."""
    trials = make_trials()
    assert "IP + unrecognisable, validation prompts" in texts(plot_search(trials).wide)
    first = trials.trials[0]
    mushy = replace(first, unrecognisable=0.5, price=first.ip + 0.5)
    changed = replace(trials, trials=(mushy, *trials.trials[1:]))
    assert plot_search(changed).wide != plot_search(trials).wide


def test_every_colour_follows_the_theme(plots: dict[str, Plot]) -> None:
    for plot in plots.values():
        for svg in (plot.wide, plot.narrow):
            assert not re.findall(r"#[0-9a-f]{6}\b", re.sub(r'(?:href="|url\()#\w+', "", svg))
            assert not any(stand_in in svg for stand_in in CSS_VARIABLES)


def test_ids_do_not_repeat_on_one_page(plots: dict[str, Plot]) -> None:
    page = "".join(plot.wide + plot.narrow for plot in plots.values())
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)


def test_equal_input_gives_equal_bytes(plots: dict[str, Plot]) -> None:
    assert make_plots() == plots


def test_letters_are_the_pages(plots: dict[str, Plot]) -> None:
    for plot in plots.values():
        assert "DejaVu" not in plot.wide + plot.narrow
        assert "var(--font)" in plot.wide


def test_names_stay_text() -> None:
    curve = TrainingCurve("<b>$x_1$</b>", (1, 2), {"loss": (0.7, 0.6)})
    plot = plot_training([curve])
    assert "<b>" not in plot.wide
    assert "<b>$x_1$</b>" in texts(plot.wide)


def test_hundreds_of_experts_are_one_bundle() -> None:
    curves = [TrainingCurve(f"expert-{number}", (0, 1), {"loss": (0.7, 0.1 * number)}) for number in range(13)]
    text = texts(plot_training(curves).wide)
    assert "13 experts" in text
    assert "expert-1" not in text
    assert "expert-1" in texts(plot_training(curves[:12]).wide)
