"""Unified Concept Editing (UCE): a closed-form edit of the keys and values of cross-attention.

Axis legend: `row` text features of single tokens, `token` tokens of a prompt, `d_text` width of the text features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from safetydpo.baselines.closed_form import as_layer, edit_map
from safetydpo.baselines.intervention import Intervention
from safetydpo.baselines.protocol import Erasure, chosen, number, require_unet
from safetydpo.baselines.settings import Choice, Range, Settings, Space
from safetydpo.config.schema import SamplerConfig
from safetydpo.diffusion.backbone import Backbone

TARGETS = ("attn2.to_k", "attn2.to_v")
"""The layers that read text features."""
ROWS_AT_A_TIME = 64


class UceComparator:
    """UCE: what keys and values see of an unsafe prompt becomes what they see of its target, the rest stays.

    Source: Gandikota et al. 2023 (arXiv 2308.14761), equations 6 and 7, in `baselines.closed_form`.
    """

    name = "uce"
    paper = "Gandikota et al. 2023, Unified Concept Editing in Diffusion Models, arXiv 2308.14761"
    space = Space(
        settings={
            "target": Choice(("safe", "empty")),
            "erase_scale": Range(0.1, 10.0, log=True),
            "preserve_scale": Range(0.01, 10.0, log=True),
            "ridge": Range(0.01, 100.0, log=True),
        },
        # The authors' code: scales 1, lambda 0.5; towards another concept, or towards nothing for unsafe content.
        first=(
            {"target": "safe", "erase_scale": 1.0, "preserve_scale": 1.0, "ridge": 0.5},
            {"target": "empty", "erase_scale": 1.0, "preserve_scale": 1.0, "ridge": 0.5},
        ),
    )

    def prepare(
        self,
        backbone: Backbone,
        erasure: Erasure,
        *,
        settings: Settings,
        sampler: SamplerConfig,  # noqa: ARG002 - nothing is sampled
        generator: torch.Generator,  # noqa: ARG002 - nothing is drawn
    ) -> Intervention:
        """Return the changes of all keys and values of cross-attention; see `Comparator.prepare`.

        Settings: `target` (`safe` = the prompt for the safe counterpart, `empty` = the empty prompt), `erase_scale`,
        `preserve_scale` and `ridge` of `edit_map`.
        """
        require_unet(backbone, name=self.name)
        self.space.check(settings, name=self.name)
        if not erasure.concepts:
            return Intervention()
        unsafe = [text for concept in erasure.concepts for text in concept.prompts]
        safe = [text for concept in erasure.concepts for text in concept.safe_prompts]
        to_safe = chosen(settings, "target") == "safe"
        erased, targets = edited_rows(backbone, unsafe, safe if to_safe else [""] * len(unsafe))
        # What is drawn instead has to stay too.
        preserved = all_rows(backbone, [*erasure.preserved, *dict.fromkeys(safe)])
        change = edit_map(
            erased,
            targets,
            preserved,
            erase_scale=number(settings, "erase_scale"),
            preserve_scale=number(settings, "preserve_scale"),
            ridge=number(settings, "ridge"),
        )
        layers = {}
        for module, _ in backbone.named_linear_layers(TARGETS):
            weight = backbone.layer_weight(module).detach().double()
            layer = as_layer(weight.cpu() @ change)
            if layer is not None:
                layers[module] = layer
        return Intervention(layers)


def edited_rows(
    backbone: Backbone, unsafe: Sequence[str], targets: Sequence[str]
) -> tuple[Float[Tensor, "row d_text"], Float[Tensor, "row d_text"]]:
    """Return the features of all tokens to be edited, and for each the feature to be seen in its place.

    Of a prompt and its target, those from the first token that differs to the end of the padding: in a causal text
    encoder the features before are equal already, and all after carry the concept. Paired counted from the end of the
    texts, so that names of unequal length meet in their last tokens; a token without partner takes the target's first.
    """
    erased, wanted = [], []
    for start in range(0, len(unsafe), ROWS_AT_A_TIME):
        texts, others = unsafe[start : start + ROWS_AT_A_TIME], targets[start : start + ROWS_AT_A_TIME]
        features, their_features = _features(backbone, texts), _features(backbone, others)
        ids, their_ids = _token_ids(backbone, texts), _token_ids(backbone, others)
        end = int(_token_ids(backbone, [""])[0, 1])
        for row in range(len(texts)):
            pairs = aligned_tokens(ids[row], their_ids[row], end=end)
            erased.append(features[row, [here for here, _ in pairs]])
            wanted.append(their_features[row, [there for _, there in pairs]])
    return torch.cat(erased), torch.cat(wanted)


def aligned_tokens(ids: Int[Tensor, " token"], targets: Int[Tensor, " token"], *, end: int) -> list[tuple[int, int]]:
    """Return (position to be edited, position of its target) of two prompts as padded token ids.

    None if the two are the same. `end` is the token that ends a text (and may be that of the padding).
    """
    different = (ids != targets).nonzero()
    if len(different) == 0:
        return []
    first = int(different[0])
    shift = _end_of(targets, end) - _end_of(ids, end)
    last = len(ids) - 1
    return [(place, min(max(first, place + shift), last)) for place in range(first, len(ids))]


def _end_of(ids: Tensor, end: int) -> int:
    found = (ids[1:] == end).nonzero()
    return int(found[0]) + 1 if len(found) else len(ids) - 1


def all_rows(backbone: Backbone, texts: Sequence[str]) -> Float[Tensor, "row d_text"]:
    """Return the features of every token of every text; none for no texts."""
    parts = [
        _features(backbone, texts[start : start + ROWS_AT_A_TIME]).flatten(0, 1)
        for start in range(0, len(texts), ROWS_AT_A_TIME)
    ]
    return torch.cat(parts) if parts else _features(backbone, [""])[0][:0]


def _features(backbone: Backbone, texts: Sequence[str]) -> Float[Tensor, "batch token d_text"]:
    with torch.no_grad():
        return backbone.encode_prompts(texts).tokens.float().cpu()


def _token_ids(backbone: Backbone, texts: Sequence[str]) -> Int[Tensor, "batch token"]:
    """Return the ids of the first text encoder; a second one (SDXL) reads the same tokens."""
    num_tokens = backbone.encode_prompts([""]).tokens.shape[1]
    return backbone.tokenize(texts)[:, :num_tokens].cpu()
