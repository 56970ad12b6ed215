from __future__ import annotations

import importlib
import importlib.util

import pytest
import torch
from torch import Tensor

from safetydpo.config.training import DpoConfig
from safetydpo.dpo.optimizers import OptimizerState, make_optimizer, read_optimizer, write_optimizer
from safetydpo.errors import UsageError

NEEDS_BITSANDBYTES = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (extra 'optimizers')"
)
ALL = ("adamw", pytest.param("adamw_8bit", marks=NEEDS_BITSANDBYTES), "adafactor", "prodigy")


def settings(optimizer: str, **changes: object) -> DpoConfig:
    rate = 1.0 if optimizer == "prodigy" else 1e-2
    return DpoConfig.model_validate({"optimizer": optimizer, "learning_rate": rate, **changes})


def parameters() -> dict[str, Tensor]:
    """A as it is drawn, of a size that 8 bits apply to, and B = 0."""
    generator = torch.Generator().manual_seed(0)
    down = torch.nn.Parameter(torch.randn(8, 640, generator=generator) / 8)
    return {"down": down, "up": torch.nn.Parameter(torch.zeros(320, 8))}


def run(optimizer: torch.optim.Optimizer, named: dict[str, Tensor], steps: range) -> None:
    for step in steps:
        x = torch.randn(4, 640, generator=torch.Generator().manual_seed(step))
        loss = ((x @ named["down"].T @ named["up"].T - 1.0) ** 2).mean()
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", ALL)
def test_it_learns_and_its_state_goes_on_with_equal_bits(name: str) -> None:
    """Six steps at once, and three, a new optimizer with the state, three more."""
    config = settings(name)
    whole, cut = parameters(), parameters()
    optimizer = make_optimizer(list(whole.values()), config=config)
    run(optimizer, whole, range(6))
    assert float(whole["up"].detach().abs().max()) > 0
    first = make_optimizer(list(cut.values()), config=config)
    run(first, cut, range(3))
    saved = read_optimizer(first, cut)
    second = make_optimizer(list(cut.values()), config=config)
    write_optimizer(second, cut, saved)
    run(second, cut, range(3, 6))
    assert all(torch.equal(whole[one], cut[one]) for one in whole)


@pytest.mark.parametrize("name", ALL)
def test_an_empty_state_makes_it_as_new(name: str) -> None:
    config = settings(name)
    used, new = parameters(), parameters()
    optimizer = make_optimizer(list(used.values()), config=config)
    run(optimizer, used, range(3))
    with torch.no_grad():
        for one, value in parameters().items():
            used[one].copy_(value)
    write_optimizer(optimizer, used, OptimizerState())
    assert read_optimizer(optimizer, used) == OptimizerState()
    run(optimizer, used, range(2))
    run(make_optimizer(list(new.values()), config=config), new, range(2))
    assert all(torch.equal(used[one], new[one]) for one in used)


@NEEDS_BITSANDBYTES
def test_state_is_a_copy_with_its_own_types() -> None:
    """8-bit moments stay bytes, and float32 ones of tensors below 4096 numbers stay float32."""
    named = parameters()
    optimizer = make_optimizer(list(named.values()), config=settings("adamw_8bit"))
    run(optimizer, named, range(1))
    state = read_optimizer(optimizer, named)
    assert state.tensors["state1"]["down"].dtype == torch.uint8
    assert state.tensors["state1"]["up"].dtype == torch.float32
    assert state.numbers["step"] == {"down": 1, "up": 1}
    before = state.tensors["state1"]["down"].clone()
    run(optimizer, named, range(1, 3))
    assert torch.equal(state.tensors["state1"]["down"], before)


def test_numbers_of_all_parameters_together_are_kept() -> None:
    """Down a bowl, Prodigy's step size grows from 1e-6, and goes on from there; of AdamW there is nothing."""
    named: dict[str, Tensor] = {"a": torch.nn.Parameter(torch.zeros(4))}

    def descend(optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            torch.autograd.backward(((named["a"] - 1.0) ** 2).sum())
            optimizer.step()
            optimizer.zero_grad()

    optimizer = make_optimizer(list(named.values()), config=settings("prodigy"))
    descend(optimizer, 30)
    state, values = read_optimizer(optimizer, named), named["a"].detach().clone()
    assert state.shared["d"] > 1e-6
    assert state.shared["k"] == 30
    descend(optimizer, 3)
    expected, named["a"].data = named["a"].detach().clone(), values
    other = make_optimizer(list(named.values()), config=settings("prodigy"))
    write_optimizer(other, named, state)
    descend(other, 3)
    assert torch.equal(named["a"], expected)
    plain = make_optimizer(list(named.values()), config=settings("adamw"))
    descend(plain, 1)
    assert read_optimizer(plain, named).shared == {}


def test_prodigy_says_nothing_on_the_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    make_optimizer(list(parameters().values()), config=settings("prodigy"))
    assert capsys.readouterr().out == ""


@NEEDS_BITSANDBYTES
def test_eight_bits_stay_near_thirty_two() -> None:
    """After 20 steps the 8-bit AdamW's loss is within a tenth of torch's AdamW's."""
    losses = []
    for name in ("adamw", "adamw_8bit"):
        named = parameters()
        run(make_optimizer(list(named.values()), config=settings(name, weight_decay=0.0)), named, range(20))
        x = torch.randn(64, 640, generator=torch.Generator().manual_seed(99))
        losses.append(float(((x @ named["down"].T @ named["up"].T - 1.0) ** 2).mean().detach()))
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


def test_adafactor_by_hand() -> None:
    """A first step from 0: the update is g / rms of its row and column, here sign(g), clipped to rms 1: -lr sign(g)."""
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = make_optimizer([parameter], config=settings("adafactor", learning_rate=0.25, weight_decay=0.0))
    parameter.grad = torch.tensor([[3.0, -3.0], [-3.0, 3.0]])
    optimizer.step()
    assert torch.allclose(parameter, torch.tensor([[-0.25, 0.25], [0.25, -0.25]]), atol=1e-6)


@pytest.mark.parametrize(("optimizer", "package"), [("prodigy", "prodigyopt"), ("adamw_8bit", "bitsandbytes")])
def test_a_missing_package_is_named(optimizer: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def refuse(name: str, *rest: object) -> object:
        if name == package:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(
        UsageError, match=rf"the package '{package}' for dpo\.optimizer '{optimizer}', .* 'safetydpo\[optimizers\]'"
    ):
        make_optimizer(list(parameters().values()), config=settings(optimizer))
