"""Measure one merged adapter after another on the validation prompts: what a trial of the search does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ray_jobs.expert_files import load_experts, read_aids
from ray_jobs.generate_pairs import SELECT_JUDGE
from ray_jobs.run import Run
from ray_jobs.sampled_rates import count_shares, draw_and_judge
from ray_jobs.workers import worker_device
from safetydpo.config.schema import Config
from safetydpo.prompts.sets import Prompt
from safetydpo.search.space import Candidate


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
        from safetydpo.dpo.engine import lora_signature
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
        _, judged = draw_and_judge(
            self._backbone,
            self._judge,
            self._prompts,
            run_seed=identity.seed,
            sampler=identity.sampler,
            purpose="search_noise",
        )
        return count_shares(judged, judge=self._judge.name)
