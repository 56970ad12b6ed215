from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from safetydpo.artifacts.adapters import LoraLayer
from safetydpo.artifacts.storage import Location, open_location
from safetydpo.config.training import DpoConfig, LoraConfig
from safetydpo.diffusion.stable_diffusion import StableDiffusion
from safetydpo.dpo.batch import PreferenceData
from safetydpo.dpo.deepspeed_engine import DeepSpeedEngine
from safetydpo.dpo.engine import Engine, open_engine
from safetydpo.dpo.trainer import StepMetrics, TrainedExpert, train_expert
from safetydpo.errors import SafetyDPOError

Make = Callable[..., PreferenceData]


class KilledError(Exception):
    """Stands in for SIGKILL."""


def kill_after(step: int) -> Callable[[StepMetrics], None]:
    def report(metrics: StepMetrics) -> None:
        if metrics.step == step:
            raise KilledError

    return report


def with_strategy(config: DpoConfig, strategy: str, zero_stage: int = 1) -> DpoConfig:
    # With redirection: it switches the adapter off and on once more in every step.
    return config.model_copy(update={"strategy": strategy, "zero_stage": zero_stage, "redirection_weight": 1.0})


def train(
    backbone: StableDiffusion,
    data: PreferenceData,
    config: DpoConfig,
    lora: LoraConfig,
    *,
    checkpoint: Location | None = None,
    report: Callable[[StepMetrics], None] = lambda _: None,
    engine: Engine | None = None,
    expert: str = "hate",
) -> TrainedExpert:
    own = engine or open_engine(backbone, config=config, lora=lora)
    try:
        return train_expert(
            backbone,
            data,
            config=config,
            lora=lora,
            run_seed=5,
            expert_name=expert,
            engine=own,
            checkpoint=checkpoint,
            report=report,
        )
    finally:
        if engine is None:
            own.close()


def largest_difference(one: dict[str, LoraLayer], other: dict[str, LoraLayer]) -> float:
    assert one.keys() == other.keys()
    pairs = [(one[n].down, other[n].down) for n in one] + [(one[n].up, other[n].up) for n in one]
    return max(float((a - b).abs().max()) for a, b in pairs)


def test_without_a_process_group_it_says_so() -> None:
    if torch.distributed.is_initialized():
        pytest.skip("another test has made the group already")
    with pytest.raises(SafetyDPOError, match=r"expected an initialised torch\.distributed process group"):
        DeepSpeedEngine([("a", torch.nn.Parameter(torch.zeros(1)))], config=DpoConfig())


@pytest.mark.parametrize("zero_stage", [1, 2])
@pytest.mark.usefixtures("process_group")
def test_equals_the_plain_loop(
    zero_stage: int, backbone: StableDiffusion, make_data: Make, config: DpoConfig, lora: LoraConfig
) -> None:
    """One process: the same weights to 1e-6 of their size and the same metrics, four steps with clipping active."""
    config = config.model_copy(update={"max_grad_norm": 1e-3})
    single = train(backbone, make_data(), with_strategy(config, "single"), lora)
    zero = train(backbone, make_data(), with_strategy(config, "deepspeed", zero_stage), lora)
    assert all(one.gradient_norm > 1e-3 for one in single.history)
    assert largest_difference(single.layers, zero.layers) == 0.0
    assert single.history == zero.history


@pytest.mark.usefixtures("process_group")
def test_resumed_equals_uninterrupted(
    backbone: StableDiffusion, make_data: Make, config: DpoConfig, lora: LoraConfig, tmp_path: Path
) -> None:
    config = with_strategy(config, "deepspeed")
    whole_at, cut_at = open_location(str(tmp_path / "whole")), open_location(str(tmp_path / "cut"))
    whole = train(backbone, make_data(), config, lora, checkpoint=whole_at)
    with pytest.raises(KilledError):
        train(backbone, make_data(), config, lora, checkpoint=cut_at, report=kill_after(2))
    resumed = train(backbone, make_data(), config, lora, checkpoint=cut_at)
    assert resumed.resumed_at == 2
    assert largest_difference(whole.layers, resumed.layers) == 0.0
    assert whole_at.read_bytes() == cut_at.read_bytes()


@pytest.mark.usefixtures("process_group")
def test_a_checkpoint_passes_from_one_strategy_to_the_other(
    backbone: StableDiffusion, make_data: Make, config: DpoConfig, lora: LoraConfig, tmp_path: Path
) -> None:
    place = open_location(str(tmp_path / "c"))
    with pytest.raises(KilledError):
        train(
            backbone,
            make_data(),
            with_strategy(config, "deepspeed"),
            lora,
            checkpoint=place,
            report=kill_after(2),
        )
    resumed = train(backbone, make_data(), with_strategy(config, "single"), lora, checkpoint=place)
    whole = train(backbone, make_data(), with_strategy(config, "single"), lora)
    assert resumed.resumed_at == 2
    assert largest_difference(whole.layers, resumed.layers) == 0.0


@pytest.mark.usefixtures("process_group")
def test_one_engine_trains_experts_one_after_another(
    backbone: StableDiffusion, make_data: Make, config: DpoConfig, lora: LoraConfig
) -> None:
    config = with_strategy(config.model_copy(update={"steps": 3}), "deepspeed")
    alone = train(backbone, make_data(seed=2), config, lora, expert="sexual")
    engine = open_engine(backbone, config=config, lora=lora)
    train(backbone, make_data(seed=1), config, lora, engine=engine)
    second = train(backbone, make_data(seed=2), config, lora, engine=engine, expert="sexual")
    assert largest_difference(alone.layers, second.layers) == 0.0
    parameters = backbone.adapter_parameters()
    before = [parameter.detach().clone() for _, parameter in parameters]
    engine.close()
    assert all(torch.equal(now, old) for (_, now), old in zip(parameters, before, strict=True))


@pytest.mark.usefixtures("process_group")
def test_infinite_gradient_ends_at_once(
    backbone: StableDiffusion, make_data: Make, config: DpoConfig, lora: LoraConfig
) -> None:
    config = with_strategy(config, "deepspeed")
    engine = open_engine(backbone, config=config, lora=lora)
    backward = engine.backward
    engine.backward = lambda loss: backward(loss * float("inf"))  # type: ignore[method-assign]
    with pytest.raises(SafetyDPOError, match="expected a finite gradient norm at step 0"):
        train(backbone, make_data(), config, lora, engine=engine)
    engine.close()


@pytest.mark.usefixtures("process_group")
def test_nothing_is_compiled(backbone: StableDiffusion, config: DpoConfig, lora: LoraConfig) -> None:
    import deepspeed.comm.comm

    open_engine(backbone, config=with_strategy(config, "deepspeed"), lora=lora).close()
    assert deepspeed.comm.comm.cdb.shm_comm_op is None


@pytest.mark.slow
@pytest.mark.parametrize(("zero_stage", "stop_after"), [(1, 4), (2, 2)])
def test_two_processes_equal_one(
    zero_stage: int,
    stop_after: int,
    tiny_folder: Path,
    tmp_path: Path,
    backbone: StableDiffusion,
    make_data: Make,
    config: DpoConfig,
    lora: LoraConfig,
) -> None:
    """Two gloo processes share the rows of each step: the same expert to 1e-6 (weights of A are about 1).

    The mean over 4 rows is then the mean of two means, so float32 sums have another order; 2.6e-7 was seen.

    The second case ends after 2 of 4 steps and goes on here, in one process and without DeepSpeed.
    """
    one = train(backbone, make_data(), config, lora).layers
    place = tmp_path / "checkpoint.safetensors"
    _launch(tiny_folder, place, stop_after=stop_after, zero_stage=zero_stage)
    rest = train(backbone, make_data(), config, lora, checkpoint=open_location(str(place)))
    assert rest.resumed_at == stop_after
    assert largest_difference(one, rest.layers) < 1e-6


def _launch(model: Path, checkpoint: Path, *, stop_after: int, zero_stage: int) -> None:
    command = [sys.executable, "-m", "tests.dpo.two_processes", str(model), str(checkpoint), f"{checkpoint}.store"]
    workers = [
        subprocess.Popen(
            [*command, str(rank), "2", str(stop_after), str(zero_stage)],
            env={**os.environ, "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [worker.communicate(timeout=240)[0] for worker in workers]
    assert all(worker.returncode == 0 for worker in workers), "\n".join(outputs)[-4000:]
