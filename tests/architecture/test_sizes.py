"""Small enough to be read: files of at most 400 lines, functions of at most 60."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.architecture.source import CODE, python_files, shown

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


@pytest.mark.parametrize("path", python_files(*CODE), ids=shown)
def test_files_and_functions_are_short(path: Path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE_LINES
    lengths = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None
    }
    assert {name: length for name, length in lengths.items() if length > MAX_FUNCTION_LINES} == {}
