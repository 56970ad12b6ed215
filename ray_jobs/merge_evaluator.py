"""Measure one merged adapter after another: on the validation prompts, in small, or without sampling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_jobs.expert_files import load_experts, read_aids
from ray_jobs.run import Run
from ray_jobs.sampled_rates import JudgedPrompt, count_shares, draw_prompts
from ray_jobs.search_judges import load_prompt_judge, model_places
from ray_jobs.workers import worker_device
from safetydpo.artifacts.storage import Location
from safetydpo.config.rungs import FewStepsRung, HeldOutRung
from safetydpo.config.schema import BaseModelConfig, Config, SamplerConfig
from safetydpo.errors import SafetyDPOError
from safetydpo.prompts.sets import Prompt
from safetydpo.search.recognition import LEAST_SIMILARITY
from safetydpo.search.space import Candidate, first_methods

if TYPE_CHECKING:
    from safetydpo.artifacts.adapters import LoraLayer
    from safetydpo.merging.merge import MergeResult

PURPOSE = "search_noise"


@dataclass(frozen=True)
class Measured:
    """Numbers of a candidate, and how many pictures were drawn for them."""

    numbers: dict[str, float]
    pictures: int


class MergeEvaluator:
    """Base, experts, judge and prompts in memory; measures one merged adapter after another."""

    def __init__(
        self,
        config: Mapping[str, Any],
        folders: Mapping[str, str],
        aids: Mapping[str, str],
        prompts: Sequence[Prompt],
        pairs_folder: str | None = None,
        captions: Sequence[str] = (),
        least_similarities: Mapping[int, float] | None = None,
        places: Mapping[str, Any] | None = None,
    ) -> None:
        """Load everything that all candidates share.

        Args:
            config: of the run.
            folders: of the experts.
            aids: folders of what merges need beside them.
            prompts: of the full measurement.
            pairs_folder: for rungs without sampling.
            captions: what pictures may show beside the prompts: safe counterparts.
            least_similarities: by rung, what the base's pictures said; of others the base is measured here first.
            places: `base` and `clip` with absolute paths, for trials, which Tune starts in folders of their own.
        """
        import torch

        from safetydpo.diffusion.build import load_backbone
        from safetydpo.merging.merge import prepare_experts

        self.run = Run(Config.model_validate(config))
        torch.set_num_threads(max(1, int(self.run.config.execution.cpus_per_worker)))
        places = model_places(self.run.config) if places is None else places
        self.backbone = load_backbone(BaseModelConfig.model_validate(places["base"]), device=worker_device())
        clip = Path(places["clip"])
        self.judge = load_prompt_judge(self.run.config, prompts, captions, clip=clip, device=worker_device())
        methods = first_methods(self.run.config.identity.search)
        found = read_aids(self.run, aids, methods=methods)
        self._prepared = prepare_experts(load_experts(self.run, folders), **found, keep=True)
        self._prompts = list(prompts)
        self._pairs_folder = pairs_folder
        self._questions: dict[int, Any] = {}
        self._least = dict(least_similarities or {})
        self._is_base = True

    def swap(self, candidate: Candidate | None) -> None:
        """Merge the experts as a candidate says and put the result into the base; None = take any adapter out."""
        self.put(None if candidate is None or candidate.is_base else self.merge(candidate).layers)

    def merge(self, candidate: Candidate) -> MergeResult:
        """Merge the experts as a candidate says; the base stays as it is."""
        from ray_jobs.merge_settings import candidate_request, request_settings
        from safetydpo.merging.merge import merge_with

        identity = self.run.config.identity
        request = candidate_request(identity.merge, candidate)
        names = [expert.name for expert in self._prepared.experts]
        return merge_with(self._prepared, request_settings(request, seed=identity.seed, names=names))

    def put(self, layers: Mapping[str, LoraLayer] | None) -> None:
        """Put an adapter into the base in place of any other; None = take it out."""
        from safetydpo.dpo.engine import lora_signature

        self._is_base = layers is None
        if layers is None:
            self.backbone.remove_adapter()
        else:
            self.backbone.swap_adapter(lora_signature(self.run.config.identity.lora), layers)

    def measure(self, candidate: Candidate | None) -> dict[str, float]:
        """Return the rates of a candidate, or of the base for None, on all prompts."""
        return self.measure_rung(candidate, len(self.run.config.identity.search.ladder)).numbers

    def measure_rung(self, candidate: Candidate | None, rung: int) -> Measured:
        """Return the numbers of a candidate, or of the base for None, at a rung, or in full above the last one."""
        search = self.run.config.identity.search
        settings = search.ladder[rung] if rung < len(search.ladder) else None
        if isinstance(settings, HeldOutRung):
            # Before the swap, because opening it asks the base.
            questions = self._open(rung, settings)
            self.swap(candidate)
            return Measured(questions.numbers(self.backbone), 0)
        self.swap(candidate)
        prompts, sampler = self._prompts, self.run.config.identity.sampler
        if settings is not None:
            prompts, sampler = small_set(prompts, settings), sampler.model_copy(update={"steps": settings.steps})
        _, judged = self.draw(prompts, sampler, rung=rung)
        numbers = count_shares(judged, judge=self.judge.name)
        if candidate is None and rung in self._least:
            numbers[LEAST_SIMILARITY] = self._least[rung]
        return Measured(numbers, len(prompts))

    def draw(
        self, prompts: Sequence[Prompt], sampler: SamplerConfig, *, purpose: str = PURPOSE, rung: int | None = None
    ) -> tuple[Any, list[JudgedPrompt]]:
        """Draw prompts with the model as it is and judge the pictures as those of a rung; None = of the full one."""
        identity = self.run.config.identity
        pictures = draw_prompts(self.backbone, prompts, run_seed=identity.seed, sampler=sampler, purpose=purpose)
        place = len(identity.search.ladder) if rung is None else rung
        least = self._least.get(place)
        if least is None and self.judge.needs_base and not self._is_base:
            raise SafetyDPOError(f"expected the base to be measured at rung {place} first, found that it was not")
        looked = self.judge.look(pictures, prompts, least)
        if looked.least_similarity is not None:
            self._least[place] = looked.least_similarity
        return pictures, looked.judged

    def _open(self, rung: int, settings: HeldOutRung) -> Any:
        from ray_jobs.held_out_rung import open_questions

        if rung not in self._questions:
            assert self._pairs_folder is not None
            folder = Location(self.run.store.filesystem, self._pairs_folder)
            self._questions[rung] = open_questions(self.run, settings, folder, self.backbone, prompts=self._prompts)
        return self._questions[rung]


def small_set(prompts: Sequence[Prompt], rung: FewStepsRung) -> list[Prompt]:
    """Return the first prompts of each kind, of unsafe ones of each category, in the order given."""
    limits = {"neutral": rung.neutral_prompts, "neighbour": rung.neighbour_prompts}
    counts: dict[tuple[str, str], int] = {}
    chosen = []
    for prompt in prompts:
        kind = (prompt.prompt_set, prompt.category if prompt.prompt_set == "unsafe" else "")
        counts[kind] = counts.get(kind, 0) + 1
        if counts[kind] <= limits.get(prompt.prompt_set, rung.prompts_per_category):
            chosen.append(prompt)
    return chosen
