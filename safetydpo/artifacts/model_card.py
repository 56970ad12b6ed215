"""The card of a published adapter or model: README.md with the front matter that the Hugging Face hub reads."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jinja2
import yaml

from safetydpo.artifacts.adapters import AdapterMetadata

Published = Literal["diffusers", "kohya", "peft", "full"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class CardResult:
    """One measured number as the hub reads it.

    Attributes:
        metric: its name in scripts, such as `ip`.
        title: its name for people.
        value: the number.
    """

    metric: str
    title: str
    value: float


@dataclass(frozen=True)
class ModelCard:
    """What a card says.

    Attributes:
        name: heading.
        file: the file (or folder) that it describes.
        published: format of that file.
        metadata: of the adapter; its `base_model` and `licence` are the card's.
        adapter_hash: hash of the layers.
        rank: largest rank of a layer.
        num_layers: changed layers.
        purpose: what it was made for, one sentence; "" = said by the categories.
        metrics: (what, value with its interval) of measurements of this very adapter.
        results: the same for the hub's `model-index`.
        data_set: (id or name, name for people) of what `results` were measured on.
        notes: sentences on what a reader must know, such as what is not known.
    """

    name: str
    file: str
    published: Published
    metadata: AdapterMetadata
    adapter_hash: str
    rank: int
    num_layers: int
    purpose: str = ""
    metrics: Sequence[tuple[str, str]] = ()
    results: Sequence[CardResult] = ()
    data_set: tuple[str, str] = ("", "")
    notes: Sequence[str] = ()

    @property
    def base_place(self) -> str:
        """What stands for the base model in the lines that load it: its hub id, else a place to fill in."""
        base = self.metadata.base_model
        return base if _HUB_ID.fullmatch(base) else "PATH/TO/THE/BASE-MODEL"

    @property
    def method(self) -> str:
        """Merge method; "" if the adapter is no merge."""
        return str(self.metadata.recipe.get("method", ""))

    @property
    def paper(self) -> str:
        """Paper of the merge method; "" if the adapter is no merge."""
        return str(self.metadata.recipe.get("paper", ""))

    @property
    def experts(self) -> Sequence[Mapping[str, Any]]:
        """Experts behind a merge, by name."""
        return list(self.metadata.recipe.get("experts", []))


def render_model_card(card: ModelCard) -> str:
    """Return README.md: the front matter that the hub reads, then text and tables for people."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("safetydpo.artifacts", "templates"),
        # Markdown for people, never shown as HTML by us; a name must not break its table all the same.
        autoescape=False,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = _cell
    front_matter = yaml.safe_dump(_front_matter(card), sort_keys=False, allow_unicode=True, width=1000)
    return environment.get_template("model_card.md.j2").render(card=card, front_matter=front_matter)


def _front_matter(card: ModelCard) -> dict[str, Any]:
    base = card.metadata.base_model
    matter: dict[str, Any] = {"license": card.metadata.licence or "unknown", "library_name": "diffusers"}
    if card.published == "peft":
        matter["library_name"] = "peft"
    # The hub takes ids only: a path of somebody's disk would be refused.
    if _HUB_ID.fullmatch(base):
        matter |= {"base_model": base, "base_model_relation": "finetune" if card.published == "full" else "adapter"}
    tags = ["text-to-image", "safety", "dpo", "safetydpo"]
    if card.published != "full":
        tags.insert(1, "lora")
    matter |= {"pipeline_tag": "text-to-image", "tags": tags}
    return matter | {"model-index": [_model_index(card)]} if card.results else matter


def _model_index(card: ModelCard) -> dict[str, Any]:
    """Return one model of the hub's `model-index`: every number under one task and one data set."""
    identifier, title = card.data_set
    metrics = [{"type": one.metric, "value": round(one.value, 6), "name": one.title} for one in card.results]
    result = {
        "task": {"type": "text-to-image", "name": "Text-to-image"},
        "dataset": {"type": identifier, "name": title},
        "metrics": metrics,
    }
    return {"name": card.name, "results": [result]}


def _cell(value: object) -> str:
    return " ".join(str(value).replace("|", "\\|").split())
