"""Fits: merges that solve for a change from what the experts do to given inputs.

Axis legend: `d_in` input features of the linear layer.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from safetydpo.artifacts.adapters import LoraLayer
from safetydpo.errors import SafetyDPOError
from safetydpo.merging.algebra import concatenate
from safetydpo.merging.method import LayerExperts, LayerMerge, MergeMethod

RIDGE = 1e-2
"""Ridge of `regmean` relative to the mean diagonal entry of the summed moments: chosen among 1e-4, 1e-3 and 1e-2 on the
demo's validation prompts, because the larger it is the better neutral concepts were kept."""

REGRESSED = "regressed"
"""Under which the experts' layers after the regression are kept between merges: nothing in it is a candidate's."""


def regmean(experts: LayerExperts) -> LayerMerge:
    """Regress: give each expert's inputs that expert's change, and benign inputs no change, as well as one map can.

    delta = argmin_W sum_e |(W - w_e delta_e) h|^2 over inputs h of expert e + |W h|^2 over benign inputs
          = (sum_e w_e delta_e G_e) (sum_e G_e + G_benign + RIDGE m I)^-1,
    with G second moments and m the mean of the diagonal of their sum. The benign inputs are an expert that changes
    nothing. Its column space is that of the experts, so the result is exact at the sum of their ranks.

    Use it when experts must act on their own prompts only; it needs the prompts of each expert.

    Raises:
        SafetyDPOError: if there are no moments.

    Source: Jin et al. 2023, "Dataless Knowledge Fusion by Merging Weights of Language Models" (RegMean, arXiv
    2212.09849), eq. 2; the ridge in place of its scaling of off-diagonal entries, and the benign term, are ours.
    """
    if len(experts.moments) != len(experts.layers) or experts.benign_moment is None:
        raise SafetyDPOError(
            f"expected second moments of the inputs of {len(experts.layers)} experts and of benign prompts for "
            f"{experts.name!r}, found {len(experts.moments)}: collect the layer inputs of the base model first"
        )
    if experts.kept is None:
        return LayerMerge(concatenate(_regressed(experts, experts.benign_moment), experts.weights))
    if REGRESSED not in experts.kept:
        experts.kept[REGRESSED] = _regressed(experts, experts.benign_moment)
    return LayerMerge(concatenate(experts.kept[REGRESSED], experts.weights))


def _regressed(experts: LayerExperts, benign: Float[Tensor, "d_in d_in"]) -> list[LoraLayer]:
    """Return each expert's layer with A G_e (sum_e G_e + G_benign + RIDGE m I)^-1 for A; weights play no part."""
    moments = [moment.to(torch.float64) for moment in experts.moments]
    total = torch.stack([*moments, benign.to(torch.float64)]).sum(dim=0)
    total.diagonal().add_(RIDGE * total.diagonal().mean())
    factors = torch.linalg.lu_factor(total)
    layers = []
    for layer, moment in zip(experts.layers, moments, strict=True):
        # A G T^-1 = (T^-1 G A')' because both moments are symmetric.
        weighted = torch.linalg.lu_solve(*factors, moment @ layer.down.to(torch.float64).T).T
        layers.append(LoraLayer(down=weighted.to(layer.down.dtype).contiguous(), up=layer.up))
    return layers


def distill(experts: LayerExperts) -> LayerMerge:
    """Take the adapter that was fitted, all layers together, to answer each expert's prompts as that expert does.

    The fit is a short training (see `safetydpo.dpo.distillation`), made once per set of experts; only the global scale
    is left to choose. Layer-wise methods see one linear map at a time, and what makes an expert act on its own
    prompts only is spread over many; a fit of the whole network's predictions keeps that.

    Use it when layer-wise merges lose either safety or the concepts that no expert should touch.

    Raises:
        SafetyDPOError: if there is no fitted adapter.

    Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531), section 2.
    """
    if experts.distilled is None:
        raise SafetyDPOError(
            f"expected a distilled adapter of these experts for {experts.name!r}, found none: distil them first"
        )
    return LayerMerge(experts.distilled)


METHODS = (
    MergeMethod(
        "regmean",
        regmean,
        "Jin et al. 2023, RegMean, arXiv 2212.09849",
        "experts that must act on their own prompts only; weighs them by layer inputs, benign prompts too",
        needs_moments=True,
        reshapes=True,
    ),
    MergeMethod(
        "distill",
        distill,
        "Hinton et al. 2015, Knowledge distillation, arXiv 1503.02531",
        "when layer-wise merges fall short: one short training, whatever the number of experts",
        needs_distilled=True,
        takes_weights=False,
        reshapes=True,
    ),
)
