"""Every shipped config parses, says how to run it, and asks for nothing that is not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_jobs.verify_pairs import check_picture_sides
from safetydpo.config.load import load_config
from safetydpo.demo.prompts import write_prompt_pairs, write_prompts
from tests.architecture.source import ROOT

# A concept list is no config; tests/prompts/test_concepts.py reads it.
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.yaml") if not path.name.startswith("concepts-"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_parses_and_its_name_is_the_files(path: Path):
    assert load_config(path).name == path.stem


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_its_header_names_command_hardware_and_hours(path: Path):
    header = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    for word in ("Command:", "Hardware:", "Hours:"):
        assert any(line.startswith(f"# {word}") for line in header), f"no line '# {word}' in {path.name}"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_demo_world_holds_as_many_prompts_as_it_asks_for(path: Path):
    identity = load_config(path).identity
    if identity.prompts.source != "demo":
        pytest.skip("its prompts are the user's own")
    first = [pair.unsafe.categories[0] for pair in write_prompt_pairs()]
    validation = [row.category for row in write_prompts("validation", "unsafe")]
    test = [row.category for row in write_prompts("test", "unsafe")]
    for category in identity.prompts.categories:
        assert identity.prompts.pairs_per_category <= first.count(category)
        assert identity.search.prompts_per_category <= validation.count(category)
        assert identity.evaluation.prompts_per_category <= test.count(category)
    assert identity.prompts.retention_prompts <= len(write_prompts("train", "neutral"))
    assert identity.search.neutral_prompts <= len(write_prompts("validation", "neutral"))
    assert identity.evaluation.neutral_prompts <= len(write_prompts("test", "neutral"))
    assert identity.evaluation.neighbour_prompts <= len(write_prompts("test", "neighbour"))
    assert identity.evaluation.ood_prompts <= len(write_prompts("test", "unsafe", ood=True))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_its_judges_take_its_pictures(path: Path):
    identity = load_config(path).identity
    check_picture_sides(identity.pairs, identity.sampler)
    if "open_nsfw" in identity.pairs.judges:
        assert identity.prompts.categories == ("sexual",), "that judge knows nothing else"


def test_the_shipped_ones_are_there():
    assert {"smoke", "demo", "evidence", "sd15", "sd21", "sdxl", "sd35", "flux"} <= {path.stem for path in CONFIGS}
