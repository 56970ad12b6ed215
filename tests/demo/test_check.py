"""The acceptance's arithmetic on made-up answers."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from safetydpo.demo.build import main
from safetydpo.demo.check import (
    CheckPrompt,
    list_failures,
    list_weak_wordings,
    make_sheet,
    summarise_wordings,
    write_check_prompts,
)
from safetydpo.demo.concepts import CONCEPTS, get_concept


def test_check_prompts_go_round_all_wordings() -> None:
    """Two rounds of 129 x 8 = 2,064 prompts in 24 wordings, 84 to 87 of each; every name of every concept occurs."""
    prompts = write_check_prompts()
    assert len({prompt.text for prompt in prompts}) == len(prompts) == 2064
    counts = Counter((prompt.name_index, prompt.template_index) for prompt in prompts)
    assert len(counts) == 24
    assert min(counts.values()) >= 84
    assert max(counts.values()) <= 87
    assert len({(prompt.concept.key, prompt.name_index) for prompt in prompts}) == 4 * len(CONCEPTS)


def make_prompts() -> list[CheckPrompt]:
    return [
        CheckPrompt("a", get_concept("bomb"), "blue", 0, 0),
        CheckPrompt("b", get_concept("bomb"), "blue", 0, 1),
        CheckPrompt("c", get_concept("bomb"), "blue", 0, 1),
        CheckPrompt("d", get_concept("dog"), "blue", 1, 1),
    ]


def test_rates_by_wording_by_hand() -> None:
    """Name 0: 2 of 3 found, all unsafe prompts; template 1: 2 of 3 found; the dog counts in no base IP."""
    found, unsafe = np.array([True, False, True, True]), np.array([True, False, False, True])
    with pytest.warns(RuntimeWarning):  # names 2 and 3 stand in no row here
        measured = summarise_wordings(make_prompts(), found, unsafe)
    assert measured["found_name_0"] == pytest.approx(2 / 3)
    assert measured["found_name_1"] == 1.0
    assert measured["found_template_0"] == 1.0
    assert measured["found_template_1"] == pytest.approx(2 / 3)
    assert measured["base_ip_name_0"] == pytest.approx(1 / 3)
    assert measured["found_kind_synonym"] == 1.0


def test_weak_wordings_by_hand() -> None:
    """The bomb's name 0 shows something unsafe in 1 of 3 pictures, below one half."""
    assert list_weak_wordings(make_prompts(), np.array([True, False, False, False])) == ["bomb/0"]
    assert list_weak_wordings(make_prompts(), np.array([True, True, False, False])) == []


def test_failures_name_the_number_and_its_floor() -> None:
    measured = {"background_select": 0.99, "agreement_concept": 0.9, "found_name_0": 0.96, "found_template_1": 0.97}
    assert list_failures(measured) == ["agreement_concept 0.900 < 0.95", "found_name_0 0.960 < 0.97"]


def test_sheet_lays_out_rows_of_sixteen() -> None:
    """17 pictures of 32 pixels: two rows, 16 x 32 x 3 = 1536 wide, 2 x 32 x 3 = 192 high; the rest is white."""
    pictures = np.zeros((17, 32, 32, 3), dtype=np.uint8)
    sheet = make_sheet(pictures)
    assert sheet.size == (1536, 192)
    assert np.asarray(sheet).mean() == pytest.approx(255 * 15 / 32)


def test_unknown_part_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["everything"])
    assert error.value.code == 2
    assert "invalid choice: 'everything'" in capsys.readouterr().err


def test_a_failing_part_ends_in_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from safetydpo.demo import build
    from safetydpo.errors import SafetyDPOError

    def fail() -> None:
        raise SafetyDPOError("expected light, found none. Switch it on.")

    monkeypatch.setattr(build, "list_parts", lambda *_, **__: {"vae": fail})
    assert build.main(["vae"]) == 1
    assert capsys.readouterr().err == "error: expected light, found none. Switch it on.\n"


@pytest.mark.parametrize("arguments", [["check", "--steps", "0"], ["vae", "--steps", "6"]])
def test_steps_are_of_the_check_alone(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert f"expected --steps of at least 1 with the part check, found {arguments[2]} with" in capsys.readouterr().err
