"""Our rules for cluster files of `ray up`. Pure: each takes the parsed file and yields what breaks it."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ray_jobs.submit_secrets import holds_secret

# For a list that is left out, Ray fills in the provider's defaults: an open dashboard, a nightly build.
WRITTEN_OUT = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)
STARTS = ("head_start_ray_commands", "worker_start_ray_commands")
_SECRETS = re.compile(
    r"aws_secret_access_key|aws_session_token|RAY_AUTH_TOKEN=\S+|(password|passwd|secret|api_?key)[\"']?\s*[:=]\s*\S",
    re.IGNORECASE,
)
_LOOPBACK = ("127.0.0.1", "localhost")
_WHOLE_WORLD = re.compile(r"(?<![\d.])0\.0\.0\.0(?![\d.])|(?<![\w:])::(/0)?(?![\w:])")
MIN_OPEN_FILES = 65536

Finding = tuple[str, str, str]
"""Key, what was expected, what was found."""
Rule = Callable[[Mapping[str, Any]], Iterator[Finding]]


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted key, text) of every value that is no group and no list."""
    if isinstance(value, Mapping):
        for key, child in value.items():
            yield from leaves(child, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from leaves(child, f"{path}.{index}" if path else str(index))
    else:
        yield path, str(value)


def looks_secret(key: str, value: str) -> bool:
    """Return whether a value, or what its key says it is, looks like a secret."""
    return holds_secret(value) or _SECRETS.search(f"{key.rpartition('.')[2]}: {value}") is not None


def wanted_tag() -> str:
    """Return how the tag of an image begins that holds the Ray and Python of this machine."""
    import ray

    return f"{ray.__version__}-py{sys.version_info.major}{sys.version_info.minor}"


def is_pinned(image: str) -> bool:
    """Return whether an image is named by the tag of this Ray and Python, or by a digest."""
    wanted, tag = wanted_tag(), image.rpartition(":")[2]
    return "@sha256:" in image or tag == wanted or tag.startswith(f"{wanted}-")


def _no_secret(content: Mapping[str, Any]) -> Iterator[Finding]:
    for key, value in leaves(content):
        if looks_secret(key, value):
            # The value itself is not repeated: it would end up in logs.
            yield key, "no secret in this file (use a profile, a token file or the environment)", "what looks like one"


def _commands_are_written_out(content: Mapping[str, Any]) -> Iterator[Finding]:
    for key in WRITTEN_OUT:
        if not isinstance(content.get(key), list):
            yield key, "a list, [] for none (left out, Ray fills in the provider's)", "none"


def _starts(content: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key in STARTS:
        for command in content[key]:
            if re.search(r"\bray start\b", command):
                yield key, command


def _dashboard_is_on_loopback(content: Mapping[str, Any]) -> Iterator[Finding]:
    key = STARTS[0]
    starts = [command for place, command in _starts(content) if place == key]
    if not any("--head" in command for command in starts):
        yield key, "`ray start --head …`", f"{content[key]!r}"
    for command in starts:
        hosts = re.findall(r"--dashboard-host[= ](\S+)", command)
        if "--head" in command and not (hosts and set(hosts) <= set(_LOOPBACK)):
            found = f"--dashboard-host={hosts[-1]}" if hosts else "no --dashboard-host"
            yield key, "--dashboard-host=127.0.0.1", found


def _nothing_is_open_to_all(content: Mapping[str, Any]) -> Iterator[Finding]:
    for key, value in leaves(content):
        if _WHOLE_WORLD.search(value):
            yield key, "addresses of your own", f"one that means the whole world in {value[:60]!r}"


def _machines_are_named(content: Mapping[str, Any]) -> Iterator[Finding]:
    if content["provider"]["type"] != "aws":
        return
    for name, node in content["available_node_types"].items():
        for setting, expected in (
            ("SecurityGroupIds", "a security group of your own (else Ray makes one that opens SSH to the world)"),
            ("ImageId", "a machine image with a current driver (else Ray takes one of Ubuntu 18.04)"),
        ):
            if not node["node_config"].get(setting):
                yield f"available_node_types.{name}.node_config.{setting}", expected, "none"


def _image_is_pinned(content: Mapping[str, Any]) -> Iterator[Finding]:
    if not _has_container(content):
        return
    docker = content["docker"]
    images = {f"docker.{key}": docker[key] for key in ("image", "head_image", "worker_image") if docker.get(key)}
    for name, node in content.get("available_node_types", {}).items():
        for key in ("head_image", "worker_image"):
            image = node.get("docker", {}).get(key)
            if image:
                images[f"available_node_types.{name}.docker.{key}"] = image
    for key, image in images.items():
        if not is_pinned(str(image)):
            expected = f"the tag {wanted_tag()}-… (the Ray and Python of this machine) or a digest"
            yield key, expected, f"{image!r}"


def _versions_are_pinned(content: Mapping[str, Any]) -> Iterator[Finding]:
    for key in ("setup_commands", "head_setup_commands", "worker_setup_commands"):
        for index, command in enumerate(content[key]):
            if "pip install" in command and not re.search(r" -c \S*constraints\.txt|==", command):
                yield f"{key}.{index}", "pinned versions (-c …/constraints.txt, or ==)", f"{command[:80]!r}"
    installs = any("constraints.txt" in command for command in content["setup_commands"])
    if not _has_container(content) and not installs:
        yield "setup_commands", "`pip install -c …/constraints.txt`, there being no image", "none"


def _head_has_no_gpu(content: Mapping[str, Any]) -> Iterator[Finding]:
    if "head_node_type" not in content:
        for key, command in _starts(content):
            if "--head" in command and re.findall(r"--num-gpus[= ](\S+)", command) != ["0"]:
                found = re.search(r"--num-gpus[= ]\S+", command)
                yield key, "--num-gpus=0 on the head", found[0] if found else "no --num-gpus"
        return
    name = content["head_node_type"]
    resources = content["available_node_types"][name].get("resources", {})
    if resources.get("GPU") != 0:
        found_gpus = f"GPU: {resources['GPU']}" if "GPU" in resources else "none written"
        yield f"available_node_types.{name}.resources", "GPU: 0 on the head", found_gpus


def _token_is_on(content: Mapping[str, Any]) -> Iterator[Finding]:
    expected = re.compile(r"RAY_AUTH_MODE=(\w+)")
    if _has_container(content):
        # Commands outside docker do not reach the container, so the mode must be an option of its start.
        modes = expected.findall(" ".join(content["docker"].get("run_options", [])))
        if set(modes) != {"token"}:
            found = "no such option" if not modes else f"RAY_AUTH_MODE={modes[-1]}"
            yield "docker.run_options", "-e RAY_AUTH_MODE=token", found
    else:
        for key, command in _starts(content):
            if set(expected.findall(command.partition("ray start")[0])) != {"token"}:
                yield key, "export RAY_AUTH_MODE=token … before `ray start`", "none"
    for key, command in _starts(content):
        for mode in expected.findall(command):
            if mode != "token":
                yield key, "RAY_AUTH_MODE=token", f"RAY_AUTH_MODE={mode}"


def _limits_are_set(content: Mapping[str, Any]) -> Iterator[Finding]:
    for key, command in _starts(content):
        files = re.search(r"ulimit -n (\d+)", command)
        if files is None or int(files[1]) < MIN_OPEN_FILES:
            yield key, f"ulimit -n {MIN_OPEN_FILES} before `ray start`", "none" if files is None else files[0]
    if not _has_container(content):
        return
    options = " ".join(content["docker"].get("run_options", []))
    if not re.search(r"--shm-size[= ]\d+", options):
        yield "docker.run_options", "--shm-size=… (30 % of the memory)", "no such option"
    files = re.search(r"--ulimit[= ]nofile=(\d+)", options)
    if files is None or int(files[1]) < MIN_OPEN_FILES:
        yield "docker.run_options", f"--ulimit nofile={MIN_OPEN_FILES}", "none" if files is None else files[0]


def _spot_has_a_fallback(content: Mapping[str, Any]) -> Iterator[Finding]:
    types = content.get("available_node_types", {})
    steady = [node for name, node in types.items() if not _is_spot(node) and name != content["head_node_type"]]
    accelerators = {node.get("labels", {}).get("accelerator") for node in steady}
    for name, node in types.items():
        own = node.get("labels", {}).get("accelerator")
        if _is_spot(node) and (own is None or own not in accelerators):
            key = f"available_node_types.{name}.labels.accelerator"
            yield key, "the same label on an on-demand type", f"{own!r} on this spot type alone"


def _is_spot(node: Mapping[str, Any]) -> bool:
    config = node["node_config"]
    scheduling = config.get("scheduling") or {}
    google = scheduling if isinstance(scheduling, Mapping) else {}
    return (
        config.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
        or google.get("provisioningModel") == "SPOT"
        or bool(google.get("preemptible"))
    )


def _has_container(content: Mapping[str, Any]) -> bool:
    docker = content.get("docker") or {}
    return bool(docker.get("image") or docker.get("head_image"))


LAUNCHER_RULES: tuple[Rule, ...] = (
    _no_secret,
    _commands_are_written_out,
    _dashboard_is_on_loopback,
    _nothing_is_open_to_all,
    _machines_are_named,
    _image_is_pinned,
    _versions_are_pinned,
    _head_has_no_gpu,
    _token_is_on,
    _limits_are_set,
    _spot_has_a_fallback,
)
