"""`safetydpo prompts write` as a person runs it, against a real server: whole runs, faults, kills, resuming."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from safetydpo.artifacts.records import Record, read_record
from safetydpo.artifacts.schemas import (
    MEMBERSHIPS,
    PROMPT_PAIRS,
    PROMPT_REJECTS,
    make_pair_id,
)
from safetydpo.artifacts.storage import open_location
from safetydpo.artifacts.tables import read_table
from tests.pairs.chat_server import Answer, Asked, ChatServer, good_lines, serve
from tests.pairs.test_writer_transformers import save_model
from tests.ray.commands import Command, Seen

USAGE, FAILURE = 2, 1


@pytest.fixture
def concepts(tmp_path: Path) -> Path:
    """Six concepts, the last one held out; c1 is of two categories."""
    path = tmp_path / "list.csv"
    rows = [
        f'"{"hate,violence" if n == 1 else "hate"}",thing{n},mine,MIT,{"true" if n == 5 else ""},flower'
        for n in range(6)
    ]
    path.write_text("category,concept,source,licence,ood,counterpart\n" + "\n".join(rows) + "\n")
    return path


def arguments(concepts: Path, out: Path, server: ChatServer | None, *more: str) -> list[str]:
    place = ["--model", "tiny", "--base-url", server.url] if server else []
    counts = ["--per-concept", "4", "--per-request", "2", "--timeout", "5", "--max-retries", "2"]
    return ["prompts", "write", str(concepts), "--out", str(out), *place, *counts, *more]


def record_of(out: Path) -> Record:
    record = read_record(open_location(str(out)))
    assert record is not None
    return record


def texts(out: Path) -> list[tuple[str, str]]:
    rows = read_table(open_location(str(out)) / "prompt_pairs.parquet", PROMPT_PAIRS).to_pylist()
    assert all(row["pair_id"] == make_pair_id(row["unsafe_text"], row["safe_text"]) for row in rows)
    return [(row["unsafe_text"], row["safe_text"]) for row in rows]


def rejects(out: Path) -> Counter[str]:
    rows = read_table(open_location(str(out)) / "rejects.parquet", PROMPT_REJECTS).to_pylist()
    return Counter(row["reason"] for row in rows)


def expected_texts(names: list[str], *, scenes: int = 4) -> list[tuple[str, str]]:
    places = [f"{1 + place // 2}.{place % 2}" for place in range(scenes)]
    return [(f"{name} in scene {place}", f"a flower in scene {place}") for name in names for place in places]


def test_a_normal_run(command: Command, concepts: Path, tmp_path: Path):
    """6 concepts x 4 pairs, 2 a request: 12 requests of 100 + 40 tokens."""
    out = tmp_path / "out"
    with serve(lambda asked: Answer(good_lines(asked), seconds=0.05)) as server:
        seen = command.raw(*arguments(concepts, out, server, "--concurrency", "3"))
    assert (seen.code, seen.err) == (0, "")
    assert "20 pairs and 4 held-out pairs, 6 concepts" in seen.out
    assert "12 requests, 0 retries, 1,200 prompt tokens, 480 completion tokens" in seen.out
    assert server.most_at_once == 3
    assert set(server.times.values()) == {1}
    assert texts(out) == expected_texts([f"thing{number}" for number in range(5)])
    assert texts(out / "ood") == expected_texts(["thing5"])
    members = read_table(open_location(str(out)) / "memberships.parquet", MEMBERSHIPS).to_pylist()
    assert Counter((row["concept"], row["category"], row["source"]) for row in members) == {
        **{(f"thing{number}", "hate", "mine"): 4 for number in range(5)},
        ("thing1", "violence", "mine"): 4,
    }
    assert rejects(out) == {}
    record = record_of(out)
    assert record.counts["pairs"] == 20
    assert record.details["per_concept"][1] == {
        "categories": ["hate", "violence"],
        "completion_tokens": 80,
        "concept": "thing1",
        "licence": "MIT",
        "ood": False,
        "pairs": 4,
        "prompt_tokens": 200,
        "rejects": {},
        "requests": 2,
        "short": False,
        "source": "mine",
    }
    assert oct(out.stat().st_mode)[-3:] == "700"


def mixed(asked: Asked) -> Answer:
    """Every fault once or more: what a bad day at a real server looks like."""
    if asked.times == 1 and asked.concept == "thing0":
        return [Answer("slow", 429, {"Retry-After-Ms": "20"}), Answer("oops", 500, {"Retry-After-Ms": "5"})][
            asked.number % 2
        ]
    if asked.times == 1 and asked.concept == "thing1" and asked.number == 1:
        return Answer(raw=b"{nonsense")
    if asked.times == 1 and asked.concept == "thing1":
        return Answer(good_lines(asked), cut=20)
    if asked.concept == "thing2" and asked.number == 1:
        return Answer("I'm sorry, I can't help with that.")
    if asked.concept == "thing3" and asked.number <= 2:
        return Answer(good_lines(asked).replace("thing3", "thing4"))
    if asked.concept == "thing5":
        return Answer("Sure!\n" + good_lines(asked)[:-5], finish_reason="length")
    return Answer(good_lines(asked))


def test_a_bad_day(command: Command, concepts: Path, tmp_path: Path):
    """What each concept costs (wanted 4, 2 a request):

    thing0: a 429 and a 500, retried: 2 requests. thing1: a cut body, retried, and nonsense, asked again: 2 requests.
    thing2: one refusal: 3. thing3: writes what thing4 writes, and comes before it by name: 2. thing4: so its first
    four are duplicates: 4. thing5: an answer is talk, a pair, and half a pair: 4. In all 17 requests and 3 retries.
    """
    out = tmp_path / "out"
    with serve(mixed) as server:
        seen = command.raw(*arguments(concepts, out, server))
    assert seen.code == 0, seen.err
    assert "17 requests, 3 retries, 1,700 prompt tokens, 680 completion tokens" in seen.out
    assert "not kept: cut_short 4, duplicate 4, not_json 4, refusal 1  (rejects.parquet)" in seen.out
    assert rejects(out) == {"cut_short": 4, "duplicate": 4, "not_json": 4, "refusal": 1}
    assert [row["requests"] for row in record_of(out).details["per_concept"]] == [2, 2, 3, 2, 4, 4]
    assert record_of(out).counts["short_concepts"] == 0
    assert len(texts(out)) == 20
    assert len(texts(out / "ood")) == 4


def test_the_set_does_not_depend_on_concurrency(command: Command, concepts: Path, tmp_path: Path):
    outcomes = []
    for concurrency in ("1", "8"):
        out = tmp_path / f"out{concurrency}"
        with serve(mixed) as server:
            command.raw(*arguments(concepts, out, server, "--concurrency", concurrency))
        outcomes.append((record_of(out).fingerprint, texts(out), rejects(out), set(server.finished)))
    assert outcomes[0] == outcomes[1]


def test_done_is_done(command: Command, concepts: Path, tmp_path: Path):
    with serve() as server:
        first = command.raw(*arguments(concepts, tmp_path / "out", server))
        before = record_of(tmp_path / "out")
        again = command.raw(*arguments(concepts, tmp_path / "out", server))
    assert (again.code, again.out) == (0, first.out)
    assert len(server.asked) == 12
    assert record_of(tmp_path / "out") == before


def test_one_more_concept_costs_one_concept(command: Command, concepts: Path, tmp_path: Path):
    with serve() as server:
        command.raw(*arguments(concepts, tmp_path / "out", server))
        concepts.write_text(concepts.read_text() + "hate,another,mine,MIT,,\n")
        assert command.raw(*arguments(concepts, tmp_path / "out", server)).code == 0
    assert len(server.asked) == 12 + 2
    assert texts(tmp_path / "out") == expected_texts([*(f"thing{number}" for number in range(5)), "another"])


def test_a_concept_that_is_held_out_later_leaves_training_and_nothing_is_asked_again(
    command: Command, concepts: Path, tmp_path: Path
):
    out = tmp_path / "out"
    with serve() as server:
        command.raw(*arguments(concepts, out, server))
        concepts.write_text(
            concepts.read_text().replace("MIT,true", "MIT,").replace("thing0,mine,MIT,", "thing0,mine,MIT,true")
        )
        command.raw(*arguments(concepts, out, server))
        assert texts(out / "ood") == expected_texts(["thing0"])
        assert "thing0 in scene 1.0" not in dict(texts(out))
        concepts.write_text(concepts.read_text().replace("MIT,true", "MIT,"))
        command.raw(*arguments(concepts, out, server))
    assert len(server.asked) == 12
    assert not (out / "ood").exists()
    assert len(texts(out)) == 24


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--model", "other"), "model ('tiny' -> 'other')"),
        (("--per-concept", "5"), "pairs_per_concept (4 -> 5)"),
        (("--temperature", "0.5", "--seed", "1"), "seed (0 -> 1), temperature (1.0 -> 0.5)"),
    ],
)
def test_other_settings_in_the_same_folder(
    command: Command, concepts: Path, tmp_path: Path, more: tuple[str, ...], told: str
):
    with serve() as server:
        command.raw(*arguments(concepts, tmp_path / "out", server))
        seen = command.raw(*arguments(concepts, tmp_path / "out", server, *more))
    seen.assert_one_line(
        "the settings that", f"was begun with, found other values of {told}: choose another", code=USAGE
    )
    assert len(server.asked) == 12


def test_more_tries_for_what_is_short(command: Command, concepts: Path, tmp_path: Path):
    """Half the answers are refusals: 2 requests of 2 pairs leave 2 of 4; with room for more, only more are asked."""

    def answer(asked: Asked) -> Answer:
        return Answer(good_lines(asked) if asked.number % 2 else '{"refused": "no"}')

    with serve(answer) as server:
        seen = command.raw(*arguments(concepts, tmp_path / "out", server, "--max-requests", "2"))
        assert "warning: too few pairs for 6 of 6 concepts: thing0 (2), thing1 (2)" in seen.out
        assert record_of(tmp_path / "out").counts["short_concepts"] == 6
        command.raw(*arguments(concepts, tmp_path / "out", server, "--max-requests", "4"))
    assert set(server.times.values()) == {1}
    assert record_of(tmp_path / "out").counts["short_concepts"] == 0
    assert rejects(tmp_path / "out") == {"refusal": 6}


def test_401_ends_at_once_with_one_line(
    command: Command, concepts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MY_KEY", "sk-very-secret-key")
    with serve(lambda _: Answer("wrong key sk-very-secret-key", 401, seconds=0.05)) as server:
        seen = command.raw(
            *arguments(concepts, tmp_path / "out", server, "--api-key-env", "MY_KEY", "--concurrency", "2")
        )
    seen.assert_one_line("found 401 from", "--api-key-env", code=FAILURE)
    assert "very-secret" not in seen.err
    assert len(server.asked) <= 2
    assert "very-secret" not in (tmp_path / "out" / "replies.jsonl").read_text()
    assert not (tmp_path / "out" / "record.json").exists()


def test_a_server_that_is_down_ends_the_run_and_what_is_answered_is_kept(
    command: Command, concepts: Path, tmp_path: Path
):
    down = Answer("down", 503, {"Retry-After-Ms": "1"})
    with serve(lambda asked: down if asked.concept > "thing2" else Answer(good_lines(asked))) as server:
        seen = command.raw(*arguments(concepts, tmp_path / "out", server, "--concurrency", "2", "--max-retries", "1"))
        seen.assert_one_line("found 5 requests in a row without an answer", "503", code=FAILURE)
        server.answer = lambda asked: Answer(good_lines(asked))
        assert command.raw(*arguments(concepts, tmp_path / "out", server)).code == 0
    assert set(server.finished) == {(f"thing{concept}", number) for concept in range(6) for number in (1, 2)}
    assert all(times == 1 for (concept, _), times in server.times.items() if concept <= "thing2")


def test_a_request_that_never_gets_its_answer_leaves_the_folder_open(command: Command, concepts: Path, tmp_path: Path):
    poisoned = Answer(raw=b"<html>", headers={"Content-Type": "text/html"})
    with serve(lambda asked: poisoned if asked.concept == "thing3" else Answer(good_lines(asked))) as server:
        seen = command.raw(*arguments(concepts, tmp_path / "out", server))
        seen.assert_one_line(
            "expected at most 1.0% of 12 requests without an answer (--max-error-rate), found 2 without: thing3 (",
            "run the same command again, which asks only these",
            code=FAILURE,
        )
        assert not (tmp_path / "out" / "record.json").exists()
        server.answer = lambda asked: Answer(good_lines(asked))
        assert command.raw(*arguments(concepts, tmp_path / "out", server)).code == 0
    assert len(texts(tmp_path / "out")) == 20


def test_a_few_requests_without_an_answer_are_listed_and_tried_again(command: Command, concepts: Path, tmp_path: Path):
    """2 of 12 requests: allowed at 0.2, then answered by the next run of the command, which asks only them."""
    out = tmp_path / "out"
    poisoned = Answer(raw=b"<html>", headers={"Content-Type": "text/html"})
    with serve(lambda asked: poisoned if asked.concept == "thing3" else Answer(good_lines(asked))) as server:
        for _ in range(2):
            seen = command.raw(*arguments(concepts, out, server, "--max-error-rate", "0.2"))
            assert seen.code == 0, seen.err
            assert "warning: 2 of 12 requests stayed without an answer: thing3 (request 1), thing3 (r" in seen.out
            assert record_of(out).failed_units == ("thing3 (request 1)", "thing3 (request 2)")
            assert "no chat completion" in record_of(out).details["unanswered"]["thing3 (request 1)"]
            assert len(texts(out)) == 16
        seen = command.raw(*arguments(concepts, out, server))
        assert (seen.code, record_of(out).counts["pairs"]) == (FAILURE, 16)
        server.answer = lambda asked: Answer(good_lines(asked))
        assert command.raw(*arguments(concepts, out, server)).code == 0
        num_asked = len(server.asked)
        command.raw(*arguments(concepts, out, server))
    assert len(server.asked) == num_asked
    assert (record_of(out).failed_units, len(texts(out))) == ((), 20)
    assert all(times == 1 for (concept, _), times in server.times.items() if concept != "thing3")


def test_a_filter_that_declines_one_concept_leaves_it_short(command: Command, concepts: Path, tmp_path: Path):
    declined = Answer(status=400, raw=b'{"error": {"message": "no", "code": "content_filter", "type": null}}')
    with serve(lambda asked: declined if asked.concept == "thing3" else Answer(good_lines(asked))) as server:
        for _ in range(2):
            seen = command.raw(*arguments(concepts, tmp_path / "out", server))
            assert seen.code == 0, seen.err
    assert set(server.times.values()) == {1}
    assert rejects(tmp_path / "out") == {"refusal": 6}
    record = record_of(tmp_path / "out")
    assert (record.details["short_concepts"], record.details["models"]) == (["thing3"], ["tiny"])


def start(command_line: list[str]) -> subprocess.Popen[bytes]:
    code = "from ray_jobs.cli import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    return subprocess.Popen([sys.executable, "-c", code, *command_line], env=environment)


@pytest.mark.slow
def test_kill_9_in_the_middle_and_the_same_command_again(command: Command, concepts: Path, tmp_path: Path):
    """What was answered and on the disk at the kill is never asked again; only what was under way then may be."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    concurrency = 2
    more = ("--concurrency", str(concurrency), "--per-concept", "12", "--max-requests", "99")
    with serve(mixed) as server:
        command.raw(*arguments(concepts, whole, server, *more))
    with serve(lambda asked: Answer(**{**vars(mixed(asked)), "seconds": 0.05})) as server:
        process = start(arguments(concepts, out, server, *more))
        journal = out / "replies.jsonl"
        deadline = time.monotonic() + 60
        while not journal.exists() or journal.read_bytes().count(b"\n") < 12:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (out / "record.json").exists()
        lines = journal.read_bytes().split(b"\n")
        assert len(lines) - 2 < record_of(whole).counts["requests"]
        rows = [json.loads(line) for line in lines[1:-1]]
        kept = {(row["concept"], row["attempt"] + 1) for row in rows}
        time.sleep(0.3)  # what was under way arrives at the server before the next process starts
        before = Counter(server.times)
        journal.write_bytes(journal.read_bytes() + b'{"torn": "li')
        assert command.raw(*arguments(concepts, out, server, *more)).code == 0
    asked_again = {key for key in kept if server.times[key] > before[key]}
    assert asked_again == set()
    under_way = {key for key, times in server.finished.items() if times > 1 and key not in kept}
    assert len(under_way - {("thing0", 1), ("thing0", 2), ("thing1", 1), ("thing1", 2)}) <= concurrency
    assert texts(out) == texts(whole)
    assert rejects(out) == rejects(whole)
    assert record_of(out).fingerprint == record_of(whole).fingerprint


def test_templates_and_a_local_model_through_the_same_command(command: Command, concepts: Path, tmp_path: Path):
    seen = command.raw(*arguments(concepts, tmp_path / "a", None, "--writer", "templates"))
    assert (seen.code, seen.err) == (0, "")
    assert "20 pairs and 4 held-out pairs" in seen.out
    model = save_model(tmp_path / "model")
    local = ("--writer", "transformers", "--model", str(model), "--max-tokens", "8", "--max-requests", "2")
    seen = command.raw(*arguments(concepts, tmp_path / "b", None, *local))
    assert seen.code == 0, seen.err
    assert "0 pairs and 0 held-out pairs" in seen.out
    record = record_of(tmp_path / "b")
    assert record.counts["completion_tokens"] == 12 * 8
    assert record.counts["rejects"] >= 12


def test_no_ray_no_torch_no_client_where_they_are_not_used(concepts: Path, tmp_path: Path):
    line = arguments(concepts, tmp_path / "out", None, "--writer", "templates")
    code = (
        f"import sys; sys.argv = ['safetydpo', *{line!r}]\nfrom ray_jobs.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "assert not {'ray', 'torch', 'openai', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def in_place(command: Command, concepts: Path, out: str, *more: str) -> Seen:
    return command.raw("prompts", "write", str(concepts), "--out", out, "--writer", "templates", *more)


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ('{"x":1}\n', "expected the settings in the first line of replies.jsonl"),
        (None, "expected an answer in line 2 of replies.jsonl"),
    ],
)
def test_a_journal_that_is_none(command: Command, concepts: Path, tmp_path: Path, lines: str | None, told: str):
    out = tmp_path / "out"
    in_place(command, concepts, str(out), "--per-concept", "2")
    journal = out / "replies.jsonl"
    journal.write_text(lines or journal.read_text().splitlines()[0] + '\n{"concept": "thing0"}\n')
    (out / "record.json").unlink()
    in_place(command, concepts, str(out), "--per-concept", "2").assert_one_line(told, code=FAILURE)


def test_the_journal_may_lie_elsewhere(command: Command, concepts: Path, tmp_path: Path):
    in_place(command, concepts, str(tmp_path / "out"), "--per-concept", "2", "--journal", str(tmp_path / "journal"))
    assert (tmp_path / "journal" / "replies.jsonl").is_file()
    assert not (tmp_path / "out" / "replies.jsonl").exists()
    assert len(texts(tmp_path / "out")) == 10
