"""One process that trains adapters on the pairs of a finished run and looks at pictures drawn with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ray_jobs.expert_files import record_folder
from ray_jobs.expert_plan import ExpertUnit, plan_experts
from ray_jobs.prompt_tables import split_prompts, spread_prompts
from ray_jobs.run import Run, with_absolute_paths
from ray_jobs.training_tables import preference_data, read_training_tables
from safetydpo.artifacts.records import read_pointers, read_record
from safetydpo.config.experts import ALL_SINGLE
from safetydpo.config.schema import Config
from safetydpo.config.training import LoraConfig
from safetydpo.diffusion.build import load_backbone
from safetydpo.diffusion.render import render
from safetydpo.dpo.engine import lora_signature, open_engine
from safetydpo.dpo.trainer import train_expert
from safetydpo.errors import UsageError
from safetydpo.judges.build import load_judge
from safetydpo.prompts.sets import Prompt
from safetydpo.seeding import derive_seed


class ExpertBench:
    """The base model, the `select` judge and the training tables of a run whose pairs are closed.

    Raises:
        UsageError: if the run has no pairs yet.
    """

    def __init__(self, config: Config) -> None:
        self.run = Run(with_absolute_paths(config))
        pointer = read_pointers(self.run.run_dir).get("pairs")
        if pointer is None:
            raise UsageError(
                f"expected the pairs of a run in {self.run.run_dir}, found none: run `safetydpo pairs CONFIG` first"
            )
        self.pairs_folder = self.run.store / "pairs" / pointer["folder"]
        pairs = read_record(self.pairs_folder)
        assert pairs is not None
        self.backbone, self.judge = load_backbone(self.run.config.identity.base), load_judge("demo_select")
        self.tables = read_training_tables(self.run, record_folder(self.run, pairs))
        self.units = {unit.name: unit for unit in plan_experts(self.run, pairs, self.pairs_folder)}

    def train(self, unit: ExpertUnit, *, lora: LoraConfig) -> None:
        """Train an expert in this process (strategy `single`) and leave it in the base model."""
        dpo = unit.dpo.model_copy(update={"strategy": "single"})
        engine = open_engine(self.backbone, config=dpo, lora=lora)
        trained = train_expert(
            self.backbone,
            preference_data(self.tables, replace(unit, dpo=dpo), self.backbone, self.run.config),
            config=dpo,
            lora=lora,
            run_seed=self.run.config.identity.seed,
            expert_name=unit.name,
            engine=engine,
        )
        engine.close()
        self.backbone.swap_adapter(lora_signature(lora), trained.layers)

    def rates(self, prompts: Sequence[Prompt], category: str) -> dict[str, float]:
        """Return the shares of `counts`."""
        return {name: hits / n for name, (hits, n) in self.counts(prompts, category).items()}

    def counts(self, prompts: Sequence[Prompt], category: str) -> dict[str, tuple[int, int]]:
        """Draw the prompts, judge them with `select`, and return (pictures counted, pictures drawn).

        `own_*` are over unsafe prompts of the expert's category (all of them for `all_single`), `others_ip` over those
        of other categories; `neutral` and `neighbour` count concepts found.
        """
        identity = self.run.config.identity
        pictures = render(
            self.backbone,
            prompts=[prompt.text for prompt in prompts],
            seeds=[derive_seed(identity.seed, "benchmark_noise", prompt.prompt_id) for prompt in prompts],
            sampler=identity.sampler,
        )
        verdicts = self.judge.judge(pictures)
        found: dict[str, list[bool]] = {}
        for index, prompt in enumerate(prompts):
            unsafe, mush = bool(verdicts.is_unsafe[index]), bool(verdicts.is_unrecognisable[index])
            if prompt.prompt_set in ("neutral", "neighbour"):
                found.setdefault(prompt.prompt_set, []).append(verdicts.concept[index] == prompt.concept)
            elif category == ALL_SINGLE or category in prompt.categories:
                intact = not unsafe and not mush and verdicts.background[index] == prompt.background
                found.setdefault("own_ip", []).append(unsafe)
                found.setdefault("own_unrecognisable", []).append(mush)
                found.setdefault("own_safe_and_intact", []).append(intact)
            else:
                found.setdefault("others_ip", []).append(unsafe)
        return {name: (sum(hits), len(hits)) for name, hits in found.items()}


def validation_prompts(run: Run, *, per_category: int = 12) -> list[Prompt]:
    """Return unsafe validation prompts of every category, 50 neutral ones and 51 of neighbours."""
    source, seed = run.config.identity.prompts, run.config.identity.seed
    unsafe = split_prompts(source, "validation", "unsafe")
    chosen = [
        prompt
        for category in source.categories
        for prompt in spread_prompts(
            [row for row in unsafe if row.category == category], per_category, seed=seed, purpose="benchmark"
        )
    ]
    for name, count in (("neutral", 50), ("neighbour", 51)):
        chosen += spread_prompts(split_prompts(source, "validation", name), count, seed=seed, purpose="benchmark")
    return chosen
