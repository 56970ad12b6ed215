"""The project's own adapters for the first so many concepts, from a finished run of one expert per category."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.expert_bench import ExpertBench
from ray_jobs import distill_experts
from ray_jobs.distill_experts import adapter_config, distillation_data
from ray_jobs.expert_files import load_experts
from ray_jobs.run import Run, with_absolute_paths
from safetydpo.artifacts.adapters import LoraLayer, read_adapter
from safetydpo.artifacts.layout import ADAPTER_FILE, MEMBERSHIPS_FILE
from safetydpo.artifacts.records import files_folder, read_pointers, read_record
from safetydpo.artifacts.schemas import MEMBERSHIPS, sha256_of
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import read_table
from safetydpo.config.schema import Config
from safetydpo.errors import UsageError

Found = tuple[dict[str, Any], Mapping[str, LoraLayer]]


class OurAdapters:
    """What the finished run offers, and what is trained from its pairs where it offers nothing.

    All concepts: the run's searched merge. The concepts of one category: its expert. Of several: their experts,
    distilled as the run's own are, at the scale that its search chose. Fewer than a category: one expert trained on the
    pairs of these concepts, with the run's settings.
    """

    def __init__(self, config: Config, *, store: Path | None, run_dir: Path | None) -> None:
        places = {"store": store, "run_dir": run_dir}
        changes = {name: str(place) for name, place in places.items() if place is not None}
        execution = config.execution.model_copy(update=changes)
        self.run = Run(with_absolute_paths(config.model_copy(update={"execution": execution})))

    @cached_property
    def fingerprint(self) -> str:
        """Hash over the artifacts of the run; "" while it has none."""
        pointers = read_pointers(self.run.run_dir)
        return (
            sha256_of({name: one["hash"] for name, one in pointers.items() if name != "outcomes"}) if pointers else ""
        )

    def layers(self, backbone: Any, concepts: Sequence[str], *, order: Sequence[str]) -> Found:
        """Return (how they were made, layers) for the first concepts of `order`.

        Raises:
            UsageError: if the run is not finished.
        """
        if len(concepts) == len(order):
            return {"from": "searched merge"}, read_adapter(self._files("merged:searched") / ADAPTER_FILE)[0]
        whole = self._whole_categories(set(concepts))
        if whole is None:
            return self._trained(concepts)
        if len(whole) == 1:
            return {"from": "expert of the category"}, self._expert(whole[0])
        return self._distilled(backbone, whole)

    def _files(self, pointer: str) -> Location:
        pointers = read_pointers(self.run.run_dir)
        if pointer not in pointers:
            raise UsageError(
                f"expected a finished run in {self.run.run_dir}, found no {pointer}: run `safetydpo run CONFIG` first, "
                "or name another run with --ours-run and --ours-store"
            )
        folder = self.run.store / pointers[pointer]["stage"] / pointers[pointer]["folder"]
        record = read_record(folder)
        assert record is not None
        return files_folder(folder, record)

    def _expert(self, category: str) -> Mapping[str, LoraLayer]:
        return read_adapter(self._files(f"expert:{category}") / ADAPTER_FILE)[0]

    def _memberships(self) -> list[dict[str, str]]:
        """Memberships of the pairs, the first category of a pair alone."""
        rows = read_table(self._files("pairs") / MEMBERSHIPS_FILE, MEMBERSHIPS).to_pylist()
        return list({row["pair_id"]: row for row in reversed(rows)}.values())

    def _whole_categories(self, concepts: set[str]) -> list[str] | None:
        of_category: dict[str, set[str]] = {}
        for row in self._memberships():
            of_category.setdefault(row["category"], set()).add(row["concept"])
        chosen = [name for name in self.run.config.identity.prompts.categories if of_category[name] <= concepts]
        covered = set().union(*(of_category[name] for name in chosen))
        return chosen if chosen and covered == concepts else None

    def _trained(self, concepts: Sequence[str]) -> Found:
        bench = ExpertBench(self.run.config)
        pair_ids = {row["pair_id"] for row in self._memberships() if row["concept"] in concepts}
        unit = next(unit for unit in bench.units.values() if pair_ids & set(unit.pair_ids))
        own = tuple(pair for pair in unit.pair_ids if pair in pair_ids)
        others = replace(unit.others, own=frozenset(own))
        bench.train(replace(unit, name="concepts", pair_ids=own, others=others), lora=self.run.config.identity.lora)
        return {"from": "expert trained on these concepts", "pairs": len(own)}, bench.backbone.export_adapter()

    def _distilled(self, backbone: Any, categories: Sequence[str]) -> Found:
        from safetydpo.dpo.distillation import answer_rows
        from safetydpo.dpo.distiller import distill
        from safetydpo.dpo.engine import lora_signature, open_engine

        config, seed = self.run.config, self.run.config.identity.seed
        settings = config.identity.merge.distill.model_copy(update={"strategy": "single", "processes": 1})
        bench = ExpertBench(config)
        taught = {name: list(bench.units[name].pair_ids) for name in categories}
        data = distillation_data(bench.tables, taught, backbone, config)
        experts = load_experts(self.run, {name: self._files(f"expert:{name}").path for name in categories})
        start = distill_experts._start_layers(self.run, experts, {}, backbone)
        answers = answer_rows(
            backbone,
            data,
            {expert.name: expert.layers for expert in experts},
            signature=lora_signature(config.identity.lora),
            config=settings,
            run_seed=seed,
        )
        lora = adapter_config(config)
        engine = open_engine(backbone, config=settings, lora=lora)
        try:
            done = distill(
                backbone,
                data,
                answers,
                start=start,
                start_hash=sha256_of(list(categories)),
                config=settings,
                lora=lora,
                run_seed=seed,
                engine=engine,
            )
        finally:
            engine.close()
            backbone.remove_adapter()
        scale = float(_recipe_scale(self._files("merged:searched")))
        layers = {name: LoraLayer(layer.down, layer.up * scale) for name, layer in done.layers.items()}
        return {"from": f"{len(categories)} experts distilled", "scale": scale}, layers


def _recipe_scale(folder: Location) -> float:
    record = read_record(folder)
    assert record is not None
    return float(record.details["recipe"]["global_scale"])
