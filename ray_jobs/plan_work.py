"""What a run consists of and what of it is done, asked of the planning functions of its stages; nothing is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ray_jobs.expert_plan import ExpertUnit, plan_experts, planned_names
from ray_jobs.final_judges import DEFAULT
from ray_jobs.generate_pairs import pairs_key, picture_manifest, render_stage
from ray_jobs.given_pairs import given_key
from ray_jobs.merge_evaluator import small_set
from ray_jobs.merge_experts import find_aids, merged_key, plain_methods
from ray_jobs.merge_settings import candidate_request, merge_request
from ray_jobs.pipeline import stages_to
from ray_jobs.places import image_pool
from ray_jobs.plan_evaluation import Adapters, evaluation_work
from ray_jobs.pools import plan_missing
from ray_jobs.prompt_tables import chosen_pairs, retention_prompts
from ray_jobs.run import Run
from ray_jobs.search_judges import can_search, takes_demo_judges
from ray_jobs.search_merges import Searched, search_key, validation_prompts
from ray_jobs.search_space import search_space
from ray_jobs.trial_log import MeasurementLog, TrialLog
from safetydpo.artifacts.records import ArtifactKey, Record, find_closed
from safetydpo.artifacts.storage import Location, open_location
from safetydpo.config.experts import ALL_SINGLE
from safetydpo.config.pairs import GENERATE
from safetydpo.config.rungs import FewStepsRung
from safetydpo.config.schema import IdentityConfig
from safetydpo.config.search import SearchConfig
from safetydpo.merging.registry import find_method
from safetydpo.pairs.preference_store import open_preferences
from safetydpo.planning.estimate import StageWork
from safetydpo.search.ladder import count_promoted, count_promoted_at_once
from safetydpo.search.space import Candidate


@dataclass(frozen=True)
class Found:
    """What of a run is closed, stage by stage; a stage is looked at only where those before it are closed."""

    run: Run
    is_model_here: bool = True
    """Whether the base model is on this machine: without it no artifact has a name to look for."""
    pairs: Record | None = None
    pairs_folder: Location | None = None
    units: Sequence[ExpertUnit] = ()
    experts: Mapping[str, Record] = field(default_factory=dict)
    merged: Mapping[str, Record] = field(default_factory=dict)
    search_folder: Location | None = None
    """Of the search, closed or begun or neither."""
    search: Record | None = None
    searched: Record | None = None
    is_distilled: bool = False
    """Whether the distillation that a merge method needs is closed."""

    @property
    def are_experts_closed(self) -> bool:
        """Whether every expert is there, which merges and search start from."""
        return bool(self.units) and len(self.experts) == len(self.units)


def last_stage(identity: IdentityConfig) -> str:
    """Return the last stage that a run can come to: of other pictures than the demo's, search and final measurement
    have judges only if judges of real pictures are named, and there is no report without a search."""
    has_final_judges = takes_demo_judges(identity) or identity.evaluation.judges != DEFAULT.judges
    if can_search(identity):
        return "report" if has_final_judges else "search"
    return "evaluate" if has_final_judges else "merge"


def find_done(run: Run) -> Found:
    """Look for the closed artifacts of a run."""
    key = pairs_artifact_key(run)
    pairs = find_closed(run.store, key)
    if pairs is None:
        return Found(run)
    folder = run.folder(key)
    units = plan_experts(run, pairs, folder)
    experts = _closed(run, {unit.name: unit.key for unit in units})
    found = Found(run, True, pairs, folder, units, experts)
    return _with_merges(found) if found.are_experts_closed else found


def pairs_artifact_key(run: Run) -> ArtifactKey:
    """Return the key of the run's pairs, drawn or given."""
    identity = run.config.identity
    benign = retention_prompts(identity.prompts, seed=identity.seed)
    if identity.pairs.source != GENERATE:
        given = open_preferences(open_location(identity.pairs.source))
        return given_key(run, given, [prompt.prompt_id for prompt in benign])
    return pairs_key(run, chosen_pairs(identity.prompts, seed=identity.seed), benign)


def _closed(run: Run, keys: Mapping[str, ArtifactKey]) -> dict[str, Record]:
    found = {name: find_closed(run.store, key) for name, key in keys.items()}
    return {name: record for name, record in found.items() if record is not None}


def _with_merges(found: Found) -> Found:
    run, pairs, folder = found.run, found.pairs, found.pairs_folder
    assert pairs is not None
    assert folder is not None
    identity = run.config.identity
    members = {name: record for name, record in found.experts.items() if name != ALL_SINGLE}
    merged: dict[str, Record] = {}
    aids = find_aids(run, found.experts, pairs, folder, methods=plain_methods(run))
    if aids is not None:
        requests = {name: merge_request(identity.merge, find_method(name)) for name in identity.merge.methods}
        merged = _closed(run, {name: merged_key(run, ask, members, aids=aids) for name, ask in requests.items()})
    methods = [find_method(name) for name in identity.search.methods]
    search_aids = find_aids(run, found.experts, pairs, folder, methods=methods)
    is_distilled = any(one is not None and one.distilled is not None for one in (aids, search_aids))
    if search_aids is None or "search" not in stages_to("report", identity):
        return Found(run, True, pairs, folder, found.units, found.experts, merged, is_distilled=is_distilled)
    about = Searched(members, search_aids, validation_prompts(run), search_space(run, members), pairs, folder)
    key = search_key(run, about)
    search, searched = find_closed(run.store, key), None
    if search is not None:
        request = candidate_request(identity.merge, Candidate.from_json(str(search.details["candidate"])))
        searched = find_closed(run.store, merged_key(run, request, members, aids=search_aids))
    return Found(
        run, True, pairs, folder, found.units, found.experts, merged, run.folder(key), search, searched, is_distilled
    )


def list_work(found: Found) -> list[StageWork]:
    """Return the work of each stage in order."""
    makers = {
        "pairs": pairs_work,
        "train": training_work,
        "merge": merging_work,
        "search": search_work,
        "evaluate": _evaluation_work,
    }
    identity = found.run.config.identity
    wanted = stages_to(last_stage(identity), identity)
    return [make(found) for stage, make in makers.items() if stage in wanted]


def pairs_work(found: Found) -> StageWork:
    """Return the pictures that pairs need; those of imported pairs are there."""
    run, identity = found.run, found.run.config.identity
    is_drawn = identity.pairs.source == GENERATE
    pairs = chosen_pairs(identity.prompts, seed=identity.seed) if is_drawn else []
    benign = retention_prompts(identity.prompts, seed=identity.seed)
    num_pairs = len({pair.pair_id for pair in pairs})
    total, done = 2 * num_pairs + len({prompt.prompt_id for prompt in benign}), 0
    if found.pairs is not None:
        done = total
        num_pairs = found.pairs.counts.get("pairs", num_pairs)
    elif found.is_model_here and total:
        manifest = picture_manifest(run, pairs, benign)
        done = manifest.num_rows - plan_missing(image_pool(run), manifest, render_stage(run, "pictures")).num_rows
    kept = "" if found.pairs is None or "kept" not in found.pairs.counts else f", {found.pairs.counts['kept']:,} kept"
    detail = f"{num_pairs:,} prompt pairs{kept}, {len(benign):,} benign"
    return StageWork(
        "pairs", "pictures", total, done, identity.sampler.steps, is_closed=found.pairs is not None, detail=detail
    )


def expert_steps(found: Found) -> dict[str, int]:
    """Return the steps of each expert by name: of the closed pairs, else as if every chosen pair were kept."""
    if found.units:
        return {unit.name: unit.dpo.steps for unit in found.units}
    identity = found.run.config.identity
    steps = dict.fromkeys(planned_names(identity), identity.dpo.steps)
    if identity.experts.all_single:
        steps[ALL_SINGLE] = max(1, round(identity.dpo.steps * identity.experts.all_single_step_factor))
    return steps


def training_work(found: Found) -> StageWork:
    """Return the uses of pairs in steps: of all experts, and of those that are closed."""
    steps, each = expert_steps(found), found.run.config.identity.dpo.pairs_per_step
    left = [count for name, count in steps.items() if name not in found.experts]
    return StageWork(
        "train",
        "training pairs",
        total=each * sum(steps.values()),
        done=each * (sum(steps.values()) - sum(left)),
        longest=max(left) / sum(left) if left else 0.0,
        is_closed=found.are_experts_closed,
        detail=f"{len(steps):,} experts, {len(found.experts):,} done; {sum(steps.values()):,} steps",
    )


def merging_work(found: Found) -> StageWork:
    """Return the plain merges."""
    methods, done = found.run.config.identity.merge.methods, len(found.merged)
    detail = ", ".join(methods)
    return StageWork("merge", "merges", len(methods), done, longest=1.0, is_closed=done == len(methods), detail=detail)


def search_work(found: Found) -> StageWork:
    """Return the pictures of the base, of all trials at every rung that they come to, and of finalists.

    Pictures of a rung with fewer steps count as the share of a full one that they take; what is measured without
    pictures counts nothing. Failures and `least_correlation` are not foreseen.
    """
    identity = found.run.config.identity
    search, steps, prompts = identity.search, identity.sampler.steps, validation_prompts(found.run)
    candidates = candidates_by_rung(search)
    # Of a candidate at each rung, in full, and with each fresh seed.
    share = [rung.steps / steps if isinstance(rung, FewStepsRung) else 0.0 for rung in search.ladder]
    small = [len(small_set(prompts, one)) if isinstance(one, FewStepsRung) else 0 for one in search.ladder]
    total = sum(count * each * part for count, each, part in zip(candidates, small, share, strict=False))
    total += candidates[-1] * len(prompts)
    if search.finalists:
        total += (1 + min(search.finalists, candidates[-1] - 1)) * search.finalist_seeds * len(prompts)
    ended, drawn = 0, 0.0
    if found.search_folder is not None:
        ended = len(TrialLog(found.search_folder / "trials").rows())
        for row in MeasurementLog(found.search_folder / "measurements").rows():
            drawn += row["pictures"] * (share[row["rung"]] if row["rung"] < len(share) else 1.0)
    is_closed = found.search is not None
    full = f", about {candidates[-1] - 1:,} in full" if search.ladder else ""
    finalists = f"; {search.finalists:,} finalists" if search.finalists else ""
    return StageWork(
        "search",
        "pictures",
        round(total),
        done=round(total) if is_closed else min(round(drawn), round(total)),
        weight=steps,
        is_closed=is_closed,
        detail=f"{search.trials:,} trials{full}, {ended:,} done; {len(prompts):,} prompts each{finalists}",
    )


def candidates_by_rung(search: SearchConfig) -> list[int]:
    """Return how many candidates each rung and, last, the full evaluation measures, the base among them."""
    expected: Sequence[float]
    # Of known first trials the base is one; it has been measured already.
    merges = search.trials - (search.first_trials == "known")
    if search.suggest == "async":
        expected = count_promoted_at_once(merges, rungs=search.ladder)
    else:
        expected = count_promoted(merges, generation=search.generation_size, rungs=search.ladder)
    return [1 + round(count) for count in expected]


def _evaluation_work(found: Found) -> StageWork:
    is_searched = "search" in stages_to("report", found.run.config.identity)
    adapters = Adapters(found.experts, found.merged, found.searched, list(expert_steps(found)), is_searched)
    return evaluation_work(found.run, adapters, is_model_here=found.is_model_here)


def not_counted(run: Run) -> list[str]:
    """Return what the run does beside what a plan counts."""
    evaluation = run.config.identity.evaluation
    told = {
        "the making of attack prompts": bool(evaluation.attacks),
        "what comparators train": bool(evaluation.comparators),
    }
    return [what for what, is_done in told.items() if is_done]
