"""The shipped cluster file obeys Ray's schema and our rules; every rule is broken once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ray_jobs.cluster_file import WRITTEN_OUT, check_cluster_file, main
from safetydpo.errors import UsageError

Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def changed(root: Path, tmp_path: Path) -> Callable[[Change], Path]:
    """Write the shipped file with one change."""

    def write(change: Change) -> Path:
        content = yaml.safe_load((root / "cluster.yaml").read_text())
        change(content)
        path = tmp_path / "changed.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


def test_the_shipped_file_is_accepted_and_says_that_it_was_not_launched(root: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(root / "cluster.yaml")]) == 0
    assert capsys.readouterr().out.endswith("cluster.yaml: ok (checked offline)\n")
    header = (root / "cluster.yaml").read_text().split("cluster_name:")[0]
    assert "NEVER launched" in header


@pytest.mark.parametrize("key", WRITTEN_OUT)
def test_a_list_of_commands_left_out_would_be_filled_by_the_provider(changed: Callable[[Change], Path], key: str):
    path = changed(lambda content: content.pop(key))
    with pytest.raises(UsageError, match=rf"changed\.yaml: {key}: expected a list, \[\] for none .*, found none"):
        check_cluster_file(path)


def _head_command(content: dict[str, Any], host: str) -> None:
    content["head_start_ray_commands"] = [f"ray start --head --port=6379 {host}"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: _head_command(c, "--dashboard-host=0.0.0.0"),
            "expected --dashboard-host=127.0.0.1, found --dash.*0$",
        ),
        (lambda c: _head_command(c, ""), "expected --dashboard-host=127.0.0.1, found no --dashboard-host$"),
        (
            lambda c: c.update(head_start_ray_commands=["ray stop"]),
            "expected `ray start --head …`, found .'ray stop'.$",
        ),
        (
            lambda c: c["docker"].update(image="rayproject/ray:latest"),
            r"docker\.image: expected the tag 2\.60\.0-py311",
        ),
        (lambda c: c["docker"].update(image="rayproject/ray:2.60.01-py311"), r"docker\.image: expected the tag 2\.60"),
        (lambda c: c["docker"].update(worker_image="rayproject/ray"), r"docker\.worker_image: expected the tag 2\.60"),
        (
            lambda c: c["available_node_types"]["head"].update(resources={"GPU": 1}),
            r"available_node_types\.head\.resources: expected GPU: 0 on the head, found GPU: 1$",
        ),
        (
            lambda c: c["available_node_types"]["head"].update(resources={}),
            r"available_node_types\.head\.resources: expected GPU: 0 on the head, found none written$",
        ),
        (lambda c: c["docker"].update(run_options=[]), r"docker\.run_options: expected -e RAY_AUTH_MODE=token, found"),
        (
            lambda c: c["docker"].update(run_options=["-e RAY_AUTH_MODE=token", "--ulimit nofile=65536"]),
            r"docker\.run_options: expected --shm-size=… \(30 % of the memory\), found no such option$",
        ),
        (
            lambda c: c["docker"].update(run_options=["-e RAY_AUTH_MODE=token --shm-size=1gb --ulimit nofile=1024"]),
            r"docker\.run_options: expected --ulimit nofile=65536, found --ulimit nofile=1024$",
        ),
        (
            lambda c: c["available_node_types"].pop("gpu_on_demand"),
            r"gpu_spot\.labels\.accelerator: expected the same label on an on-demand type, found 'a10g' on this spot",
        ),
        (
            lambda c: c["setup_commands"].append("export RAY_AUTH_TOKEN=abc"),
            r"setup_commands\.1: expected no secret in this file .*, found what looks like one$",
        ),
        (
            lambda c: c["provider"].update(aws_secret_access_key="x"),
            r"provider\.aws_secret_access_key: expected no secret in this file",
        ),
    ],
)
def test_a_broken_rule_is_named_by_its_key(changed: Callable[[Change], Path], change: Change, message: str):
    with pytest.raises(UsageError, match=message.removesuffix("$")) as caught:
        check_cluster_file(changed(change))
    assert str(caught.value).endswith(": correct it before `ray up`") or not message.endswith("$")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(max_wrokers=3), r"changed\.yaml: top level: expected what Ray's schema .*'max_wrokers'"),
        (
            lambda c: c["available_node_types"]["gpu_spot"].update(resources={"GPU": 0.5}),
            r"available_node_types\.gpu_spot\.resources\.GPU: expected what Ray's schema .*0\.5",
        ),
        (lambda c: c.update(head_node_type="hed"), "expected a cluster file that Ray accepts, found: .*head_node_type"),
        (lambda c: c.pop("docker"), "docker: expected a value, found none"),
        (lambda c: c["docker"].pop("image"), "that Ray accepts, found: Must provide a container & image name; correct"),
    ],
)
def test_what_ray_would_refuse(changed: Callable[[Change], Path], change: Change, message: str):
    with pytest.raises(UsageError, match=message):
        check_cluster_file(changed(change))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "expected a cluster file in YAML at .*x.yaml, found: while parsing"),
        ("- a", "expected a mapping in .*x.yaml, found list"),
    ],
)
def test_no_cluster_file(tmp_path: Path, text: str, message: str):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UsageError, match=message):
        check_cluster_file(tmp_path / "x.yaml")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([]) == 2
    assert capsys.readouterr().err == "usage: python -m ray_jobs.cluster_file FILE …\n"
    assert main([str(tmp_path / "none.yaml")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: expected a cluster file in YAML at ")
    assert error.count("\n") == 1
