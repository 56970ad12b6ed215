"""What the report shows beside the summary: search trials, training curves, contact sheets and lineage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class SearchTrial:
    """One candidate of the search, measured on validation prompts by the `select` judge.

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
    """Base and aligned picture of one prompt and seed."""

    prompt: str
    seed: int
    base: SheetPicture
    aligned: SheetPicture


@dataclass(frozen=True)
class ContactSheet:
    """Pairs of pictures under one heading, such as a category or `neutral`; `aligned_name` is the row shown."""

    title: str
    aligned_name: str
    pairs: tuple[SheetPair, ...]


@dataclass(frozen=True)
class LineageEntry:
    """One artifact that the result rests on: the stage that made it, its name, its hash and a remark."""

    stage: str
    name: str
    hash: str
    detail: str = ""
