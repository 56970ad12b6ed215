"""Rebuild the demo world from nothing: `python -m safetydpo.demo.build PART`.

Parts, in order: text, vae, unet, judge_select, judge_audit, features, check; `all` runs them one after another. Each
part checks itself and writes its measured quality into `weights/measured.json`; an interrupted part goes on from its
last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from safetydpo.demo.training import DEFAULT_WORK
from safetydpo.errors import SafetyDPOError

DEFAULT_SHEET = Path("docs/images/demo-sheet.png")


def list_parts(work: Path, sheet: Path, *, steps: int | None = None) -> dict[str, Callable[[], None]]:
    """List the parts in the order in which they need one another."""
    from safetydpo.demo.check import build_check, measure_steps
    from safetydpo.demo.features import build_features
    from safetydpo.demo.train_judges import AUDIT_RECIPE, SELECT_RECIPE, build_judge
    from safetydpo.demo.train_text import build_text
    from safetydpo.demo.train_unet import build_unet
    from safetydpo.demo.train_vae import build_vae

    return {
        "text": lambda: build_text(work),
        "vae": lambda: build_vae(work),
        "unet": lambda: build_unet(work),
        "judge_select": lambda: build_judge(SELECT_RECIPE, work),
        "judge_audit": lambda: build_judge(AUDIT_RECIPE, work),
        "features": build_features,
        "check": lambda: build_check(sheet) if steps is None else print(json.dumps(measure_steps(steps), indent=1)),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the named part and return the exit code: 0, 1 where a part misses its quality, 2 for a wrong call."""
    parser = argparse.ArgumentParser(
        prog="python -m safetydpo.demo.build", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    names = ("text", "vae", "unet", "judge_select", "judge_audit", "features", "check", "all")
    parser.add_argument("part", choices=names, metavar="PART", help=" | ".join(names))
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK, help="folder of the checkpoints")
    parser.add_argument("--sheet", type=Path, default=DEFAULT_SHEET, help="where `check` puts the sample sheet")
    parser.add_argument(
        "--steps", type=int, help="`check` prints its numbers for pictures of so many steps, and writes nothing"
    )
    parsed = parser.parse_args(arguments)
    if parsed.steps is not None and (parsed.part != "check" or parsed.steps < 1):
        parser.error(f"expected --steps of at least 1 with the part check, found {parsed.steps} with {parsed.part}")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parts = list_parts(parsed.work, parsed.sheet, steps=parsed.steps)
    try:
        for name in parts if parsed.part == "all" else [parsed.part]:
            parts[name]()
    except SafetyDPOError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
