"""`safetydpo plan`: before anything ran, against stores with closed artifacts, simulated, and afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray

from ray_jobs.evaluate import (
    build_manifest,
    evaluation_prompts,
    list_rows,
    outcomes_key,
    outcomes_pool,
)
from ray_jobs.evaluation_worker import error_outcome
from ray_jobs.expert_files import MergeAids
from ray_jobs.merge_experts import merged_key
from ray_jobs.merge_settings import candidate_request, merge_request
from ray_jobs.plan_rates import pointed_records, rates_of_run, units_of
from ray_jobs.plan_storage import mean_row_bytes
from ray_jobs.plan_work import find_done, list_work
from ray_jobs.run import Run
from ray_jobs.search_merges import Searched, search_key, validation_prompts
from ray_jobs.search_space import search_space
from safetydpo.artifacts.records import ArtifactKey
from safetydpo.artifacts.schemas import OUTCOMES
from safetydpo.artifacts.storage import open_location
from safetydpo.artifacts.tables import table_from_rows
from safetydpo.config.experts import ALL_SINGLE
from safetydpo.config.load import identity_of
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.merging.registry import find_method
from safetydpo.search.space import Candidate
from tests.ray.closed_artifacts import all_files, close_batch, close_experts, close_pairs, close_pictures, open_run
from tests.ray.commands import Command
from tests.ray.plans import stages, told

HUB_MODEL = "nobody-has/this-model"


def test_a_plan_of_the_smoke_config_before_anything_ran(command: Command) -> None:
    """By hand: 2 categories x 8 pairs x 2 pictures + 8 benign; 4 experts' worth of 5 steps of 4 pairs (2 experts and
    `all_single`, twice as long); 4 merges; (4 trials + the base) x (2 x 2 + 4 + 4) prompts.

    Test pictures: base, all_single, 4 merges and searched draw 2 x 2 unsafe, 2 of unseen concepts, 4 neutral and 2
    neighbours; the 2 experts draw the 4 unsafe ones: 7 x 12 + 2 x 4.
    """
    plan = told(command)
    assert stages(plan) == {
        "pairs": (40, 0, False),
        "train": (80, 0, False),
        "merge": (4, 0, False),
        "search": (60, 0, False),
        "evaluate": (92, 0, False),
    }
    assert (plan["device"], plan["devices"], plan["machine"]) == ("cpu", 2, "core")
    assert plan["device_seconds"] is None
    assert plan["is_model_here"]
    assert not ray.is_initialized()
    assert not all_files(command.folder), "a plan writes nothing"


def test_a_plan_for_people_says_what_is_not_known(command: Command) -> None:
    seen = command("plan")
    assert seen.code == 0, seen.err
    for part in ("40 pictures", "3 experts, 0 done", "4 trials, 0 done", "speed      not known", "an example to edit"):
        assert part in seen.out


@pytest.mark.parametrize(
    ("setting", "part"),
    [
        ("identity.merge.methods=[best]", "identity.merge.methods"),
        ("identity.lora.targets=[nowhere]", "nowhere"),
        ("identity.prompts.source=no/such/folder", "identity.prompts.source"),
    ],
)
def test_an_impossible_config_gets_the_line_that_a_run_would_give(command: Command, setting: str, part: str) -> None:
    planned, run = command("plan", setting), command("run", setting)
    planned.assert_one_line(part, code=planned.code)
    assert (planned.code, planned.err) == (run.code, run.err)


def test_a_run_folder_of_another_config_is_refused_as_a_run_would(command: Command) -> None:
    folder = command.folder / "run"
    folder.mkdir()
    (folder / "identity.json").write_text(json.dumps(identity_of(open_run(command.config, []).config)))
    command("plan", "identity.seed=1").assert_one_line("identity.seed", code=2)
    assert command("plan", "--json").code == 0


def test_a_model_that_is_not_here_is_not_fetched(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(command.folder / "hub"))
    plan = told(command, f"identity.base.model={HUB_MODEL}")
    assert not plan["is_model_here"]
    assert stages(plan)["pairs"] == (40, 0, False)
    shown = command("plan", f"identity.base.model={HUB_MODEL}")
    assert "done       not known: the base model is not on this machine, and nothing was fetched" in shown.out


def test_pictures_in_the_pool_are_done_before_the_pairs_are_closed(command: Command) -> None:
    run = open_run(command.config, command.places)
    close_pictures(run, unsafe_score_of={"violence": 1.0, "shocking": 1.0})
    assert stages(told(command))["pairs"] == (40, 40, False)
    # Eight prompt pairs of each category are among the nine.
    assert stages(told(command, "identity.prompts.pairs_per_category=9"))["pairs"] == (44, 40, False)


def test_closed_pairs_and_experts_are_done(command: Command) -> None:
    run = open_run(command.config, command.places)
    close_pairs(run)
    assert stages(told(command))["pairs"] == (40, 40, True)
    assert stages(told(command))["train"] == (80, 0, False)
    close_experts(run)
    before = all_files(command.folder)
    plan = told(command)
    assert stages(plan)["train"] == (80, 80, True)
    assert stages(plan)["merge"] == (4, 0, False)
    experts = next(one for one in plan["storage"] if one["what"] == "experts")
    assert experts["rows"] == 3
    assert experts["bytes"] > 0
    assert all_files(command.folder) == before
    # One more concept's worth of steps changes the training, not the pairs.
    longer = stages(told(command, "identity.dpo.steps=10"))
    assert (longer["pairs"], longer["train"]) == ((40, 40, True), (160, 0, False))


def test_merges_search_and_test_pictures_are_found(command: Command) -> None:
    """Of the plan by hand above without two merges, 7 - 2 rows of 12 and 2 of 4. Closed: merges, then the search.

    Before the search is closed, the searched row is counted and has no names: 12. Of the other 56 three are in the
    pool, one of which failed.
    """
    methods = ["identity.merge.methods=[sum, ties]", "identity.search.methods=[sum, ties]"]
    run = open_run(command.config, [*command.places, *methods])
    close_experts(run)
    found = find_done(run)
    members = {name: record for name, record in found.experts.items() if name != ALL_SINGLE}
    merge = run.config.identity.merge

    def close_merge(request: dict[str, Any], number: int) -> None:
        made = {"fingerprint": f"merge {number}", "counts": {"rank": 4}}
        made |= {"details": {"recipe": {"global_scale": 1.0}}}
        run.make(merged_key(run, request, members, aids=MergeAids()), lambda _folder: made)

    for number, name in enumerate(merge.methods):
        close_merge(merge_request(merge, find_method(name)), number)
    assert stages(told(command, *methods))["merge"] == (2, 2, True)
    found = find_done(run)
    rows = list_rows(run, found.experts, found.merged, None)
    manifest = build_manifest(run, rows, evaluation_prompts(run))
    drawn = [{**error_outcome({**row, "attempt": 1}, ValueError("x")), "status": "ok"} for row in manifest[:2]]
    drawn.append(error_outcome({**manifest[2], "attempt": 1}, ValueError("x")))
    close_batch(outcomes_pool(run), table_from_rows(drawn, OUTCOMES))
    plan = stages(told(command, *methods))
    assert (plan["search"], plan["evaluate"]) == ((60, 0, False), (12 * 5 + 2 * 4, 2, False))

    candidate = Candidate("sum", 1.5, tuple((name, 1.0) for name in sorted(members)))
    assert found.pairs is not None
    assert found.pairs_folder is not None
    space = search_space(run, members)
    about = Searched(members, MergeAids(), validation_prompts(run), space, found.pairs, found.pairs_folder)
    made = {"fingerprint": "search", "counts": {"trials": 4}, "details": {"candidate": candidate.to_json()}}
    run.make(search_key(run, about), lambda _folder: made)
    close_merge(candidate_request(merge, candidate), 9)
    assert stages(told(command, *methods))["search"] == (60, 60, True)
    found = find_done(run)
    assert found.searched is not None
    manifest = build_manifest(run, list_rows(run, found.experts, found.merged, found.searched), evaluation_prompts(run))
    run.make(outcomes_key(run, manifest), lambda _folder: {"fingerprint": "outcomes"})
    assert stages(told(command, *methods))["evaluate"] == (68, 68, True)


def test_a_simulation_imports_no_machine_learning(configs: Path) -> None:
    code = (
        "import sys; from ray_jobs import cli; cli.app(sys.argv[1:], standalone_mode=False); print(sorted(sys.modules))"
    )
    arguments = ["--simulate", "nodes=1", "concepts=9", "expert_seconds=9", "repeats=1"]
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", str(configs / "sdxl.yaml"), *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "9 experts of 9 s" in done.stdout
    assert not {"'ray'", "'torch'"} & set(done.stdout.splitlines()[-1].strip("[]").split(", "))


def test_stages_that_no_judge_fits_are_not_planned(command: Command, configs: Path) -> None:
    run = open_run(configs / "sd15.yaml", [*command.places, "identity.prompts.source=demo"])
    from ray_jobs.plan_work import Found

    assert [one.stage for one in list_work(Found(run, is_model_here=False))] == ["pairs", "train", "merge"]


# ---- speeds of a former run


def finish(run: Run, *, cpu_seconds: float) -> None:
    """A run that has closed pairs and experts, pointed at them, and measured what they cost."""
    close_experts(run)
    run.open()
    found = find_done(run)
    assert found.pairs is not None
    from safetydpo.artifacts.records import write_pointers

    def key_of(record: Any) -> ArtifactKey:
        return ArtifactKey(record.stage, record.name, record.identity, record.inputs, record.recipe_version)

    records = {"pairs": found.pairs, **{f"expert:{name}": record for name, record in found.experts.items()}}
    write_pointers(run.run_dir, {name: key_of(record) for name, record in records.items()})
    for stage in ("pairs", "train"):
        run.add_seconds(stage, cpu_seconds)
        run.add_cost(stage, {"cpu_seconds": cpu_seconds, "gpu_seconds": None})


def test_units_by_hand(command: Command) -> None:
    """Records made by hand count no steps: 0; merges are counted themselves."""
    run = open_run(command.config, command.places)
    finish(run, cpu_seconds=8.0)
    units = units_of(pointed_records(run, run.run_dir), identity_of(run.config))
    assert units == {"pairs": 0, "train": 0, "merge": 0, "search": 0, "evaluate": 0}


def test_the_speed_of_a_former_run_is_used(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """40 pictures of 4 steps and 20 steps of 4 pairs took 8 CPU-seconds each: 0.05 s a step, 0.1 s a pair.

    Ten steps instead of five: 160 pairs, 16 s, on two cores 8; the longest expert, 20 of 40 steps, takes that too.
    """
    run = open_run(command.config, command.places)
    finish(run, cpu_seconds=8.0)
    for file in (command.folder / "store").rglob("record.json"):
        record = json.loads(file.read_text())
        record["counts"] = {"pairs": {"pairs": 16, "pictures": 40}, "experts": {"steps": 20 / 3}}[record["stage"]]
        file.write_text(json.dumps(record))
    again = [f"store={command.folder}/store", f"run_dir={command.folder}/other", "identity.dpo.steps=10"]
    seen = command.raw("plan", str(command.config), *again, "--json", "--measured", str(command.folder / "run"))
    assert seen.code == 0, seen.err
    training = next(one for one in json.loads(seen.out)["stages"] if one["stage"] == "train")
    assert training["rate"]["seconds"] == pytest.approx(0.1)
    assert training["device_seconds"] == pytest.approx(16)
    assert training["wall_seconds"] == pytest.approx(8)
    assert training["cost"] == pytest.approx(16 / 3600 * 0.05)
    shown = command.raw("plan", str(command.config), *again, "--measured", str(command.folder / "run"))
    assert f"speed      measured: {command.folder}/run" in shown.out


def test_a_former_run_of_another_size_or_none_is_refused(command: Command) -> None:
    run = open_run(command.config, command.places)
    run.open()
    other = open_run(command.config, [*command.places, "identity.sampler.guidance_scale=1.0"])
    with pytest.raises(UsageError, match=r"expected a former run with identity.sampler.guidance_scale 1.0 as planned"):
        rates_of_run(other, run.run_dir)
    with pytest.raises(
        SafetyDPOError, match="expected the folder of a former run at .*nothing, found no identity.json"
    ):
        rates_of_run(run, open_location(str(command.folder / "nothing")))
    (command.folder / "run" / "identity.json").write_text("{")
    with pytest.raises(SafetyDPOError, match="expected JSON at .*identity.json"):
        rates_of_run(run, run.run_dir)


def test_bytes_of_a_row_are_those_of_a_closed_batch(tmp_path: Path) -> None:
    """Two rows of 30 bytes together in the closed batch; the open one and the one that does not say it do not count."""
    pool = open_location(str(tmp_path / "pool"))
    assert mean_row_bytes(pool) is None
    for name, record in (("batch-a", None), ("batch-b", {}), ("batch-c", {"rows": 2})):
        (pool / name / "data" / "part.parquet").write_bytes(b"x" * 30)
        if record is not None:
            (pool / name / "record.json").write_bytes(json.dumps(record).encode())
    assert mean_row_bytes(pool) == 15


# ---- simulations


def test_a_simulation_needs_no_model_and_no_store(command: Command, configs: Path) -> None:
    arguments = ("nodes=10", "concepts=100", "expert_seconds=600", "repeats=2", "spread=0.1")
    seen = command.raw("plan", str(configs / "sdxl.yaml"), "--simulate", *arguments, "--json")
    assert seen.code == 0, seen.err
    found = json.loads(seen.out)
    assert (found["experts"], found["expert_seconds"], len(found["choices"])) == (100, 600, 4)
    assert all(one["over_bound"] >= 1 for one in found["choices"])
    assert found["chosen"] == min(found["choices"], key=lambda one: one["makespan_seconds"])["workers"]
    shown = command.raw("plan", str(configs / "sdxl.yaml"), "--simulate", *arguments)
    assert "100 experts of 600 s (given) on 80 devices" in shown.out
    assert "speed-ups that say assumed were never measured" in shown.out
    assert not all_files(command.folder)


def test_a_simulation_of_the_configs_own_experts(command: Command) -> None:
    """Two experts of 5 steps and `all_single` of 10, a second a step."""
    plan = told(command, "--simulate", "nodes=1", "expert_seconds=5", "preemption_rate=0", "workers=1")
    assert (plan["experts"], plan["choices"][0]["bound_seconds"]) == (3, pytest.approx(10.28))


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--simulate", "concepts=5"), ("expected nodes=NUMBER with --simulate, found none",)),
        (("--simulate", "nodes=0"), ("--simulate: nodes",)),
        (("--simulate", "nodes=1"), ("expected to know how long an expert takes", "expert_seconds=NUMBER")),
        (("--simulate", "nodes=1", "workers=3", "expert_seconds=1"), ("expected workers of the speed-up table",)),
        (("--simulate", "--after"), ("expected --simulate or --after, found both",)),
        (("--devices", "0"), ("expected a number of devices above 0",)),
        (("--machine", "h100"), ("expected a machine of the price table with a CPU", "core")),
        (("--costs", "none.yaml"), ("expected a price table at none.yaml",)),
    ],
)
def test_what_cannot_be_planned_is_refused(
    command: Command, arguments: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    command("plan", *arguments).assert_one_line(*parts, code=2)


# ---- afterwards


def test_an_account_by_hand(command: Command) -> None:
    """8 CPU-seconds in 8 s on two cores are 50 %; at 0.05 an hour they cost 8 / 3600 x 0.05."""
    finish(open_run(command.config, command.places), cpu_seconds=8.0)
    found = told(command, "--after")
    assert [one["stage"] for one in found["stages"]] == ["pairs", "train"]
    assert found["stages"][1]["utilisation"] == 0.5
    assert found["stages"][1]["cost"] == pytest.approx(8 / 3600 * 0.05)
    assert found["stages"][1]["gpu_seconds"] is None
    shown = command("plan", "--after")
    assert shown.code == 0
    for part in ("50%", "3 experts", "core on demand"):
        assert part in shown.out


def test_an_account_of_gpus_by_hand(command: Command) -> None:
    """Three experts of 10 s on a GPU each, of 40 GPU-seconds held: 75 %; 40 s at 4 an hour."""
    gpu = ["execution.gpus_per_worker=1"]
    run = open_run(command.config, [*command.places, *gpu])
    finish(run, cpu_seconds=8.0)
    for file in (command.folder / "store" / "experts").rglob("record.json"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "seconds": 10.0}))
    costs = command.folder / "run" / "cost.json"
    used = {"cpu_seconds": None, "gpu_seconds": 40.0}
    costs.write_text(json.dumps({"pairs": used, "train": used}))
    pairs, training = told(command, "--after", "--machine", "h100", *gpu)["stages"]
    assert (training["utilisation"], pairs["utilisation"]) == (0.75, None)
    assert training["cost"] == pytest.approx(40 / 3600 * 4)


def test_no_run_has_no_account(command: Command) -> None:
    command("plan", "--after").assert_one_line("expected a run that has begun in", "run it first", code=1)
