"""`safetydpo benchmarks` as a person uses it; it starts no Ray and loads no network but for `fetch`."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from safetydpo.artifacts.schemas import IMPORTED_PROMPTS
from safetydpo.artifacts.storage import open_location
from safetydpo.artifacts.tables import read_table
from tests.prompts.benchmark_samples import UNKNOWN, write_entry
from tests.prompts.samples import TEXTS
from tests.ray.commands import Command
from tests.ray.test_gate_command import LIGHT


def test_neither_ray_nor_torch_is_imported(tmp_path: Path, root: Path):
    entry, file = write_entry(tmp_path, "mine")
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, "benchmarks", "check", entry, file],
        cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "mine: verified: the bytes of a.csv of https://example.org/set" in done.stdout


def test_list_and_show(command: Command):
    seen = command.raw("benchmarks", "list")
    assert seen.code == 0
    assert all(name in seen.out for name in ("coprov2_test", "8,000", "sneakyprompt", "on request", "unknown"))
    seen = command.raw("benchmarks", "show", "sneakyprompt")
    assert "unknown; computed and recorded at first use" in seen.out
    command.raw("benchmarks", "show", "sneaky").assert_one_line("did you mean 'sneakyprompt'?", code=2)


def test_another_file_is_exit_code_1_unless_accepted(command: Command, tmp_path: Path):
    entry, file = write_entry(tmp_path, "mine")
    Path(file).write_text(Path(file).read_text().replace("wasp", "bee"))
    digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    command.raw("benchmarks", "check", entry, file).assert_one_line(digest, "--accept-other-bytes", code=1)
    seen = command.raw("benchmarks", "check", entry, file, "--accept-other-bytes")
    assert (seen.code, "accepted although sha256" in seen.out) == (0, True)
    command.raw("benchmarks", "check", entry, f"{tmp_path}/lost").assert_one_line("found nothing", code=2)


def test_an_import_writes_a_table_and_a_record(command: Command, tmp_path: Path):
    entry, file = write_entry(tmp_path, "mine", copies=UNKNOWN)
    out = tmp_path / "mine.parquet"
    seen = command.raw("benchmarks", "import", entry, file, "--out", str(out))
    assert seen.code == 0, seen.err
    assert "2 rows are in" in seen.out
    assert "not verified" in seen.out
    rows = read_table(open_location(str(out)), IMPORTED_PROMPTS).to_pylist()
    assert {(row["source"], row["split"], row["prompt_set"]) for row in rows} == {("mine", "test", "unsafe")}
    record = json.loads((tmp_path / "mine.parquet.benchmark.json").read_text())
    assert record["sha256"] == hashlib.sha256(Path(file).read_bytes()).hexdigest()
    Path(file).write_text(Path(file).read_text().replace("wasp", "bee"))
    seen = command.raw("benchmarks", "import", entry, file, "--out", str(out))
    seen.assert_one_line(record["sha256"], "was made from", code=1)
    command.raw("benchmarks", "import", entry, file, "--out", f"{tmp_path}/x.csv").assert_one_line(".parquet", code=2)
    (tmp_path / "folder.parquet").mkdir()
    seen = command.raw("benchmarks", "import", entry, file, "--out", f"{tmp_path}/folder.parquet")
    seen.assert_one_line("found a folder", code=2)


def test_fetch_needs_a_hub_a_name_and_a_folder(command: Command, tmp_path: Path):
    out = ("--out", f"{tmp_path}/x.csv")
    command.raw("benchmarks", "fetch", "ud", *out).assert_one_line("which is not", code=2)
    command.raw("benchmarks", "fetch", "mma_diffusion", *out).assert_one_line("(--file)", code=2)
    seen = command.raw("benchmarks", "fetch", "i2p_hub", "--out", f"{tmp_path}/no/x.csv")
    seen.assert_one_line("create it", code=2)


DATA = TEXTS["coprov2_test"].encode()


class _Hub(BaseHTTPRequestHandler):
    """As much of a hub as one file needs."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        is_there = self.path == "/datasets/someone/set/resolve/main/a.csv"
        self.send_response(200 if is_there else 404)
        if is_there:
            self.send_header("ETag", '"abc"')
            self.send_header("X-Repo-Commit", "1" * 40)
        else:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", str(len(DATA) if is_there else 0))
        self.end_headers()
        if body and is_there:
            self.wfile.write(DATA)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_a_file_is_loaded_from_the_hub_and_checked(hub: str, tmp_path: Path, root: Path):
    entry, _ = write_entry(tmp_path, "mine", hub={"repository": "someone/set", "file": "a.csv"})
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}

    def fetch(*more: str) -> subprocess.CompletedProcess[str]:
        arguments = ["benchmarks", "fetch", entry, "--out", f"{tmp_path}/out.csv", *more]
        return subprocess.run(
            [sys.executable, "-c", LIGHT, *arguments],
            cwd=root, capture_output=True, text=True, check=False, env=environment,
        )  # fmt: skip

    done = fetch()
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.csv").read_bytes() == DATA
    assert "a.csv of someone/set is in" in done.stdout
    missing = fetch("--file", "b.csv")
    assert missing.returncode == 1
    assert missing.stderr.startswith("error: expected b.csv of the data set someone/set from the hub, found ")
    assert missing.stderr.count("\n") == 1
