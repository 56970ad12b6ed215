"""Concepts as a condition of the network: names in lists that fit the text encoder, and the mean of their features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

from safetydpo.diffusion.backbone import Backbone, Condition


def mean_condition(backbone: Backbone, texts: Sequence[str]) -> Condition:
    """Return the mean of the texts' features as a condition of one row; one text's are its own."""
    return backbone.encode_prompts(texts).map(lambda values: values.mean(dim=0, keepdim=True))


def weighted_condition(backbone: Backbone, texts: Sequence[str], *, weight: float) -> Condition:
    """Return `empty + weight (mean of the texts - empty)`, feature by feature; weight 1 is the mean itself."""
    wanted = mean_condition(backbone, texts)
    if weight == 1.0:
        return wanted
    empty = backbone.encode_prompts([""])
    mixed = {}
    for field in fields(wanted):
        here, none = getattr(wanted, field.name), getattr(empty, field.name)
        if here is not None:
            mixed[field.name] = none + weight * (here - none)
    return replace(wanted, **mixed)


def name_lists(backbone: Backbone, names: Sequence[str], *, joined: str) -> tuple[str, ...]:
    """Return the names as texts: `single` = one each, `list` = as few comma-separated lists as the text encoder holds.

    A name alone may be too long; it then makes a text of its own, which the encoder cuts and the log tells of.
    """
    if joined == "single":
        return tuple(names)
    room = backbone.encode_prompts([""]).tokens.shape[1] - 2
    comma = num_tokens(backbone, ",")
    lists: list[list[str]] = []
    used = 0
    for name in names:
        length = num_tokens(backbone, name)
        if lists and used + comma + length <= room:
            lists[-1].append(name)
            used += comma + length
        else:
            lists.append([name])
            used = length
    return tuple(", ".join(members) for members in lists)


def num_tokens(backbone: Backbone, text: str) -> int:
    """Return how many tokens a text has, without its start and its end; of one that is cut, those that are left."""
    ids = backbone.tokenize([text, ""])
    # An empty text is its start and its end.
    end = int(ids[1, 1])
    return int((ids[0, 1:] == end).nonzero()[0])
