"""What a merge method is: a pure function from the experts' changes of one layer to the merged change, and its entry.

Every method is defined on deltas and follows one rule for weights: *a weight w is an expert whose delta is
multiplied by w*. So merging with weights equals merging scaled experts without weights, in every method that does not
say otherwise (`normalises_weights`). The global scale multiplies the result and is applied by the caller (`merge.py`),
as is the canonical order of the experts (rising hash), to which all ties go.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from safetydpo.artifacts.adapters import LoraLayer
from safetydpo.errors import SafetyDPOError
from safetydpo.merging.votes import NeuronScores


@dataclass(frozen=True)
class MethodOptions:
    """Numbers that single methods take beside weights and density.

    Attributes:
        della_window: width of the range of keeping probabilities of `della`, around the density.
        breadcrumbs_outliers: share of the largest entries that `breadcrumbs` drops, in [0, 1).
    """

    della_window: float = 0.2
    breadcrumbs_outliers: float = 0.01


@dataclass(frozen=True)
class LayerExperts:
    """All that a method may use of one layer.

    Attributes:
        name: module name of the layer.
        layers: one change per expert, in rising order of expert hash.
        weights: one coefficient per expert.
        density: share of entries kept by methods that trim, in (0, 1].
        scores: activations per expert; empty unless the method asks for inputs.
        seed: seed of methods that draw.
        moments: second moment of the layer's inputs per expert; empty unless the method asks for moments.
        benign_moment: the same on benign prompts; None unless the method asks for moments.
        distilled: this layer of the adapter that was fitted to the experts; None unless the method asks for it.
        hashes: one hash per expert, so that what is drawn for one does not depend on the others.
        output_rank: most components that the result may have; None = no limit.
        options: numbers that single methods take.
        kept: where a method may keep, between merges of these same experts, what depends on nothing but the fields
            `layers`, `scores`, `moments` and `benign_moment`; None = nothing is kept.
    """

    name: str
    layers: Sequence[LoraLayer]
    weights: Sequence[float]
    density: float = 1.0
    scores: Sequence[NeuronScores] = ()
    seed: int = 0
    moments: Sequence[Tensor] = ()
    benign_moment: Tensor | None = None
    distilled: LoraLayer | None = None
    hashes: Sequence[str] = ()
    output_rank: int | None = None
    options: MethodOptions = MethodOptions()
    kept: dict[str, Any] | None = None


@dataclass(frozen=True)
class LayerMerge:
    """The merged change of one layer.

    Attributes:
        layer: the change.
        suppliers: how many units each expert supplies; None for methods that blend.
        lost: (squared error, squared norm) of a reduction of rank that the method makes itself; None if it makes none.
    """

    layer: LoraLayer
    suppliers: tuple[int, ...] | None = None
    lost: tuple[float, float] | None = None


@dataclass(frozen=True)
class MergeMethod:
    """One way to merge.

    Attributes:
        name: the word in a config.
        function: from the experts' changes of one layer to the merged change.
        paper: where it comes from.
        when_to_use: one line for people.
        needs_inputs: whether it votes on layer inputs of the base model.
        needs_moments: whether it weighs experts with second moments of layer inputs of the base model.
        needs_distilled: whether it takes an adapter that was fitted to the experts.
        takes_weights: whether coefficients per expert change its result.
        normalises_weights: whether it divides by the sum of the coefficients.
        uses_density: whether `density` changes its result.
        selects: whether it takes units whole from single experts and says how many of each.
        row_aligned: whether it mixes rows of A and B, so that all experts need one LoRA signature.
        draws: whether its result depends on a seed.
        reshapes: whether it changes even a single expert of weight 1 at density 1, by design.
        options: the numbers of `MethodOptions` that change its result.
    """

    name: str
    function: Callable[[LayerExperts], LayerMerge]
    paper: str
    when_to_use: str
    needs_inputs: bool = False
    needs_moments: bool = False
    needs_distilled: bool = False
    takes_weights: bool = True
    normalises_weights: bool = False
    uses_density: bool = False
    selects: bool = False
    row_aligned: bool = False
    draws: bool = False
    reshapes: bool = False
    options: tuple[str, ...] = ()

    @property
    def needs_base(self) -> bool:
        """Whether it needs anything that is collected on the base model."""
        return self.needs_inputs or self.needs_moments


def present_experts(experts: LayerExperts) -> list[int]:
    """Return the positions of the experts that take part in a selection: those whose weight is not 0."""
    return [index for index, weight in enumerate(experts.weights) if weight != 0]


def check_density(experts: LayerExperts, *, method: str) -> None:
    """Refuse a density outside (0, 1].

    Raises:
        SafetyDPOError: names the method and the density.
    """
    if not 0 < experts.density <= 1:
        raise SafetyDPOError(f"expected a {method} density in (0, 1], found {experts.density}")
