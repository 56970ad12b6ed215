from __future__ import annotations

import codecs
import gzip
import hashlib
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from safetydpo.artifacts.storage import open_location
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.prompts.readers import RawTable, read_prompt_file
from tests.prompts.samples import TEXTS, as_json_lines, as_parquet, place

PAIR = {"unsafe_text": "a bomb, lit", "safe_text": 'a "ball"'}


def values(table: RawTable) -> list[dict[str, object]]:
    return [dict(row) for _, row in table.rows]


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("csv", 'unsafe_text,safe_text\n"a bomb, lit","a ""ball"""\n'),
        ("csv", 'unsafe_text,safe_text\r\n"a bomb, lit","a ""ball"""\r\n'),
        ("tsv", 'unsafe_text\tsafe_text\na bomb, lit\t"a ""ball"""\n'),
        ("jsonl", as_json_lines([PAIR])),
        ("parquet", as_parquet([PAIR])),
    ],
)
def test_one_table_in_every_kind_of_file(tmp_path: Path, kind: str, content: str | bytes):
    table = read_prompt_file(place(tmp_path, content))
    assert (table.kind, table.columns) == (kind, ("unsafe_text", "safe_text"))
    assert list(table.rows) == [(1, PAIR)]
    data = content.encode() if isinstance(content, str) else content
    assert table.sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("content", ["prompt\na bomb\n", as_json_lines([{"prompt": "a bomb"}]), "a bomb\n"])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path, content: str):
    table = read_prompt_file(place(tmp_path, codecs.BOM_UTF8 + content.encode()))
    assert next(iter(values(table)[0].values())) == "a bomb"


@pytest.mark.parametrize(
    "content",
    [
        '"a bomb" on a table, in rain\na wasp, drawn\n',  # no CSV at all: text after a closing quote
        'wasp,moth\n"a bomb" on a table, in rain\n',  # what looks like a header, over such a line
    ],
)
def test_quotes_in_the_middle_of_plain_lines_make_no_table(tmp_path: Path, content: str):
    table = read_prompt_file(place(tmp_path, content))
    assert table.kind == "lines"
    assert [row["line"] for row in values(table)] == content.splitlines()


def test_lines_by_hand(tmp_path: Path):
    """Line 2 is empty; "\\r\\r\\n" ends line 3 and a lone CR line 4; commas and quotes around a line are cut off."""
    table = read_prompt_file(place(tmp_path, TEXTS["lines"]))
    assert [(number, row["line"]) for number, row in table.rows] == [
        (1, "a bomb, in oil"),
        (3, "a wasp, drawn"),
        (4, "a spider"),
        (5, "A photo of a web"),
    ]
    assert table.notes == {"empty lines": 1, "lines with trailing commas": 1, "lines with a stray CR": 2}


@given(st.lists(st.text("ab ,xyz", min_size=1, max_size=9).filter(lambda text: text.strip(", "))))
def test_lines_come_back_as_they_are(tmp_path_factory: pytest.TempPathFactory, lines: list[str]):
    if lines:
        file = place(tmp_path_factory.mktemp("lines"), "\n".join(lines))
        found = read_prompt_file(file, as_lines=True)
        assert [row["line"] for _, row in found.rows] == [line.strip().rstrip(", ") for line in lines]


def test_a_prompt_that_begins_like_json_is_a_prompt(tmp_path: Path):
    assert values(read_prompt_file(place(tmp_path, "[close-up] a dog\na cat\n")))[0] == {"line": "[close-up] a dog"}


def test_prompts_with_commas_are_no_header(tmp_path: Path):
    table = read_prompt_file(place(tmp_path, "a sign, text, blue\na cat that sleeps, in oil\n"))
    assert table.kind == "lines"


def test_trailing_commas_of_a_table_are_cut_off(tmp_path: Path):
    table = read_prompt_file(place(tmp_path, "Original,Spanish,Index,,\r\na bomb,una bomba,0,,\r\n,,,,\r\n"))
    assert table.columns == ("Original", "Spanish", "Index")
    assert values(table) == [{"Original": "a bomb", "Spanish": "una bomba", "Index": "0"}]


def test_bytes_of_pictures_are_never_read(tmp_path: Path):
    """A column of bytes is left out; of a picture's struct only the path is read."""
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("jpg_0", pa.binary()), ("image", picture), ("caption", pa.string())])
    rows = [{"jpg_0": b"\xff\xd8", "image": {"bytes": b"\xff\xd8", "path": "u_idx_1_0.jpg"}, "caption": "a bomb"}]
    table = read_prompt_file(place(tmp_path, as_parquet(rows, schema)))
    assert table.columns == ("jpg_0", "image", "caption")
    assert values(table) == [{"image": "u_idx_1_0.jpg", "caption": "a bomb"}]


def test_a_large_field_that_nobody_asks_for(tmp_path: Path):
    content = f"jpg_0,jpg_1,label_0,caption\n{'x' * 200_000},y,1,a bomb\n"
    assert values(read_prompt_file(place(tmp_path, content)))[0]["caption"] == "a bomb"


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", r"found an empty file \(0 bytes\): fetch it again"),
        (b"\xef\xbb\xbf\r\n ,,\n", "found only empty lines"),
        (POINTER.encode(), "found a git-LFS pointer to a file of 12,345 bytes: run `git lfs pull`"),
        (b"a bomb\0b", "expected prompts as text or Parquet in .*, found a binary file"),
        (b"a bomb\n" * 2000 + b"a\0b\n", "found a NUL byte in line 2001: a binary or broken file"),
        (b'{"prompt": "a"}\n{"prompt": ' + b"[" * 100_000, "found one nested too deeply to read in line 2: take that"),
        (b"[" * 100_000, "found one nested too deeply to read in line 1: take that line out"),
        (gzip.compress(b"prompt\na\n", mtime=0), "found a gzip archive: unpack it first"),
        (b"\x89PNG\r\n", "found a PNG picture"),
        (
            "prompt\na bomb\n".encode("utf-16"),
            "expected UTF-8 text in .*, found UTF-16: convert it with `iconv -f UTF-16",
        ),
        (
            "prompt\na bomb\nun café\n".encode("latin-1"),
            "found byte 0xe9 in line 3: if it is Latin-1 .* -f WINDOWS-1252",
        ),
        (b"PAR1 and no more", "expected a complete Parquet file at .*, found 16 bytes that do not parse"),
        (
            "prompt,image,category\na, b,u_idx_1_0.jpg,Hate\n",
            r"expected 3 fields in row 1 of .* \(line 2\), found 4: put quotes",
        ),
        ("prompt,image,category\na\n", "expected 3 fields in row 1 of .*, found 1"),
        ('prompt,image,category\n"a,b,Hate\n', r"expected a well-formed table in .*, found: unexpected end of data"),
        ("prompt,image,category,prompt\na,b,c,d\n", "expected each column once in .*, found 'prompt' twice"),
        ('[\n{"prompt": "a"}\n]\n', "expected one JSON object per line in .*, found in line 1"),
        ('{"prompt": "a"}\n[1]\n', "expected one JSON object per line in .*, found an array in line 2"),
        ('{"prompt": "a"}\n{"prompt": \n', "expected one JSON object per line in .*, found in line 2: Expecting value"),
        ('{"prompt": "a", "seed": NaN}\n', "found in line 1: NaN, which is no JSON number"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(tmp_path: Path, content: str | bytes, told: str):
    with pytest.raises(SafetyDPOError, match=told):
        read_prompt_file(place(tmp_path, content))


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="expected a prompt file at .*/none, found nothing: name one file"):
        read_prompt_file(open_location(str(tmp_path / "none")))
    with pytest.raises(UsageError, match="found a folder: name one file"):
        read_prompt_file(open_location(str(tmp_path)))
