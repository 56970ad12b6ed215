from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from safetydpo.artifacts import metric_sinks
from safetydpo.artifacts.metric_sinks import MlflowSink, WandbSink, check_logger, open_trackers
from safetydpo.errors import UsageError


@pytest.mark.parametrize("logger", ["wandb", "mlflow"])
def test_a_missing_package_is_one_clear_line(logger: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(metric_sinks, "find_spec", lambda name: None)
    expected = (
        rf"expected the package '{logger}' for execution.loggers, found none: pip install 'safetydpo\[{logger}\]'"
    )
    with pytest.raises(UsageError, match=expected):
        check_logger(logger)
    with pytest.raises(UsageError, match=expected):
        open_trackers([logger], name="hate", group="demo", settings={}, folder=tmp_path)
    assert list(tmp_path.iterdir()) == [], "nothing is begun"


def test_mlflow_without_a_place_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own default is the working directory of whatever process logs."""
    monkeypatch.setattr(metric_sinks, "find_spec", lambda name: object())
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UsageError, match="expected MLFLOW_TRACKING_URI in the environment .*, found none: set it"):
        check_logger("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    check_logger("mlflow")


def test_without_loggers_there_is_no_tracker() -> None:
    assert open_trackers([], name="hate", group="demo", settings={}) == []


def log_two_runs(make: Any) -> None:
    """One process trains many experts, one after the other."""
    for loss in (0.5, 0.25):
        sink = make()
        sink.write({"train/loss": 2 * loss}, step=0)
        sink.write({"train/loss": loss}, step=1)
        sink.write({"validation/unsafe_rate": 0.1}, step=2)
        sink.close()


@pytest.mark.skipif(find_spec("wandb") is None, reason="needs the extra `wandb`")
def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log_two_runs(lambda: WandbSink(tmp_path, name="hate", group="demo", settings={"seed": 0}))
    runs = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(runs) == 2
    for run in runs:
        data = run.read_bytes()
        assert b"train/loss" in data
        assert b"validation/unsafe_rate" in data


@pytest.mark.skipif(find_spec("mlflow") is None, reason="needs the extra `mlflow`")
def test_mlflow_in_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "runs").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    log_two_runs(lambda: MlflowSink(name="hate", group="demo", settings={"seed": 0}))
    client = MlflowClient()
    experiment = client.get_experiment_by_name("demo")
    runs = client.search_runs([experiment.experiment_id])
    assert [(run.info.run_name, run.info.status) for run in runs] == [("hate", "FINISHED")] * 2
    assert [run.data.params for run in runs] == [{"seed": "0"}] * 2
    series = {
        tuple((point.step, point.value) for point in client.get_metric_history(run.info.run_id, "train/loss"))
        for run in runs
    }
    assert series == {((0, 1.0), (1, 0.5)), ((0, 0.5), (1, 0.25))}
