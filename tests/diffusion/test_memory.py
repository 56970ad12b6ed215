from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safetydpo.config.schema import SamplerConfig
from safetydpo.diffusion.memory import PassSize, draw_within_memory, encode_within_memory, is_out_of_memory
from safetydpo.diffusion.render import render
from tests.diffusion.models import Model

SCRIPT = """
import json, resource, sys
import torch
from safetydpo.config.schema import BaseModelConfig, SamplerConfig
from safetydpo.diffusion.build import load_backbone
from safetydpo.diffusion.memory import draw_within_memory
from safetydpo.diffusion.render import render

backbone = load_backbone(BaseModelConfig(model=sys.argv[1]), num_threads=1)
sampler = SamplerConfig(steps=1, height=32, width=32, batch_size=2048)
rows = {"prompts": ["a red ball", "a blue flower"], "seeds": [1, 2]}
render(backbone, **rows, sampler=sampler.model_copy(update={"batch_size": 2}))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[2]), resource.RLIM_INFINITY))
pictures, size = draw_within_memory(lambda fitting: render(backbone, **rows, sampler=fitting), sampler=sampler)
same = render(backbone, **rows, sampler=sampler.model_copy(update={"batch_size": size}))
print(json.dumps({"size": size, "equal": torch.equal(pictures, same)}))
"""


@pytest.mark.slow
def test_memory_that_runs_out_halves_the_batch(tiny_folder: Path):
    """A process that may take 125 MB more cannot draw 2,048 pictures at once, but some power of two of them.

    Address space is what is limited: one thread, one arena and tensors that go back to the system keep
    it from being taken up by empty reserves.
    """
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tiny_folder), str(125_000_000)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["equal"]
    assert found["size"] in [2**power for power in range(11)]


def test_with_enough_memory_nothing_changes(model: Model):
    sampler = SamplerConfig(steps=2, height=model.size, width=model.size, batch_size=2)
    rows = {"prompts": ["a red ball"] * 3, "seeds": [1, 2, 3]}
    pictures, size = draw_within_memory(
        lambda fitting: render(model.backbone, **rows, sampler=fitting), sampler=sampler
    )
    assert size == 2
    assert torch.equal(pictures, render(model.backbone, **rows, sampler=sampler))


def test_other_errors_pass_through():
    def draw(_sampler: SamplerConfig) -> torch.Tensor:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        draw_within_memory(draw, sampler=SamplerConfig(batch_size=2))


def test_a_single_picture_that_does_not_fit_is_an_error(model: Model):
    sizes: list[int] = []

    def callback(step: object) -> torch.Tensor:
        sizes.append(len(step.latents))  # type: ignore[attr-defined]
        raise torch.OutOfMemoryError("CUDA out of memory")

    sampler = SamplerConfig(steps=2, height=model.size, width=model.size, batch_size=6)
    with pytest.raises(RuntimeError, match="out of memory"):
        draw_within_memory(
            lambda fitting: render(model.backbone, prompts=["a"], seeds=[1], sampler=fitting, callback=callback),
            sampler=sampler,
        )
    assert sizes == [6, 3, 1]


def test_a_size_that_fails_three_times_running_is_not_tried_again(caplog: pytest.LogCaptureFixture):
    """8 fails twice, then fits: nothing is learned; then it fails three times: 2 (the size of the last one) it is."""
    room = PassSize(8)
    for fitted in (4, 4, 8, 4, 4):
        room.note(fitted)
        assert room.size == 8
    room.note(2)
    assert room.size == 2
    assert "8 pictures do not fit into memory at once, 2 do: staying there" in caplog.text
    for _ in range(5):
        room.note(2)
    assert room.size == 2


def test_which_errors_mean_memory():
    cpu = RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried")
    assert is_out_of_memory(cpu)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))


@settings(max_examples=30)  # Python's garbage is collected at each halving: a tenth of a second in a process of tests
@given(st.lists(st.integers(), max_size=20), st.integers(1, 8), st.integers(1, 8))
def test_passes_are_equal_in_size_and_halved_until_they_fit(items: list[int], batch_size: int, room: int):
    sizes: list[int] = []

    def encode(batch: list[int]) -> list[int]:
        sizes.append(len(batch))
        if len(batch) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [item + 1 for item in batch]

    made, size = encode_within_memory(items, encode, batch_size=batch_size)
    assert made == [item + 1 for item in items]
    tried = [batch_size >> halvings for halvings in range(4)]
    assert size == (next(fit for fit in tried if fit <= room) if items else batch_size)
    assert sizes[len(sizes) - -(-len(items) // size) :] == [size] * -(-len(items) // size), "padded, all of them"


def test_one_item_that_does_not_fit_is_an_error():
    def encode(_batch: list[int]) -> list[int]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        encode_within_memory([1, 2], encode, batch_size=2)
