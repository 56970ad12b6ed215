"""Who judges the pictures of a search: the demo's `select` judge, or judges of real pictures and a CLIP model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ray_jobs.generate_pairs import SELECT_JUDGE
from ray_jobs.sampled_rates import JudgedPrompt, judge_concepts
from safetydpo.artifacts.schemas import sha256_of
from safetydpo.config.schema import Config, IdentityConfig
from safetydpo.config.search import SearchConfig
from safetydpo.errors import UsageError
from safetydpo.judges.build import DEMO_SIDE, clip_folder, fingerprint_files, fingerprint_judge, picture_side
from safetydpo.prompts.sets import Prompt
from safetydpo.search.recognition import (
    find_own_captions,
    least_similarity,
    nearest_similarities,
    rivals_of,
)

if TYPE_CHECKING:
    from safetydpo.judges.protocol import Judge

JUDGES_SETTING = "identity.search.judges"
CLIP_SETTING = "identity.search.clip"
DEFAULT = SearchConfig()
BENIGN = ("neutral", "neighbour")


def asks_demo_judge(identity: IdentityConfig) -> bool:
    """Return whether the search asks the demo's `select` judge, which knows concepts and broken pictures itself."""
    return identity.search.judges == DEFAULT.judges


def can_search(identity: IdentityConfig) -> bool:
    """Return whether the search has a judge that takes the run's pictures."""
    return not asks_demo_judge(identity) or takes_demo_judges(identity)


def takes_demo_judges(identity: IdentityConfig) -> bool:
    """Return whether the run's pictures have the size that the demo's judges know."""
    return (identity.sampler.height, identity.sampler.width) == (DEMO_SIDE, DEMO_SIDE)


def clip_of_search(identity: IdentityConfig) -> Path:
    """Return the folder of the CLIP model of a search.

    Raises:
        UsageError: if there is none.
    """
    return clip_folder(identity.search.clip, setting=CLIP_SETTING)


def check_search_judges(config: Config) -> None:
    """Refuse judges or a CLIP model that cannot be had or do not take the run's pictures, loading none.

    Raises:
        UsageError: naming the setting.
        SafetyDPOError: if weights are missing.
    """
    identity = config.identity
    if asks_demo_judge(identity):
        return
    sides = (identity.sampler.height, identity.sampler.width)
    try:
        users = {f"judge {name!r} of {JUDGES_SETTING}": picture_side(name) for name in identity.search.judges}
        fingerprint_search_judges(config)
    except UsageError as error:
        raise UsageError(f"{error} ({JUDGES_SETTING})") from error
    if identity.search.clip == DEFAULT.clip:
        users[f"{CLIP_SETTING} 'demo'"] = DEMO_SIDE
    for user, side in users.items():
        if side is not None and sides != (side, side):
            raise UsageError(
                f"expected pictures of {side} x {side} (identity.sampler) for {user}, which knows the drawings of the "
                f"demo world only, found {sides[0]} x {sides[1]}: name judges of real pictures ({JUDGES_SETTING}, such "
                f"as [open_nsfw]) and a folder with a CLIP model ({CLIP_SETTING})"
            )


def fingerprint_search_judges(config: Config) -> dict[str, str]:
    """Return what the answers of a search's judges depend on, by input of its key.

    Raises:
        UsageError: if a judge cannot be had as configured.
        SafetyDPOError: if one of them has no weights.
    """
    identity, settings = config.identity, config.execution.judges
    if asks_demo_judge(identity):
        return {"judge": fingerprint_judge(SELECT_JUDGE)}
    found = [[name, fingerprint_judge(name, settings)] for name in identity.search.judges]
    return {"judge": sha256_of(found), "clip": fingerprint_files(clip_of_search(identity))}


@dataclass(frozen=True)
class Looked:
    """What the judges of a search found in some pictures."""

    judged: list[JudgedPrompt]
    least_similarity: float | None = None
    """Below which a picture shows nothing; None = the judge knows without."""


class PromptJudge(Protocol):
    """Looks at pictures of prompts.

    Attributes:
        name: as it stands in errors.
        needs_base: whether it judges by what the base's pictures said.
    """

    name: str
    needs_base: bool

    def look(self, pictures: Any, prompts: Sequence[Prompt], least: float | None = None) -> Looked:
        """Judge pictures [n, height, width, 3] (RGB bytes) of n prompts; `least` None = they are the base's."""
        ...


class ConceptJudge:
    """The demo's `select` judge."""

    needs_base = False

    def __init__(self) -> None:
        from safetydpo.judges.build import load_judge

        self._judge = load_judge(SELECT_JUDGE)
        self.name = self._judge.name

    def look(self, pictures: Any, prompts: Sequence[Prompt], least: float | None = None) -> Looked:
        """Judge pictures; `least` is not looked at."""
        del least
        return Looked(judge_concepts(self._judge, pictures, prompts))


class RealJudges:
    """Judges of real pictures, which know what is unsafe, and a CLIP model that finds prompts in pictures."""

    needs_base = True

    def __init__(self, config: Config, prompts: Sequence[Prompt], captions: Sequence[str], *, device: str) -> None:
        """Load the judges and embed all captions: those of the prompts, and `captions` that pictures may show beside.

        Raises:
            SafetyDPOError: if there are no benign prompts of several concepts.
        """
        from safetydpo.judges.build import load_judge
        from safetydpo.judges.clip import ClipScorer

        identity = config.identity
        self.name = ", ".join(identity.search.judges)
        self._judges: list[Judge] = [
            load_judge(name, config.execution.judges, device=device) for name in identity.search.judges
        ]
        benign = [prompt for prompt in prompts if prompt.prompt_set in BENIGN]
        self._rivals = rivals_of([prompt.concept for prompt in benign], [prompt.text for prompt in benign])
        self._places = {prompt.prompt_id: place for place, prompt in enumerate(benign)}
        beside = [prompt.text for prompt in prompts if prompt.prompt_set not in BENIGN]
        texts = [prompt.text for prompt in benign] + sorted({*beside, *captions})
        self._scorer = ClipScorer(clip_of_search(identity), device=device)
        self._texts = self._scorer.embed_texts(texts)

    def look(self, pictures: Any, prompts: Sequence[Prompt], least: float | None = None) -> Looked:
        """Judge pictures; `least` is found from the base's.

        Raises:
            SafetyDPOError: if the base's pictures say nothing.
        """
        import torch

        images = self._scorer.embed_images(pictures)
        similarities = (
            torch.nn.functional.normalize(images, dim=1) @ torch.nn.functional.normalize(self._texts, dim=1).T
        )
        table = similarities.double().numpy()
        nearest = nearest_similarities(table)
        benign = [index for index, prompt in enumerate(prompts) if prompt.prompt_set in BENIGN]
        if least is None:
            least = least_similarity(nearest[benign])
        places = [self._places[prompts[index].prompt_id] for index in benign]
        hits = find_own_captions(table[benign, : len(self._places)], places, self._rivals[places])
        is_found = dict(zip(benign, hits, strict=True))
        verdicts = [judge.judge(pictures) for judge in self._judges]
        return Looked(
            [
                JudgedPrompt(
                    prompt,
                    is_found.get(index, False),
                    any(verdict.counts_as_unsafe(index) for verdict in verdicts),
                    # Not a number is similar to nothing.
                    not nearest[index] >= least,
                )
                for index, prompt in enumerate(prompts)
            ],
            least,
        )


def load_prompt_judge(
    config: Config, prompts: Sequence[Prompt], captions: Sequence[str], *, device: str
) -> PromptJudge:
    """Load who judges the pictures of a search's prompts."""
    if asks_demo_judge(config.identity):
        return ConceptJudge()
    return RealJudges(config, prompts, captions, device=device)
