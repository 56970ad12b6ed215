"""Prompts of benchmarks in the final evaluation: sets of their own beside the run's test prompts.

A prompt that stands among the training pairs of the run, but for case and punctuation, is in a set of its own, so that
the share of unsafe pictures is told over all prompts and over those alone that no expert has seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ray_jobs.prompt_tables import all_pairs
from safetydpo.artifacts.storage import Location, open_location
from safetydpo.config.benchmarks import EvaluationBenchmark
from safetydpo.config.schema import Config
from safetydpo.errors import SafetyDPOError
from safetydpo.evaluation.benchmark_metrics import SEEN, UNSEEN
from safetydpo.evaluation.distances import mismatched_captions
from safetydpo.evaluation.outcomes import PROMPT_SETS
from safetydpo.prompts.benchmark_entries import BenchmarkEntry, find_entry
from safetydpo.prompts.benchmark_files import find_file, read_benchmark
from safetydpo.prompts.duplicates import normalised_key
from safetydpo.prompts.sets import Prompt, spread_evenly


def benchmark_sets(config: Config) -> tuple[str, ...]:
    """Return the names of the prompt sets that benchmarks add to an evaluation, two per benchmark."""
    names = [find_entry(benchmark.name).name for benchmark in config.identity.evaluation.benchmarks]
    return tuple(f"{prefix}{name}" for name in names for prefix in (UNSEEN, SEEN))


def benchmark_prompts(config: Config) -> dict[str, list[Prompt]]:
    """Return the prompts of every benchmark of the final evaluation, by set; {} if there are none.

    Raises:
        UsageError: if a benchmark or its file does not exist.
        SafetyDPOError: if a file is another one than the entry says.
    """
    chosen = config.identity.evaluation.benchmarks
    if not chosen:
        return {}
    pairs = all_pairs(config.identity.prompts)
    trained = {normalised_key(text) for pair in pairs for text in (pair.unsafe_text, pair.safe_text)} - {""}
    sets: dict[str, list[Prompt]] = {}
    for benchmark in chosen:
        entry = find_entry(benchmark.name)
        prompts = _prompts_of(entry, benchmark, config)
        for name, is_seen in ((f"{UNSEEN}{entry.name}", False), (f"{SEEN}{entry.name}", True)):
            sets[name] = [
                _in_set(prompt, name) for prompt in prompts if (normalised_key(prompt.text) in trained) is is_seen
            ]
    return sets


def read_evaluated(benchmark: EvaluationBenchmark, config: Config) -> list[str]:
    """Return the texts of a benchmark of the final evaluation, all of them, of both sides of a pair.

    Raises:
        UsageError: if there is no such benchmark or no file.
        SafetyDPOError: if the file is another one than the entry says.
    """
    entry = find_entry(benchmark.name)
    found = read_benchmark(entry, _place(entry, benchmark, config), accept_other_bytes=benchmark.accept_other_bytes)
    return [str(text) for text in found.imported.table.column("text").to_pylist()]


def _place(entry: BenchmarkEntry, benchmark: EvaluationBenchmark, config: Config) -> Location:
    return open_location(benchmark.file) if benchmark.file else find_file(entry, config.execution.benchmarks)


def _prompts_of(entry: BenchmarkEntry, benchmark: EvaluationBenchmark, config: Config) -> list[Prompt]:
    place = _place(entry, benchmark, config)
    found = read_benchmark(entry, place, accept_other_bytes=benchmark.accept_other_bytes)
    rows = [row for row in found.imported.table.to_pylist() if row["side"] == entry.side]
    prompts = _distinct(rows)
    if not prompts:
        raise SafetyDPOError(
            f"expected {entry.side} prompts in {place} (identity.evaluation.benchmarks), found none: correct `side` of "
            f"the benchmark {entry.name}"
        )
    if benchmark.prompts is None:
        return prompts
    return spread_evenly(
        prompts,
        benchmark.prompts,
        group_of=lambda prompt: prompt.category,
        key_of=lambda prompt: prompt.prompt_id,
        seed=config.identity.seed,
        purpose=f"benchmark:{entry.name}",
    )


def _distinct(rows: Sequence[Mapping[str, Any]]) -> list[Prompt]:
    """Return one prompt per distinct text with all its categories, in the order of the file."""
    first: dict[str, Mapping[str, Any]] = {}
    categories: dict[str, dict[str, None]] = {}
    for row in rows:
        first.setdefault(row["prompt_id"], row)
        categories.setdefault(row["prompt_id"], {}).update({row["category"]: None} if row["category"] else {})
    return [
        Prompt(
            text=row["text"],
            prompt_set="",
            split="test",
            # Where a file names no concepts, each prompt is a cluster of its own, also over several seeds.
            concept=row["concept"] or prompt_id,
            category=next(iter(categories[prompt_id]), ""),
            categories=tuple(categories[prompt_id]),
            background="",
        )
        for prompt_id, row in first.items()
    ]


def _in_set(prompt: Prompt, prompt_set: str) -> Prompt:
    return Prompt(
        text=prompt.text,
        prompt_set=prompt_set,
        split=prompt.split,
        concept=prompt.concept,
        category=prompt.category,
        categories=prompt.categories,
        background=prompt.background,
    )


def caption_partners(prompts: Sequence[Prompt]) -> list[int]:
    """Return for each prompt the index of a caption of another concept, as if no attack and no benchmark were there.

    Only neutral prompts are scored against it, and their partners must not depend on those; their own prompts, which
    come last, get the first caption.
    """
    own = [prompt.concept for prompt in prompts if prompt.prompt_set in PROMPT_SETS]
    return mismatched_captions(own) + [0] * (len(prompts) - len(own))
