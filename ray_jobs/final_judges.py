"""Which judges the final measurement asks, what its results depend on, and how several become one verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetydpo.artifacts.layout import demo_weights
from safetydpo.artifacts.schemas import sha256_of
from safetydpo.config.judges import JudgesConfig
from safetydpo.config.pairs import GENERATE
from safetydpo.config.schema import Config, EvaluationConfig, IdentityConfig
from safetydpo.config.search import SearchConfig
from safetydpo.errors import UsageError
from safetydpo.evaluation.outcomes import JudgeName
from safetydpo.judges.build import DEMO_SIDE, NO_LOCAL_WEIGHTS, clip_folder, fingerprint_files, picture_side
from safetydpo.judges.final import final_picture_side, fingerprint_final_judge, load_final_judge
from safetydpo.judges.protocol import Judge, Verdicts

JUDGES_SETTING = "identity.evaluation.judges"
CLIP_SETTING = "identity.evaluation.clip"
DEFAULT, SEARCH = EvaluationConfig(), SearchConfig()


@dataclass(frozen=True)
class JudgeRoles:
    """Who judges the test pictures, by setting name: `audit` decides; `select` chose the pairs and the merge."""

    select: tuple[str, ...]
    audit: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All of them, each once."""
        return tuple(dict.fromkeys((*self.select, *self.audit)))


def asks_demo_judges(identity: IdentityConfig) -> bool:
    """Return whether the judges are the demo's two: their answers have columns of their own in `outcomes`."""
    return identity.evaluation.judges == DEFAULT.judges and identity.search.judges == SEARCH.judges


def judge_roles(identity: IdentityConfig) -> JudgeRoles:
    """Return the judges of each role; those that chose nothing, or do not take these pictures, have none."""
    if asks_demo_judges(identity):
        return JudgeRoles(("demo_select",), identity.evaluation.judges)
    sides = (identity.sampler.height, identity.sampler.width)
    chose = judges_of_pairs(identity)
    if identity.search.judges != SEARCH.judges:
        chose = (*chose, *identity.search.judges)
    return JudgeRoles(
        tuple(dict.fromkeys(name for name in chose if (side := picture_side(name)) is None or sides == (side, side))),
        identity.evaluation.judges,
    )


def judges_of_pairs(identity: IdentityConfig) -> tuple[str, ...]:
    """Return the judges that chose the pairs; of given pairs nobody here knows them."""
    return identity.pairs.judges if identity.pairs.source == GENERATE else ()


def shared_judges(identity: IdentityConfig) -> tuple[str, ...]:
    """Return the judges of the result that also chose the pairs or the merge, and the CLIP model if it did."""
    chose = {*judges_of_pairs(identity), *identity.search.judges}
    shared = [name for name in identity.evaluation.judges if name in chose]
    if identity.search.judges != SEARCH.judges:
        folders = (clip_of(identity), clip_folder(identity.search.clip, setting="identity.search.clip"))
        if len({fingerprint_files(folder) for folder in folders}) == 1:
            shared.append("the CLIP model of CLIP retention")
    return tuple(shared)


def clip_of(identity: IdentityConfig) -> Path:
    """Return the folder of the CLIP model of the caption scores.

    Raises:
        UsageError: if there is none.
    """
    return clip_folder(identity.evaluation.clip, setting=CLIP_SETTING)


def judges_fingerprint(config: Config | None = None) -> str:
    """Return a hash over what the judges' answers and the caption scores depend on; None = of the defaults.

    Raises:
        UsageError: if a judge cannot be had as configured.
        SafetyDPOError: if one of them has no weights.
    """
    if config is None or (asks_demo_judges(config.identity) and config.identity.evaluation.clip == DEFAULT.clip):
        return sha256_of([fingerprint_files(demo_weights() / name) for name in ("judge_select", "judge_audit", "clip")])
    identity, settings = config.identity, config.execution.judges
    roles = judge_roles(identity)
    try:
        found = {name: fingerprint_final_judge(name, settings) for name in roles.names}
    except UsageError as error:
        raise UsageError(f"{error} ({JUDGES_SETTING})") from error
    return sha256_of(
        {
            "select": [[name, found[name]] for name in roles.select],
            "audit": [[name, found[name]] for name in roles.audit],
            "clip": fingerprint_files(clip_of(identity)),
        }
    )


def check_final_judges(config: Config) -> None:
    """Refuse judges or a CLIP model that cannot be had or do not take the run's pictures, loading none.

    Raises:
        UsageError: naming the setting.
        SafetyDPOError: if weights are missing.
    """
    identity = config.identity
    height, width = identity.sampler.height, identity.sampler.width
    users = {f"judge {name!r} of {JUDGES_SETTING}": final_picture_side(name) for name in judge_roles(identity).audit}
    if identity.evaluation.clip == DEFAULT.clip:
        users[f"{CLIP_SETTING} 'demo'"] = DEMO_SIDE
    for user, side in users.items():
        if side is not None and (height, width) != (side, side):
            raise UsageError(
                f"expected pictures of {side} x {side} (identity.sampler) for {user}, which knows the drawings of the "
                f"demo world only, found {height} x {width}: name judges of real pictures ({JUDGES_SETTING}, such as "
                f"[q16, nudenet] or [open_nsfw]) and a folder with a CLIP model ({CLIP_SETTING})"
            )
    judges_fingerprint(config)


class JudgePanel:
    """All judges of both roles, each loaded once; the same judge in two roles looks once."""

    def __init__(self, roles: JudgeRoles, settings: JudgesConfig = NO_LOCAL_WEIGHTS, *, device: str = "cpu") -> None:
        self._roles = roles
        self._judges: dict[str, Judge] = {name: load_final_judge(name, settings, device=device) for name in roles.names}

    def judge(self, images: Any) -> Panel:
        """Judge pictures by all judges."""
        verdicts = {name: judge.judge(images) for name, judge in self._judges.items()}
        return Panel(self._roles, self._judges, verdicts)


@dataclass(frozen=True)
class Panel:
    """What all judges said of some pictures."""

    roles: JudgeRoles
    judges: Mapping[str, Judge]
    verdicts: Mapping[str, Verdicts]

    def columns(self, role: JudgeName, index: int) -> dict[str, object]:
        """Return the role's columns of `outcomes` for a picture; what no judge of the role knows is "" or false."""
        names = self.roles.select if role == "select" else self.roles.audit
        said = [self.verdicts[name] for name in names]
        concepts = [verdict.concept[index] for verdict in said]
        backgrounds = [verdict.background[index] for verdict in said]
        return {
            f"{role}_concept": next((value for value in concepts if value is not None), ""),
            f"{role}_background": next((value for value in backgrounds if value is not None), ""),
            f"{role}_unsafe": any(verdict.counts_as_unsafe(index) for verdict in said),
            f"{role}_unrecognisable": any(verdict.is_unrecognisable[index] for verdict in said),
        }

    def failures(self, index: int) -> dict[str, str]:
        """Return why judges could not judge a picture, by their names; empty if all could."""
        told = {self.judges[name].name: verdict.failure_of(index) for name, verdict in self.verdicts.items()}
        return {name: reason for name, reason in told.items() if reason}

    def judgements(self, index: int) -> list[dict[str, object]]:
        """Return the `judgements` of a picture: one for each judge of each role."""
        return [
            self._judgement(role, name, index)
            for role, names in (("select", self.roles.select), ("audit", self.roles.audit))
            for name in names
        ]

    def _judgement(self, role: str, name: str, index: int) -> dict[str, object]:
        judge, verdict = self.judges[name], self.verdicts[name]
        failure = verdict.failure_of(index)
        return {
            "role": role,
            "judge": judge.name,
            "version": judge.version,
            # Parquet knows NaN, but a reader that averages it does not know why.
            "score": None if failure else verdict.unsafe_score[index],
            "unsafe": verdict.counts_as_unsafe(index),
            "failure": failure,
            "concept": verdict.concept[index],
            "background": verdict.background[index],
            "unrecognisable": verdict.is_unrecognisable[index],
        }


def first_known(judgements: Sequence[Mapping[str, Any]], what: str) -> Any:
    """Return the first judge's answer that is none of "does not know"; None if no judge knows."""
    return next((judgement[what] for judgement in judgements if judgement[what] is not None), None)


def any_known(judgements: Sequence[Mapping[str, Any]], what: str) -> bool | None:
    """Return whether any judge says yes; None if no judge knows."""
    known = [bool(judgement[what]) for judgement in judgements if judgement[what] is not None]
    return any(known) if known else None
