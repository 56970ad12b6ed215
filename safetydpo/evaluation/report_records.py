"""What the report shows beside the summary: search trials, training curves, contact sheets and lineage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class SearchTrial:
    """One candidate of the search, measured on validation prompts by the judges of the search.

    Attributes:
        number: Trial number.
        method: Merge method.
        ip: IP on validation prompts.
        unrecognisable: Share of unrecognisable pictures on unsafe validation prompts.
        price: IP plus the price of unrecognisable pictures: what the search lowers.
        neutral: Neutral rate relative to the base.
        neighbour: Neighbour retention relative to the base.
        feasible: Both floors are kept.
        on_front: No other trial is at least as good everywhere and better somewhere.
        chosen: The trial became the row `searched`.
        scale: Global scale of the merge.
    """

    number: int
    method: str
    ip: float
    unrecognisable: float
    price: float
    neutral: float
    neighbour: float
    feasible: bool
    on_front: bool
    chosen: bool
    scale: float | None = None


@dataclass(frozen=True)
class SearchTrials:
    """All trials of a search and the floors they were held to (shares of the base's rates)."""

    trials: tuple[SearchTrial, ...]
    neutral_floor: float
    neighbour_floor: float


@dataclass(frozen=True)
class TrainingCurve:
    """What the training of one expert logged.

    Attributes:
        expert: Name of the expert.
        steps: Optimizer steps at which the values were logged.
        values: Series by name (`loss`, `implicit_accuracy`, …), each as long as `steps`.
    """

    expert: str
    steps: tuple[int, ...]
    values: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class ExpertDraws:
    """Rows that the steps of one expert used, and how many distinct draws of its pairs those were."""

    name: str
    draw_uses: int
    distinct_draws: int

    @property
    def rate(self) -> float:
        """Uses of each draw, mean."""
        return self.draw_uses / max(self.distinct_draws, 1)


@dataclass(frozen=True)
class DrawReuse:
    """How often the draws of pairs were used: by each expert, and by all of them together.

    Attributes:
        experts: One each.
        draw_uses: Rows of all steps of all experts.
        distinct_draws: Draws of all experts; one that several experts make counts once.
        reference: `live` or `cached`: with the latter each draw's reference errors were computed once.
    """

    experts: tuple[ExpertDraws, ...]
    draw_uses: int
    distinct_draws: int
    reference: str

    @property
    def rate(self) -> float:
        """Uses of each draw, mean."""
        return self.draw_uses / max(self.distinct_draws, 1)


@dataclass(frozen=True)
class ExpertOverlap:
    """How alike experts are, each two of them.

    Attributes:
        names: Experts, the order of rows and columns.
        categories: Categories that each is made for; empty where it is not known.
        cosine: Cosine between their deltas, all layers together, in [-1, 1].
        columns: Share of the smaller output space that lies in the larger one, mean over layers, in [0, 1].
        rows: The same of input spaces.
    """

    names: tuple[str, ...]
    categories: tuple[tuple[str, ...], ...]
    cosine: tuple[tuple[float, ...], ...]
    columns: tuple[tuple[float, ...], ...]
    rows: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class LayerWinners:
    """Who supplies the rows of each layer in a merge that selects.

    Attributes:
        method: Merge method.
        layers: (module, rows by expert) in the order of the names of modules.
        categories: Categories of each expert by name.
    """

    method: str
    layers: tuple[tuple[str, Mapping[str, int]], ...]
    categories: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class SheetPicture:
    """One picture of a contact sheet.

    Attributes:
        png: The bytes of a PNG; None if the picture failed.
        unsafe: Blur it until the reader asks.
    """

    png: bytes | None
    unsafe: bool


@dataclass(frozen=True)
class SheetPair:
    """Base and aligned picture of one prompt and seed; `remark` says why this pair is shown."""

    prompt: str
    seed: int
    base: SheetPicture
    aligned: SheetPicture
    remark: str = ""


@dataclass(frozen=True)
class ContactSheet:
    """Pairs of pictures under one heading, such as a category or `neutral`.

    Attributes:
        title: Heading.
        aligned_name: The row shown beside the base.
        pairs: What is shown.
        is_unsafe: The prompts ask for something unsafe: a redacted page has neither them nor their pictures.
        rule: How many of how many are shown, and how they were chosen.
    """

    title: str
    aligned_name: str
    pairs: tuple[SheetPair, ...]
    is_unsafe: bool = False
    rule: str = ""


@dataclass(frozen=True)
class LineageEntry:
    """One artifact that the result rests on: the stage that made it, its name, its hash and a remark."""

    stage: str
    name: str
    hash: str
    detail: str = ""


@dataclass(frozen=True)
class StageCost:
    """What one stage took and made; None = not measured, or nothing of the sort.

    Attributes:
        stage: Its name.
        wall_seconds: Wall time of the driver.
        cpu_seconds: CPU time of the driver and all processes of its local Ray; not measured on a cluster.
        gpu_seconds: Wall time x GPUs that Ray holds: an upper bound of what was used.
        pairs: Prompt pairs it worked on.
        pictures: Pictures it drew, or took from the store because an earlier run had drawn them.
        detail: What else it made.
        utilisation: Busy over held, in [0, 1]: of GPUs the time in which work was under way, of CPU cores CPU time.
        cost: Of what was held, in the unit of the config's prices.
    """

    stage: str
    wall_seconds: float | None = None
    cpu_seconds: float | None = None
    gpu_seconds: float | None = None
    pairs: int | None = None
    pictures: int | None = None
    detail: str = ""
    utilisation: float | None = None
    cost: float | None = None
