"""How alike experts are: cosines between their deltas, and the overlap of the spaces in which they act. Factored.

No dense delta is made: <B1 A1, B2 A2> = sum((B1'B2) * (A1 A2')), and a delta's column and row space follow from QR of
its factors. All sums run in float64.

Axis legend: `expert` experts, `other` experts again, `rank` LoRA components, `d_in d_out` features of the linear layer,
`dimension` dimensions of a subspace, `angle` principal angles, the smallest first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from safetydpo.artifacts.adapters import LoraLayer
from safetydpo.errors import SafetyDPOError

Side = Literal["columns", "rows"]
"""Column space: the outputs that a delta can change. Row space: the inputs that it looks at."""
NEGLIGIBLE = 1e-6
"""Singular values below this share of the largest one belong to no subspace: float32 weights are no more exact."""


def inner_products(layers: Sequence[LoraLayer]) -> Float[Tensor, "expert expert"]:
    """Return <delta_i, delta_j> = trace(delta_i' delta_j) of one layer of all experts, float64.

    Raises:
        SafetyDPOError: if there is no expert, or shapes differ.
    """
    _check(layers)
    factors = [_factors(layer) for layer in layers]
    ups, downs = torch.cat([up for up, _ in factors], dim=1), torch.cat([down for _, down in factors], dim=0)
    return _block_sums((ups.T @ ups) * (downs @ downs.T), [int(layer.down.shape[0]) for layer in layers])


def delta_norm(layer: LoraLayer) -> float:
    """Return the Frobenius norm of up @ down, every scale included."""
    return max(float(inner_products([layer])), 0.0) ** 0.5


def cosine_matrix(experts: Sequence[Mapping[str, LoraLayer]]) -> Float[Tensor, "expert expert"]:
    """Return the cosine between the deltas of experts, all layers as one vector; 0 for an expert that changes nothing.

    `cos(i, j) = sum_l <delta_il, delta_jl> / (|delta_i| |delta_j|)`, in [-1, 1].

    Raises:
        SafetyDPOError: if there is no expert, or they differ in layers or shapes.
    """
    products = torch.stack([inner_products(layers) for layers in _by_layer(experts)]).sum(dim=0)
    norms = products.diagonal().clamp(min=0).sqrt()
    scale = norms[:, None] * norms[None, :]
    return torch.where(scale > 0, products / scale.clamp(min=torch.finfo(torch.float64).tiny), 0.0).clamp(-1, 1)


def subspace(layer: LoraLayer, side: Side) -> Float[Tensor, "features dimension"]:
    """Return an orthonormal basis of a delta's column or row space, float64; no column for a delta of zeros.

    With up = Q_u R_u and down' = Q_d R_d, the singular vectors of the small matrix R_u R_d' are those of the delta.
    """
    up, down = _factors(layer)
    left, upper = torch.linalg.qr(up)
    right, lower = torch.linalg.qr(down.T)
    u, s, vh = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    kept = s > NEGLIGIBLE * s.max() if float(s.max()) > 0 else torch.zeros_like(s, dtype=torch.bool)
    return (left @ u)[:, kept] if side == "columns" else (right @ vh.T)[:, kept]


def principal_angles(first: LoraLayer, second: LoraLayer, *, side: Side) -> Float[Tensor, " angle"]:
    """Return the principal angles between two deltas' spaces in radians, in [0, pi / 2], the smallest first.

    cos(angle_k) is the k-th singular value of Q1'Q2 with orthonormal bases Q; there are as many angles as the smaller
    space has dimensions.

    Source: Björck and Golub 1973, "Numerical methods for computing angles between linear subspaces", section 2.
    """
    _check([first, second])
    cosines = torch.linalg.svdvals(subspace(first, side).T @ subspace(second, side))
    return torch.arccos(cosines.clamp(0, 1))


def overlap_matrix(experts: Sequence[Mapping[str, LoraLayer]], *, side: Side) -> Float[Tensor, "expert expert"]:
    """Return how much of the smaller space lies in the larger one, for each two experts, as a mean over layers.

    `overlap = |Q1'Q2|^2 / min(dim 1, dim 2)`: the mean squared cosine of the principal angles, in [0, 1]. Layers that
    one of the two does not change are left out of their mean; 0 if there is no other.

    Raises:
        SafetyDPOError: if there is no expert, or they differ in layers or shapes.

    Source: Hu et al. 2022, "LoRA" (arXiv 2106.09685), section 7.2, eq. 4.
    """
    count = len(experts)
    total, layers_of = torch.zeros(count, count, dtype=torch.float64), torch.zeros(count, count, dtype=torch.float64)
    for layers in _by_layer(experts):
        _check(layers)
        bases = [subspace(layer, side) for layer in layers]
        sizes = torch.tensor([basis.shape[1] for basis in bases])
        stacked = torch.cat(bases, dim=1)
        shared = _block_sums((stacked.T @ stacked).square(), sizes.tolist())
        smaller = torch.minimum(sizes[:, None], sizes[None, :])
        total += torch.where(smaller > 0, shared / smaller.clamp(min=1), 0.0)
        layers_of += smaller > 0
    return torch.where(layers_of > 0, total / layers_of.clamp(min=1), 0.0).clamp(0, 1)


def _factors(layer: LoraLayer) -> tuple[Tensor, Tensor]:
    """Return B and A in float64; a convolution is the linear layer of its patches."""
    return layer.up.to(torch.float64).flatten(1), layer.down.to(torch.float64).flatten(1)


def _by_layer(experts: Sequence[Mapping[str, LoraLayer]]) -> Iterator[list[LoraLayer]]:
    """Yield each layer of all experts, one layer at a time: lazily read experts never lie in memory whole."""
    if not experts or not experts[0]:
        raise SafetyDPOError(f"expected layers of at least one expert, found {len(experts)} experts and no layer")
    names = sorted(experts[0])
    for number, layers in enumerate(experts):
        different = sorted(set(layers) ^ set(names))
        if different:
            raise SafetyDPOError(
                f"expected experts of the same layers, found a first difference at {different[0]!r} of expert number "
                f"{number}: compare experts of one lora.targets"
            )
    for name in names:
        yield [layers[name] for layers in experts]


def _check(layers: Sequence[LoraLayer]) -> None:
    shapes = [(layer.up.shape[0], *layer.down.shape[1:]) for layer in layers]
    if len(set(shapes)) != 1:
        found = " and ".join(str(list(shape)) for shape in dict.fromkeys(shapes)) or "none"
        raise SafetyDPOError(f"expected deltas of one shape [d_out, d_in], found {found}")


def _block_sums(values: Tensor, sizes: Sequence[int]) -> Float[Tensor, "expert other"]:
    """Return the sums of the blocks of a square matrix whose rows and columns come in groups of `sizes`."""
    groups = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes, dtype=torch.int64))
    rows = torch.zeros(len(sizes), values.shape[1], dtype=values.dtype).index_add_(0, groups, values)
    return torch.zeros(len(sizes), len(sizes), dtype=values.dtype).index_add_(1, groups, rows)
