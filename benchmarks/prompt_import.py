"""How long an import of 15,690 pairs and a leak check of 8,000 prompts against them take (made-up texts).

    python -m benchmarks.prompt_import

Prints CPU and wall seconds, so that a busy machine does not look like slow code.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from safetydpo.artifacts.storage import open_location
from safetydpo.artifacts.tables import write_table
from safetydpo.prompts.importing import import_prompts
from safetydpo.prompts.leaks import find_leaks, read_texts

NUM_PAIRS, NUM_TEST, NUM_REPEATED, NUM_WORDS = 15_690, 8_000, 728, 12_000
CATEGORIES = ("Hate", "sexual", "Violence", "Shocking", "Illegal Activity", "Harrasment", "self-harm")
Result = TypeVar("Result")


def main() -> None:
    """Write the files, time both commands' work, print the seconds."""
    draw = random.Random(0)
    # Word frequencies fall like 1 / rank, as in any language.
    words = [f"w{rank}" for rank in range(1, NUM_WORDS + 1)]
    weights = [1 / rank for rank in range(1, NUM_WORDS + 1)]

    def text() -> str:
        return " ".join(draw.choices(words, weights, k=draw.randint(8, 20)))

    pairs = [(text(), text(), draw.choice(CATEGORIES)) for _ in range(NUM_PAIRS)]
    rows = [
        f"{t},{side}_idx_{i:07d}_0.jpg,{c}" for i, (u, s, c) in enumerate(pairs) for side, t in (("u", u), ("s", s))
    ]
    tests = [pair[0] for pair in pairs[:NUM_REPEATED]] + [text() for _ in range(NUM_TEST - NUM_REPEATED)]
    with tempfile.TemporaryDirectory() as folder:
        train, test = Path(folder, "train"), Path(folder, "test")
        train.write_text("\n".join(["prompt,image,category", *rows]) + "\n")
        test.write_text("\n".join(tests) + "\n")
        imported = timed("import of 15,690 pairs", lambda: import_prompts(open_location(str(train))))
        out = open_location(str(Path(folder, "train.parquet")))
        timed("writing", lambda: write_table(out, imported.table))
        report = timed(
            "check of 8,000 against 31,380", lambda: find_leaks(read_texts(open_location(str(test))), read_texts(out))
        )
        print(f"{imported.summary.num_pair_ids} pairs, {report.rows('exact')} exact, {report.rows('near')} near")


def timed(name: str, work: Callable[[], Result]) -> Result:
    """Do some work and print how long it took."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    print(f"{name}: {time.process_time() - cpu:.1f} s of CPU, {time.perf_counter() - wall:.1f} s of wall time")
    return result


if __name__ == "__main__":
    main()
