"""How long an import of 15,690 pairs and a leak check of 8,000 prompts against them take (made-up texts).

    python -m benchmarks.prompt_import [--rounds 3]

Prints CPU and wall seconds, so that a busy machine does not look like slow code. `csv_reader_vs_import` is the CPU time
of a script that reads the same file with the csv module and joins the sides of each pair, over that of the import,
which also checks, normalises, hashes, and counts what it dropped; `wall_vs_cpu` says how busy the machine was.
"""

from __future__ import annotations

import argparse
import csv
import random
import statistics
import tempfile
from pathlib import Path

from benchmarks.harness import alternate, print_result, ratio_of_medians
from safetydpo.artifacts.storage import open_location
from safetydpo.artifacts.tables import write_table
from safetydpo.prompts.importing import import_prompts
from safetydpo.prompts.leaks import find_leaks, read_texts

NUM_PAIRS, NUM_TEST, NUM_REPEATED, NUM_WORDS = 15_690, 8_000, 728, 12_000
CATEGORIES = ("Hate", "sexual", "Violence", "Shocking", "Illegal Activity", "Harrasment", "self-harm")


def main() -> None:
    """Write the files, time the commands' work and a script's, print the seconds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
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
        train, test, out = Path(folder, "train"), Path(folder, "test"), open_location(f"{folder}/train.parquet")
        train.write_text("\n".join(["prompt,image,category", *rows]) + "\n")
        test.write_text("\n".join(tests) + "\n")
        imported = import_prompts(open_location(str(train)))
        write_table(out, imported.table)
        report = find_leaks(read_texts(open_location(str(test))), read_texts(out))
        print(f"{imported.summary.num_pair_ids} pairs, {report.rows('exact')} exact, {report.rows('near')} near")
        times = alternate(
            {
                "import": lambda: ignore(import_prompts(open_location(str(train)))),
                "csv_reader": lambda: ignore(read_by_hand(train)),
                "write": lambda: write_table(out, imported.table),
                "leak_check": lambda: ignore(find_leaks(read_texts(open_location(str(test))), read_texts(out))),
            },
            rounds=options.rounds,
            warmup_rounds=0,
        )
    cpu = {name: [one.cpu_seconds for one in rounds] for name, rounds in times.items()}
    wall = {name: [one.wall_seconds for one in rounds] for name, rounds in times.items()}
    print_result(
        "prompt_import",
        ratios={
            "csv_reader_vs_import": ratio_of_medians(cpu["csv_reader"], cpu["import"]),
            "wall_vs_cpu": statistics.median(wall["import"]) / statistics.median(cpu["import"]),
        },
        raw={"pairs": NUM_PAIRS, "tests": NUM_TEST, "cpu_seconds": cpu, "wall_seconds": wall},
    )


def read_by_hand(file: Path) -> dict[str, dict[str, str]]:
    """Return the two texts of each pair, as a short script would read them."""
    pairs: dict[str, dict[str, str]] = {}
    with file.open(newline="") as lines:
        for row in csv.DictReader(lines):
            side, _, rest = row["image"].partition("_idx_")
            pairs.setdefault(rest.removesuffix("_0.jpg"), {})[side] = row["prompt"]
    return pairs


def ignore(_result: object) -> None:
    """Forget a result: only how long it took is wanted."""


if __name__ == "__main__":
    main()
