"""Samplers by name, as fresh optuna studies in memory.

| name     | what it learns from                              | what it is told                            |
|----------|--------------------------------------------------|--------------------------------------------|
| `tpe`    | all trials, those too that a rung stopped        | the price with its penalties               |
| `nsga2`  | its last population                              | price, neutral and neighbour rate          |
| `cmaes`  | all trials measured in full                      | the price with its penalties               |
| `random` | nothing                                          | the price with its penalties               |
"""

from __future__ import annotations

import logging
import warnings
from importlib.util import find_spec
from typing import Any

import optuna

from safetydpo.errors import UsageError
from safetydpo.search.space import SearchSpace

MULTI_OBJECTIVE = ("nsga2",)
DIRECTIONS = ("minimize", "maximize", "maximize")
"""Of the price, the neutral rate and the neighbour retention (the last two relative to the base)."""


def fresh_study(
    sampler: str,
    space: SearchSpace,
    *,
    seed: int,
    startup_trials: int,
    multivariate: bool = False,
    population: int = 2,
    is_async: bool = False,
) -> Any:
    """Return an empty study of a sampler.

    Args:
        sampler: a name of this file's table.
        space: what may be chosen.
        seed: seed of the sampler.
        startup_trials: trials before `tpe` models anything.
        multivariate: whether `tpe` models parameters jointly.
        population: candidates of a generation of `nsga2` and `cmaes`.
        is_async: whether candidates are asked while others run: `tpe` then keeps away from those.

    Raises:
        UsageError: if the sampler does not exist, or `cmaes` has one number to search only, or its package is missing.
    """
    with warnings.catch_warnings():
        # `multivariate`, `group` and `constant_liar` are marked experimental; we pin optuna and test repeatability.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        chosen = _sampler(
            sampler,
            space,
            seed=seed,
            startup_trials=startup_trials,
            multivariate=multivariate,
            population=population,
            is_async=is_async,
        )
    # Optuna announces each study on standard error; only that message is muted, and only here.
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(logging.WARNING)
    try:
        storage = optuna.storages.InMemoryStorage()
        if sampler in MULTI_OBJECTIVE:
            return optuna.create_study(storage=storage, sampler=chosen, directions=list(DIRECTIONS))
        return optuna.create_study(storage=storage, sampler=chosen, direction="minimize")
    finally:
        optuna.logging.set_verbosity(before)


def _sampler(
    name: str,
    space: SearchSpace,
    *,
    seed: int,
    startup_trials: int,
    multivariate: bool,
    population: int,
    is_async: bool,
) -> Any:
    if name == "tpe":
        return optuna.samplers.TPESampler(
            seed=seed,
            n_startup_trials=startup_trials,
            multivariate=multivariate,
            group=multivariate,
            constant_liar=is_async,
        )
    if name == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed, population_size=max(2, population))
    if name == "cmaes":
        return _cmaes(space, seed=seed, population=population)
    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    raise UsageError(f"expected a sampler of tpe, nsga2, cmaes, random, found {name!r}")


def _cmaes(space: SearchSpace, *, seed: int, population: int) -> Any:
    numbers = num_dimensions(space)
    if numbers < 2:
        raise UsageError(
            f"expected at least 2 settings to search for identity.search.sampler 'cmaes', found {numbers} of "
            f"identity.search.methods [{', '.join(space.methods)}]: use sampler 'tpe', or a method with coefficients"
        )
    # Optuna loads it only when the first generation is over.
    if find_spec("cmaes") is None:
        raise UsageError(
            "expected the package cmaes for identity.search.sampler 'cmaes', found none: pip install "
            "'safetydpo[cmaes]', or use sampler 'tpe'"
        )
    # Fewer than 4 candidates are no generation of CMA-ES.
    return optuna.samplers.CmaEsSampler(seed=seed, n_startup_trials=1, popsize=max(4, population))


def num_dimensions(space: SearchSpace) -> int:
    """Return how many continuous settings a space of one method has; a range of one value is none."""
    method = space.methods[0]
    ranges = [space.scale_range(method)]
    ranges += [space.weight_range] * (len(space.groups) if space.takes_weights(method) else 0)
    ranges += [space.density_range] if method in space.density_methods else []
    ranges += [space.block_weight_range] * len(space.block_groups)
    return sum(low < high for low, high in ranges)
