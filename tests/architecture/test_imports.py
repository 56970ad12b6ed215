"""What importing may not cost. The one-way street itself is checked by import-linter (`make lint`)."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.architecture.source import PACKAGES, ROOT, python_files

HEAVY = ("torch", "ray", "diffusers", "transformers", "peft", "deepspeed", "numpy", "scipy", "optuna", "matplotlib")

LOAD_EVERY_CONFIG = """
import glob, json, sys
import safetydpo
from safetydpo.config.load import load_config
for path in sorted(glob.glob("configs/*.yaml")):
    if not path.startswith("configs/concepts-"):
        load_config(path)
print(json.dumps(sorted(sys.modules)))
"""

IMPORT_EVERYTHING = """
import importlib, json, sys
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
print(json.dumps(sorted(sys.modules)))
"""


def modules_after(code: str, *arguments: str) -> set[str]:
    """Return what is imported in a fresh process after running `code`."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_every_config_loads_without_the_machine_learning_stack():
    """A head node reads a config in a fraction of a second, without torch or a GPU driver."""
    assert modules_after(LOAD_EVERY_CONFIG).isdisjoint(HEAVY)


def test_no_module_of_the_library_imports_ray():
    """Imported all together, so that a third party that drags ray in is found as well."""
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in python_files("safetydpo")]
    names = [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]
    assert "safetydpo.dpo.loss" in names
    imported = modules_after(IMPORT_EVERYTHING, json.dumps(names))
    assert set(names) <= imported
    assert "ray" not in imported


def test_no_module_has_a_name_that_takes_anything():
    banned = {"utils", "util", "common", "helpers", "helper", "misc", "other", "tools"}
    assert not [path for path in python_files(*PACKAGES) if path.stem in banned or path.parent.name in banned]
