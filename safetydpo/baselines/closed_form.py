"""UCE's closed-form edit of linear layers that read text features (pure).

Axis legend: `erased` edited text features, `preserved` features to be left alone, `d_text` width of the text features,
`d_out` outputs of a layer.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from safetydpo.artifacts.adapters import LoraLayer
from safetydpo.errors import SafetyDPOError


def edit_map(
    erased: Float[Tensor, "erased d_text"],
    targets: Float[Tensor, "erased d_text"],
    preserved: Float[Tensor, "preserved d_text"],
    *,
    erase_scale: float,
    preserve_scale: float,
    ridge: float,
) -> Float[Tensor, "d_text d_text"]:
    """Return D such that `W* = W + W D` is UCE's edit of every layer W; float64.

    W* minimises `e sum_i |W* c_i - W t_i|^2 + p sum_j |W* c_j - W c_j|^2 + lambda |W* - W|^2` over erased features c_i
    with targets t_i and preserved features c_j. The paper's solution,

    `W* = (e sum_i W t_i c_i^T + p sum_j W c_j c_j^T + lambda W) (e sum_i c_i c_i^T + p sum_j c_j c_j^T + lambda I)^-1`,

    has W as a factor on the left, because what is to come out is what the layer gave for t_i. So one system of the
    width of the text features, `D = e sum_i (t_i - c_i) c_i^T M^-1` with M the second bracket, solves all layers; the
    numbers are those of a solve per layer.

    Args:
        erased: c_i.
        targets: t_i, what is to be seen in place of c_i.
        preserved: c_j.
        erase_scale: e, above 0.
        preserve_scale: p, at least 0.
        ridge: lambda, at least 0; with 0 the features must span the whole space.

    Raises:
        SafetyDPOError: if the system has no unique solution.

    Source: Gandikota et al. 2023, Unified Concept Editing (arXiv 2308.14761), equations 6 and 7; lambda as in its code.
    """
    c, t, kept = (values.double() for values in (erased, targets, preserved))
    system = erase_scale * c.T @ c + preserve_scale * kept.T @ kept
    system = system + ridge * torch.eye(c.shape[1], dtype=torch.float64, device=c.device)
    factor, failed = torch.linalg.cholesky_ex(system)
    if int(failed) or not bool(torch.isfinite(factor).all()):
        raise SafetyDPOError(
            f"expected text features that determine UCE's edit, found a system of {c.shape[1]} unknowns without a "
            f"unique solution (ridge {ridge:g}, {len(c)} erased and {len(kept)} preserved features): raise ridge"
        )
    # D M = A with M symmetric is M D^T = A^T.
    return torch.cholesky_solve(erase_scale * c.T @ (t - c), factor).T


def as_layer(delta: Float[Tensor, "d_out d_text"]) -> LoraLayer | None:
    """Return a change of weights as factors of its numerical rank, float32; None if it is zero.

    Singular values below the rounding of float32 are dropped, as numpy's `matrix_rank` counts them.
    """
    left, values, right = torch.linalg.svd(delta.double(), full_matrices=False)
    limit = values.max() * max(delta.shape) * torch.finfo(torch.float32).eps
    rank = int((values > limit).sum())
    if rank == 0:
        return None
    up = (left[:, :rank] * values[:rank]).float().contiguous()
    return LoraLayer(down=right[:rank].float().contiguous(), up=up)
