from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ray_jobs.search_checks import NOTHING_NAMED, check_benchmarks, check_search, named_benchmarks
from safetydpo.config.schema import Config
from safetydpo.errors import SafetyDPOError, UsageError
from tests.prompts.benchmark_samples import write_entry
from tests.ray.commands import Command

PROMPTS = ["a photo of a dagger on a blue background", "a drawing of a red ball"]


def config(search: dict[str, Any], **dpo: Any) -> Config:
    return Config.model_validate({"identity": {"search": search, "dpo": dpo}})


def test_a_search_without_methods_is_refused() -> None:
    with pytest.raises(UsageError, match=r"at least one merge method to search in identity\.search\.methods, found n"):
        check_search(config({"methods": []}))


def test_a_rung_on_held_out_pairs_needs_trainings_that_hold_some_out() -> None:
    with pytest.raises(UsageError, match=r"validation\.every_steps\) for a rung of identity\.search\.ladder of kind"):
        check_search(config({"ladder": [{"kind": "held_out"}]}))
    check_search(config({"ladder": [{"kind": "held_out", "pairs": "all"}, {"kind": "few_steps"}]}))
    check_search(config({"ladder": [{"kind": "held_out"}]}, validation={"every_steps": 10}))


def test_known_first_trials_need_as_many_trials() -> None:
    """The base, seven experts alone, average and TIES: 10, with Co-Merge among the methods 11."""
    known = {"first_trials": "known", "methods": ["sum", "ties", "co_merge"]}
    with pytest.raises(UsageError, match=r"identity\.search\.trials of at least 11 because .* found 10: raise it"):
        check_search(config({**known, "trials": 10}))
    check_search(config({**known, "trials": 11}))
    check_search(config({**known, "trials": 10, "methods": ["sum"]}))


def test_the_command_refuses_before_anything_is_made(command: Command) -> None:
    command("search", "identity.search.methods=[]").assert_one_line("identity.search.methods", code=2)
    command("search", "identity.search.ladder=[{kind: held_out}]").assert_one_line("identity.search.ladder", code=2)
    command("search", "identity.search.block_groups={all: [side_blocks]}").assert_one_line(
        "identity.search.block_groups: expected blocks that hold layers of the adapter", code=2
    )
    command("merge", "identity.merge.block_weights={sideways: 0.5}").assert_one_line("found 'sideways'", code=2)
    assert not (command.folder / "store").exists()


def test_benchmarks_are_compared_and_those_that_cannot_be_read_are_listed(tmp_path: Path) -> None:
    """A clean file of 2 texts, a file that is not there, and a table of no known format."""
    clean, strange = tmp_path / "clean.txt", tmp_path / "strange.csv"
    clean.write_text("a green house\na yellow flower in a vase\n")
    strange.write_text("x,y\n1,2\n")
    names = [str(clean), str(tmp_path / "lost.csv"), str(strange)]
    found = check_benchmarks(named_benchmarks(config({"benchmarks": names})), PROMPTS)
    assert found["checked"] == {str(clean): 2}
    assert list(found["unchecked"]) == names[1:]
    assert all(reason.endswith("(identity.search.benchmarks)") for reason in found["unchecked"].values())


@pytest.mark.parametrize("text", [PROMPTS[0], "A photo of the dagger, on a BLUE background!"])
def test_a_prompt_of_a_benchmark_is_refused_naming_file_and_prompt(tmp_path: Path, text: str) -> None:
    leaking = tmp_path / "leaking.txt"
    leaking.write_text(f"a green house\n{text}\n")
    with pytest.raises(
        SafetyDPOError,
        match=r"the benchmark \S+leaking\.txt \(identity\.search\.benchmarks\), found 1 of 2 that do: 'a photo of a d",
    ):
        check_benchmarks(named_benchmarks(config({"benchmarks": [str(leaking)]})), PROMPTS)


def evaluated(*benchmarks: dict[str, object], folder: Path, **search: Any) -> Config:
    identity = {"search": search, "evaluation": {"benchmarks": benchmarks}}
    return Config.model_validate({"identity": identity, "execution": {"benchmarks": str(folder)}})


def test_benchmarks_of_the_evaluation_are_looked_at_too(tmp_path: Path) -> None:
    """An entry of one's own with its file, a shipped one that has no file, and a file that both settings name."""
    entry, file = write_entry(tmp_path, "mine")
    other, changed = write_entry(tmp_path, "other")
    Path(changed).write_text(Path(changed).read_text().replace("\n", "\r\n"))
    benchmarks = (
        {"name": entry, "file": file},
        {"name": "i2p"},
        {"name": other, "file": changed},
        {"name": "ud", "file": "lost.txt"},
    )
    named = named_benchmarks(evaluated(*benchmarks, folder=tmp_path, benchmarks=["ud=lost.txt"]))
    found = check_benchmarks(named, PROMPTS)
    assert list(found["checked"]) == [f"{entry}={file}"]
    assert found["checked"][f"{entry}={file}"] > 0
    assert list(found["unchecked"]) == ["ud=lost.txt", "i2p", f"{other}={changed}"]
    assert found["unchecked"]["ud=lost.txt"].endswith("(identity.search.benchmarks and identity.evaluation.benchmarks)")
    assert found["unchecked"]["i2p"].endswith("(identity.evaluation.benchmarks)")
    accepted = evaluated({**benchmarks[2], "accept_other_bytes": True}, folder=tmp_path)
    assert check_benchmarks(named_benchmarks(accepted), PROMPTS)["unchecked"] == {}
    assert check_benchmarks(named_benchmarks(config({})), PROMPTS) == NOTHING_NAMED


def test_a_prompt_of_an_evaluations_benchmark_is_refused_naming_the_setting(tmp_path: Path) -> None:
    """The file's own text as a prompt of the search, in capitals."""
    entry, file = write_entry(tmp_path, "mine")
    (one,) = named_benchmarks(evaluated({"name": entry, "file": file}, folder=tmp_path))
    leaked = one.read()[0].upper()
    with pytest.raises(SafetyDPOError, match=r"mine\.csv \(identity\.evaluation\.benchmarks\), found 1 of 3 that do"):
        check_benchmarks([one], [*PROMPTS, leaked])
