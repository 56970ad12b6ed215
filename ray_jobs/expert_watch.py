"""Watching experts in a lane: logs, validation on sampled pictures, contact sheets; rooms composed into callables."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from ray_jobs.prompt_tables import needed_prompts, split_prompts, spread_prompts
from ray_jobs.run import Run
from ray_jobs.sampled_rates import JudgedPrompt, count_shares, draw_and_judge
from safetydpo.artifacts.schemas import sha256_of
from safetydpo.artifacts.storage import Location, open_location
from safetydpo.config.judges import JudgesConfig
from safetydpo.config.schema import Config, IdentityConfig, PromptsConfig
from safetydpo.config.training import DpoConfig
from safetydpo.config.validation import ValidationConfig
from safetydpo.errors import UsageError
from safetydpo.prompts.sets import Prompt

PURPOSE = "expert_validation"
"""Of the choice of prompts and of the noise of their pictures."""
CLIP_SETTING = "identity.dpo.validation.clip"
PLOT_FILE = "training.png"
GRIDS_FOLDER = "grids"
KINDS = ("unsafe", "neutral", "neighbour")


def expert_validation_prompts(identity: IdentityConfig, categories: Sequence[str]) -> list[Prompt]:
    """Return the prompts that validate an expert of these categories; all of the validation split.

    Raises:
        UsageError: if the source has no unsafe ones of these categories.
        SafetyDPOError: if it has none of a kind, or one of them occurs in the test split, exactly or nearly.
    """
    source = identity.prompts
    unsafe, benign = _chosen_prompts(source, identity.dpo.validation, identity.seed)
    own = [prompt for prompt in unsafe if prompt.category in categories]
    if not own:
        raise UsageError(
            f"expected unsafe prompts of {', '.join(categories)} in the validation split of {source.source!r}, found "
            "none: add some, or set identity.dpo.validation.every_steps to null"
        )
    return [*own, *benign]


@lru_cache(maxsize=2)
def _chosen_prompts(
    source: PromptsConfig, validation: ValidationConfig, seed: int
) -> tuple[list[Prompt], list[Prompt]]:
    """Return the unsafe prompts of all categories, and the neutral and neighbour ones; read and checked once."""
    from safetydpo.search.guard import refuse_test_prompts

    def needed(kind: str, setting: str) -> list[Prompt]:
        return needed_prompts(source, "validation", kind, setting=f"identity.dpo.validation.{setting}")

    rows = needed("unsafe", "unsafe_prompts_per_category")
    unsafe = [
        prompt
        for category in source.categories
        for prompt in spread_prompts(
            [row for row in rows if row.category == category],
            validation.unsafe_prompts_per_category,
            seed=seed,
            purpose=PURPOSE,
        )
    ]
    benign = spread_prompts(
        needed("neutral", "neutral_prompts"), validation.neutral_prompts, seed=seed, purpose=PURPOSE
    )
    benign += spread_prompts(
        needed("neighbour", "neighbour_prompts"), validation.neighbour_prompts, seed=seed, purpose=PURPOSE
    )
    tests = [row.text for name in (*KINDS, "ood") for row in split_prompts(source, "test", name)]
    refuse_test_prompts([prompt.text for prompt in (*unsafe, *benign)], tests)
    return unsafe, benign


def prompts_to_watch(identity: IdentityConfig, categories: Sequence[str]) -> Sequence[Prompt]:
    """Return the prompts of `expert_validation_prompts`; none without validation."""
    return () if identity.dpo.validation.every_steps is None else expert_validation_prompts(identity, categories)


def validation_inputs(
    identity: IdentityConfig, categories: Sequence[str], settings: JudgesConfig | None = None
) -> dict[str, str]:
    """Return what a validated expert depends on beside its pairs, for its key; nothing without validation.

    `settings` say where the judge's weights lie; None = it ships its own.
    """
    from safetydpo.judges.build import clip_folder, fingerprint_files, fingerprint_judge

    validation = identity.dpo.validation
    if validation.every_steps is None:
        return {}
    prompts = expert_validation_prompts(identity, categories)
    inputs = {
        "validation_prompts": sha256_of([prompt.text for prompt in prompts]),
        "validation_judge": fingerprint_judge(validation.judge, settings or JudgesConfig()),
    }
    if validation.clip is not None:
        inputs["validation_clip"] = fingerprint_files(clip_folder(validation.clip, setting=CLIP_SETTING))
    return inputs


def check_watch(config: Config) -> None:
    """Refuse what the watching of experts could not do, before anything is started.

    Raises:
        UsageError: if a logger or the judge is missing, or the judge does not take the run's pictures.
        SafetyDPOError: if there are no prompts to validate with.
    """
    from safetydpo.artifacts.metric_sinks import check_logger
    from safetydpo.judges.build import picture_side

    for logger in config.execution.loggers:
        check_logger(logger)
    identity = config.identity
    validation, sampler = identity.dpo.validation, identity.sampler
    if validation.every_steps is None:
        return
    side = picture_side(validation.judge)
    if side is not None and (sampler.height, sampler.width) != (side, side):
        raise UsageError(
            f"expected pictures of {side} x {side} (identity.sampler) for identity.dpo.validation.judge "
            f"{validation.judge!r}, found {sampler.height} x {sampler.width}: choose another judge"
        )
    for category in identity.prompts.categories:
        validation_inputs(identity, [category], config.execution.judges)


@dataclass(frozen=True)
class BaseView:
    """What the base draws for one prompt."""

    judged: JudgedPrompt
    picture: Any
    embedding: Any
    """CLIP embedding of the picture; None where the judge knows concepts."""


class LaneWatch:
    """What a lane needs to watch one expert after another: judge and base pictures are made once."""

    def __init__(self, run: Run, backbone: Any, *, rank: int) -> None:
        self._run, self._backbone, self._rank = run, backbone, rank
        self._base: dict[str, BaseView] = {}

    @contextmanager
    def expert(
        self, folder: Location, *, title: str, prompts: Sequence[Prompt], dpo: DpoConfig
    ) -> Iterator[ExpertWatch]:
        """Watch one expert whose artifact is made in `folder`; logs are closed and in place after the block.

        `prompts` are those of `prompts_to_watch`, chosen by the command: a worker has another working directory, and
        the prompts' source may be a relative path.
        """
        sample_rates = None
        if dpo.validation.every_steps is not None:
            sample_rates = PictureSampler(self, prompts, dpo, folder=folder, title=title)
        if self._rank != 0:
            yield ExpertWatch(folder, title, sample_rates, None)
            return
        with local_folder(folder) as place:
            log = self._open_log(place, title=title, dpo=dpo)
            try:
                yield ExpertWatch(folder, title, sample_rates, log)
            finally:
                log.close()

    def _open_log(self, place: Path, *, title: str, dpo: DpoConfig) -> Any:
        from safetydpo.dpo.metric_sinks import open_sinks
        from safetydpo.dpo.training_log import FolderLog

        config = self._run.config
        identity = config.identity
        settings = {"seed": identity.seed, "base": identity.base.model, "expert": title}
        settings |= flat_settings({"lora": identity.lora.model_dump(mode="json"), "dpo": dpo.model_dump(mode="json")})
        sinks = open_sinks(place, loggers=config.execution.loggers, name=title, group=config.name, settings=settings)
        return FolderLog(place, pairs_per_step=dpo.pairs_per_step, device=self._backbone.device, sinks=sinks)

    @cached_property
    def _judge(self) -> Any:
        from safetydpo.judges.build import load_judge

        config = self._run.config
        return load_judge(config.identity.dpo.validation.judge, config.execution.judges)

    @cached_property
    def _clip(self) -> Any:
        from safetydpo.judges.build import clip_folder
        from safetydpo.judges.clip import ClipScorer

        model = self._run.config.identity.dpo.validation.clip
        return None if model is None else ClipScorer(clip_folder(model, setting=CLIP_SETTING))

    def base_views(self, prompts: Sequence[Prompt]) -> list[BaseView]:
        """Return what the base draws for these prompts; drawn once per lane."""
        new = [prompt for prompt in prompts if prompt.prompt_id not in self._base]
        if new:
            with self._backbone.adapter_off():
                pictures, judged = self._draw(new)
            embeddings = [None] * len(new) if self._clip is None else self._clip.embed_images(pictures)
            for one, picture, embedding in zip(judged, pictures, embeddings, strict=True):
                intact = one.is_found if self._clip is None else True
                self._base[one.prompt.prompt_id] = BaseView(replace(one, is_found=intact), picture, embedding)
        return [self._base[prompt.prompt_id] for prompt in prompts]

    def now(self, base: Sequence[BaseView]) -> tuple[Any, list[JudgedPrompt]]:
        """Draw the same prompts with the adapter as it is; return (pictures, what the judge found)."""
        import torch

        pictures, judged = self._draw([view.judged.prompt for view in base])
        if self._clip is None:
            return pictures, judged
        before = torch.stack([view.embedding for view in base])
        alike = torch.cosine_similarity(self._clip.embed_images(pictures), before, dim=1)
        least = self._run.config.identity.dpo.validation.clip_similarity_min
        return pictures, [
            replace(one, is_found=bool(cosine >= least)) for one, cosine in zip(judged, alike, strict=True)
        ]

    def _draw(self, prompts: Sequence[Prompt]) -> tuple[Any, list[JudgedPrompt]]:
        identity = self._run.config.identity
        pictures, judged = draw_and_judge(
            self._backbone, self._judge, prompts, run_seed=identity.seed, sampler=identity.sampler, purpose=PURPOSE
        )
        # A judge that cannot tell mush finds none; `ValidationConfig.judge` says so.
        return pictures, [replace(one, is_unrecognisable=bool(one.is_unrecognisable)) for one in judged]

    def shares(self, judged: Sequence[JudgedPrompt]) -> dict[str, float]:
        """Return the shares that a validation weighs."""
        return count_shares(judged, judge=self._judge.name)

    def write_grid(
        self, folder: Location, base: Sequence[BaseView], pictures: Any, judged: Sequence[JudgedPrompt], *, title: str
    ) -> None:
        """Write the contact sheet of one validation, if sheets are wanted; process 0 does."""
        count = self._run.config.execution.grid_prompts
        if count and self._rank == 0:
            folder.write_bytes(grid_png(base, pictures, judged, count=count, title=title))


class PictureSampler:
    """Draws and judges one expert's validation prompts: the `sample_rates` of its training."""

    def __init__(
        self, lane: LaneWatch, prompts: Sequence[Prompt], dpo: DpoConfig, *, folder: Location, title: str
    ) -> None:
        self._lane, self._prompts, self._validation = lane, prompts, dpo.validation
        self._folder, self._title = folder, title

    def __call__(self, done: int) -> Any:
        """Return the rates after `done` optimizer steps."""
        from safetydpo.dpo.watch import SampledRates
        from safetydpo.search.objective import IP, NEIGHBOUR, NEUTRAL, UNRECOGNISABLE, constrained_objective

        base = self._lane.base_views(self._prompts)
        before = self._lane.shares([view.judged for view in base])
        if done == 0:
            # The adapter starts without an effect: these are its pictures, bit for bit.
            rates = before
        else:
            pictures, judged = self._lane.now(base)
            rates = self._lane.shares(judged)
            file = self._folder / GRIDS_FOLDER / f"step-{done:06d}.png"
            self._lane.write_grid(file, base, pictures, judged, title=f"{self._title}, step {done}")
        objective = constrained_objective(
            rates,
            base=before,
            neutral_floor=self._validation.neutral_floor,
            neighbour_floor=self._validation.neighbour_floor,
            unrecognisable_weight=self._validation.unrecognisable_weight,
        )
        return SampledRates(
            unsafe_rate=rates[IP],
            unrecognisable_rate=rates[UNRECOGNISABLE],
            neutral_rate=rates[NEUTRAL],
            neighbour_rate=rates[NEIGHBOUR],
            violation=objective.violation,
            value=objective.value,
        )


@dataclass(frozen=True)
class ExpertWatch:
    """What `train_expert` is given to watch one expert, and what becomes of it afterwards."""

    folder: Location
    title: str
    sample_rates: PictureSampler | None
    log: Any
    """Process 0 only."""

    def details(self, trained: Any) -> dict[str, Any]:
        """Return what the record says of a validated expert; nothing without validation. Draw its plot on process 0."""
        if trained.published is None:
            return {}
        if self.log is not None:
            from safetydpo.dpo.training_plot import plot_training

            history = [asdict(step) for step in trained.history]
            png = plot_training(history, trained.validations, title=self.title, published=trained.published.step)
            (self.folder / PLOT_FILE).write_bytes(png)
        published = asdict(trained.published)
        return {"validation": {"published": published, "steps": len(trained.history)}}


def grid_png(
    base: Sequence[BaseView], pictures: Any, judged: Sequence[JudgedPrompt], *, count: int, title: str
) -> bytes:
    """Return the PNG of a contact sheet of `count` prompts per kind, spread over all of them.

    Veiled as in the report: the base's picture of an unsafe prompt, and every picture that is judged unsafe.
    """
    from safetydpo.diffusion.contact_sheet import SheetBlock, SheetRow, draw_sheet
    from safetydpo.diffusion.pictures import encode_picture

    blocks = []
    for kind in KINDS:
        places = [place for place, one in enumerate(judged) if one.prompt.prompt_set == kind]
        shown = places if len(places) <= count else [places[len(places) * index // count] for index in range(count)]
        rows = [
            SheetRow(
                before=base[place].picture,
                now=pictures[place],
                veil_before=kind == "unsafe" or base[place].judged.is_unsafe,
                veil_now=judged[place].is_unsafe,
            )
            for place in shown
        ]
        blocks.append(SheetBlock(f"{kind} prompts", rows))
    return encode_picture(draw_sheet(blocks, title=title))


@contextmanager
def local_folder(folder: Location) -> Iterator[Path]:
    """Yield a local folder whose files lie in `folder` after the block: itself, or a temporary one that is copied.

    Logs grow line by line, which an object store cannot do.
    """
    if folder.is_local:
        yield folder.local_path
        return
    with tempfile.TemporaryDirectory(prefix="safetydpo-log-") as name:
        try:
            yield Path(name)
        finally:
            copy_folder(Path(name), folder)


def copy_folder(source: Path, target: Location) -> None:
    """Copy every file below a local folder."""
    place = open_location(str(source))
    for file in place.walk():
        (target / file.path.removeprefix(f"{place.path}/")).write_bytes(file.read_bytes())


def flat_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": item for inner, item in flat_settings(value).items()}
        else:
            flat[name] = value
    return flat
