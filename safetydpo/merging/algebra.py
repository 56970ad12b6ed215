"""Linear algebra of LoRA deltas in factored form: no dense matrix is made unless a function says so.

A delta is `up @ down`. Sums are concatenations, ranks are reduced by QR of the factors and a small SVD. All
decompositions run in float64 and come back in the input's type, so that float32 results are exact to rounding.
Where the components are nearly as many as the rows or columns, the dense way is the shorter one and is taken.

A convolution is the linear layer of its patches: `flatten_kernel` and `restore_kernel` are the border.

Axis legend: `rank rank_out` LoRA components, `d_in d_out` features of the linear layer (of a convolution: channels in x
kernel height x kernel width, channels out).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from safetydpo.artifacts.adapters import LoraLayer
from safetydpo.errors import SafetyDPOError

FACTORED_SHARE = 0.7
"""Components up to this share of min(d_in, d_out) are decomposed in factored form: above it, two QRs, a small SVD and
two products take longer than one dense SVD (`benchmarks/merge.py` measures both)."""
SMALL_LAYER = 256
"""Where min(d_in, d_out) is at most this, the factored form is taken up to it: both ways take milliseconds there, and
the one that is taken decides the last bits of merges that are stored."""
ROUNDINGS = 16
"""A singular value below this many epsilons of the first one is rounding."""


@dataclass(frozen=True)
class Reduction:
    """A layer of reduced rank and what was lost.

    Attributes:
        layer: the nearest layer of the wanted rank.
        squared_error: squared Frobenius norm of what was cut off.
        squared_norm: squared Frobenius norm of the delta before.
    """

    layer: LoraLayer
    squared_error: float
    squared_norm: float

    @property
    def truncation_error(self) -> float:
        """Relative Frobenius error in [0, 1]: |delta - reduced| / |delta|; 0 for a delta of zeros."""
        return relative_error(self.squared_error, self.squared_norm)


def relative_error(squared_error: float, squared_norm: float) -> float:
    """Return sqrt(squared_error / squared_norm), 0 if the norm is 0."""
    return float((squared_error / squared_norm) ** 0.5) if squared_norm > 0 else 0.0


def delta(layer: LoraLayer) -> Float[Tensor, "d_out d_in"]:
    """Return the dense change of the weight: up @ down."""
    return layer.up @ layer.down


def rank_of(layer: LoraLayer) -> int:
    """Return the number of stored components (the true rank may be lower)."""
    return int(layer.down.shape[0])


def max_rank(layer: LoraLayer) -> int:
    """Return min(d_in, d_out), the largest rank that this layer's delta can have."""
    return int(min(layer.down.shape[1], layer.up.shape[0]))


def scale_layer(layer: LoraLayer, factor: float) -> LoraLayer:
    """Return the layer whose delta is `factor` times the given one; the factor goes into `up`."""
    return LoraLayer(down=layer.down, up=layer.up * factor)


def concatenate(layers: Sequence[LoraLayer], weights: Sequence[float]) -> LoraLayer:
    """Return the layer whose delta is sum_e weight_e * delta_e, exactly, by stacking the factors.

    `up = [w_1 up_1 | w_2 up_2 | …]`, `down = [down_1; down_2; …]`; the ranks add up and may differ.
    Adding A's and B's separately would be wrong: (sum A)(sum B) is not sum(A B).

    Raises:
        SafetyDPOError: if there is no layer, or not one weight for each.
    """
    if not layers or len(layers) != len(weights):
        raise SafetyDPOError(
            f"expected one weight for each of at least one layer, found {len(layers)} layers and {len(weights)} weights"
        )
    return LoraLayer(
        down=torch.cat([layer.down for layer in layers], dim=0),
        up=torch.cat([layer.up * weight for layer, weight in zip(layers, weights, strict=True)], dim=1),
    )


def exact_factors(dense: Float[Tensor, "d_out d_in"]) -> LoraLayer:
    """Return a dense delta as a layer of rank min(d_in, d_out) without any computation.

    The dense matrix is one factor, the identity the other.
    """
    d_out, d_in = dense.shape
    if d_in <= d_out:
        return LoraLayer(down=torch.eye(d_in, dtype=dense.dtype), up=dense)
    return LoraLayer(down=dense, up=torch.eye(d_out, dtype=dense.dtype))


def cap_rank(layer: LoraLayer) -> LoraLayer:
    """Return the same delta with at most min(d_in, d_out) components; unchanged if it has no more."""
    return layer if rank_of(layer) <= max_rank(layer) else exact_factors(delta(layer))


def flatten_kernel(layer: LoraLayer) -> LoraLayer:
    """Return the change of a convolution as that of a linear layer on patches; a linear layer comes back as it is.

    `down` [rank, c_in, height, width] becomes [rank, c_in * height * width], `up` [c_out, rank, 1, 1] becomes
    [c_out, rank]; up @ down is then the change of the weight, flattened from its second axis on.
    """
    if layer.down.ndim == 2:
        return layer
    return LoraLayer(down=layer.down.flatten(1), up=layer.up.flatten(1))


def restore_kernel(layer: LoraLayer, kernel: Sequence[int]) -> LoraLayer:
    """Undo `flatten_kernel`: `kernel` is (height, width) of the convolution, () for a linear layer."""
    if not kernel:
        return layer
    return LoraLayer(down=layer.down.unflatten(1, (-1, *kernel)), up=layer.up[:, :, None, None])


def singular_values(layer: LoraLayer) -> Float[Tensor, " rank"]:
    """Return the singular values of up @ down in falling order, float64, from the factored form."""
    _, middle, _ = _orthogonal_core(layer)
    return torch.linalg.svdvals(middle)


def reduce_rank(layer: LoraLayer, rank: int) -> Reduction:
    """Return the nearest layer of at most `rank` components in the Frobenius norm.

    With up = Q_u R_u and down' = Q_d R_d, the SVD of the small matrix R_u R_d' is that of up @ down, up to the
    orthonormal Q's: the cost grows with the number of components, not with min(d_in, d_out)^3. Exact if
    `rank` is at least the true rank. The new `up` carries the singular values, `down` is orthonormal.

    Raises:
        SafetyDPOError: if `rank` is below 1.

    Source: Eckart and Young 1936 (best approximation); Halko, Martinsson and Tropp 2011, section 5 (SVD from QR).
    """
    left, middle, right = _orthogonal_core(layer)
    u, s, vh = torch.linalg.svd(middle, full_matrices=False)
    return _truncate(left @ u, s, vh @ right, rank=rank, dtype=layer.up.dtype)


def factor_dense(dense: Float[Tensor, "d_out d_in"], rank: int) -> Reduction:
    """Return the nearest layer of at most `rank` components to a dense delta, by a dense SVD.

    Raises:
        SafetyDPOError: if `rank` is below 1.

    Source: Eckart and Young 1936.
    """
    u, s, vh = torch.linalg.svd(dense.to(torch.float64), full_matrices=False)
    return _truncate(u, s, vh, rank=rank, dtype=dense.dtype)


def decompose(
    layer: LoraLayer,
) -> tuple[Float[Tensor, "d_out rank_out"], Float[Tensor, " rank_out"], Float[Tensor, "rank_out d_in"]]:
    """Return the SVD (u, s, vh) of up @ down in float64, by the shorter of the two ways.

    At most min(rank, d_in, d_out) singular values, falling; those of directions outside the true rank are about 0.

    Source: Halko, Martinsson and Tropp 2011, section 5 (SVD from QR).
    """
    if not prefers_factors(layer):
        u, s, vh = torch.linalg.svd(delta(layer).to(torch.float64), full_matrices=False)
        return u, s, vh
    left, middle, right = _orthogonal_core(layer)
    u, s, vh = torch.linalg.svd(middle, full_matrices=False)
    return left @ u, s, vh @ right


def truncate(layer: LoraLayer, rank: int) -> Reduction:
    """Return the nearest layer of at most `rank` components, by the shorter of the two ways.

    Raises:
        SafetyDPOError: if `rank` is below 1.
    """
    return reduce_rank(layer, rank) if prefers_factors(layer) else factor_dense(delta(layer), rank)


def prefers_factors(layer: LoraLayer) -> bool:
    """Whether the factored form is the shorter way to a decomposition than the dense matrix."""
    most = max_rank(layer)
    return rank_of(layer) < most if most <= SMALL_LAYER else rank_of(layer) <= FACTORED_SHARE * most


def nonzero_count(values: Float[Tensor, " rank"], *, dtype: torch.dtype) -> int:
    """Return how many of the falling singular values are more than the rounding of factors of this type.

    The limit is `ROUNDINGS` epsilons of the first value: what lies below has directions that mean nothing.
    """
    if values.numel() == 0 or values[0] <= 0:
        return 0
    return int((values > ROUNDINGS * torch.finfo(dtype).eps * values[0]).sum())


def _orthogonal_core(layer: LoraLayer) -> tuple[Tensor, Tensor, Tensor]:
    """Return (Q_u, R_u R_d', Q_d') in float64."""
    left, upper = torch.linalg.qr(layer.up.to(torch.float64))
    right, lower = torch.linalg.qr(layer.down.to(torch.float64).T)
    return left, upper @ lower.T, right.T


def _truncate(u: Tensor, s: Tensor, vh: Tensor, *, rank: int, dtype: torch.dtype) -> Reduction:
    if rank < 1:
        raise SafetyDPOError(f"expected an output rank of at least 1, found {rank}")
    kept = min(rank, int(s.shape[0]))
    squares = s.square()
    return Reduction(
        layer=LoraLayer(down=vh[:kept].to(dtype).contiguous(), up=(u[:, :kept] * s[:kept]).to(dtype).contiguous()),
        squared_error=float(squares[kept:].sum()),
        squared_norm=float(squares.sum()),
    )
