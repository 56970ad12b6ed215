"""Only safetensors, JSON, Parquet and safe YAML are read: a file of another origin must not be able to run code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.architecture.source import PACKAGES, python_files, shown

# pickletools runs nothing, but whoever walks a pickle with it is about to rebuild what it holds.
WALKERS = {"pickletools"}
MAY_WALK = {
    # Q16's prompts are published as a pickle only. This file converts it once, by hand, into safetensors: opcodes and
    # names by an allow-list, nothing imported or called (tests/judges/test_q16_pickle.py). No job imports it to judge.
    "safetydpo/judges/q16_pickle.py",
}
MODULES = WALKERS | {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle"}
# module -> functions of it that unpickle or build arbitrary objects
FUNCTIONS = {
    "torch": {"load"},
    "yaml": {"load", "load_all", "full_load", "unsafe_load", "full_load_all", "unsafe_load_all"},
    "pd": {"read_pickle"},
    "pandas": {"read_pickle"},
    "np": {"load"},
    "numpy": {"load"},
}
# of any object: ray.tune.Tuner.restore, deepspeed's engine.load_checkpoint and module.load_pickle unpickle
METHODS = {"restore", "load_checkpoint", "read_pickle", "load_pickle"}


def unpickling(source: str) -> Iterator[str]:
    """Yield what in `source` would unpickle."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom):
            package = (node.module or "").split(".")[0]
            banned = FUNCTIONS.get(package, set())
            names = [alias.name for alias in node.names]
            yield from (f"{package}.{name}" for name in names if package in MODULES or name in banned | MODULES)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            if node.func.attr in METHODS or node.func.attr in FUNCTIONS.get(owner, set()):
                yield f"{owner}.{node.func.attr}"
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and not _is_false(node.value):
            yield "allow_pickle"
        if isinstance(node, ast.keyword) and node.arg == "weights_only":
            yield "weights_only"


def _is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


@pytest.mark.parametrize("path", python_files(*PACKAGES), ids=shown)
def test_no_code_of_ours_unpickles(path: Path):
    allowed = WALKERS if shown(path) in MAY_WALK else set()
    assert not [what for what in unpickling(path.read_text(encoding="utf-8")) if what not in allowed]


def test_the_one_exception_is_reached_by_the_conversion_only():
    """Imported inside the function that converts, so that no judge loads it."""
    users = [
        shown(path)
        for path in python_files(*PACKAGES)
        if "q16_pickle" in path.read_text(encoding="utf-8") and shown(path) not in MAY_WALK
    ]
    assert users == ["safetydpo/judges/q16_conversion.py"]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pickle", ["pickle"]),
        ("from ray import cloudpickle", ["ray.cloudpickle"]),
        ("from pickle import loads", ["pickle.loads"]),
        ("import pickletools", ["pickletools"]),
        ("from torch import load", ["torch.load"]),
        ("torch.load(path)", ["torch.load"]),
        ("torch.load(path, weights_only=True)", ["torch.load", "weights_only"]),
        ("np.load(path, allow_pickle=True)", ["np.load", "allow_pickle"]),
        ("yaml.load(text, Loader=yaml.SafeLoader)", ["yaml.load"]),
        ("yaml.safe_load(text)", []),
        ("Tuner.restore(path, train)", ["Tuner.restore"]),
        ("self.engine.load_checkpoint(path)", [".load_checkpoint"]),
        ("json.load(file)", []),
        ("safetensors.torch.load(data)", []),
    ],
)
def test_the_check_finds_what_it_should(source: str, found: list[str]):
    assert sorted(unpickling(source)) == sorted(found)
