from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from safetydpo.artifacts.storage import open_location
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.prompts.picture_prompts import PicturePrompt, read_picture_prompts

WANTED = {"a.png": PicturePrompt("a cat, sitting", "hate"), "b/c.png": PicturePrompt("a dog", "")}


def read(tmp_path: Path, name: str, text: str) -> dict[str, PicturePrompt]:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return read_picture_prompts(open_location(str(tmp_path / name)))


def test_every_kind_of_table(tmp_path: Path):
    assert (
        read(tmp_path, "x.csv", '\ufefffile,prompt,category\na.png,"a cat, sitting",hate\nb/c.png,a dog,\n') == WANTED
    )
    rows = [
        {"file_name": "a.png", "text": "a cat, sitting", "category": "hate"},
        {"file_name": "b/c.png", "text": "a dog"},
    ]
    assert read(tmp_path, "x.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n") == WANTED
    columns = {"picture": ["a.png", "b/c.png"], "caption": ["a cat, sitting", "a dog"], "category": ["hate", None]}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    assert read_picture_prompts(open_location(str(tmp_path / "x.parquet"))) == WANTED


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("x.csv", "file,category\na.png,hate\n", "expected a column prompt or text or caption in"),
        ("x.csv", "number,prompt\n1,a\n", "expected a column picture or file_name or file or image in"),
        ("x.csv", "file,prompt\na.png,\n", "expected the name of a picture and its prompt in row 1"),
        ("x.csv", "file,prompt\n,a cat\n", "expected the name of a picture and its prompt in row 1"),
        ("x.csv", "file,prompt\na.png\n", "expected the name of a picture and its prompt in row 1"),
        ("x.csv", "file,prompt\na,x\na,y\n", "expected each picture once in .*, found 'a' again in row 2"),
        ("x.csv", "", "expected rows with pictures and prompts in .*, found none"),
        ("x.csv", 'file,prompt\na,"x\n', "expected a readable table in"),
        ("x.jsonl", "[1]\n", "a line that is no object"),
        ("x.jsonl", "{\n", "expected a readable table in"),
        ("x.parquet", "no", "expected a readable table in"),
        ("x.txt", "a", r"expected a \.csv, \.jsonl or \.parquet file for --prompts, found 'x\.txt'"),
    ],
)
def test_what_is_no_such_table(tmp_path: Path, name: str, text: str, told: str):
    with pytest.raises((SafetyDPOError, UsageError), match=told):
        read(tmp_path, name, text)
