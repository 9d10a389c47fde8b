"""Batched linear algebra of eigenbases: on a GPU no loop over matrices, no host synchronisation, always in float64.

`torch.linalg.qr` and `eigh` on CUDA go through a batch one by one (pytorch issue 143281). There a refresh
orthonormalises by Cholesky factorisations, which are batched, and judges the outcome on the device.

A gradient of (8, 64) gives a factor of rank 8 and leaves 56 eigenvectors undefined; libraries take whatever round-off
makes of them, and two runs of one seed part from the first step. Here they are defined, so that a run does not depend
on the size of the batch it is computed in, on the units of the loss, or on the machine. Factors come in float64
whatever the weights are in: a step of SOAP is as long along one eigenvector as along any other, and of a factor in
float32 those of eigenvalues near 1e-6 of the largest are known to a tenth. In float64 they are known as well as the
gradients are, and two runs of a float32 trial that differ by rounding stay together a thousand times longer.
"""

from __future__ import annotations

import torch

# The eigenvector of an eigenvalue below this share of the largest counts as undefined. At a thousandth of the largest
# singular value the round-off of a float32 gradient turns a vector by 1e-4, and that of a float64 factor by 1e-10.
_NULL = 1e-6

# Share of the largest eigenvalue that is added to all for a refresh, by the dtype of the basis.
_LIFT = {torch.float64: 1e-13, torch.float32: 1e-6}

# Cholesky passes for columns of the condition number that lifting the null space to this share leaves.
_PASSES = {torch.float64: 2, torch.float32: 1}

# Each polish squares the deviation of the Gram matrix from the identity.
_POLISHES = 4

_LAPACK_ON = {"cpu"}

# A unit column closer to the span of those before it has no direction of its own in float64.
_LEAST_DISTANCE = 1e-13

# Largest deviation that the last polish takes down to round-off.
_BEFORE_LAST_POLISH = 1e-8


def eigenbasis(factor: torch.Tensor) -> torch.Tensor:
    """Eigenvectors by descending eigenvalue; the identity where the factor is zero or not finite.

    In the null space, where any basis would do, they are the eigenvectors of diag(d, ..., 2, 1) restricted to it. On
    CUDA this waits for the device and may go through the batch one by one: for first steps only.

    Args:
        factor: symmetric, shape (..., d, d), float64.

    Returns:
        Orthonormal columns, same shape, float64.
    """
    size = factor.shape[-1]
    usable = (factor.isfinite().all(-1).all(-1) & (factor != 0).any(-1).any(-1))[..., None, None]
    identity = torch.eye(size, dtype=torch.float64, device=factor.device)
    live = torch.where(usable, factor, identity)
    values, vectors = torch.linalg.eigh(live / live.abs().amax((-2, -1), keepdim=True))
    null = (values <= _NULL * values[..., -1:]).to(torch.float64)
    ramp = torch.arange(size, 0, -1, dtype=torch.float64, device=factor.device)
    restricted = (vectors.mT * ramp) @ vectors * null.unsqueeze(-1) * null.unsqueeze(-2)
    # Above the ramp, and distinct, so that the others keep their places.
    others = (size + 1 + ramp.flip(0)) * (1 - null)
    turns = torch.linalg.eigh(restricted + torch.diag_embed(others)).eigenvectors
    return torch.where(usable, (vectors @ turns).flip(-1), identity)


def power_iteration(factor: torch.Tensor, basis: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One step of orthogonal iteration towards the eigenvectors, SOAP's refresh (nikhilvyas/SOAP).

    The columns are sorted by their Rayleigh quotients diag(Q^T S Q), descending, multiplied by the factor and
    orthonormalised in this order. A column that the factor maps into the span of those before it is replaced by what
    the old column has outside the factor's range: the limit of QR((S + d I) Q) for d towards 0. A matrix for which this
    fails (its factor is not finite) keeps its sorted basis.

    Args:
        factor: symmetric S, shape (..., d, d), float64.
        basis: orthonormal columns Q, same shape, float32 or float64.

    Returns:
        The new basis, of `basis`'s dtype, and the order (..., d) in which the old columns were taken, int64.
    """
    old = basis.to(torch.float64)
    moved = factor @ old
    quotients = (old * moved).sum(-2)
    largest = quotients.abs().amax(-1, keepdim=True)
    order = torch.argsort(quotients, dim=-1, descending=True, stable=True)
    columns = order.unsqueeze(-2).expand(old.shape)
    old, moved = old.gather(-1, columns), moved.gather(-1, columns)
    # The lift only keeps the null space in the span of the columns; what round-off makes of it is replaced below.
    lift = (_LIFT[basis.dtype] * largest).masked_fill(largest == 0, 1.0).unsqueeze(-2)
    passes = _PASSES[basis.dtype]
    found, _ = orthonormalise(moved + lift * old, passes)
    live = ((found * (factor @ found)).sum(-2) > _NULL * largest).unsqueeze(-2)
    span = found * live
    found, sound = orthonormalise(torch.where(live, found, old - span @ (span.mT @ old)), passes)
    return torch.where(sound[..., None, None], found, old).to(basis.dtype), order


def orthonormalise(matrix: torch.Tensor, passes: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Q of the QR decomposition with a positive diagonal of R.

    On the CPU by LAPACK; elsewhere by shifted Cholesky-QR and products, Fukaya et al., SIAM J. Sci. Comput. 42 (2020)
    A477. After one Cholesky pass columns are orthonormal to about the square of the condition number times round-off,
    and what is left is removed by matrix products alone, which a GPU does twenty times faster than one more
    factorisation. One pass serves for a condition number of the normalised columns up to about 1e6, two for one up to
    1e12; what lies beyond, or holds a NaN, is reported.

    Args:
        matrix: X, shape (..., n, n), float64.
        passes: number of Cholesky factorisations.

    Returns:
        Q, and whether it is orthonormal, shape (...).
    """
    x = matrix / torch.linalg.vector_norm(matrix, dim=-2, keepdim=True)
    return _by_reflections(x) if matrix.device.type in _LAPACK_ON else _by_products(x, passes)


def _by_reflections(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Householder's QR of unit columns, matrix by matrix, which on a CPU takes less than half the time of products."""
    q, r = torch.linalg.qr(x)
    diagonal = r.diagonal(dim1=-2, dim2=-1)
    sound = (diagonal.abs() > _LEAST_DISTANCE).all(-1)  # a NaN fails the comparison
    return q * torch.where(diagonal < 0, -1.0, 1.0).to(q.dtype).unsqueeze(-2), sound


def _by_products(x: torch.Tensor, passes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cholesky-QR of unit columns, all matrices at once."""
    size = x.shape[-1]
    identity = torch.eye(size, dtype=x.dtype, device=x.device)
    # The shift covers the rounding of the Gram matrix of unit columns. The paper's bound, 11 (n^2 + n) eps |X|^2, is
    # far above what occurs, and a needlessly large shift costs a pass.
    gram = x.mT @ x + 10 * size * torch.finfo(x.dtype).eps * identity
    for _ in range(passes):
        lower = torch.linalg.cholesky_ex(gram, check_errors=False).L
        x = torch.linalg.solve_triangular(lower.mT, x, upper=True, left=False)
        gram = x.mT @ x
    error = gram - identity
    for _ in range(_POLISHES - 1):
        x = _polished(x, error)
        error = x.mT @ x - identity
    # Every step multiplies X by a triangular matrix, whatever came of the factorisation, so Q stays that of QR and this
    # one check does. A NaN fails the comparison.
    sound = (error.abs() < _BEFORE_LAST_POLISH).all(-1).all(-1)
    return _polished(x, error), sound


def _polished(x: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
    """X with the deviation E of its Gram matrix from the identity squared: X (I - U), where U + U^T = E, U upper."""
    upper = torch.triu(error, diagonal=1) + torch.diag_embed(error.diagonal(dim1=-2, dim2=-1) / 2)
    return x - x @ upper
