"""The shipped cluster files obey their schema and our rules; every rule is broken once in every file it is for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ray_jobs.cluster_file import check_cluster_file, main
from ray_jobs.cluster_file_rules import WRITTEN_OUT
from safetydpo.errors import UsageError

Content = dict[str, Any]
Change = Callable[[Content], object]
AWS, GCP, LOCAL = "cluster.yaml", "configs/cluster/gcp.yaml", "configs/cluster/local.yaml"
LAUNCHED = (AWS, GCP, LOCAL)
ALL = (*LAUNCHED, "configs/cluster/kuberay-rayjob.yaml")


@pytest.fixture
def changed(root: Path, tmp_path: Path) -> Callable[[str, Change], Path]:
    """Write a shipped file with one change."""

    def write(name: str, change: Change) -> Path:
        content = yaml.safe_load((root / name).read_text())
        change(content)
        path = tmp_path / "changed.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


@pytest.mark.parametrize("name", ALL)
def test_a_shipped_file_is_accepted_and_says_how_far_it_was_tried(
    root: Path, capsys: pytest.CaptureFixture[str], name: str
):
    assert main([str(root / name)]) == 0
    assert capsys.readouterr().out.endswith(f"{name}: ok (checked offline)\n")
    header = "".join(line for line in (root / name).read_text().splitlines(keepends=True) if line.startswith("#"))
    assert "offline" in header
    for word in ("Command:", "End:", "auth_token"):
        assert word in header


@pytest.mark.parametrize("name", LAUNCHED)
@pytest.mark.parametrize("key", WRITTEN_OUT)
def test_a_list_of_commands_left_out_would_be_filled_by_the_provider(
    changed: Callable[[str, Change], Path], name: str, key: str
):
    path = changed(name, lambda content: content.pop(key))
    with pytest.raises(UsageError, match=rf"changed\.yaml: {key}: expected a list, \[\] for none .*, found none"):
        check_cluster_file(path)


def in_command(key: str, old: str, new: str) -> Change:
    """Replace a part of the start command of the head or the workers."""

    def change(content: Content) -> None:
        before = list(content[key])
        content[key] = [command.replace(old, new) for command in before]
        assert content[key] != before, f"{old!r} is not in {key}"

    return change


def in_options(old: str, new: str) -> Change:
    """Replace an option with which the container is started; with nothing = leave it out."""

    def change(content: Content) -> None:
        before = content["docker"]["run_options"]
        content["docker"]["run_options"] = [option.replace(old, new) for option in before if new or old not in option]
        assert content["docker"]["run_options"] != before

    return change


def head_type(content: Content) -> Content:
    found: Content = content["available_node_types"]["head"]
    return found


HEAD, WORKER = "head_start_ray_commands", "worker_start_ray_commands"
EVERYWHERE: list[tuple[Change, str]] = [
    (
        in_command(HEAD, "host=127.0.0.1", "host=0.0.0.0"),
        "expected --dashboard-host=127.0.0.1, found --dash.*=0.0.0.0$",
    ),
    (
        in_command(HEAD, "--dashboard-host=127.0.0.1", ""),
        "expected --dashboard-host=127.0.0.1, found no --dashboard-host$",
    ),
    # The last one counts.
    (
        in_command(HEAD, "--dashboard-host=127.0.0.1", "--dashboard-host=127.0.0.1 --dashboard-host 10.0.0.1"),
        "expected --dashboard-host=127.0.0.1, found --dashboard-host=10.0.0.1$",
    ),
    (lambda c: c.update({HEAD: ["ray stop"]}), "expected `ray start --head …`, found .'ray stop'.$"),
    (
        lambda c: c["setup_commands"].append("ufw allow from 0.0.0.0/0"),
        r"setup_commands\.\d: expected addresses of your own, found one that means the whole world in 'ufw allow",
    ),
    (
        lambda c: c["setup_commands"].append("export RAY_AUTH_TOKEN=abc"),
        r"setup_commands\.\d: expected no secret in this file .*, found what looks like one$",
    ),
    (
        lambda c: c["setup_commands"].append("pip install --upgrade ray"),
        r"setup_commands\.\d: expected pinned versions \(-c …/constraints.txt, or ==\), found 'pip install --up.*ray'$",
    ),
    (
        in_command(WORKER, "ulimit -n 65536; ", ""),
        "worker_start_ray_commands: expected ulimit -n 65536 .*, found none$",
    ),
    (
        in_command(HEAD, "ulimit -n 65536", "ulimit -n 1024"),
        "head_start_ray_commands: expected ulimit -n 65536 before `ray start`, found ulimit -n 1024$",
    ),
    (
        in_command(HEAD, "ray start", "RAY_AUTH_MODE=disabled ray start"),
        "head_start_ray_commands: expected .*RAY_AUTH_MODE=token",
    ),
]
IN_A_CLOUD: list[tuple[Change, str]] = [
    (lambda c: c["docker"].update(image="rayproject/ray:latest"), r"docker\.image: expected the tag 2\.60\.0-py311"),
    (lambda c: c["docker"].update(image="rayproject/ray:2.60.01-py311"), r"docker\.image: expected the tag 2\.60"),
    (lambda c: c["docker"].update(worker_image="rayproject/ray"), r"docker\.worker_image: expected the tag 2\.60"),
    (
        lambda c: head_type(c).update(docker={"worker_image": "ray:2"}),
        r"available_node_types\.head\.docker\.worker_image: expected the tag 2\.60",
    ),
    (
        lambda c: head_type(c).update(resources={"GPU": 1}),
        r"available_node_types\.head\.resources: expected GPU: 0 on the head, found GPU: 1$",
    ),
    (
        lambda c: head_type(c).update(resources={}),
        r"available_node_types\.head\.resources: expected GPU: 0 on the head, found none written$",
    ),
    (in_options("RAY_AUTH_MODE", ""), r"docker\.run_options: expected -e RAY_AUTH_MODE=token, found no such option$"),
    (in_options("MODE=token", "MODE=disabled"), "expected -e RAY_AUTH_MODE=token, found RAY_AUTH_MODE=disabled$"),
    (in_options("--shm-size", ""), r"docker\.run_options: expected --shm-size=… \(30 % of the memory\), found no such"),
    (
        in_options("nofile=65536:65536", "nofile=1024"),
        r"docker\.run_options: expected --ulimit nofile=65536, found --ulimit nofile=1024$",
    ),
]
BROKEN: list[tuple[str, Change, str]] = [
    *((name, *case) for name in LAUNCHED for case in EVERYWHERE),
    *((name, *case) for name in (AWS, GCP) for case in IN_A_CLOUD),
    (
        AWS,
        lambda c: c["available_node_types"].pop("gpu_on_demand"),
        r"gpu_spot\.labels\.accelerator: expected the same label on an on-demand type, found 'a10g' on this spot",
    ),
    (
        GCP,
        lambda c: c["available_node_types"].pop("gpu_standard"),
        r"gpu_spot\.labels\.accelerator: expected the same label on an on-demand type, found 'l4' on this spot",
    ),
    (
        AWS,
        lambda c: c["provider"].update(aws_secret_access_key="x"),
        r"provider\.aws_secret_access_key: expected no secret in this file",
    ),
    (
        GCP,
        lambda c: c["provider"].update(
            gcp_credentials={"type": "service_account", "credentials": "-----BEGIN PRIVATE KEY"}
        ),
        r"provider\.gcp_credentials\.credentials: expected no secret in this file",
    ),
    (
        LOCAL,
        lambda c: c["auth"].update(ssh_private_key="-----BEGIN OPENSSH PRIVATE KEY-----"),
        r"auth\.ssh_private_key: expected no secret in this file",
    ),
    (
        AWS,
        lambda c: head_type(c)["node_config"].pop("SecurityGroupIds"),
        r"head\.node_config\.SecurityGroupIds: expected a security group of your own .* to the world\), found none$",
    ),
    (
        AWS,
        lambda c: c["available_node_types"]["gpu_spot"]["node_config"].pop("ImageId"),
        r"gpu_spot\.node_config\.ImageId: expected a machine image with a current driver .*, found none$",
    ),
    (
        AWS,
        lambda c: c["provider"].update(security_group={"IpPermissions": [{"IpRanges": [{"CidrIp": "0.0.0.0/0"}]}]}),
        r"provider\.security_group\.IpPermissions\.0\.IpRanges\.0\.CidrIp: expected addresses of your own",
    ),
    (
        AWS,
        lambda c: c["provider"].update(security_group={"IpPermissions": [{"Ipv6Ranges": [{"CidrIpv6": "::/0"}]}]}),
        r"CidrIpv6: expected addresses of your own, found one that means the whole world in '::/0'",
    ),
    (LOCAL, in_command(HEAD, "--num-gpus=0", "--num-gpus=2"), "expected --num-gpus=0 on the head, found --num-gpus=2$"),
    (LOCAL, in_command(HEAD, "--num-gpus=0", ""), "expected --num-gpus=0 on the head, found no --num-gpus$"),
    (
        LOCAL,
        in_command(WORKER, "RAY_AUTH_MODE=token", ""),
        r"worker_start_ray_commands: expected export RAY_AUTH_MODE=token … before `ray start`, found none$",
    ),
    (
        LOCAL,
        lambda c: c.update(setup_commands=["true"]),
        "setup_commands: expected `pip install -c …/constraints.txt`, there being no image, found none$",
    ),
]


@pytest.mark.parametrize(("name", "change", "message"), BROKEN)
def test_a_broken_rule_is_named_by_its_key(
    changed: Callable[[str, Change], Path], name: str, change: Change, message: str
):
    with pytest.raises(UsageError, match=message.removesuffix("$")) as caught:
        check_cluster_file(changed(name, change))
    assert str(caught.value).endswith(": correct it before the launch")
    if message.endswith("$"):
        with pytest.raises(UsageError, match=message.removesuffix("$") + ": correct it before the launch$"):
            raise caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [AWS, GCP])
def test_an_image_by_its_digest_is_pinned(changed: Callable[[str, Change], Path], name: str):
    check_cluster_file(changed(name, lambda c: c["docker"].update(image="rayproject/ray@sha256:" + "0" * 64)))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            AWS,
            lambda c: c.update(max_wrokers=3),
            r"changed\.yaml: top level: expected what Ray's schema .*'max_wrokers'",
        ),
        (
            GCP,
            lambda c: c.update(max_wrokers=3),
            r"changed\.yaml: top level: expected what Ray's schema .*'max_wrokers'",
        ),
        (LOCAL, lambda c: c.update(max_wrokers=3), r"top level: expected what Ray's schema .*'max_wrokers'"),
        (
            AWS,
            lambda c: c["available_node_types"]["gpu_spot"].update(resources={"GPU": 0.5}),
            r"available_node_types\.gpu_spot\.resources\.GPU: expected what Ray's schema .*0\.5",
        ),
        (AWS, lambda c: c.update(head_node_type="hed"), "a cluster file that Ray accepts, found: .*head_node_type"),
        (AWS, lambda c: c.pop("docker"), "docker: expected a value, found none"),
        (
            AWS,
            lambda c: c["docker"].pop("image"),
            "that Ray accepts, found: Must provide a container & image name; correct",
        ),
        (LOCAL, lambda c: c["provider"].pop("worker_ips"), "expected a cluster file that Ray accepts, found: "),
        (LOCAL, lambda c: c.pop("provider"), "provider: expected a value, found none"),
        (AWS, lambda c: c["docker"].update(run_options={}), "expected what Ray's schema of cluster files allows"),
        (AWS, lambda c: head_type(c).update(labels=[]), "expected what Ray's schema|expected the shape of the shipped"),
    ],
)
def test_what_ray_would_refuse(changed: Callable[[str, Change], Path], name: str, change: Change, message: str):
    with pytest.raises(UsageError, match=message) as caught:
        check_cluster_file(changed(name, change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "expected a cluster file in YAML at .*x.yaml, found: while parsing"),
        ("- a", "expected a mapping in .*x.yaml, found list"),
        ("", "expected a mapping in .*x.yaml, found NoneType"),
        ("a: 1\n---\nb: 2\n", "expected one document for `ray up`, found 2: keep one file a cluster"),
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


@pytest.mark.parametrize("name", LAUNCHED)
def test_calls_to_a_machine_that_is_cut_off_give_up_in_seconds_and_models_stay_on_a_nodes_own_disk(
    root: Path, name: str
):
    text = (root / name).read_text()
    assert (
        text.count("RAY_grpc_client_keepalive_time_ms=10000")
        == text.count("RAY_grpc_client_keepalive_timeout_ms=5000")
        > 0
    )
    assert "HF_HOME=" in text
    mounts = yaml.safe_load(text)["file_mounts"]
    assert not [place for place in mounts if "model" in place]


@pytest.mark.parametrize("name", [AWS, GCP])
def test_spot_workers_are_watched_over(root: Path, name: str):
    content = yaml.safe_load((root / name).read_text())
    cloud = content["provider"]["type"]
    assert any(f"python -m ray_jobs.spot_watcher {cloud} $RAY_HEAD_IP:6379" in one for one in content[WORKER])


def test_the_roles_allow_one_prefix_of_one_bucket_and_the_workers_nothing_else(root: Path):
    node, head = (
        json.loads((root / "configs" / "cluster" / f"aws-{name}-policy.json").read_text()) for name in ("node", "head")
    )
    allowed = [one for one in node["Statement"] if one["Effect"] == "Allow"]
    for statement in allowed:
        actions = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
        assert all(action.startswith("s3:") and "*" not in action for action in actions)
        whole_bucket = statement["Resource"] == "arn:aws:s3:::BUCKET"
        assert statement["Resource"] == "arn:aws:s3:::BUCKET/PREFIX/*" or (whole_bucket and "Condition" in statement)
    for statement in head["Statement"]:
        actions = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
        assert all("*" not in action for action in actions)
        # What may be done to every machine of the account is looking.
        if statement["Resource"] == "*":
            assert all(action.startswith("ec2:Describe") for action in actions)
        if "ec2:TerminateInstances" in actions:
            assert "safetydpo" in json.dumps(statement["Condition"])
    profiles = {
        name: kind["node_config"]["IamInstanceProfile"]["Name"]
        for name, kind in yaml.safe_load((root / AWS).read_text())["available_node_types"].items()
    }
    assert profiles == {"head": "safetydpo-head", "gpu_spot": "safetydpo-node", "gpu_on_demand": "safetydpo-node"}
