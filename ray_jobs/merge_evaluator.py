"""Measure one merged adapter after another on the validation prompts: what a trial of the search does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ray_jobs.expert_files import load_experts, read_aids
from ray_jobs.generate_pairs import SELECT_JUDGE
from ray_jobs.run import Run
from ray_jobs.workers import worker_device
from safetydpo.config.schema import Config
from safetydpo.prompts.sets import Prompt
from safetydpo.search.space import Candidate
from safetydpo.seeding import derive_seed


class MergeEvaluator:
    """Base, experts, judge and prompts in memory; measures one merged adapter after another."""

    def __init__(
        self, config: Mapping[str, Any], folders: Mapping[str, str], aids: Mapping[str, str], prompts: Sequence[Prompt]
    ) -> None:
        import torch

        from safetydpo.diffusion.build import load_backbone
        from safetydpo.judges.build import load_judge
        from safetydpo.merging.merge import prepare_experts

        self.run = Run(Config.model_validate(config))
        torch.set_num_threads(max(1, int(self.run.config.execution.cpus_per_worker)))
        self._backbone = load_backbone(self.run.config.identity.base, device=worker_device())
        self._judge = load_judge(SELECT_JUDGE)
        methods = self.run.config.identity.search.methods
        self._prepared = prepare_experts(load_experts(self.run, folders), **read_aids(self.run, aids, methods=methods))
        self._prompts = list(prompts)

    def measure(self, candidate: Candidate | None) -> dict[str, float]:
        """Return the rates of a candidate, or of the base for None."""
        from safetydpo.diffusion.render import render
        from safetydpo.dpo.engine import lora_signature
        from safetydpo.judges.protocol import known_answers
        from safetydpo.merging.merge import merge_prepared

        identity = self.run.config.identity
        if candidate is None:
            self._backbone.remove_adapter()
        else:
            result = merge_prepared(
                self._prepared,
                method=candidate.method,
                weights=dict(candidate.weights),
                global_scale=candidate.global_scale,
                density=candidate.density or 1.0,
                output_rank=identity.merge.output_rank,
                seed=identity.seed,
            )
            self._backbone.swap_adapter(lora_signature(identity.lora), result.layers)
        pictures = render(
            self._backbone,
            prompts=[prompt.text for prompt in self._prompts],
            seeds=[derive_seed(identity.seed, "search_noise", prompt.prompt_id) for prompt in self._prompts],
            sampler=identity.sampler,
        )
        verdicts = self._judge.judge(pictures)
        mushes = known_answers(
            verdicts.is_unrecognisable, judge=self._judge.name, what="whether a picture is recognisable"
        )
        rows = list(zip(self._prompts, verdicts.concept, verdicts.is_unsafe, mushes, strict=True))

        def rate(prompt_set: str, hits: Sequence[bool]) -> float:
            chosen = [hit for hit, prompt in zip(hits, self._prompts, strict=True) if prompt.prompt_set == prompt_set]
            return sum(chosen) / len(chosen)

        found = [concept == prompt.concept for prompt, concept, _, _ in rows]
        return {
            "ip_select": rate("unsafe", [unsafe for _, _, unsafe, _ in rows]),
            "unrecognisable_rate": rate("unsafe", [mush for _, _, _, mush in rows]),
            "neutral_rate": rate("neutral", found),
            "neighbour_retention": rate("neighbour", found),
        }
