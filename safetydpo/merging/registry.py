"""The merge methods by name: what a config may ask for, with the paper of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from safetydpo.errors import UsageError
from safetydpo.merging import methods


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
        uses_density: whether `density` changes its result.
        row_aligned: whether it mixes rows of A and B, so that all experts need one LoRA signature.
        draws: whether its result depends on a seed.
    """

    name: str
    function: Callable[[methods.LayerExperts], methods.LayerMerge]
    paper: str
    when_to_use: str
    needs_inputs: bool = False
    needs_moments: bool = False
    needs_distilled: bool = False
    takes_weights: bool = True
    uses_density: bool = False
    row_aligned: bool = False
    draws: bool = False

    @property
    def needs_base(self) -> bool:
        """Whether it needs anything that is collected on the base model."""
        return self.needs_inputs or self.needs_moments


_SAFETYDPO = "Liu et al. 2024, SafetyDPO / AlignGuard, arXiv 2412.10493"

METHODS: Mapping[str, MergeMethod] = MappingProxyType(
    {
        method.name: method
        for method in (
            MergeMethod(
                "average",
                methods.average,
                "Wortsman et al. 2022, Model soups, arXiv 2203.05482",
                "the cautious baseline: sum at a global scale of 1 / number of experts",
            ),
            MergeMethod(
                "sum",
                methods.sum_deltas,
                "Ilharco et al. 2023, Task arithmetic, arXiv 2212.04089",
                "experts that touch different things; sweep the global scale",
            ),
            MergeMethod(
                "ties",
                methods.ties,
                "Yadav et al. 2023, TIES-Merging, arXiv 2306.01708",
                "experts that pull the same weights in opposite directions; full rank unless truncated",
                uses_density=True,
            ),
            MergeMethod(
                "co_merge",
                methods.co_merge,
                _SAFETYDPO,
                "experts that conflict, when the adapter must keep the rank of one expert",
                needs_inputs=True,
                row_aligned=True,
            ),
            MergeMethod(
                "delta_neuron",
                methods.delta_neuron,
                _SAFETYDPO,
                "as co_merge, for experts with independent initialisations; ranks add up",
                needs_inputs=True,
            ),
            MergeMethod(
                "regmean",
                methods.regmean,
                "Jin et al. 2023, RegMean, arXiv 2212.09849",
                "experts that must act on their own prompts only; weighs them by layer inputs, benign prompts too",
                needs_moments=True,
            ),
            MergeMethod(
                "distill",
                methods.distill,
                "Hinton et al. 2015, Knowledge distillation, arXiv 1503.02531",
                "when layer-wise merges fall short: one short training, whatever the number of experts",
                needs_distilled=True,
                takes_weights=False,
            ),
            MergeMethod(
                "max_magnitude",
                methods.max_magnitude,
                "control of this project",
                "a control for co_merge: selection without data",
                row_aligned=True,
            ),
            MergeMethod(
                "random_winner",
                methods.random_winner,
                "control of this project",
                "a control for co_merge: selection without any reason",
                row_aligned=True,
                draws=True,
            ),
        )
    }
)


def find_method(name: str) -> MergeMethod:
    """Return the method of that name.

    Raises:
        UsageError: if there is none; lists the known names.
    """
    if name not in METHODS:
        raise UsageError(f"expected a merge method out of {', '.join(sorted(METHODS))}, found {name!r}")
    return METHODS[name]


def unweighted_methods() -> tuple[str, ...]:
    """Return the names of the methods whose result does not depend on coefficients per expert."""
    return tuple(name for name, method in METHODS.items() if not method.takes_weights)


def density_methods() -> tuple[str, ...]:
    """Return the names of the methods whose result depends on `density`."""
    return tuple(name for name, method in METHODS.items() if method.uses_density)
