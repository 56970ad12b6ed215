"""Experts that belong together, and what does not depend on scale, weights or method: activation scores and moments.

Prepared once, the same experts are merged many times, whole or in part: scores belong to one expert, so a subset
needs no other pass over the layer inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from safetydpo.artifacts.adapters import AdapterMetadata, LoraLayer
from safetydpo.errors import SafetyDPOError
from safetydpo.merging.algebra import flatten_kernel
from safetydpo.merging.compatible import check_experts, check_names, shapes_of
from safetydpo.merging.moments import ExpertMoments, Moments
from safetydpo.merging.votes import NeuronScores, score_neurons

MAX_SCORE_BYTES = 2 << 30
"""Scores of all experts beyond this are not kept but computed for each merge, one layer at a time."""


@dataclass(frozen=True)
class Expert:
    """One adapter that takes part in a merge; `hash` decides order and ties, `name` is for people.

    `layers` may be read from a file as they are needed (`artifacts.lazy_tensors.LazyLayers`). `num_merged` says how
    many experts it stands for: 1, or more if it is a merge itself.
    """

    name: str
    hash: str
    layers: Mapping[str, LoraLayer]
    metadata: AdapterMetadata
    num_merged: int = 1


@dataclass(frozen=True)
class PreparedExperts:
    """Checked experts in rising order of hash, with the scores of each on the layer inputs (if there are any)."""

    experts: tuple[Expert, ...]
    layer_names: tuple[str, ...]
    scores: Mapping[str, tuple[NeuronScores, ...]] = field(default_factory=dict)
    """Per module the scores of each expert; empty without inputs, or if they would be too large to keep."""
    moments: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)
    """Per module the second moments of each expert's inputs, and last that of benign prompts; read when asked for."""
    distilled: Mapping[str, LoraLayer] | None = None
    """The adapter that was fitted to these experts."""
    inputs: Mapping[str, Tensor] | None = None
    """The layer inputs that scores are computed from, where they are not kept."""
    kept: dict[str, dict[str, Any]] | None = field(default=None, compare=False)
    """Per module what methods keep between merges (`LayerExperts.kept`); None = nothing."""

    def kept_of(self, name: str) -> dict[str, Any] | None:
        """Return where methods may keep what they know of one layer, None if nothing is kept."""
        return None if self.kept is None else self.kept.setdefault(name, {})

    @property
    def has_scores(self) -> bool:
        """Whether there is anything to vote on."""
        return bool(self.scores) or self.inputs is not None

    def layers(self, name: str) -> list[LoraLayer]:
        """Return one layer of each expert; that of a convolution as a linear layer on patches."""
        return [flatten_kernel(expert.layers[name]) for expert in self.experts]

    def kernel(self, name: str) -> tuple[int, ...]:
        """Return (height, width) of a convolution's kernel, () for a linear layer."""
        return shapes_of(self.experts[0].layers, name)[0][2:]

    def layer_scores(self, name: str, layers: Sequence[LoraLayer]) -> tuple[NeuronScores, ...]:
        """Return the scores of each expert in one layer, kept or computed; () without inputs."""
        if name in self.scores or self.inputs is None:
            return self.scores.get(name, ())
        values = self.inputs[name].to(layers[0].down.dtype)
        return tuple(score_neurons(layer, values) for layer in layers)


def prepare_experts(
    experts: Sequence[Expert],
    *,
    inputs: Mapping[str, Tensor] | None = None,
    moments: Moments | None = None,
    distilled: Mapping[str, LoraLayer] | None = None,
    max_score_bytes: int = MAX_SCORE_BYTES,
    keep: bool = False,
) -> PreparedExperts:
    """Check that experts belong together, put them in order, score them on the layer inputs and find their moments.

    Scores that are larger than `max_score_bytes` together are computed anew in each merge, layer by layer; the result
    is the same. `keep` is for who merges them many times: methods then keep what no candidate changes, at most another
    copy of the experts; the result is the same.

    Raises:
        UsageError: if there is no expert or a name occurs twice.
        SafetyDPOError: if experts differ in base model, target layers or shapes, hold NaN, or a layer has no inputs,
            no moments or no distilled change.
    """
    check_experts([(expert.name, expert.layers, expert.metadata) for expert in experts])
    made = _prepare(experts, None, inputs, moments, distilled, max_score_bytes)
    return replace(made, kept={}) if keep else made


def add_experts(
    prepared: PreparedExperts,
    experts: Sequence[Expert],
    *,
    inputs: Mapping[str, Tensor] | None = None,
    moments: Moments | None = None,
    distilled: Mapping[str, LoraLayer] | None = None,
    max_score_bytes: int = MAX_SCORE_BYTES,
) -> PreparedExperts:
    """Return what `prepare_experts` makes of the prepared experts and these together; only these are scored.

    Inputs and moments must be those that the others were prepared with; a distilled adapter is fitted to all of them.

    Raises:
        UsageError: if a name occurs twice.
        SafetyDPOError: as `prepare_experts`, or if the others were scored on another number of inputs.
    """
    # Numbers of the others were looked at when they were prepared: one of them stands for all.
    check_names([expert.name for expert in (*prepared.experts, *experts)])
    check_experts([(one.name, one.layers, one.metadata) for one in (prepared.experts[0], *experts)])
    made = _prepare([*prepared.experts, *experts], prepared, inputs, moments, distilled, max_score_bytes)
    # What methods kept was of the former experts alone.
    return made if prepared.kept is None else replace(made, kept={})


def _prepare(
    experts: Sequence[Expert],
    known: PreparedExperts | None,
    inputs: Mapping[str, Tensor] | None,
    moments: Moments | None,
    distilled: Mapping[str, LoraLayer] | None,
    max_score_bytes: int,
) -> PreparedExperts:
    ordered = tuple(sorted(experts, key=lambda expert: (expert.hash, expert.name)))
    names = tuple(sorted(ordered[0].layers))
    scores: dict[str, tuple[NeuronScores, ...]] = {}
    if inputs is not None:
        missing = next((name for name in names if name not in inputs), None)
        if missing is not None:
            raise SafetyDPOError(
                f"expected layer inputs of every LoRA target, found none for {missing!r}: "
                "collect them again with the same lora.targets"
            )
        if _score_bytes(ordered, names, num_inputs=inputs[names[0]].shape[0]) <= max_score_bytes:
            scores = {name: _scores(ordered, name, inputs, known) for name in names}
            inputs = None
    if distilled is not None and set(distilled) != set(names):
        first = sorted(set(distilled) ^ set(names))[0]
        raise SafetyDPOError(
            f"expected a distilled adapter of the experts' {len(names)} layers, found {len(distilled)} and a first "
            f"difference at {first!r}: distil these experts again"
        )
    found: Mapping[str, tuple[Tensor, ...]] = {}
    if moments is not None:
        found = ExpertMoments(moments, names, [(expert.name, expert.metadata.categories) for expert in ordered])
    return PreparedExperts(ordered, names, scores, found, distilled, inputs)


def _scores(
    ordered: Sequence[Expert], name: str, inputs: Mapping[str, Tensor], known: PreparedExperts | None
) -> tuple[NeuronScores, ...]:
    """Return the scores of all experts in one layer, those of known ones as they are."""
    first = flatten_kernel(ordered[0].layers[name])
    # Once for all experts: it takes as long as the scores of one.
    values = inputs[name].to(first.down.dtype)
    have: dict[str, NeuronScores] = {}
    if known is not None and name in known.scores:
        have = {expert.name: one for expert, one in zip(known.experts, known.scores[name], strict=True)}
        wrong = next((one for one in have.values() if one.up.shape[1] != len(values)), None)
        if wrong is not None:
            raise SafetyDPOError(
                f"expected the {wrong.up.shape[1]} layer inputs that the prepared experts were scored on, found "
                f"{len(values)} for {name!r}: prepare all experts anew"
            )
    return tuple(
        have[expert.name] if expert.name in have else score_neurons(flatten_kernel(expert.layers[name]), values)
        for expert in ordered
    )


def _score_bytes(experts: Sequence[Expert], names: Sequence[str], *, num_inputs: int) -> int:
    """Return the size of all scores in float32: one number per row of A, row of B, input and expert."""
    first = experts[0].layers
    units = sum(down[0] + up[0] for down, up in (shapes_of(first, name) for name in names))
    return 4 * units * num_inputs * len(experts)
