"""Errors of the reference for all draws that the experts of a run will make, computed once by Ray Data and stored.

They lie in a pool like pictures do: a draw that the pool holds is never computed again, whichever run, expert or
setting of the loss asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ray_jobs.cluster import connect
from ray_jobs.generate_pairs import derived_pool
from ray_jobs.places import variant
from ray_jobs.pools import PoolStage, fill_pool
from ray_jobs.run import Run, config_for_workers
from ray_jobs.training_tables import (
    PairTables,
    pair_data,
    preference_rows,
    read_kept,
    read_pair_tables,
    read_training_tables,
)
from safetydpo.artifacts.pool_index import read_index, read_pool
from safetydpo.artifacts.schemas import REFERENCE_ERRORS
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import table_from_rows, table_from_stream
from safetydpo.config.schema import Config
from safetydpo.config.training import DpoConfig
from safetydpo.errors import SafetyDPOError

if TYPE_CHECKING:
    from ray_jobs.expert_plan import ExpertUnit
    from safetydpo.diffusion.backbone import Backbone
    from safetydpo.dpo.batch import PreferenceData
    from safetydpo.dpo.reference import ErrorContext

DRAWS_PER_CALL = 512
"""Draws that a worker computes at one call and stores in one file: two numbers each, so that files stay few."""
REFERENCE_MANIFEST = pa.schema(
    [
        REFERENCE_ERRORS.field("error_id"),
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("draw_index", pa.int64(), nullable=False),
    ]
)
Members = Sequence["ExpertUnit"]


def make_reference_errors(run: Run, units: Members, pairs_folder: Location) -> None:
    """Compute and store what the units with `dpo.reference` `cached` need and the store lacks.

    Raises:
        SafetyDPOError: if rows are missing afterwards.
    """
    groups = _by_context(run, units)
    if not groups:
        return
    connect(run.config)
    tables = read_pair_tables(pairs_folder)
    for members in groups.values():
        context = _context(run, members[0].dpo)
        stage = PoolStage(
            label="reference errors",
            output=REFERENCE_ERRORS,
            id_column="error_id",
            worker=ReferenceWorker,
            arguments={
                "config": config_for_workers(run.config).model_dump(mode="json"),
                "dpo": members[0].dpo.model_dump(mode="json"),
                "pairs_folder": pairs_folder.name,
            },
            batch_size=DRAWS_PER_CALL,
            passes_per_batch=-(-DRAWS_PER_CALL // context.batch_size),
        )
        manifest = table_from_stream(_manifest_rows(tables, draws_of_pairs(run, members), context), REFERENCE_MANIFEST)
        fill_pool(_pool(run, context), manifest, stage, execution=run.config.execution)


def with_reference_errors(
    run: Run, unit: ExpertUnit, data: PreferenceData, tables: PairTables, backbone: Backbone
) -> PreferenceData:
    """Return the preferences of an expert with the stored errors of its draws, if its settings ask for them.

    Raises:
        SafetyDPOError: if some are not stored.
    """
    from safetydpo.dpo.reference import error_ids
    from safetydpo.dpo.stored_errors import errors_by_draw

    if unit.dpo.reference == "live":
        return data
    context, draws = _context(run, unit.dpo, backbone), draws_of_pairs(run, [unit])
    rows = preference_rows(tables, data.pair_ids)
    ids = [list(error_ids(row, draws[row.pair_id], context)) for row in rows]
    wanted = {error_id for of_pair in ids for error_id in of_pair}
    found = read_pool(_pool(run, context), REFERENCE_ERRORS, wanted=wanted, id_column="error_id")
    if found.num_rows < len(wanted):
        raise SafetyDPOError(
            f"expected {len(wanted)} stored reference errors of expert {unit.name!r} in {_pool(run, context)}, found "
            f"{found.num_rows}: run the training command again, which computes them first"
        )
    place = {error_id: row for row, error_id in enumerate(found.column("error_id").to_pylist())}
    sides = [found.column(f"error_reference_{side}").to_numpy() for side in ("safe", "unsafe")]
    errors = np.stack(sides, axis=1).astype(np.float32)
    stored = [errors[[place[error_id] for error_id in of_pair]] for of_pair in ids]
    return replace(data, reference_errors=errors_by_draw(stored))


def draws_of_pairs(run: Run, units: Members, *, steps: Mapping[str, int] | None = None) -> dict[str, int]:
    """Return how many distinct draws of each pair the units make together: the draws 0, 1, ... below that number.

    `steps` is how many each unit does, by its name; None = those of its settings. Pairs that a validation keeps out of
    a unit's training are none of that unit's.
    """
    from safetydpo.dpo.held_out import held_out_ids
    from safetydpo.dpo.reference import planned_draws

    together: dict[str, int] = {}
    for unit in units:
        # The order that `PreferenceData` gives them.
        pair_ids, dpo, run_seed = sorted(unit.pair_ids), unit.dpo, run.config.identity.seed
        if dpo.validation.every_steps is not None:
            seed = dpo.draw_seed_of(run_seed)
            held_out = held_out_ids(pair_ids, rate=dpo.validation.held_out_rate, run_seed=seed)
            pair_ids = [pair_id for pair_id in pair_ids if pair_id not in held_out]
        if steps is not None:
            dpo = dpo.model_copy(update={"steps": steps[unit.name]})
        _, draws = planned_draws(dpo, run_seed=run_seed, expert=unit.name, num_pairs=len(pair_ids))
        for pair_id, number in zip(pair_ids, draws.tolist(), strict=True):
            together[pair_id] = max(together.get(pair_id, 0), number)
    return together


def _by_context(run: Run, units: Members) -> dict[str, list[ExpertUnit]]:
    groups: dict[str, list[ExpertUnit]] = {}
    for unit in units:
        if unit.dpo.reference == "cached":
            groups.setdefault(_context(run, unit.dpo).hash, []).append(unit)
    return groups


def count_stored(run: Run, units: Members) -> tuple[int, int]:
    """Return how many errors of draws the units need, and how many are stored: at most, as others' may be among them.

    The pool is that of the units' context; whose errors lie in it is not looked at, which would take a hash for each.
    """
    needed, stored = 0, 0
    for members in _by_context(run, units).values():
        of_pool = _pool(run, _context(run, members[0].dpo))
        number = sum(draws_of_pairs(run, members).values())
        needed += number
        stored += min(number, read_index(of_pool, REFERENCE_ERRORS, id_column="error_id").num_rows)
    return needed, stored


def _context(run: Run, dpo: DpoConfig, backbone: Backbone | None = None) -> ErrorContext:
    """Return the context of these settings; without a loaded base from its files."""
    from safetydpo.diffusion.build import num_train_timesteps
    from safetydpo.dpo.reference import ErrorContext

    identity = run.config.identity
    return ErrorContext(
        base_fingerprint=run.base_fingerprint if backbone is None else backbone.fingerprint,
        dtype=identity.base.dtype,
        batch_size=_pairs_per_pass(dpo, workers=run.config.execution.workers_per_expert),
        num_timesteps=num_train_timesteps(identity.base) if backbone is None else backbone.num_train_timesteps,
        draw_seed=dpo.draw_seed_of(identity.seed),
        config=dpo,
        compiled_for=identity.lora if dpo.compiled else None,
    )


def _pairs_per_pass(dpo: DpoConfig, *, workers: int) -> int:
    """Return the pairs in one pass of a training step: its worker's share, or less of it at once.

    Passes of that size fit into memory, and on one kind of processor they have a step's very bits.
    """
    own = dpo.pairs_per_step // workers
    return own if dpo.pairs_per_forward is None else min(own, dpo.pairs_per_forward)


def _pool(run: Run, context: ErrorContext) -> Location:
    """Return the pool of one context: an expert reads the index of its pool, which must not hold all seeds' draws."""
    return variant(derived_pool(run, "reference_errors"), context.hash[:12])


def _manifest_rows(
    tables: PairTables, draws: Mapping[str, int], context: ErrorContext
) -> Iterator[dict[str, str | int]]:
    from safetydpo.dpo.reference import error_ids

    for row in preference_rows(tables, sorted(draws)):
        for draw_index, error_id in enumerate(error_ids(row, draws[row.pair_id], context)):
            yield {"error_id": error_id, "pair_id": row.pair_id, "draw_index": draw_index}


class ReferenceWorker:
    """Computes the reference's errors of draws, with the pairs in memory and the denoiser alone."""

    def __init__(self, config: Mapping[str, Any], dpo: Mapping[str, Any], pairs_folder: str) -> None:
        from ray_jobs.workers import worker_device
        from safetydpo.diffusion.build import load_backbone

        run = Run(Config(**config))
        self._backbone = load_backbone(run.config.identity.base, device=worker_device(), parts="denoiser")
        folder, settings = run.store / "pairs" / pairs_folder, DpoConfig(**dpo)
        self._context = _context(run, settings, self._backbone)
        tables, kept = read_training_tables(run, folder), sorted(read_kept(folder))
        self._data = pair_data(tables, kept, settings, self._backbone, run.config)
        self._place = {pair_id: place for place, pair_id in enumerate(self._data.pair_ids)}

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return `reference_errors` rows."""
        from safetydpo.dpo.draws import RowUse
        from safetydpo.dpo.reference import compute_errors

        pairs, draws = table.column("pair_id").to_pylist(), table.column("draw_index").to_pylist()
        uses = [RowUse(self._place[pair_id], draw_index) for pair_id, draw_index in zip(pairs, draws, strict=True)]
        errors = compute_errors(self._backbone, self._data, uses, self._context).tolist()
        rows = [
            {"error_id": error_id, "error_reference_safe": safe, "error_reference_unsafe": unsafe}
            for error_id, (safe, unsafe) in zip(table.column("error_id").to_pylist(), errors, strict=True)
        ]
        return table_from_rows(rows, REFERENCE_ERRORS)
