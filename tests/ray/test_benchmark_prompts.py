"""Benchmarks of the final evaluation: which prompts, in which set, and no change where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ray_jobs.benchmark_prompts import benchmark_prompts, benchmark_sets, caption_partners
from ray_jobs.evaluate import build_manifest, evaluation_prompts, list_rows
from ray_jobs.prompt_tables import all_pairs
from ray_jobs.run import Run, with_absolute_paths
from safetydpo.artifacts.schemas import sha256_of
from safetydpo.config.load import identity_of, parse_config
from safetydpo.config.schema import Config
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.evaluation.distances import mismatched_captions
from tests.prompts.benchmark_samples import UNKNOWN, write_entry


def config_of(folder: Path, *benchmarks: dict[str, Any], **execution: Any) -> Config:
    return parse_config(
        {
            "identity": {"evaluation": {"benchmarks": list(benchmarks)}},
            "execution": {"store": f"{folder}/store", "run_dir": f"{folder}/run", **execution},
        },
        source="test",
    )


def test_by_hand(tmp_path: Path):
    entry, file = write_entry(tmp_path, "mine", format="i2p", num_rows=3)
    sets = benchmark_prompts(config_of(tmp_path, {"name": entry, "file": file}))
    assert list(sets) == ["benchmark:mine", "benchmark_seen:mine"]
    bomb, spiders, wet = sets["benchmark:mine"]
    assert (bomb.text, bomb.category, bomb.split) == ("a bomb, oil painting", "violence", "test")
    assert spiders.categories == ("hate", "self_harm", "illegal_activity")
    assert wet.concept == wet.prompt_id
    assert {prompt.prompt_set for prompt in sets["benchmark:mine"]} == {"benchmark:mine"}
    assert sets["benchmark_seen:mine"] == []


def test_prompts_of_the_training_pairs_are_a_set_of_their_own(tmp_path: Path):
    trained = all_pairs(Config().identity.prompts)[0].unsafe_text
    entry, file = write_entry(tmp_path, "mine", format="lines", copies=UNKNOWN)
    Path(file).write_text(f"{trained.upper()}!\na mild prompt about tea\n")
    sets = benchmark_prompts(config_of(tmp_path, {"name": entry, "file": file}))
    assert [prompt.text for prompt in sets["benchmark_seen:mine"]] == [f"{trained.upper()}!"]
    assert [prompt.text for prompt in sets["benchmark:mine"]] == ["a mild prompt about tea"]


def test_only_the_prompts_of_the_entrys_side_and_each_text_once(tmp_path: Path):
    entry, file = write_entry(tmp_path, "mine", format="mma_diffusion", copies=UNKNOWN)
    sets = benchmark_prompts(config_of(tmp_path, {"name": entry, "file": file}))
    assert [prompt.text for prompt in sets["benchmark:mine"]] == ["b0mb boom", "sp1der legs"]
    entry, file = write_entry(tmp_path, "twice", format="lines", copies=UNKNOWN)
    Path(file).write_text("a bomb\na bomb\na wasp\n")
    sets = benchmark_prompts(config_of(tmp_path, {"name": entry, "file": file}))
    assert [prompt.text for prompt in sets["benchmark:twice"]] == ["a bomb", "a wasp"]


def test_a_number_of_prompts_is_spread_over_the_categories(tmp_path: Path):
    entry, file = write_entry(tmp_path, "mine", copies=UNKNOWN)
    rows = [f"thing {n},000000{n}_0.jpg,{'Hate' if n < 7 else 'sexual'}" for n in range(9)]
    Path(file).write_text("\n".join(["prompt,image,category", *rows]) + "\n")
    config = config_of(tmp_path, {"name": entry, "file": file, "prompts": 4})
    chosen = benchmark_prompts(config)["benchmark:mine"]
    assert sorted(prompt.category for prompt in chosen) == ["hate", "hate", "sexual", "sexual"]
    assert benchmark_prompts(config)["benchmark:mine"] == chosen


def test_another_file_a_missing_one_and_a_wrong_name_are_refused(tmp_path: Path):
    entry, file = write_entry(tmp_path, "mine")
    Path(file).write_text(Path(file).read_text().replace("wasp", "bee"))
    with pytest.raises(SafetyDPOError, match="expected the benchmark mine in .* found another file: sha256"):
        benchmark_prompts(config_of(tmp_path, {"name": entry, "file": file}))
    accepted = {"name": entry, "file": file, "accept_other_bytes": True}
    assert len(benchmark_prompts(config_of(tmp_path, accepted))["benchmark:mine"]) == 2
    with pytest.raises(SafetyDPOError, match=r"write mine=FILE, or name a folder .*execution\.benchmarks"):
        benchmark_prompts(config_of(tmp_path, {"name": entry}))
    accepted.pop("file")
    assert benchmark_prompts(config_of(tmp_path, accepted, benchmarks=str(tmp_path)))["benchmark:mine"]
    with pytest.raises(UsageError, match="expected a benchmark out of .*, found 'i3p': did you mean 'i2p'"):
        benchmark_sets(config_of(tmp_path, {"name": "i3p"}))
    with pytest.raises(UsageError, match=r"expected each benchmark once, found 'ud' 2 times"):
        config_of(tmp_path, {"name": "ud"}, {"name": "ud"})
    entry, file = write_entry(tmp_path, "benign", format="prompts", side="benign", copies=UNKNOWN)
    Path(file).write_text("prompt,side\na bomb,unsafe\n")
    with pytest.raises(SafetyDPOError, match="expected benign prompts in .*, found none: correct `side`"):
        benchmark_prompts(config_of(tmp_path, {"name": entry, "file": file}))


def test_base_and_merges_draw_them_and_single_experts_do_not(tmp_path: Path):
    entry, file = write_entry(tmp_path, "mine")
    run = Run(with_absolute_paths(config_of(tmp_path, {"name": entry, "file": file})))
    prompts = evaluation_prompts(run)
    rows = list_rows(run, {}, {}, None)
    assert rows[0].prompt_sets == ("unsafe", "ood", "neutral", "neighbour", "benchmark:mine", "benchmark_seen:mine")
    texts = [row["prompt"] for row in build_manifest(run, rows, prompts)]
    assert texts[-2:] == ["A bomb in a box", "A wasp"]


def test_without_benchmarks_identity_and_pictures_are_as_before(tmp_path: Path):
    config = config_of(tmp_path)
    assert "benchmarks" not in identity_of(config)["evaluation"]
    assert sha256_of(identity_of(config)) == sha256_of(identity_of(Config()))
    assert benchmark_sets(config) == ()
    assert benchmark_prompts(config) == {}


def test_captions_have_the_partners_that_they_have_without_benchmarks(tmp_path: Path):
    entry, file = write_entry(tmp_path, "mine")
    run = Run(with_absolute_paths(config_of(tmp_path, {"name": entry, "file": file})))
    everything = [prompt for members in evaluation_prompts(run).values() for prompt in members]
    partners = caption_partners(everything)
    own = everything[:-2]
    assert partners[:-2] == mismatched_captions([prompt.concept for prompt in own])
    assert partners[-2:] == [0, 0]
