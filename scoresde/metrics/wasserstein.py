"""Wasserstein distances: sliced between samples, exact between Gaussians."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scoresde.metrics.frechet import frechet_distance
from scoresde.metrics.inputs import Array, samples

__all__ = ["gaussian_wasserstein", "sliced_wasserstein"]

CHUNK = 64  # directions at a time: bounds the memory to 64 (N + M) numbers, a few times over


def sliced_wasserstein(x: Array, y: Array, projections: int = 512, seed: int = 0, p: float = 2) -> float:
    """Return the sliced W_p of two samples: (mean over unit directions u of W_p(x u, y u)^p)^(1/p), in float64.

    In one dimension W_p^p is the integral over q in (0, 1) of |F_x^{-1}(q) - F_y^{-1}(q)|^p; it is summed exactly, for
    unequal sizes over the pieces on which both quantile functions are constant.

    Args:
        x: [N, D].
        y: [M, D]; M may differ from N.
        projections: number of directions, uniform on the sphere.
        seed: the directions are a function of it (and of D) alone.
        p: at least 1.

    Raises:
        TypeError, ValueError: not finite, fewer than 2 rows, another D, or a bad option.

    Source: Rabin, Peyré, Delon and Bernot 2011; Bonneel, Rabin, Peyré and Pfister 2015.
    """
    x, y = samples(x, "x"), samples(y, "y")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"x has D = {x.shape[1]} and y D = {y.shape[1]}; wanted the same D: flatten both alike")
    if isinstance(projections, bool) or not isinstance(projections, int) or projections < 1:
        raise ValueError(f"projections is {projections!r}; wanted an integer of at least 1, as in 512")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed!r}; wanted an integer in [0, 2**63), as in 0")
    if isinstance(p, bool) or not isinstance(p, (int, float)) or not 1 <= p < math.inf:
        raise ValueError(f"p is {p!r}; wanted a finite number of at least 1, as in 2")
    i, j, width = _coupling(len(x), len(y))
    total = 0.0
    for u in _directions(x.shape[1], projections, seed).split(CHUNK, dim=1):
        # Sorted along the last dimension, where sort is fastest.
        a, b = (x @ u).T.sort().values, (y @ u).T.sort().values
        total += float(((a[:, i] - b[:, j]).abs().pow(p) @ width).sum())
    return (total / projections) ** (1 / p)


def gaussian_wasserstein(mean1: Array, cov1: Array, mean2: Array, cov2: Array) -> float:
    """Return the 2-Wasserstein distance of two Gaussians: the square root of `frechet_distance`.

    Args:
        mean1: [D].
        cov1: [D, D].
        mean2: [D].
        cov2: [D, D].

    Raises:
        TypeError, ValueError: as `frechet_distance`.

    Source: Dowson and Landau 1982.
    """
    return math.sqrt(frechet_distance(mean1, cov1, mean2, cov2))


def _directions(dim: int, projections: int, seed: int) -> Tensor:
    """Return unit columns [dim, projections], uniform on the sphere, from a generator of their own."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(dim, projections, dtype=torch.float64, generator=generator)
    return u / u.norm(dim=0, keepdim=True)


def _coupling(n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each piece of (0, 1] the index of the quantile of n points, that of m points, and its width."""
    # The right ends of the pieces in units of 1 / (n m): integers, so equal ends of the two grids are equal.
    ends = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).unique()
    width = ends.diff(prepend=ends.new_zeros(1)).double() / (n * m)
    return (ends - 1) // m, (ends - 1) // n, width
