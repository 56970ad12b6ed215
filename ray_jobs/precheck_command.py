"""The check of a cluster, run on it: `python -m ray_jobs.precheck_command [CONFIG [key=value …]]`.

`safetydpo doctor --address http://…` sends it as a job. It prints one line per check that has passed, or one that says
what is wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from ray_jobs.cluster import connect, disconnect
from ray_jobs.failures import run_guarded, split_debug
from ray_jobs.precheck import check_cluster, describe
from safetydpo.artifacts.json_text import parse_json
from safetydpo.config.load import load_config
from safetydpo.config.schema import Config

VERSIONS = "--versions="
"""Versions of the machine that asks, as JSON."""


def run_checks(config: Config, *, with_store: bool, expected: Mapping[str, str] | None = None) -> None:
    """Connect to the cluster of the config, check it, and print one line per check."""
    try:
        connect(config, probe=False)
        answers = check_cluster(config, with_store=with_store, expected=expected)
        print("\n".join(describe(config, answers, with_store=with_store)))
    finally:
        disconnect()


def main(arguments: Sequence[str]) -> int:
    """Check the cluster that this job runs on; return the exit code."""
    rest, debug = split_debug(arguments)
    given = [argument for argument in rest if argument.startswith(VERSIONS)]
    expected = parse_json(given[0].removeprefix(VERSIONS)) if given else None
    rest = [argument for argument in rest if argument not in given]

    def work() -> None:
        config = load_config(rest[0], rest[1:]) if rest else Config()
        run_checks(config, with_store=bool(rest), expected=expected)

    return run_guarded(work, debug=debug)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
