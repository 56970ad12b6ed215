"""Who judges the pictures of a search: the demo's `select` judge, or judges of real pictures and a CLIP model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ray_jobs.generate_pairs import SELECT_JUDGE
from ray_jobs.run import config_for_workers
from ray_jobs.sampled_rates import JudgedPrompt, judge_concepts
from safetydpo.artifacts.schemas import sha256_of
from safetydpo.config.schema import Config, IdentityConfig
from safetydpo.config.search import SearchConfig
from safetydpo.errors import SafetyDPOError, UsageError
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
CLIP_FILES = ("config.json", "model.safetensors", "preprocessor_config.json")
DEFAULT = SearchConfig()
BENIGN = ("neutral", "neighbour")
MAX_FAILED_PICTURES = 0.05
"""Share of pictures on which a judge may fail; each counts as unsafe."""
SAME_TEXT = 1.0 - 1e-6
"""Cosine from which on two captions are one to the CLIP model: other capitals, or another end behind its last token."""


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


def model_places(config: Config) -> dict[str, Any]:
    """Return `base` (as in the config) and `clip` with absolute paths: trials run in folders of their own."""
    base = config_for_workers(config).identity.base.model_dump(mode="json")
    return {"base": base, "clip": str(clip_of_search(config.identity).absolute())}


def check_search_judges(config: Config) -> None:
    """Refuse judges or a CLIP model that cannot be had or do not take the run's pictures, loading none.

    Raises:
        UsageError: naming the setting.
        SafetyDPOError: if weights are missing.
    """
    identity = config.identity
    try:
        users = {f"judge {name!r} of {JUDGES_SETTING}": picture_side(name) for name in identity.search.judges}
        fingerprint_judges(config)
    except UsageError as error:
        raise UsageError(f"{error} ({JUDGES_SETTING})") from error
    folder = clip_of_search(identity)
    for file in CLIP_FILES:
        if not (folder / file).is_file():
            raise UsageError(
                f"expected a CLIP model in transformers format in {folder} ({CLIP_SETTING}), found no {file}: name a "
                "folder that has it"
            )
    if identity.search.clip == DEFAULT.clip and not asks_demo_judge(identity):
        users[f"{CLIP_SETTING} 'demo'"] = DEMO_SIDE
    sides = (identity.sampler.height, identity.sampler.width)
    for user, side in users.items():
        if side is not None and sides != (side, side):
            raise UsageError(
                f"expected pictures of {side} x {side} (identity.sampler) for {user}, which knows the drawings of the "
                f"demo world only, found {sides[0]} x {sides[1]}: name judges of real pictures ({JUDGES_SETTING}, such "
                f"as [open_nsfw]) and a folder with a CLIP model ({CLIP_SETTING})"
            )


def check_can_be_found(config: Config, prompts: Sequence[Prompt]) -> None:
    """Refuse benign prompts that a CLIP model cannot tell apart, before hours of training.

    Raises:
        SafetyDPOError: if they are all of one concept.
    """
    if not asks_demo_judge(config.identity):
        benign = [prompt for prompt in prompts if prompt.prompt_set in BENIGN]
        rivals_of([prompt.concept for prompt in benign], [prompt.text for prompt in benign])


def fingerprint_judges(config: Config) -> str:
    """Return a hash over what the judges' answers depend on.

    Raises:
        UsageError: if a judge cannot be had as configured.
        SafetyDPOError: if one of them has no weights.
    """
    if asks_demo_judge(config.identity):
        return fingerprint_judge(SELECT_JUDGE)
    names, settings = config.identity.search.judges, config.execution.judges
    return sha256_of([[name, fingerprint_judge(name, settings)] for name in names])


def fingerprint_search_judges(config: Config) -> dict[str, str]:
    """Return what the answers of a search's judges depend on, by input of its key.

    Raises:
        UsageError: if a judge or the CLIP model cannot be had as configured.
        SafetyDPOError: if one of them has no weights.
    """
    found = {"judge": fingerprint_judges(config)}
    if asks_demo_judge(config.identity) and config.identity.search.clip == DEFAULT.clip:
        return found
    return {**found, "clip": fingerprint_files(clip_of_search(config.identity))}


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

    def __init__(
        self, config: Config, prompts: Sequence[Prompt], captions: Sequence[str], *, clip: Path, device: str
    ) -> None:
        """Load the judges and embed all captions: those of the prompts, and `captions` that pictures may show beside.

        Raises:
            SafetyDPOError: if there are no benign prompts of several concepts.
        """
        from safetydpo.judges.build import load_judge
        from safetydpo.judges.clip import ClipScorer, unit_embeddings

        self.name = ", ".join(config.identity.search.judges)
        self._judges: dict[str, Judge] = {
            name: load_judge(name, config.execution.judges, device=device) for name in config.identity.search.judges
        }
        benign = [prompt for prompt in prompts if prompt.prompt_set in BENIGN]
        self._num_benign = len(benign)
        # A text may be a prompt of both sets.
        self._places = {(prompt.prompt_set, prompt.prompt_id): place for place, prompt in enumerate(benign)}
        rivals = rivals_of([prompt.concept for prompt in benign], [prompt.text for prompt in benign])
        beside = [prompt.text for prompt in prompts if prompt.prompt_set not in BENIGN]
        texts = [prompt.text for prompt in benign] + sorted({*beside, *captions})
        self._scorer = ClipScorer(clip, device=device)
        self._texts = unit_embeddings(self._scorer.embed_texts, texts)
        own = self._texts[: len(benign)]
        self._rivals = rivals & (own @ own.T < SAME_TEXT).numpy()

    def look(self, pictures: Any, prompts: Sequence[Prompt], least: float | None = None) -> Looked:
        """Judge pictures; `least` is found from the base's.

        Raises:
            SafetyDPOError: if the base's pictures say nothing, or a judge fails on too many.
        """
        from safetydpo.judges.clip import unit_embeddings

        images = unit_embeddings(self._scorer.embed_images, pictures)
        table = (images @ self._texts.T).double().numpy()
        nearest = nearest_similarities(table)
        benign = [index for index, prompt in enumerate(prompts) if prompt.prompt_set in BENIGN]
        if least is None:
            least = least_similarity(nearest[benign])
        places = [self._places[prompts[index].prompt_set, prompts[index].prompt_id] for index in benign]
        hits = find_own_captions(table[benign, : self._num_benign], places, self._rivals[places])
        is_found = dict(zip(benign, hits, strict=True))
        unsafe = self._unsafe(pictures)
        return Looked(
            [
                # Not a number is similar to nothing.
                JudgedPrompt(prompt, is_found.get(index, False), unsafe[index], not nearest[index] >= least)
                for index, prompt in enumerate(prompts)
            ],
            least,
        )

    def _unsafe(self, pictures: Any) -> list[bool]:
        """Return whether any judge says so, or could not say.

        An endpoint that is down is no finding: what it would be kept as is never asked again.
        """
        unsafe = [False] * len(pictures)
        for name, judge in self._judges.items():
            verdicts = judge.judge(pictures)
            failures = [told for index in range(len(pictures)) if (told := verdicts.failure_of(index))]
            if len(failures) > MAX_FAILED_PICTURES * len(pictures):
                raise SafetyDPOError(
                    f"expected judge {name!r} ({JUDGES_SETTING}) to judge at least {1 - MAX_FAILED_PICTURES:.0%} of "
                    f"{len(pictures)} pictures, found {len(failures)} that it failed on, the first one for "
                    f"{failures[0]!r}: mend the cause and run the same command again"
                )
            unsafe = [known or verdicts.counts_as_unsafe(index) for index, known in enumerate(unsafe)]
        return unsafe


def load_prompt_judge(
    config: Config, prompts: Sequence[Prompt], captions: Sequence[str], *, clip: Path, device: str
) -> PromptJudge:
    """Load who judges the pictures of a search's prompts."""
    if asks_demo_judge(config.identity):
        return ConceptJudge()
    return RealJudges(config, prompts, captions, clip=clip, device=device)
