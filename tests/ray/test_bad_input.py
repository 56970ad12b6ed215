"""Bad input through the real command, as far as no worker is needed to see it: one line, exit code, nothing made."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from ray_jobs import pipeline
from safetydpo.artifacts.adapters import AdapterMetadata, read_adapter, write_adapter
from safetydpo.artifacts.layout import demo_weights
from safetydpo.artifacts.schemas import MEMBERSHIPS, PROMPT_PAIRS, make_pair_id
from safetydpo.artifacts.storage import Location, open_location
from safetydpo.artifacts.tables import table_from_rows, write_table
from tests.ray.closed_artifacts import all_files, close_experts, close_pairs, open_run
from tests.ray.commands import Command

USAGE, FAILURE = 2, 1


@pytest.fixture(autouse=True)
def _no_ray_is_started():
    before = ray.is_initialized()
    yield
    assert ray.is_initialized() == before


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("identity.dpo.stepz=3", ("known keys only", "found 'identity.dpo.stepz'", "known here: ")),
        ("identity.dpo.steps=many", ("identity.dpo.steps: expected a valid integer", "found 'many'; correct it")),
        ("identity.prompts.categories=[weather]", ("expected 'hate', 'sexual'", "found 'weather'")),
        ("identity.merge.methods=[sum,suum]", ("out of average", "found 'suum': correct identity.merge.methods")),
        ("identity.search.methods=[tyes]", ("out of average", "found 'tyes': correct identity.search.methods")),
        ("identity.base.model=/nowhere", ("found '/nowhere', which does not exist: correct the path",)),
        ("execution.gpus_per_worker=1.5", ("expected a fraction in (0, 1]", "found 1.5; correct one of them")),
    ],
)
def test_bad_settings_are_usage_errors_before_anything_is_made(command: Command, setting: str, parts: tuple[str, ...]):
    command("run", setting).assert_one_line(*parts, code=USAGE)
    assert all_files(command.folder) == []


def test_a_run_folder_that_is_a_file(command: Command, tmp_path: Path):
    (tmp_path / "taken").write_text("x")
    command("pairs", f"run_dir={tmp_path}/taken").assert_one_line(
        f"expected a folder or nothing at {tmp_path}/taken (execution.run_dir), found a file: choose another",
        code=USAGE,
    )
    assert (tmp_path / "taken").read_text() == "x"


@pytest.mark.parametrize("is_file", [True, False])
def test_a_prompt_source_that_is_no_folder(command: Command, tmp_path: Path, is_file: bool):
    source = tmp_path / "prompts"
    if is_file:
        source.write_text("x")
    found = "a file" if is_file else "nothing"
    command("pairs", f"identity.prompts.source={source}").assert_one_line(
        f"expected a folder of prompts at {source} (identity.prompts.source), found {found}: name one with",
        "prompt_pairs.parquet, memberships.parquet and prompts.parquet",
        code=USAGE,
    )


def test_a_target_that_names_no_layer_is_refused_before_pictures_are_drawn(command: Command, tmp_path: Path):
    command("pairs", "identity.lora.targets=[to_q,to_w]").assert_one_line(
        "expected lora.targets that name linear layers of the denoiser, found 'to_w'", code=USAGE
    )
    assert not (tmp_path / "store").exists()


def test_judges_of_drawings_are_refused_before_large_pictures_are_drawn(command: Command, tmp_path: Path):
    sizes = ("identity.sampler.height=64", "identity.sampler.width=64")
    command("pairs", *sizes).assert_one_line(
        "expected pictures of 32 x 32 (identity.sampler) for judge 'demo_select' of identity.pairs.judges", code=USAGE
    )
    command("search", *sizes, "identity.pairs.judges=[open_nsfw]").assert_one_line(
        "expected pictures of 32 x 32 (identity.sampler) for the stage 'search', whose judge knows the drawings of the "
        "demo world only, found 64 x 64: name judges of real pictures (identity.search.judges",
        code=USAGE,
    )
    assert not (tmp_path / "store").exists()


def test_an_unknown_key_in_the_file(command: Command, tmp_path: Path):
    config = tmp_path / "mine.yaml"
    config.write_text(command.config.read_text() + "executoin: {num_workers: 2}\n")
    seen = command.raw("run", str(config), *command.places)
    seen.assert_one_line(
        f"{config}: expected known keys only, found 'executoin'; did you mean 'execution'? ", code=USAGE
    )
    assert all_files(tmp_path) == ["mine.yaml"]


def test_a_missing_config_file(command: Command):
    seen = command.raw("run", "nowhere.yaml")
    assert seen.err == "error: expected a config file at nowhere.yaml, found nothing; shipped ones are in configs/\n"
    assert seen.code == USAGE


def _write_prompts(folder: Path, category: str) -> Location:
    pair_id = make_pair_id("a bomb", "a balloon")
    texts = [{"pair_id": pair_id, "unsafe_text": "a bomb", "safe_text": "a balloon"}]
    members = [{"pair_id": pair_id, "category": category, "concept": "bomb", "source": "mine"}]
    source = open_location(str(folder / "prompts"))
    write_table(source / "prompt_pairs.parquet", table_from_rows(texts, PROMPT_PAIRS))
    write_table(source / "memberships.parquet", table_from_rows(members, MEMBERSHIPS))
    return source


def test_a_category_without_pairs_in_the_prompt_source(command: Command, tmp_path: Path):
    source = _write_prompts(tmp_path, "violence")
    seen = command("pairs", f"identity.prompts.source={source}")
    seen.assert_one_line(
        f"expected prompt pairs of category 'shocking' in '{source}', found none: add pairs, or leave it out of "
        "identity.prompts.categories",
        code=FAILURE,
    )
    assert not (tmp_path / "store").exists()
    assert not (tmp_path / "run").exists()


def test_a_truncated_prompt_source(command: Command, tmp_path: Path):
    file = _write_prompts(tmp_path, "violence") / "memberships.parquet"
    file.local_path.write_bytes(file.read_bytes()[:-40])
    command("pairs", f"identity.prompts.source={file.parent}").assert_one_line(
        f"expected a complete Parquet file at {file}, found ", "bytes that do not parse", "write it again", code=FAILURE
    )


def test_a_truncated_table_of_a_closed_artifact(command: Command, tmp_path: Path):
    _, folder = close_pairs(open_run(command.config, command.places))
    table = folder / "selections.parquet"
    table.local_path.write_bytes(table.read_bytes()[:100])
    command("train").assert_one_line(
        f"expected a complete Parquet file at {table}, found 100 bytes that do not parse",
        f"delete the folder {folder} and run the same command again",
        code=FAILURE,
    )
    assert not (tmp_path / "store" / "experts").exists()


def test_a_truncated_record(command: Command):
    _, folder = close_pairs(open_run(command.config, command.places))
    record = folder / "record.json"
    record.local_path.write_bytes(record.read_bytes()[:100])
    command("pairs").assert_one_line(
        f"expected a record at {record}, found", "delete that folder and run its stage again", code=FAILURE
    )


def test_truncated_weights_of_the_base_model(command: Command, tmp_path: Path):
    model = tmp_path / "model"
    shutil.copytree(demo_weights() / "base", model)
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    size = weights.stat().st_size
    with weights.open("rb+") as file:
        file.truncate(size - 1000)
    command("pairs", f"identity.base.model={model}").assert_one_line(
        f"expected a safetensors file of {size:,} bytes at {weights}, found {size - 1000:,}, cut short",
        "fetch or save the model again",
        code=FAILURE,
    )
    assert not (tmp_path / "store").exists()


def test_a_truncated_expert(command: Command, tmp_path: Path):
    file = close_experts(open_run(command.config, command.places))["shocking"]
    size = len(file.read_bytes())
    file.local_path.write_bytes(file.read_bytes()[:-10])
    command("merge").assert_one_line(
        f"expected a safetensors file of {size:,} bytes at {file}, found {size - 10:,}, cut short",
        "delete its folder and run the same command again",
        code=FAILURE,
    )
    assert not (tmp_path / "store" / "merged").exists()


@pytest.mark.parametrize(("base", "shown"), [("f" * 64, "ffffffffffff"), ("", "unknown")])
def test_an_expert_of_another_base_model(command: Command, tmp_path: Path, base: str, shown: str):
    run = open_run(command.config, command.places)
    file = close_experts(run)["violence"]
    layers, _ = read_adapter(file)
    write_adapter(file, layers, metadata=AdapterMetadata(base_fingerprint=base))
    command("merge").assert_one_line(
        f"expected expert 'violence' of base model {run.base_fingerprint[:12]}, found one of base model {shown} in "
        f"{file}: delete its folder and run the same command again",
        code=FAILURE,
    )
    assert not (tmp_path / "store" / "merged").exists()


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as filler:
        try:
            while True:
                filler.write(b"x" * 4096)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise


def test_a_full_disk_leaves_nothing_and_the_same_command_goes_on(command: Command, small_disk: Path):
    """64 KiB, filled to the last byte; afterwards the run stops at the next thing that is wrong, not at the disk."""
    close_pairs(open_run(command.config, command.places))
    _fill(small_disk / "filler")
    seen = command("pairs", f"run_dir={small_disk}/run")
    seen.assert_one_line(
        f"bytes to {small_disk}/run/identity.json, found: [Errno 28] No space left on device; free space or choose "
        "another folder, then run the same command again",
        code=FAILURE,
    )
    assert all_files(small_disk) == ["filler"]
    (small_disk / "filler").unlink()
    assert command("pairs", f"run_dir={small_disk}/run").code == 0
    assert all_files(small_disk) == ["run/artifacts.json", "run/cost.json", "run/identity.json", "run/timing.json"]


def test_a_place_that_is_a_file(command: Command, tmp_path: Path):
    (tmp_path / "store").write_text("mine")
    command("pairs", f"run_dir={tmp_path}/store/run").assert_one_line(f"{tmp_path}/store/run", code=FAILURE)
    assert (tmp_path / "store").read_text() == "mine"


@pytest.mark.parametrize("arguments", [("--debug", "run"), ("run", "--debug")])
def test_debug_shows_the_traceback_above_the_line(
    command: Command, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
):
    monkeypatch.setenv("SAFETYDPO_WORKER_LOGS", "")
    seen = command.raw(*arguments, str(command.config), *command.places, "identity.merge.methods=[suum]")
    assert seen.code == USAGE
    assert "Traceback (most recent call last)" in seen.err
    assert "in find_method" in seen.err
    assert seen.err.splitlines()[-1].startswith("error: expected a merge method out of average")


@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_the_job_entry_point_tells_errors_alike(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], debug: list[str]
):
    monkeypatch.setenv("SAFETYDPO_WORKER_LOGS", "")
    code = pipeline.main([*debug, str(command.config), *command.places, "identity.merge.methods=[suum]"])
    lines = capsys.readouterr().err.splitlines()
    assert code == USAGE
    assert lines[-1].startswith("error: expected a merge method out of average")
    assert ("Traceback (most recent call last):" in lines) == bool(debug)
    assert len(lines) == 1 or debug


def test_the_job_entry_point_without_a_config(capsys: pytest.CaptureFixture[str]):
    assert pipeline.main(["--debug"]) == USAGE
    usage = "usage: python -m ray_jobs.pipeline [--debug] CONFIG [key=value …]\n"
    assert capsys.readouterr().err == usage
    assert pipeline.main(["--help"]) == 0
    assert capsys.readouterr().out == usage


def test_a_real_process_ends_with_the_code_and_one_line(root: Path, configs: Path):
    for module in (["ray_jobs.cli", "run"], ["ray_jobs.pipeline"]):
        done = subprocess.run(
            [sys.executable, "-m", *module, str(configs / "smoke.yaml"), "identity.dpo.stepz=3"],
            cwd=root,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == USAGE
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith("error: ")
