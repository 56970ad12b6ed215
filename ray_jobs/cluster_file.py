"""Check files that describe clusters offline: Ray's own schema, and the rules of this project.

Command: `python -m ray_jobs.cluster_file cluster.yaml …`. No credentials, no network. Files for `ray up` go through the
schema that Ray ships (the only module that touches `ray.autoscaler._private`, which Ray may move), manifests of KubeRay
through a list of the keys that its RayJob knows.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray_jobs.cluster_file_kuberay import KUBERAY_RULES, is_manifest
from ray_jobs.cluster_file_rules import LAUNCHER_RULES
from safetydpo.config.safe_yaml import YamlError, parse_documents
from safetydpo.errors import SafetyDPOError, UsageError

_NEEDED = ("cluster_name", "provider")
_NEEDED_IN_A_CLOUD = ("docker", "head_node_type", "available_node_types")


def check_cluster_file(path: str | Path) -> None:
    """Check a cluster file against its schema and our rules.

    Our rules, for all: dashboard, image or versions pinned to the installed Ray and Python, no GPU on the head, token
    authentication, limits of files and shared memory, no secret. For `ray up`: every list of commands written out, no
    address of the whole world, and in a cloud, an on-demand type with the accelerator of every spot type. For KubeRay:
    confined pods, a fixed size and a queue, network rules around them.

    Raises:
        UsageError: naming the first key that is wrong.
    """
    documents = _read(Path(path))
    if any(is_manifest(document) for document in documents):
        findings = (finding for rule in KUBERAY_RULES for finding in rule(documents))
    else:
        if len(documents) != 1:
            raise UsageError(
                f"{path}: expected one document for `ray up`, found {len(documents)}: keep one file a cluster"
            )
        _check_schema(documents[0], source=str(path))
        findings = (finding for rule in LAUNCHER_RULES for finding in rule(documents[0]))
    try:
        first = next(findings, None)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        # A group where a text belongs, or the like; Ray's schema does not look into every corner.
        raise UsageError(
            f"{path}: expected the shape of the shipped files (cluster.yaml, configs/cluster/), found another: "
            f"{type(error).__name__} {error}; compare with them"
        ) from error
    if first is not None:
        key, expected, found = first
        raise UsageError(f"{path}: {key}: expected {expected}, found {found}: correct it before the launch")


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        documents = parse_documents(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, YamlError) as error:
        found = " ".join(str(error).split())
        raise UsageError(
            f"expected a cluster file in YAML at {path}, found: {found}; correct the path or it"
        ) from error
    for document in documents or [None]:
        if not isinstance(document, dict):
            raise UsageError(f"expected a mapping in {path}, found {type(document).__name__}: see cluster.yaml")
    return documents


def _check_schema(content: Mapping[str, Any], *, source: str) -> None:
    from click import ClickException
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import prepare_config, validate_config

    # Before Ray fills in its defaults, which would hide what is missing.
    provider = content.get("provider")
    hosts = isinstance(provider, Mapping) and provider.get("type") == "local"
    for key in _NEEDED if hosts else _NEEDED + _NEEDED_IN_A_CLOUD:
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
            f"{' '.join(error.message.split())[:200]}; correct it before the launch"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError, ClickException) as error:
        said = " ".join(str(error).split()) or "what it does not understand"
        raise UsageError(
            f"{source}: expected a cluster file that Ray accepts, found: {said}; correct it before the launch"
        ) from error


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
