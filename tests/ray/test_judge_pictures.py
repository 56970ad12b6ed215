"""The worker that judges stored pictures, in this process, with real judges and files that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

from ray_jobs import judge_command
from ray_jobs.judge_pictures import MISSING, Judged, StoredPictureJudge, _row, _with_prompts, as_verdicts
from safetydpo.artifacts.picture_listing import StoredPicture, list_pictures, manifest_of
from safetydpo.artifacts.schemas import JUDGED_PICTURES, PICTURE_VERDICTS
from safetydpo.artifacts.storage import open_location
from safetydpo.artifacts.tables import table_from_rows
from safetydpo.config.judges import JudgesConfig
from safetydpo.errors import UsageError
from safetydpo.judges.build import load_judge
from safetydpo.judges.picture_files import SUFFIXES, read_picture
from safetydpo.prompts.picture_prompts import PicturePrompt
from tests.judges.pictures import several
from tests.judges.vision_server import Answer, serve
from tests.ray.commands import Command


def write_pictures(folder: Path) -> Path:
    """Five pictures of five sizes, one of no bytes, one that is cut."""
    folder.mkdir(exist_ok=True)
    for index, picture in enumerate(several()):
        Image.fromarray(picture.numpy()).save(folder / f"{index}.png")
    (folder / "empty.png").write_bytes(b"")
    (folder / "cut.jpg").write_bytes((folder / "0.png").read_bytes()[:60])
    return folder


def judge_all(folder: Path, judge: str, settings: JudgesConfig | None = None) -> dict[str, dict[str, Any]]:
    """Return the worker's row of each picture by name."""
    listing = list_pictures(open_location(str(folder)), SUFFIXES)
    manifest = manifest_of(listing.pictures)
    worker = StoredPictureJudge(judge, str(folder), (settings or JudgesConfig()).model_dump(mode="json"), 4)
    parts = [worker(manifest.slice(start, 4)) for start in range(0, manifest.num_rows, 4)]
    table = pa.concat_tables(parts)
    assert table.schema == PICTURE_VERDICTS
    names = dict(zip(manifest.column("picture_id").to_pylist(), manifest.column("name").to_pylist(), strict=True))
    return {names[row["picture_id"]]: row for row in table.to_pylist()}


def test_scores_are_the_judges_own_on_each_file(tmp_path: Path):
    folder = write_pictures(tmp_path / "pictures")
    found = judge_all(folder, "open_nsfw")
    judge = load_judge("open_nsfw")
    for index in range(5):
        expected = judge.judge([read_picture((folder / f"{index}.png").read_bytes())])
        row = found[f"{index}.png"]
        assert row["score"] == pytest.approx(expected.unsafe_score[0], abs=1e-5)
        assert (row["unsafe"], row["status"], row["judge"]) == (expected.is_unsafe[0], "ok", "open-nsfw")
        assert row["picture_failure"] == row["judge_failure"] == ""


def test_what_is_no_picture_is_a_row_that_counts_as_unsafe(tmp_path: Path):
    found = judge_all(write_pictures(tmp_path / "pictures"), "open_nsfw")
    assert len(found) == 7
    for name, size in (("empty.png", 0), ("cut.jpg", 60)):
        row = found[name]
        assert row["picture_failure"].startswith(f"corrupt: {size} bytes")
        # Not tried again: the bytes stay what they are.
        assert (row["score"], row["unsafe"], row["judge_failure"], row["status"]) == (None, True, "", "ok")


def test_a_picture_that_the_judge_does_not_take_fails_alone(tmp_path: Path):
    """The demo's judge knows one size; a neighbour in the same batch is judged all the same."""
    folder = write_pictures(tmp_path / "pictures")
    Image.new("RGB", (32, 32), "red").save(folder / "small.png")
    found = judge_all(folder, "demo_audit")
    assert found["small.png"]["judge_failure"] == ""
    assert 0 <= found["small.png"]["score"] <= 1
    assert "expected a picture of 32 x 32, found 40 x 40" in found["0.png"]["judge_failure"]
    assert (found["0.png"]["unsafe"], found["0.png"]["status"]) == (True, "error")


def test_a_judge_without_an_answer_is_asked_again_by_the_next_attempt(tmp_path: Path):
    folder = write_pictures(tmp_path / "pictures")
    with serve(lambda asked: Answer("hm") if asked.pixels.shape[0] == 64 else Answer('{"rating": "Safe"}')) as server:
        settings = JudgesConfig.model_validate({"vlm": {"base_url": server.url, "model": "guard"}})
        found = judge_all(folder, "vlm", settings)
    assert found["2.png"]["judge_failure"].startswith("malformed")
    assert (found["2.png"]["unsafe"], found["2.png"]["score"], found["2.png"]["status"]) == (True, None, "error")
    assert (found["1.png"]["unsafe"], found["1.png"]["score"], found["1.png"]["status"]) == (False, 0.0, "ok")


def test_a_file_that_is_gone_may_come_back(tmp_path: Path):
    folder = write_pictures(tmp_path / "pictures")
    listing = list_pictures(open_location(str(folder)), SUFFIXES)
    (folder / "3.png").unlink()
    worker = StoredPictureJudge("open_nsfw", str(folder), {}, 4)
    rows = worker(manifest_of([each for each in listing.pictures if each.name == "3.png"])).to_pylist()
    assert (rows[0]["status"], rows[0]["unsafe"]) == ("error", True)
    assert "3.png" in rows[0]["picture_failure"]


def test_prompts_without_pictures_stay_in_the_denominator(tmp_path: Path):
    folder = write_pictures(tmp_path / "pictures")
    listing = list_pictures(open_location(str(folder)), SUFFIXES)
    prompts = {"0.png": PicturePrompt("a", "hate"), "lost.png": PicturePrompt("b", "hate")}
    pictures = _with_prompts(listing, prompts)
    assert len(pictures) == 8
    assert [(each.prompt, each.category) for each in pictures if each.name == "0.png"] == [("a", "hate")]
    assert [each.prompt for each in pictures if each.name == "1.png"] == [None]
    row = _row(pictures[-1], {}, fallback="open_nsfw")
    assert row == {
        "picture": "lost.png",
        "prompt": "b",
        "category": "hate",
        "judge": "open_nsfw",
        "version": "",
        "score": None,
        "unsafe": True,
        "picture_failure": MISSING,
        "judge_failure": "",
    }


def judged_table() -> Judged:
    listing = type("L", (), {"other_files": ["notes.txt"], "pictures": []})()
    rows = []
    for judge in ("q16", "nudenet"):
        for index in range(24):
            picture = StoredPicture(f"{index}.png", f"{index}.png", category="hate" if index % 2 else "")
            common = {
                "picture": picture.name,
                "prompt": None,
                "category": picture.category,
                "judge": judge,
                "version": "1",
            }
            corrupt = "corrupt: 0 bytes" if index == 0 else ""
            failed = "no answer" if index == 1 and judge == "q16" else ""
            rows.append(
                {**common, "score": None, "unsafe": index < 3, "picture_failure": corrupt, "judge_failure": failed}
            )
    return Judged(table_from_rows(rows, JUDGED_PICTURES), listing, [f"{index}.png" for index in range(24)])


def test_the_table_says_n_and_lists_apart_what_has_no_verdict(capsys: pytest.CaptureFixture[str]):
    judged = judged_table()
    assert len(as_verdicts(judged.table)) == 48
    judge_command.print_judged(judged)
    out = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "24 pictures" in lines
    # 3 of 24: the exact interval is 0.027 to 0.324.
    assert "q16 3 24 0.125 [0.027, 0.324] 1 1" in lines
    assert "nudenet 3 24 0.125 [0.027, 0.324] 1 0" in lines
    assert "any 3 24 0.125 [0.027, 0.324] 1 1" in lines
    assert "By category, any judge" in lines
    assert any(line.startswith("(none) 2 12 0.167") for line in lines)
    assert "no picture, counted as unsafe: 0.png (corrupt: 0 bytes)" in lines
    assert "not judged, counted as unsafe: 1.png (q16: no answer)" in lines
    assert "no prompt names it: 4 more" in lines
    assert "1 other files were left aside, such as notes.txt" in lines


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--judges", "open_nsfw,open_nsfw"], "each once, with commas between (--judges)"),
        (["--judges", " "], "with commas between (--judges)"),
        (["--out", "x.csv"], "a file that ends in .parquet for --out"),
        (["--judges", "nobody"], "a judge among demo_audit"),
        (["--judges", "q16"], "execution.judges.clip_vit_l14 for judge 'q16'"),
        (["identity.nothing=1"], "known keys only"),
    ],
)
def test_requests_that_cannot_be_carried_out(command: Command, tmp_path: Path, arguments: list[str], told: str):
    folder = write_pictures(tmp_path / "pictures")
    seen = command.raw("judge", str(folder), "--out", str(tmp_path / "v.parquet"), *arguments)
    seen.assert_one_line(told, code=2)


def test_the_result_may_not_lie_among_the_pictures(command: Command, tmp_path: Path):
    folder = write_pictures(tmp_path / "pictures")
    seen = command.raw("judge", str(folder), "--out", str(folder / "v.parquet"))
    seen.assert_one_line("--out outside of", code=2)


def test_the_list_says_what_is_missing(command: Command):
    seen = command.raw("judges", "list")
    assert seen.code == 0
    text = " ".join(seen.out.split())
    assert "open_nsfw yes" in text
    assert "nudenet yes" in text
    assert "q16 no: expected execution.judges.clip_vit_l14 for judge 'q16', found none" in text


def test_q16_is_converted_by_hand_and_its_checksum_is_demanded(command: Command, tmp_path: Path):
    import hashlib
    import pickle

    import numpy as np

    source, out = tmp_path / "prompts.p", str(tmp_path / "q16.safetensors")
    source.write_bytes(pickle.dumps(np.ones((2, 768), np.float16)))
    checksum = hashlib.sha256(source.read_bytes()).hexdigest()
    assert command.raw("judges", "convert-q16", str(source), "--out", out).code == 2
    seen = command.raw("judges", "convert-q16", str(source), "--out", out, "--sha256", "abc")
    seen.assert_one_line("64 hexadecimal digits for --sha256", code=2)
    seen = command.raw("judges", "convert-q16", str(source), "--out", str(tmp_path / "q16.pt"), "--sha256", checksum)
    seen.assert_one_line("ends in .safetensors for --out", code=2)
    seen = command.raw("judges", "convert-q16", str(source), "--out", out, "--sha256", "0" * 64)
    seen.assert_one_line(f"expected the sha256 {'0' * 64}", code=1)
    seen = command.raw("judges", "convert-q16", str(source), "--out", out, "--sha256", checksum)
    assert (seen.code, seen.err) == (0, "")
    assert "execution.judges.q16_prompts" in seen.out


def test_a_setting_of_the_command_reaches_the_workers(tmp_path: Path):
    with pytest.raises(UsageError, match=r"execution\.judges\.vlm\.base_url and model"):
        StoredPictureJudge("vlm", str(tmp_path), {}, 4)
    settings = json.loads(
        JudgesConfig.model_validate({"vlm": {"base_url": "http://a/v1", "model": "m"}}).model_dump_json()
    )
    assert StoredPictureJudge("vlm", str(tmp_path), settings, 4)
