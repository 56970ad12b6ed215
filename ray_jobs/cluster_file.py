"""Check a cluster file for `ray up` offline: Ray's own schema, and the rules of this project.

Command: `python -m ray_jobs.cluster_file cluster.yaml`. No credentials, no network. The only module that touches
`ray.autoscaler._private`, which Ray may move.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from safetydpo.errors import SafetyDPOError, UsageError

# For a list that is left out, Ray fills in the provider's defaults: an open dashboard, a nightly build.
WRITTEN_OUT = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)
_SECRETS = re.compile(
    r"AKIA[0-9A-Z]{16}|aws_secret_access_key|\bhf_[A-Za-z0-9]{20,}|RAY_AUTH_TOKEN=\S+|-----BEGIN [A-Z ]*PRIVATE KEY",
    re.IGNORECASE,
)
_LOOPBACK = ("127.0.0.1", "localhost")
_MIN_OPEN_FILES = 65536


def check_cluster_file(path: str | Path) -> None:
    """Check a cluster file against Ray's schema and our rules.

    Our rules: every list of commands written out; dashboard on loopback; the image pinned to the installed Ray and
    Python; no GPU on the head; token authentication in the container; /dev/shm and open files set; an on-demand type
    with the accelerator of every spot type; no secret.

    Raises:
        UsageError: naming the first key that is wrong.
    """
    content = _read(Path(path))
    _check_schema(content, source=str(path))
    for rule in _RULES:
        for key, expected, found in rule(content):
            raise UsageError(f"{path}: {key}: expected {expected}, found {found}: correct it before `ray up`")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        found = " ".join(str(error).split())
        raise UsageError(
            f"expected a cluster file in YAML at {path}, found: {found}; correct the path or it"
        ) from error
    if not isinstance(content, dict):
        raise UsageError(f"expected a mapping in {path}, found {type(content).__name__}: see cluster.yaml")
    return content


def _check_schema(content: Mapping[str, Any], *, source: str) -> None:
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import prepare_config, validate_config

    # Before Ray fills in its defaults, which would hide what is missing.
    for key in ("cluster_name", "provider", "docker", "head_node_type", "available_node_types"):
        if not content.get(key):
            raise UsageError(f"{source}: {key}: expected a value, found none: see cluster.yaml")
    # It tells of a default that it fills in; the file checked here is not the one that `ray up` will run.
    logging.getLogger("ray.autoscaler").setLevel(logging.WARNING)
    try:
        validate_config(prepare_config(dict(content)))
    except ValidationError as error:
        key = ".".join(str(part) for part in error.absolute_path) or "top level"
        raise UsageError(
            f"{source}: {key}: expected what Ray's schema of cluster files allows, found: "
            f"{' '.join(error.message.split())[:200]}; correct it before `ray up`"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise UsageError(
            f"{source}: expected a cluster file that Ray accepts, found: {' '.join(str(error).split())}; "
            "correct it before `ray up`"
        ) from error


Finding = tuple[str, str, str]
Rule = Callable[[Mapping[str, Any]], Iterator[Finding]]


def _commands_are_written_out(content: Mapping[str, Any]) -> Iterator[Finding]:
    for key in WRITTEN_OUT:
        if not isinstance(content.get(key), list):
            yield key, "a list, [] for none (left out, Ray fills in the provider's)", "none"


def _dashboard_is_on_loopback(content: Mapping[str, Any]) -> Iterator[Finding]:
    key = "head_start_ray_commands"
    starts = [command for command in content[key] if "ray start" in command]
    if not any("--head" in command for command in starts):
        yield key, "`ray start --head …`", f"{content[key]!r}"
    for command in starts:
        host = re.search(r"--dashboard-host[= ](\S+)", command)
        if "--head" in command and (host is None or host[1] not in _LOOPBACK):
            yield key, "--dashboard-host=127.0.0.1", "no --dashboard-host" if host is None else host[0]


def _image_is_pinned(content: Mapping[str, Any]) -> Iterator[Finding]:
    import ray

    wanted = f"{ray.__version__}-py{sys.version_info.major}{sys.version_info.minor}"
    docker = content["docker"]
    images = {f"docker.{key}": docker[key] for key in ("image", "head_image", "worker_image") if docker.get(key)}
    for name, node in content["available_node_types"].items():
        image = node.get("docker", {}).get("worker_image")
        if image:
            images[f"available_node_types.{name}.docker.worker_image"] = image
    if not images:
        yield "docker.image", f"an image with the tag {wanted}-…", "none"
    for key, image in images.items():
        tag = str(image).rpartition(":")[2]
        if "@sha256:" not in image and not (tag == wanted or tag.startswith(f"{wanted}-")):
            yield key, f"the tag {wanted}-… (the Ray and Python of this machine) or a digest", f"{image!r}"


def _head_has_no_gpu(content: Mapping[str, Any]) -> Iterator[Finding]:
    name = content["head_node_type"]
    resources = content["available_node_types"][name].get("resources", {})
    if resources.get("GPU") != 0:
        found = f"GPU: {resources['GPU']}" if "GPU" in resources else "none written"
        yield f"available_node_types.{name}.resources", "GPU: 0 on the head", found


def _token_is_on(content: Mapping[str, Any]) -> Iterator[Finding]:
    # Commands outside docker do not reach the container, so the mode must be an option of its start.
    if not any(re.search(r"RAY_AUTH_MODE=token\b", option) for option in content["docker"].get("run_options", [])):
        yield "docker.run_options", "-e RAY_AUTH_MODE=token", "no such option"


def _limits_are_set(content: Mapping[str, Any]) -> Iterator[Finding]:
    options = " ".join(content["docker"].get("run_options", []))
    if not re.search(r"--shm-size[= ]\d+", options):
        yield "docker.run_options", "--shm-size=… (30 % of the memory)", "no such option"
    files = re.search(r"--ulimit[= ]nofile=(\d+)", options)
    if files is None or int(files[1]) < _MIN_OPEN_FILES:
        yield "docker.run_options", f"--ulimit nofile={_MIN_OPEN_FILES}", "none" if files is None else files[0]


def _spot_has_a_fallback(content: Mapping[str, Any]) -> Iterator[Finding]:
    def is_spot(node: Mapping[str, Any]) -> bool:
        return bool(node["node_config"].get("InstanceMarketOptions", {}).get("MarketType") == "spot")

    types = content["available_node_types"]
    steady = [node for name, node in types.items() if not is_spot(node) and name != content["head_node_type"]]
    accelerators = {node.get("labels", {}).get("accelerator") for node in steady}
    for name, node in types.items():
        own = node.get("labels", {}).get("accelerator")
        if is_spot(node) and (own is None or own not in accelerators):
            key = f"available_node_types.{name}.labels.accelerator"
            yield key, "the same label on an on-demand type", f"{own!r} on this spot type alone"


def _no_secret(content: Mapping[str, Any]) -> Iterator[Finding]:
    for key, value in _leaves(content, ""):
        if _SECRETS.search(f"{key.rpartition('.')[2]}: {value}"):
            # The value itself is not repeated: it would end up in logs.
            yield key, "no secret in this file (use a profile, a token file or the environment)", "what looks like one"


def _leaves(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, child in value.items():
            yield from _leaves(child, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from _leaves(child, f"{path}.{index}")
    else:
        yield path, str(value)


_RULES: tuple[Rule, ...] = (
    _no_secret,
    _commands_are_written_out,
    _dashboard_is_on_loopback,
    _image_is_pinned,
    _head_has_no_gpu,
    _token_is_on,
    _limits_are_set,
    _spot_has_a_fallback,
)


def main(arguments: list[str]) -> int:
    """Check the files named; print one line each."""
    if not arguments:
        print("usage: python -m ray_jobs.cluster_file FILE …", file=sys.stderr)
        return UsageError.exit_code
    for path in arguments:
        try:
            check_cluster_file(path)
        except SafetyDPOError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
        print(f"{path}: ok (checked offline)")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
