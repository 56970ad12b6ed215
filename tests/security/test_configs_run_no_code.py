"""A config is data: no tag, reference, path or override in it runs anything or is taken for more than a text."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from safetydpo.artifacts.layout import demo_weights
from safetydpo.config.load import config_of_settings, load_config, load_policy
from safetydpo.config.schema import BaseModelConfig, Config
from safetydpo.diffusion.build import load_backbone
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.pairs.writer_templates import read_templates
from safetydpo.prompts.benchmark_entries import read_entry
from safetydpo.prompts.concepts import read_concepts
from tests.ray.commands import Command


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """What every attack below tries to make."""
    marker = tmp_path / "it_ran"
    yield marker
    assert not marker.exists()


CALLS = [
    "!!python/object/apply:os.system ['touch MARKER']",
    "!!python/object/apply:subprocess.check_call [['touch', MARKER]]",
    "!!python/object/new:os.system ['touch MARKER']",
    "!!python/object:tests.security.hostile._Touch {_marker: MARKER}",
    "!!python/object/apply:builtins.open [MARKER, w]",
    "!!python/name:os.system ''",
    "!!python/module:this ''",
    "!!python/tuple [1, 2]",
    "!<tag:yaml.org,2002:python/object/apply:os.system> ['touch MARKER']",
    "!import tests.security.hostile",
    "!include /etc/passwd",
    "!env HOME",
]


@pytest.mark.parametrize("number", range(len(CALLS)))
@pytest.mark.parametrize("reader", [load_config, lambda path: load_policy(path, {}), read_entry, read_templates])
def test_tags_that_build_objects_are_refused(reader, number: int, marker: Path, tmp_path: Path):
    value = CALLS[number].replace("MARKER", str(marker))
    for text in (f"name: {value}\n", f"{value}\n", f"? {value}\n: x\n", f"name: [{{a: {value}}}]\n"):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(UsageError, match="expected .*YAML .*found: .*could not determine a constructor"):
            reader(tmp_path / "x.yaml")


@pytest.mark.parametrize("number", range(len(CALLS)))
def test_tags_in_overrides_are_refused(number: int, marker: Path):
    value = CALLS[number].replace("MARKER", str(marker))
    with pytest.raises(UsageError, match="expected a YAML value in .*could not determine a constructor"):
        config_of_settings([f"name={value}"])


def test_tags_in_a_concept_list_make_texts(marker: Path, tmp_path: Path):
    """That reader takes every scalar as it is written, whatever is said of it."""
    value = f"!!python/object/apply:os.system 'touch {marker}'"
    (tmp_path / "x.yaml").write_text(
        f"concepts:\n- {{category: hate, concept: {value}, source: mine, licence: CC0-1.0}}\n"
    )
    assert read_concepts(tmp_path / "x.yaml")[0].concept == f"touch {marker}"


@pytest.mark.parametrize("text", ["${HOME}", "$HOME", "${oc.env:HOME}", "%(HOME)s", "{{ env.HOME }}", "`id`", "$(id)"])
def test_nothing_is_interpolated(text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HOME", "/secret")
    folder = f"runs/{text}"
    (tmp_path / "run.yaml").write_text(f"execution: {{run_dir: '{folder}'}}\n")
    assert load_config(tmp_path / "run.yaml").execution.run_dir == folder
    assert config_of_settings([f"run_dir='{folder}'"]).execution.run_dir == folder


def _texts(model: BaseModel, prefix: str = "") -> Iterator[str]:
    for name, value in model:
        if isinstance(value, BaseModel):
            yield from _texts(value, f"{prefix}{name}.")
        elif isinstance(value, str) or value is None:
            yield f"{prefix}{name}"


def test_no_setting_takes_the_path_of_a_module(marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A `.py` in any setting that may hold a text is refused or a mere text; reading the config imports nothing."""
    code = tmp_path / "attack.py"
    code.write_text(f"open({str(marker)!r}, 'w')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = sorted(_texts(Config()))
    assert len(settings) > 40
    for setting in settings:
        for value in (str(code), "attack", "attack:main"):
            with contextlib.suppress(UsageError):
                config_of_settings([f"{setting}={value}"])
    assert "attack" not in sys.modules


@pytest.mark.parametrize(
    "setting", ["identity.base.model", "identity.prompts.source", "execution.judges.q16_prompts", "run_dir"]
)
def test_a_module_in_place_of_a_file_ends_the_command(
    setting: str, marker: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
):
    code = tmp_path / "attack.py"
    code.write_text(f"open({str(marker)!r}, 'w')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    judges = ["identity.pairs.judges=[q16]"] if "judges" in setting else []
    seen = command("pairs", f"{setting}={code}", *judges)
    assert seen.code in (1, 2)
    assert seen.err.startswith("error: ")
    assert seen.err.count("\n") == 1


@pytest.mark.parametrize(
    "override",
    [
        "__class__.__init__.__globals__=1",
        "execution.__class__=x",
        "identity.model_config.extra=allow",
        "identity.dpo.__dict__.steps=1",
        "model_fields=1",
        "execution.model_post_init=os.system",
        "name=a;touch it_ran",
        "name=$(touch it_ran)",
    ],
)
def test_overrides_reach_settings_only(override: str):
    with pytest.raises(UsageError, match="known keys only|expected a text that matches|expected key.path=value"):
        config_of_settings([override])
    assert Config.model_config["extra"] == "forbid"


def test_a_model_folder_with_code_of_its_own_runs_none(tmp_path: Path, marker: Path):
    """`auto_map` and custom pipelines of a hub's model folder: the class names stay names."""
    model = Path(shutil.copytree(demo_weights() / "base", tmp_path / "model"))
    attack = f"open({str(marker)!r}, 'w')\nclass Attack: ...\n"
    for folder in ("", "unet", "vae", "text_encoder", "tokenizer"):
        for name in ("pipeline.py", "modeling.py", "attack.py", "__init__.py"):
            (model / folder / name).write_text(attack)
    for config in model.rglob("*config*.json"):
        content = json.loads(config.read_text())
        content["auto_map"] = dict.fromkeys(("AutoModel", "AutoConfig", "AutoTokenizer"), "attack.Attack")
        content["custom_pipeline"] = "pipeline"
        config.write_text(json.dumps(content))
    load_backbone(BaseModelConfig(model=str(model)))
    index = json.loads((model / "model_index.json").read_text())
    index["unet"] = ["attack", "Attack"]
    (model / "model_index.json").write_text(json.dumps(index))
    config = json.loads((model / "unet" / "config.json").read_text())
    config["_class_name"] = "Attack"
    (model / "unet" / "config.json").write_text(json.dumps(config))
    with contextlib.suppress(SafetyDPOError):
        load_backbone(BaseModelConfig(model=str(model)))
    assert "attack" not in sys.modules


def test_a_config_in_a_folder_of_modules_shadows_none(tmp_path: Path, marker: Path, root: Path, configs: Path):
    """The command that reads a config of a downloaded folder does not import what lies beside it."""
    for name in ("yaml", "pydantic", "safetydpo", "sitecustomize", "usercustomize", "typing_extensions"):
        (tmp_path / f"{name}.py").write_text(f"open({str(marker)!r}, 'w')\n")
    config = tmp_path / "mine.yaml"
    config.write_text("nome: x\n")
    script = Path(sys.executable).parent / "safetydpo"
    done = subprocess.run(
        [str(script), "run", str(config)],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "known keys only" in done.stderr


def test_bombs_of_aliases_and_nesting_are_refused_quickly(tmp_path: Path):
    """Nine lines that stand for a billion values; a hundred thousand brackets; a list that holds itself."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    for text, found in (
        ("\n".join(lines) + "\nname: *a8\n", "aliases that stand for more than 1,000,000 values"),
        ("name: " + "[" * 100_000 + "\n", "nested too deeply"),
        ("name: &a [*a]\n", "an alias of a group inside that group"),
        ("name: " + "9" * 100_000 + "\n", "integer string conversion"),
        ("name: 2001-99-99\n", "month must be in"),
    ):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(UsageError, match=found) as caught:
            load_config(tmp_path / "x.yaml")
        assert "\n" not in str(caught.value)
