"""Peak memory of a merge of 500 experts of SDXL's shape that are read from their files layer by layer.

`python -m benchmarks.merge_memory FOLDER` merges the files of a folder and prints one JSON object; `measure_memory`
writes the files and runs it in a process of its own. Counted is the largest resident size of that process, imports
included.

Each of the 500 paths is one of `NUM_FILES` files of 23 MB: the reader opens, reads and forgets each path, and does not
know. Two merges: `co_merge` of all 560 layers, which votes on inputs of every layer; then `svd` of one layer of each
shape, whose 2,000 components take the dense way.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.random_experts import METADATA, RANK, SDXL, layer_shapes, make_layers
from safetydpo.artifacts.adapters import LoraLayer, write_adapter
from safetydpo.artifacts.lazy_tensors import LazyLayers
from safetydpo.artifacts.storage import open_location
from safetydpo.merging.merge import Expert, MergeSettings, merge_with, prepare_experts

NUM_EXPERTS, NUM_FILES = 500, 20
NUM_INPUTS, NUM_TOKENS = 12, 4


def measure_memory() -> dict[str, Any]:
    """Write the files, merge them in a process of its own, return what it prints."""
    shapes = layer_shapes(SDXL)
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(NUM_FILES):
            location = open_location(str(Path(folder, f"{seed}.safetensors")))
            write_adapter(location, make_layers(shapes, seed), metadata=METADATA)
        command = [sys.executable, "-m", "benchmarks.merge_memory", folder]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def peak_gigabytes() -> float:
    """Return the largest resident size of this process so far.

    Read from /proc, because the `ru_maxrss` of a started process begins at that of the process that started it.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024 / 1e9


def merge_folder(folder: str) -> dict[str, Any]:
    """Merge 500 experts of a folder's files; return peaks and seconds."""
    before = peak_gigabytes()
    experts = []
    for index in range(NUM_EXPERTS):
        layers = LazyLayers(open_location(str(Path(folder, f"{index % NUM_FILES}.safetensors"))))
        experts.append(Expert(f"expert{index}", f"{index:064d}", layers, layers.metadata))
    first = experts[0].layers
    generator = torch.Generator().manual_seed(0)
    inputs = {
        name: torch.randn(NUM_INPUTS, NUM_TOKENS, first[name].down.shape[1], generator=generator).half()
        for name in first
    }
    started = time.perf_counter()
    merged = merge_with(prepare_experts(experts, inputs=inputs), MergeSettings("co_merge"))
    found: dict[str, Any] = {
        "imports_gigabytes": before,
        "co_merge_gigabytes": peak_gigabytes(),
        "co_merge_seconds": time.perf_counter() - started,
        "layers": len(merged.layers),
        "parameters": sum(layer.down.numel() + layer.up.numel() for layer in merged.layers.values()),
    }
    kinds = {(layer.down.shape[1], layer.up.shape[0]): name for name, layer in first.items()}
    few = [Expert(e.name, e.hash, _Chosen(e.layers, sorted(kinds.values())), e.metadata) for e in experts]
    started = time.perf_counter()
    merge_with(prepare_experts(few), MergeSettings("svd", output_rank=RANK))
    found["svd_seconds_per_layer"] = (time.perf_counter() - started) / len(kinds)
    return found | {"peak_gigabytes": peak_gigabytes()}


class _Chosen(Mapping[str, LoraLayer]):
    """Some layers of an expert."""

    def __init__(self, layers: Mapping[str, LoraLayer], names: list[str]) -> None:
        self._layers, self._names = layers, names

    def __getitem__(self, name: str) -> LoraLayer:
        return self._layers[name]

    def __iter__(self) -> Any:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


if __name__ == "__main__":
    print(json.dumps(merge_folder(sys.argv[1])))
