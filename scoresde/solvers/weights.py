"""The weights of every linear method: c_j = int L_j(w) du over a step, L_j the Lagrange basis of the nodes w_j. Float64, on the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ..linear import LinearSDE
from ..variables import Clock, Variable

__all__ = ["Segment", "Weights", "bh1", "bh2", "exact"]

Array = NDArray[np.float64]

_POINTS, _MASS = (a / 2 for a in np.polynomial.legendre.leggauss(64))  # on [-1/2, 1/2]: integrates e^lam over 14 units to rounding


@dataclass(frozen=True)
class Segment:
    """A step of the coordinate from `start` to `end`, quadrature `points` in it with masses `du`, which add to the step of u.

    slope is du/dw at the end.
    """

    start: float
    end: float
    points: Array
    du: Array
    slope: float

    @classmethod
    def between(cls, variable: Variable, coordinate: Clock, sde: LinearSDE, t: torch.Tensor, s: torch.Tensor) -> Segment:
        """The step from time t to s.

        In the variable's own clock the integrand is a polynomial; else lam is the variable of integration, in which every integrand
        is smooth. Either way no difference of nearly equal numbers is taken, however small the step.
        """
        ends = torch.stack([t, s])
        start, end = coordinate.at(sde, ends).tolist()
        if coordinate is variable.clock:
            h = end - start
            return cls(start, end, start + (_POINTS + 0.5) * h, _MASS * h, 1.0)
        a, b = (sde.logsnr(ends) / 2).tolist()
        inner = torch.from_numpy(a + (_POINTS + 0.5) * (b - a))
        rate = variable.clock.rate(torch.cat([inner, ends.new_tensor([b])])).numpy()
        return cls(start, end, coordinate.along(sde, inner).numpy(), rate[:-1] * _MASS * (b - a), float(rate[-1]))

    @classmethod
    def counted(cls, k: int, du: float) -> Segment:
        """Step k with its number as the coordinate, in which u is taken to be linear."""
        return cls(k, k + 1, k + _POINTS + 0.5, _MASS * du, du)


Weights = Callable[[Segment, Sequence[float]], Array]


def exact(segment: Segment, nodes: Sequence[float]) -> Array:
    """c_j = int L_j(w) du: the polynomial through the nodes, integrated exactly."""
    c = np.empty(len(nodes))
    for j, w in enumerate(nodes):
        others = np.array([v for i, v in enumerate(nodes) if i != j])
        c[j] = np.prod((segment.points[:, None] - others) / (w - others), axis=1) @ segment.du
    return c


def _b_of_h(segment: Segment, nodes: Sequence[float], b: float) -> Array:
    """UniPC's shortcut: with two nodes, int (w - start) du becomes B h / 2; with any other number B(h) cancels and `exact` is left."""
    if len(nodes) != 2:
        return exact(segment, nodes)
    c = b * (segment.end - segment.start) / 2 / (nodes[1] - nodes[0])
    return np.array([segment.du.sum() - c, c])


def bh1(segment: Segment, nodes: Sequence[float]) -> Array:
    """UniPC with B1(h) = h, nodes[0] the start of a step in lam. Zhao et al. 2023 (NeurIPS), eq. 5 and section 3.4."""
    return _b_of_h(segment, nodes, segment.slope * (segment.end - segment.start))


def bh2(segment: Segment, nodes: Sequence[float]) -> Array:
    """UniPC with B2(h) = e^h - 1; on two nodes it is the midpoint form of DPM-Solver++(2M), Lu et al. 2022, eq. 17."""
    return _b_of_h(segment, nodes, float(segment.du.sum()))
