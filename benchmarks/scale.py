"""What a concept costs when there are hundreds: pairs, one short expert each, merge, search and evaluation.

Run `python -m benchmarks.scale [--concepts 70 280] [--place runs/scale] [--page docs/operations.md]`. The demo world's
35 unsafe concepts on each of its 8 backgrounds are concepts of their own, with four prompt pairs each. Every number of
concepts has a store of its own and runs the commands of `configs/scale.yaml` one after the other. In the largest one
the training is killed (SIGKILL of all its processes) when half of the experts are finished, and the same command is
run again.

Seconds are by the clock, from a command's start to its end; `cpu_seconds` count all its processes. Memory is the
highest sum of the proportional set sizes of all processes, looked at once a second. The ratio `NAME_per_concept` is
what one of the concepts beyond the smallest number costs against one of the smallest number, start included in both:
1 or less is linear or better.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.concept_sets import write_concepts
from benchmarks.harness import print_result
from benchmarks.process_watch import Taken, watched
from tests.ray.smoke_place import ROOT, STAGE_FOLDERS, Place

STAGES = ("pairs", "train", "merge", "search", "evaluate")
BEGIN, END = "<!-- scale:begin -->", "<!-- scale:end -->"


def measure(place: Path, concepts: int, *, killed: bool) -> dict[str, Any]:
    """Run all stages with this many concepts; return what each took."""
    shutil.rmtree(place, ignore_errors=True)
    pairs = write_concepts(place / "prompts", concepts)
    run = Place(
        place / "store",
        place / "run",
        changes=(f"identity.prompts.source={place}/prompts",),
        config=ROOT / "configs" / "scale.yaml",
    )
    found: dict[str, Any] = {"concepts": concepts, "prompt_pairs": pairs, "stages": {}}
    for stage in STAGES:
        if killed and stage == "train":
            found["kill"] = kill_halfway(run, concepts)
        started = time.time()
        with watched(run.processes) as taken:
            run.run(stage, seconds=3600)
        found["stages"][stage] = told(taken, time.time() - started) | {"files": count_files(run, stage)}
        print(f"{concepts} concepts, {stage}: {found['stages'][stage]}", flush=True)
    experts = run.records("train")
    found["experts"] = len(experts)
    if killed:
        kept = found["kill"].pop("finished")
        found["kill"]["kept_as_they_were"] = all(path.stat().st_mtime_ns == when for path, when in kept.items())
    found["attempts"] = sum(len(list(folder.glob("attempt-*"))) for folder in (run.store / "experts").glob("*"))
    found["store_megabytes"] = sum(file.stat().st_size for file in run.store.rglob("*") if file.is_file()) / 2**20
    found["left_processes"] = 0 if run.is_left_alone() else len(run.processes())
    return found


def kill_halfway(run: Place, concepts: int) -> dict[str, Any]:
    """Kill the training when half of its experts are there; return what it took and which were finished."""
    started = time.time()

    def finished() -> list[Path]:
        return list(run.store.glob("experts/*/record.json"))

    with watched(run.processes) as taken:
        run.kill_when(
            lambda: len(finished()) >= concepts // 2, "train", sent=signal.SIGKILL, at_once=True, seconds=3600
        )
    times = {path: path.stat().st_mtime_ns for path in finished()}
    return told(taken, time.time() - started) | {"experts_finished": len(times), "finished": times}


def told(taken: Taken, seconds: float) -> dict[str, Any]:
    """Return what the processes of a command took."""
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(taken.cpu_seconds, 1),
        "processes": taken.processes,
        "memory_megabytes": round(taken.memory_bytes / 2**20),
        "megabytes_of": {kind: round(held / 2**20) for kind, held in taken.bytes_of.most_common()},
    }


def count_files(run: Place, stage: str) -> int:
    """Return how many files a stage has left in the store."""
    return sum(1 for folder in STAGE_FOLDERS[stage] for path in (run.store / folder).rglob("*") if path.is_file())


def growth(found: Sequence[dict[str, Any]], kind: str) -> dict[str, float]:
    """Return, by stage, what a concept beyond the smallest number costs over what one of the smallest costs."""
    least, most = found[0], found[-1]
    more = most["concepts"] - least["concepts"]
    ratios = {}
    for stage in STAGES:
        first, last = (with_kill(one, stage, kind) for one in (least, most))
        ratios[stage] = (last - first) / more / (first / least["concepts"])
    return ratios


def with_kill(found: dict[str, Any], stage: str, kind: str) -> float:
    """Return a number of a stage; of a killed training both commands' seconds."""
    extra = found["kill"][kind] if stage == "train" and "kill" in found and "seconds" in kind else 0.0
    return float(found["stages"][stage][kind] + extra)


def table(found: Sequence[dict[str, Any]]) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| concepts | stage | seconds | CPU seconds | per concept | files per concept | processes | memory, MB |",
        "|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for one in found:
        for stage in STAGES:
            row, count = one["stages"][stage], one["concepts"]
            seconds = with_kill(one, stage, "seconds")
            name = f"{stage}, killed once" if stage == "train" and "kill" in one else stage
            lines.append(
                f"| {count} | {name} | {seconds:.0f} | {with_kill(one, stage, 'cpu_seconds'):.0f} | "
                f"{seconds / count:.2f} | {row['files'] / count:.1f} | {row['processes']} | {row['memory_megabytes']} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Measure and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", type=int, nargs="+", default=[70, 280])
    parser.add_argument("--place", type=Path, default=Path("runs/scale"))
    parser.add_argument("--page", type=Path)
    arguments = parser.parse_args()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    counts = sorted(arguments.concepts)
    place = arguments.place.absolute()
    found = [measure(place / str(count), count, killed=count == counts[-1]) for count in counts]
    print(table(found))
    if arguments.page:
        before, rest = arguments.page.read_text().split(BEGIN)
        arguments.page.write_text(f"{before}{BEGIN}\n{table(found)}\n{END}{rest.split(END)[1]}")
    ratios = {f"{stage}_seconds_per_concept": value for stage, value in growth(found, "seconds").items()}
    ratios |= {f"{stage}_files_per_concept": value for stage, value in growth(found, "files").items()}
    print_result("scale", ratios=ratios, raw={str(one["concepts"]): one for one in found})


if __name__ == "__main__":
    main()
