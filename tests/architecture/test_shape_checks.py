"""Every module that names shapes of tensors has them checked while the tests run, or is excused with a reason."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

from safetydpo.attacks.swaps import swap_scores
from safetydpo.judges.q16 import inappropriate_probability
from safetydpo.merging.moments import MomentSums
from tests.architecture.source import ROOT, python_files
from tests.checked_modules import CHECKED_MODULES, TAKES_A_PROTOCOL, UNCHECKED_MODULES

TREES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text(encoding="utf-8"))
    for path in python_files("safetydpo")
}
NAMES_SHAPES = [
    name
    for name, tree in TREES.items()
    if any(isinstance(node, ast.ImportFrom) and node.module == "jaxtyping" for node in ast.walk(tree))
]
PROTOCOLS = {
    node.name
    for tree in TREES.values()
    for node in ast.walk(tree)
    if isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "Protocol" for base in node.bases)
}


def is_checked(module: str) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in CHECKED_MODULES)


@pytest.mark.parametrize("module", NAMES_SHAPES)
def test_a_module_that_names_shapes_is_checked_or_excused(module: str) -> None:
    assert is_checked(module) != (module in UNCHECKED_MODULES), (
        "expected it in one of the two lists of tests/checked_modules.py"
    )


def test_the_lists_name_modules_that_are_there_in_their_order() -> None:
    assert list(CHECKED_MODULES) == sorted(set(CHECKED_MODULES))
    assert list(UNCHECKED_MODULES) == sorted(UNCHECKED_MODULES)
    assert set(UNCHECKED_MODULES) <= set(NAMES_SHAPES)
    for name in CHECKED_MODULES:
        place = Path(ROOT, *name.split("."))
        assert place.with_suffix(".py").is_file() or place.is_dir()


@pytest.mark.parametrize("module", [name for name, why in UNCHECKED_MODULES.items() if why == TAKES_A_PROTOCOL])
def test_what_is_excused_for_a_protocol_takes_one(module: str) -> None:
    named = {
        part.id
        for node in ast.walk(TREES[module])
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None
        for part in ast.walk(node.annotation)
        if isinstance(part, ast.Name)
    }
    assert named & PROTOCOLS


@pytest.mark.parametrize(
    "call",
    [
        lambda: swap_scores(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(5, 4)),
        lambda: inappropriate_probability(torch.zeros(2, 3), torch.zeros(2, 4)),
        lambda: MomentSums(["hate"])("layer", 0, torch.zeros(3)),
    ],
    ids=["swaps", "q16", "moments"],
)
def test_a_wrong_shape_is_refused_before_anything_is_computed(call) -> None:
    with pytest.raises(TypeCheckError):
        call()
