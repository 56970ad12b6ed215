"""Merges in a common basis: singular vectors of all experts together, from the factored form.

Axis legend: `d_in d_out` features of the linear layer, `basis` directions of the common basis.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from safetydpo.artifacts.adapters import LoraLayer
from safetydpo.merging.algebra import concatenate, decompose, max_rank, nonzero_count, scale_layer
from safetydpo.merging.method import LayerExperts, LayerMerge, MergeMethod, check_density
from safetydpo.merging.methods.sparse import elect_and_average, trim


def knots(experts: LayerExperts) -> LayerMerge:
    """Write the experts in one orthonormal basis of their outputs, merge there as `ties`, and go back.

    U S [V_1 … V_E] is the SVD of the experts side by side, [w_1 delta_1 … w_E delta_E]; TIES runs on the aligned
    S V_e = U' w_e delta_e, and delta = U TIES(S V_1, …, S V_E). Directions that no expert uses are left out.

    Use it in place of `ties` for experts with independent initialisations, whose entries mean different things.

    Raises:
        SafetyDPOError: if the density is outside (0, 1].

    Source: Stoica et al. 2024, "Model Merging with SVD to Tie the KnOTS" (arXiv 2410.19735), section 4; S on the side
    of V as in the settings that its authors publish.
    """
    check_density(experts, method="KnOTS")
    scaled = [scale_layer(layer, weight) for layer, weight in zip(experts.layers, experts.weights, strict=True)]
    basis = output_basis(scaled)
    dtype = experts.layers[0].up.dtype
    aligned = ((basis.T @ layer.up.to(torch.float64) @ layer.down.to(torch.float64)).to(dtype) for layer in scaled)
    merged = elect_and_average(trim(change, experts.density) for change in aligned)
    return LayerMerge(LoraLayer(down=merged, up=basis.to(dtype)))


def tsv(experts: LayerExperts) -> LayerMerge:
    """Keep the strongest directions of each expert and make those of all experts orthogonal before adding them.

    With E experts, the min(d_in, d_out) / E strongest triplets (u, s, v) of each w_e delta_e, at least one, are put
    side by side as U, S, V; each of U and V is replaced by the nearest matrix with orthonormal columns, P Q' of its SVD
    P D Q', and delta = U_orth S V_orth'. Experts whose change is 0 take no part and do not count.

    Use it when experts share directions and interfere there; it decorrelates them.

    Source: Gargiulo et al. 2025, "Task Singular Vectors" (arXiv 2412.00081), section 4 (TSV-Merge).
    """
    parts = []
    for layer, weight in zip(experts.layers, experts.weights, strict=True):
        u, s, vh = decompose(scale_layer(layer, weight))
        kept = nonzero_count(s, dtype=layer.up.dtype)
        if kept > 0:
            parts.append((u[:, :kept], s[:kept], vh[:kept]))
    first = experts.layers[0]
    if not parts:
        return LayerMerge(concatenate([first], [0.0]))
    share = max(1, max_rank(first) // len(parts))
    dtype = first.up.dtype
    left = _nearest_orthonormal(torch.cat([u[:, :share] for u, _, _ in parts], dim=1), dtype=dtype)
    right = _nearest_orthonormal(torch.cat([vh[:share].T for _, _, vh in parts], dim=1), dtype=dtype)
    strengths = torch.cat([s[:share] for _, s, _ in parts])
    return LayerMerge(LoraLayer(down=right.T.to(dtype).contiguous(), up=(left * strengths).to(dtype).contiguous()))


def iso(experts: LayerExperts) -> LayerMerge:
    """Add the experts and give every direction of the sum the same strength: the mean of its singular values.

    delta = mean(s) U V', with U S V' the SVD of sum_e w_e delta_e and the mean over the singular values that are not 0:
    a sum of adapters has low rank, and directions outside it would be noise.

    Use it when a few strong directions, of one expert or common to all, drown the rest. It changes a single expert too.

    Source: Marczak et al. 2025, "No Task Left Behind" (Iso-C, arXiv 2502.04959), section 4.1; there the mean is over
    all min(d_in, d_out) singular values of dense changes.
    """
    total = concatenate(experts.layers, experts.weights)
    u, s, vh = decompose(total)
    kept = nonzero_count(s, dtype=total.up.dtype)
    if kept == 0:
        return LayerMerge(concatenate([experts.layers[0]], [0.0]))
    dtype = total.up.dtype
    up = (u[:, :kept] * s[:kept].mean()).to(dtype).contiguous()
    return LayerMerge(LoraLayer(down=vh[:kept].to(dtype).contiguous(), up=up))


def output_basis(layers: list[LoraLayer]) -> Float[Tensor, "d_out basis"]:
    """Return an orthonormal basis of the outputs of all layers, float64: left singular vectors of them side by side.

    With down_e' = Q_e R_e, [up_1 down_1 … up_E down_E] has those of the small [up_1 R_1' … up_E R_E']. At least one
    column is returned.
    """
    blocks = []
    for layer in layers:
        triangle = torch.linalg.qr(layer.down.to(torch.float64).T, mode="r").R
        blocks.append(layer.up.to(torch.float64) @ triangle.T)
    u, s, _ = torch.linalg.svd(torch.cat(blocks, dim=1), full_matrices=False)
    return u[:, : max(1, nonzero_count(s, dtype=layers[0].up.dtype))]


def _nearest_orthonormal(columns: Float[Tensor, "d columns"], *, dtype: torch.dtype) -> Float[Tensor, "d columns"]:
    """Return P Q' of the SVD P D Q', without directions in which the columns are dependent."""
    u, s, vh = torch.linalg.svd(columns, full_matrices=False)
    kept = nonzero_count(s, dtype=dtype)
    return u[:, :kept] @ vh[:kept]


METHODS = (
    MergeMethod(
        "knots",
        knots,
        "Stoica et al. 2024, Model Merging with SVD to Tie the KnOTS, arXiv 2410.19735",
        "as ties, for experts with independent initialisations; ranks add up",
        uses_density=True,
    ),
    MergeMethod(
        "tsv",
        tsv,
        "Gargiulo et al. 2025, Task Singular Vectors, arXiv 2412.00081",
        "experts that interfere in shared directions; ranks add up",
    ),
    MergeMethod(
        "iso",
        iso,
        "Marczak et al. 2025, No Task Left Behind: Isotropic Model Merging, arXiv 2502.04959",
        "when a few strong directions drown the rest; sweep the global scale",
        reshapes=True,
    ),
)
