"""A store and a run folder of the smoke config, the commands on it, and the processes that they start."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[2]
SMOKE = ROOT / "configs" / "smoke.yaml"
STAGE_FOLDERS = {
    "pairs": ("images", "verdicts", "latents", "captions", "pairs"),
    "train": ("experts",),
    "merge": ("layer_inputs", "distilled", "merged", "diagnosis"),
    "search": ("search",),
    "evaluate": ("outcomes",),
    # What it writes for people stands in the run's folder.
    "report": ("picture_measures",),
}
TIMES = ("timing.json", "cost.json")
"""Files of a run folder that every stage adds to."""
MARK = "SAFETYDPO_TEST_MARK"
PATIENCE = float(os.environ.get("SAFETYDPO_TEST_PATIENCE", "1"))
"""Factor on all waiting times, for a machine whose cores are busy with other work."""


@dataclass(frozen=True)
class Place:
    """One store and one run folder; `mark` stands in the environment of every process that works on them."""

    store: Path
    run_dir: Path
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    changes: tuple[str, ...] = ()
    """Settings beside those of the config."""
    config: Path = SMOKE
    root: Path = ROOT
    """Where the commands are run: the package that is imported is the one there."""

    @property
    def settings(self) -> list[str]:
        """The settings that put a run here, and its changes."""
        return [f"store={self.store}", f"run_dir={self.run_dir}", *self.changes]

    @property
    def environment(self) -> dict[str, str]:
        """The environment of the commands."""
        moved = {} if self.root == ROOT else {"PYTHONPATH": str(self.root)}
        return {**os.environ, MARK: self.mark, **moved}

    def command(self, stage: str) -> list[str]:
        """`safetydpo STAGE CONFIG` on this place."""
        return [sys.executable, "-m", "ray_jobs.cli", stage, str(self.config), *self.settings]

    def run(self, stage: str, *, seconds: float = 400) -> float:
        """Run a command to its end; return its wall time in seconds."""
        started = time.time()
        done = subprocess.run(
            self.command(stage),
            cwd=self.root,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=seconds * PATIENCE,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return time.time() - started

    def kill_when(
        self,
        reached: Callable[[], bool],
        stage: str,
        *,
        sent: int = signal.SIGKILL,
        at_once: bool = False,
        seconds: float = 240,
    ) -> subprocess.CompletedProcess[str]:
        """Start a command, signal its process group once `reached`, and see all of its processes end.

        With `at_once` its workers are killed first, not left to notice.
        """
        process = subprocess.Popen(
            self.command(stage),
            cwd=self.root,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # A shell starts background commands with Ctrl-C ignored, and tests run in one would hand that on.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            assert wait_for(lambda: reached() or process.poll() is not None, seconds=seconds), "not reached in time"
            assert process.poll() is None, f"ended with {process.returncode} before it could be killed"
            if at_once:
                # As when the power goes: workers that outlive their driver by a second could finish a tiny expert.
                for child in reversed(psutil.Process(process.pid).children(recursive=True)):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.kill()
            os.killpg(process.pid, sent)
            output, errors = process.communicate(timeout=60 * PATIENCE)
            assert wait_for(lambda: not self.processes(), seconds=60), f"still there: {self.processes()}"
            return subprocess.CompletedProcess(process.args, process.returncode, output, errors)
        finally:
            for survivor in self.processes():
                with contextlib.suppress(psutil.NoSuchProcess):
                    survivor.kill()
            process.wait()

    def processes(self) -> list[psutil.Process]:
        """Every process that bears the mark, whoever its parent is by now."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == self.mark:
                    found.append(process)
        return found

    def is_left_alone(self) -> bool:
        """Whether every process of a finished command ends by itself; Ray's take a moment longer than the command."""
        return wait_for(lambda: not self.processes(), seconds=30)

    def artifacts(self, stage: str) -> dict[str, str]:
        """Every closed artifact of a stage: {folder: fingerprint}, and {file: sha256} of its adapters."""
        found = {}
        for folder in STAGE_FOLDERS[stage]:
            for record in sorted((self.store / folder).glob("*/record.json")):
                found[f"{folder}/{record.parent.name}"] = str(json.loads(record.read_text())["fingerprint"])
                for file in sorted(record.parent.rglob("*.safetensors")):
                    found[f"{folder}/{record.parent.name}/{file.name}"] = hashlib.sha256(file.read_bytes()).hexdigest()
        return found

    def records(self, stage: str) -> list[dict[str, Any]]:
        """The records of a stage's closed artifacts."""
        folders = STAGE_FOLDERS[stage]
        return [json.loads(file.read_text()) for name in folders for file in (self.store / name).glob("*/record.json")]

    def pool_rows(self, stage: str) -> dict[str, list[dict[str, Any]]]:
        """Every row of the closed batches of a stage's pools, sorted: {pool: rows}."""
        found: dict[str, list[dict[str, Any]]] = {}
        for folder in STAGE_FOLDERS[stage]:
            for record in (self.store / folder).glob("pool-*/batch-*/record.json"):
                rows = found.setdefault(f"{folder}/{record.parent.parent.name}", [])
                for file in (record.parent / "data").glob("*.parquet"):
                    rows += pq.ParquetFile(file).read().to_pylist()
        return {pool: sorted(rows, key=lambda row: str(next(iter(row.values())))) for pool, rows in found.items()}

    def times(self) -> dict[str, float]:
        """Wall time of each stage in seconds."""
        content: dict[str, float] = json.loads((self.run_dir / "timing.json").read_text())
        return content

    def files(self) -> dict[Path, int]:
        """Every file of store and run folder and when it was written."""
        everything = [*self.store.rglob("*"), *self.run_dir.rglob("*")]
        return {path: path.stat().st_mtime_ns for path in everything if path.is_file()}

    def before(self, stage: str, folder: Path, *, changes: tuple[str, ...] = ()) -> Place:
        """Copy the closed artifacts of the stages before `stage` to a place of their own."""
        place = Place(folder / "store", folder / "run", changes=changes)
        for earlier in list(STAGE_FOLDERS)[: list(STAGE_FOLDERS).index(stage)]:
            for name in STAGE_FOLDERS[earlier]:
                if (self.store / name).is_dir():
                    shutil.copytree(self.store / name, place.store / name)
        if stage == "search":
            # The searched adapter lies among the merged ones; it may be one of them.
            pointers = json.loads((self.run_dir / "artifacts.json").read_text())["artifacts"]
            searched = pointers.pop("merged:searched")
            if searched not in pointers.values():
                shutil.rmtree(place.store / searched["stage"] / searched["folder"])
        if stage == "report":
            # It tells what the stages before it took.
            place.run_dir.mkdir(parents=True)
            for name in TIMES:
                took = json.loads((self.run_dir / name).read_text())
                took.pop("report")
                (place.run_dir / name).write_text(json.dumps(took))
        return place

    def report(self) -> dict[str, bytes]:
        """Every file that the report's stage writes for people, but its record, which holds the time.

        A file that a killed command was writing lies hidden beside the others.
        """
        folders = (self.run_dir / "report", self.run_dir / "merged")
        files = [file for folder in folders for file in folder.glob("[!.]*") if file.name != "record.json"]
        return {str(file.relative_to(self.run_dir)): file.read_bytes() for file in files}


def cpu_seconds_of_commands() -> float:
    """CPU time of all commands that have ended, and of the processes that they saw end; it grows from call to call."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def wait_for(condition: Callable[[], bool], *, seconds: float) -> bool:
    """Wait until the condition holds; return whether it did in time."""
    deadline = time.time() + seconds * PATIENCE
    while time.time() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return condition()
