"""The weights of every linear method: c_j = int L_j(w) du over a step, L_j the Lagrange basis of the nodes w_j. Float64, on the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..linear import LinearSDE
from ..variables import Clock, Variable
from ..variables import t as time_clock

__all__ = ["Frame", "Segment", "bh1", "bh2", "exact", "segment", "taylor"]

Array = NDArray[np.float64]

_POINTS, _MASS = (a / 2 for a in np.polynomial.legendre.leggauss(64))  # on [-1/2, 1/2]: integrates e^lam over 14 units to rounding


@dataclass(frozen=True)
class Segment:
    """A step of the coordinate from `start` to `end`, quadrature `points` in it with masses `du`, which add to the step of u.

    slope is du/dw at the end (nan in t, which has no rate that is the same for every SDE). Or n steps at once, `[n]` and `[n, points]`.
    """

    start: Any
    end: Any
    points: Array
    du: Array
    slope: Any

    def each(self) -> list[Segment]:
        """The steps one by one, of n at once."""
        return [
            Segment(*row)
            for row in zip(self.start.tolist(), self.end.tolist(), self.points, self.du, self.slope.tolist(), strict=True)
        ]


def segment(
    variable: Variable,
    coordinate: Clock | None,
    sde: LinearSDE,
    t: torch.Tensor,
    s: torch.Tensor,
    rate: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Segment:
    """The steps from times t to times s, `[n]` each; coordinate None counts steps, u taken to be linear in each.

    rate: du/dlam at lam `[n, points]`, of a u that is not the variable's clock. In the variable's own clock the integrand is a
    polynomial; else lam is the variable of integration, in which every integrand is smooth. Either way no difference of nearly equal
    numbers is taken, however small the step.
    """
    n = len(t)
    if coordinate is None:
        u, k = (variable.clock.at(sde, s) - variable.clock.at(sde, t)).numpy(), np.arange(n, dtype=np.float64)
        return Segment(k, k + 1, k[:, None] + (_POINTS + 0.5), _MASS * u[:, None], u)
    start, end = coordinate.at(sde, t).numpy(), coordinate.at(sde, s).numpy()
    if rate is None and coordinate == variable.clock:
        h = (end - start)[:, None]
        points, du, slope = start[:, None] + (_POINTS + 0.5) * h, _MASS * h, np.ones(n)
    else:
        a, b = (sde.logsnr(v).numpy() / 2 for v in (t, s))
        inner = torch.from_numpy(a[:, None] + (_POINTS + 0.5) * (b - a)[:, None])
        points = coordinate.along(sde, inner).numpy()
        rate = rate or variable.clock.rate
        du = rate(inner).numpy() * _MASS * (b - a)[:, None]
        last = torch.from_numpy(b)[:, None]
        slope = np.full(n, np.nan) if coordinate == time_clock else (rate(last) / coordinate.rate(last))[:, 0].numpy()
    return Segment(start, end, points, du, slope)


class Frame:
    """y = x / m with dy = q du on each of the steps from times t to times s `[n]`; for the flow, m and u are the variable's."""

    def __init__(self, variable: Variable, sde: LinearSDE, t: torch.Tensor, s: torch.Tensor) -> None:
        self.variable, self.sde, self.t, self.s = variable, sde, t, s

    def scale(self, at: torch.Tensor) -> list[float]:
        """m at times `at` `[n]`, one a step."""
        return self.variable.scale(self.sde.alpha(at), self.sde.sigma(at)).expand(at.shape).tolist()

    def segments(self, coordinate: Clock | None, at: torch.Tensor) -> list[Segment]:
        """From t to times `at` in this u."""
        return segment(self.variable, coordinate, self.sde, self.t, at).each()

    def spread(self, a: torch.Tensor, b: torch.Tensor) -> list[float]:
        """Deviation of what noise adds to y from a to b, one a step: none here."""
        return [0.0] * len(a)


Weights = Callable[[Segment, Sequence[Any]], Array]


def exact(segment: Segment, nodes: Sequence[Any]) -> Array:
    """c_j = int L_j(w) du: the polynomial through the nodes, integrated exactly. `[k]`, or `[k, n]` of n steps with nodes `[n]` each."""
    w = np.array(nodes)
    distance = segment.points - w[..., None]
    c = np.empty(w.shape)
    for j in range(len(w)):
        others = np.delete(np.arange(len(w)), j)
        c[j] = np.einsum("...p,...p->...", segment.du, distance[others].prod(axis=0)) / np.prod(w[j] - w[others], axis=0)
    return c


def _b_of_h(segment: Segment, nodes: Sequence[float], b: float) -> Array:
    """UniPC's shortcut: with two nodes, int (w - start) du becomes B h / 2; with any other number B(h) cancels and `exact` is left."""
    if len(nodes) != 2:
        return exact(segment, nodes)
    c = b * (segment.end - segment.start) / 2 / (nodes[1] - nodes[0])
    return np.array([segment.du.sum() - c, c])


def bh1(segment: Segment, nodes: Sequence[float]) -> Array:
    """UniPC with B1(h) = h, nodes[0] the start of the step, in any coordinate but t. Zhao et al. 2023 (NeurIPS), eq. 5 and section 3.4."""
    return _b_of_h(segment, nodes, segment.slope * (segment.end - segment.start))


def bh2(segment: Segment, nodes: Sequence[float]) -> Array:
    """UniPC with B2(h) = e^h - 1; on two nodes it is the midpoint form of DPM-Solver++(2M), Lu et al. 2022, eq. 17."""
    return _b_of_h(segment, nodes, float(segment.du.sum()))


def taylor(segment: Segment, nodes: Sequence[float]) -> Array:
    """ER-SDE's: with three nodes the slope is that of the last two: not the parabola through them. Cui et al. 2023, eq. 18."""
    if len(nodes) != 3:
        return exact(segment, nodes)
    a, b, c = nodes
    first, second = segment.du @ (segment.points - a), segment.du @ (segment.points - a) ** 2 / 2
    slope, before = np.array([1.0, -1.0, 0.0]) / (a - b), np.array([0.0, 1.0, -1.0]) / (b - c)
    return np.array([segment.du.sum(), 0.0, 0.0]) + first * slope + second * 2 * (slope - before) / (a - c)
