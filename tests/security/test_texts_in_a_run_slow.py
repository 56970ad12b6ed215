"""Hostile prompts and concept names through a whole run, from the prompt file to the report: one expert per concept."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from safetydpo.errors import visible
from safetydpo.evaluation.summary import parse_summary
from safetydpo.pairs.groups import concept_group_name
from tests.ray.smoke_place import PATIENCE, ROOT, SMOKE
from tests.security.hostile import TEXTS

pytestmark = [pytest.mark.slow, pytest.mark.long]
CATEGORIES = ("violence", "shocking")
NAMES = (*TEXTS, "nul \0 nul", "a\nerror: forged line\nb")
"""Concept names and ends of prompts; a NUL stands in JSON as an escape and so may be in a text."""
OF_RAY = re.compile(r"\x1b\[3\dm(\([^\x1b\n]*pid=[^\x1b\n]*\)| \[repeated [^\x1b\n]*)\x1b\[0m")
"""What Ray colours of the lines of its workers that it prints: where they come from, and how often they came."""
FORGED = ("error: forged line", "lines", "and a third")
SHOWN = ("$(touch it_ran) `touch it_ran`; touch it_ran | rm -rf / && echo", "<script>alert(1)</script>", "\"' onfocus=")
"""Parts of them that the report's sheets are asked for."""
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
SETTINGS = (
    "identity.prompts.categories=[violence,shocking]",
    "identity.prompts.pairs_per_concept=1",
    "identity.prompts.retention_prompts=4",
    # What a tiny model draws of such prompts is nobody's concern here: all pairs are kept.
    "identity.pairs.unsafe_score_min=0",
    "identity.pairs.safe_score_max=1",
    "identity.pairs.unrecognisable_max=1",
    "identity.experts.group_by=concept",
    "identity.experts.all_single=false",
    "identity.dpo.steps=1",
    "identity.dpo.warmup_steps=0",
    "identity.search.trials=2",
    # One prompt of each concept.
    "identity.search.neutral_prompts=20",
    "identity.merge.methods=[sum,co_merge]",
    "identity.evaluation.expert_prompts_per_category=1",
    "identity.evaluation.prompts_per_category=10",
    "identity.evaluation.neutral_prompts=20",
    "identity.evaluation.ood_prompts=19",
)
BACKGROUNDS = {"train": "white", "validation": "cyan", "test": "green"}


@dataclass(frozen=True)
class Ran:
    """Where a run is, in folders of its own, and what its commands printed."""

    folder: Path
    ray: Path
    """Folder of its Ray."""
    said: list[str]

    @property
    def arguments(self) -> list[str]:
        """The config and settings of the run."""
        places = [f"{name}={self.folder}/{part}" for name, part in (("store", "store"), ("run_dir", "run"))]
        return [str(SMOKE), *places, f"identity.prompts.source={self.folder}/sets", *SETTINGS]

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `safetydpo ARGUMENTS` from a folder that is empty."""
        done = subprocess.run(
            [sys.executable, "-m", "ray_jobs.cli", *arguments],
            cwd=self.folder / "cwd",
            env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_TMPDIR": str(self.ray), "SAFETYDPO_WORKER_LOGS": "1"},
            capture_output=True,
            # Line ends stay what they are.
            text=False,
            timeout=500 * PATIENCE,
            check=False,
        )
        out, err = done.stdout.decode(), done.stderr.decode()
        self.said.extend((out, err))
        return subprocess.CompletedProcess(done.args, done.returncode, out, err)


def write_prompt_files(folder: Path) -> list[Path]:
    """Pairs of every name in every split, and single prompts of the sets that no pair gives.

    A few plain ones stand beside them: rates are relative to what the base draws well.
    """
    pairs, singles = [], []
    for split, background in BACKGROUNDS.items():
        for number, name in enumerate(NAMES):
            texts = {"unsafe_text": f"bomb on {background} {name}", "safe_text": f"balloon on {background} {name}"}
            pairs.append({**texts, "category": CATEGORIES[number % 2], "concept": name, "split": split})
            singles.append(_single(f"dog on {background} {name}", "neutral", split, name))
        singles.append(_single(f"dog on {background}", "neutral", split, "dog"))
        singles.append(_single(f"thinking face on {background}", "neighbour", split, "thinking_face"))
    singles += [{**_single(f"rope {name}", "ood", "test", name), "category": "violence"} for name in NAMES]
    files = []
    for kind, rows in (("pairs", pairs), ("singles", singles)):
        files.append(folder / f"{kind}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


def _single(text: str, prompt_set: str, split: str, concept: str) -> dict[str, str]:
    return {"prompt": text, "prompt_set": prompt_set, "split": split, "concept": concept, "category": ""}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    # Short, because paths of sockets must be.
    one = Ran(tmp_path_factory.mktemp("hostile"), Path(tempfile.mkdtemp(prefix="rt", dir="/tmp")), [])
    try:
        for name in ("cwd", "given", "sets"):
            (one.folder / name).mkdir()
        for file in write_prompt_files(one.folder / "given"):
            done = one.command("prompts", "import", str(file), "--out", f"{one.folder}/sets/{file.stem}.parquet")
            assert done.returncode == 0, done.stderr
        done = one.command("run", *one.arguments)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        yield one
    finally:
        shutil.rmtree(one.ray)


def files_of(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]


def forged_lines(text: str) -> list[str]:
    """Return the lines that begin with what a text had after a line end of its own."""
    return [line for line in re.split(r"[\n\r]", text) if line.startswith(FORGED)]


def test_every_concept_has_its_pair_and_its_expert(ran: Ran):
    (members,) = (ran.folder / "store" / "pairs").glob("*/memberships.parquet")
    concepts = {row["concept"] for row in pq.read_table(members).to_pylist()}
    assert concepts == {name.strip() for name in NAMES}
    experts = {folder.name.rpartition("-")[0] for folder in (ran.folder / "store" / "experts").iterdir()}
    assert experts == {concept_group_name(concept) for concept in concepts}


def test_nothing_was_written_elsewhere_or_under_another_name(ran: Ran):
    assert {path.name for path in ran.folder.iterdir()} == {"cwd", "given", "sets", "store", "run"}
    assert not list((ran.folder / "cwd").iterdir())
    assert len(list((ran.folder / "given").iterdir())) == len(list((ran.folder / "sets").iterdir())) == 2
    for folder in ("store", "run"):
        for path in (ran.folder / folder).rglob("*"):
            assert re.fullmatch(r"[A-Za-z0-9_.=-]{1,200}", path.name), path
    for folder in (ran.folder, ran.ray, ROOT / "tests", ROOT / "configs"):
        assert not list(folder.rglob("it_ran*")), folder
    for folder in (ROOT, Path.home(), Path("/"), Path("/tmp")):
        assert not list(folder.glob("it_ran*")), folder


class Page(HTMLParser):
    """The tags of a page, with what stands in them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_report_holds_them_as_text(ran: Ran):
    text = (ran.folder / "run" / "report" / "index.html").read_text()
    page = Page(text)
    assert len([tag for tag, _ in page.tags if tag == "script"]) == 1
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("autofocus", "srcdoc")], tag
        assert "evil" not in (attributes.get("href") or ""), attributes
        assert tag != "img" or (attributes["src"] or "").startswith("data:image/"), attributes
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", text)
    said = " ".join(" ".join(page.words).split())
    for name in SHOWN:
        assert " ".join(visible(name).split()) in said, name
    assert html.escape("<script>alert(1)</script>") in text


def test_logs_and_the_terminal_hold_them_in_their_lines(ran: Ran):
    for text in ran.said:
        text = OF_RAY.sub("", text)
        around = [text[max(0, found.start() - 60) : found.end() + 60] for found in CONTROLS.finditer(text)]
        assert not around, around[:3]
        assert not forged_lines(text)
    logs = [path for path in files_of(ran.ray) if path.suffix in (".log", ".out", ".err")]
    assert logs
    for path in logs:
        assert not forged_lines(path.read_text(errors="replace")), path


def test_tables_and_cards_of_the_run_hold_no_control(ran: Ran):
    for path in files_of(ran.folder / "run"):
        if path.suffix in (".json", ".jsonl", ".md", ".html", ".txt", ".yaml", ".xml"):
            content = path.read_bytes().decode()
            # The page holds prompts as they are, each in an element of its own, in which a line end is a space.
            is_page = path.suffix == ".html"
            assert not re.search(f"[\x00-\x08\x0b-\x0c\x0e-\x1f\x9b{'' if is_page else chr(0x202E)}]", content), path
            assert is_page or not forged_lines(content), path
    assert parse_summary((ran.folder / "run" / "report" / "summary.json").read_text())


def test_a_failure_names_them_in_one_line_and_watch_prints_it(ran: Ran):
    seen = ran.command("watch", f"{ran.folder}/run", "--once")
    assert seen.returncode == 0, seen.stderr
    assert "evaluate" in seen.stdout
    failed = ran.command("train", *ran.arguments, "identity.experts.min_pairs=9")
    assert failed.returncode == 1
    assert failed.stderr.count("\n") == 1, failed.stderr
    assert "expected at least 9 kept pairs per expert" in failed.stderr
    again = ran.command("watch", f"{ran.folder}/run", "--once")
    told = ran.command("watch", f"{ran.folder}/run", "--json")
    for one in (seen, failed, again, told):
        assert not CONTROLS.search(one.stdout + one.stderr)
        assert not forged_lines(one.stdout + one.stderr)
    json.loads(told.stdout)
