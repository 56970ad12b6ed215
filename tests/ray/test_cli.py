"""Bad input at the command line: one line, the right exit code, no traceback."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ray_jobs import cli


def _run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["safetydpo", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0), capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("identity.dpo.stepz=3", "found 'identity.dpo.stepz'"),
        ("identity.dpo.steps=many", "identity.dpo.steps"),
        ("identity.dpo.beta", "expected key.path=value, found 'identity.dpo.beta'"),
        ("identity.prompts.categories=[weather]", "identity.prompts.categories"),
        ("identity.base.model=/nowhere", "/nowhere"),
    ],
)
def test_bad_settings_end_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    configs: Path,
    tmp_path: Path,
    setting: str,
    message: str,
) -> None:
    places = [f"store={tmp_path}/store", f"run_dir={tmp_path}/run"]
    code, text = _run(monkeypatch, capsys, "run", str(configs / "smoke.yaml"), *places, setting)
    assert code in (1, 2)
    assert text.startswith("error: ")
    assert message in text
    assert text.count("\n") == 1
    assert not (tmp_path / "store" / "pairs").exists()


def test_missing_config_file(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = _run(monkeypatch, capsys, "run", "nowhere.yaml")
    assert code == 2
    assert text == "error: expected a config file at nowhere.yaml, found nothing; shipped ones are in configs/\n"


def test_help_teaches_and_loads_no_torch(capsys: pytest.CaptureFixture[str]) -> None:
    import subprocess

    code = (
        "import sys; sys.argv=['safetydpo','--help']\n"
        "from ray_jobs import cli\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "assert not {'torch','ray','diffusers'} & set(sys.modules), 'heavy import'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for word in ("demo", "run", "pairs", "train", "merge", "search", "evaluate", "report", "doctor"):
        assert word in done.stdout
