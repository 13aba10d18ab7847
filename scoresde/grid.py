"""Rules for times: functions (sde, n) -> float64 `[n + 1]`, from t_max down to t_min, end points exact, strictly decreasing."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from .checks import check_count, check_number, shape_of
from .linear import SDE, LinearSDE

__all__ = ["cosine", "interval", "karras", "logsnr", "quadratic", "rectified", "score_sde", "uniform"]

Grid = Callable[[LinearSDE, int], Tensor]


def check_times(times: Tensor, sde: SDE) -> Tensor:
    """Return `times` as float64 on the CPU when it is 1-D, finite, inside [t_min, t_max] and strictly monotone; raise otherwise.

    A time outside by rounding alone (relative 1e-12) is set to the end point it meant.
    """
    if not isinstance(times, Tensor) or not times.is_floating_point() or times.ndim != 1 or len(times) < 2:
        raise ValueError(f"times is {shape_of(times)}; wanted a 1-D float tensor of at least two times: torch.tensor([...])")
    times = times.detach().to("cpu", torch.float64)
    values = times.tolist()  # a grid is short: plain floats are the quickest
    if bad := sum(not math.isfinite(v) for v in values):
        raise ValueError(f"times has {bad} NaN or infinite entries; wanted finite times")
    low, high, slack = min(values), max(values), 1e-12 * sde.t_max
    if low < sde.t_min - slack or high > sde.t_max + slack:
        raise ValueError(
            f"times span [{low:.12g}, {high:.12g}], outside [{sde.t_min:.12g}, {sde.t_max:.12g}], where "
            f"{type(sde).__name__} is regular; stay inside (in float64: float32 rounds the ends) or give the SDE another t_min, t_max"
        )
    if low < sde.t_min or high > sde.t_max:
        times = times.clamp(sde.t_min, sde.t_max)
        values = times.tolist()
    sign = 1.0 if values[1] > values[0] else -1.0
    for i, (a, b) in enumerate(pairwise(values)):
        if not sign * b > sign * a:
            raise ValueError(
                f"times are not strictly monotone: times[{i}] = {a:.17g}, times[{i + 1}] = {b:.17g}; sort them and "
                "drop duplicates: times.unique().flip(0)"
            )
    return times


def _fractions(n: int) -> Tensor:
    return torch.linspace(0, 1, check_count(n, "n") + 1, dtype=torch.float64)


def _snap(times: Tensor, sde: LinearSDE) -> Tensor:
    """End points to the bit: computed ones are off by rounding (Karras in float32 ends at 79.99998)."""
    times[0], times[-1] = sde.t_max, sde.t_min
    return check_times(times, sde)


def uniform(sde: LinearSDE, n: int) -> Tensor:
    """Uniform in t."""
    return _snap(sde.t_max + _fractions(n) * (sde.t_min - sde.t_max), sde)


def quadratic(sde: LinearSDE, n: int) -> Tensor:
    """Uniform in sqrt(t): finer near t_min. Song et al. 2021 (DDIM, ICLR)."""
    a, b = sde.t_max**0.5, sde.t_min**0.5
    return _snap((a + _fractions(n) * (b - a)) ** 2, sde)


def _ends(sde: LinearSDE) -> Tensor:
    return sde.logsnr(torch.tensor([sde.t_max, sde.t_min], dtype=torch.float64))


def logsnr(sde: LinearSDE, n: int) -> Tensor:
    """Uniform in logsnr. Lu et al. 2022 (DPM-Solver, NeurIPS)."""
    a, b = _ends(sde)
    return _snap(sde.time(a + _fractions(n) * (b - a)), sde)


def _in_powers(sde: LinearSDE, n: int, a: float | Tensor, b: Tensor, power: float) -> Tensor:
    """Times uniform in rho^(1 / power), which runs from a to b."""
    return sde.time(-2 * power * (a + _fractions(n) * (b - a)).log())


def karras(sde: LinearSDE, n: int, rho: float = 7.0) -> Tensor:
    """Uniform in (sigma / alpha)^(1 / rho). Karras et al. 2022 (NeurIPS), eq. 5. `functools.partial(karras, rho=3)` for another rho."""
    check_number(rho, "rho", 0.0, open_low=True)
    a, b = (-_ends(sde) / 2 / rho).exp()
    return _snap(_in_powers(sde, n, a, b, rho), sde)


def between(sde: LinearSDE, n: int, high: float, end: Tensor) -> Tensor:
    """n steps uniform in (sigma / alpha)^(1 / 7) from the time where sigma / alpha = high down to `end`: one pass of Restart."""
    a, b = high ** (1 / 7), sde.rho(end) ** (1 / 7)
    times = _in_powers(sde, n, a, b, 7.0).clamp(sde.t_min, sde.t_max)
    times[-1] = end
    return check_times(times, sde)


def rectified(sde: LinearSDE, n: int, power: float = 1.0) -> Tensor:
    """Uniform in tau^(1 / power), tau = sigma / (alpha + sigma), the time of rectified flow (power 1). Liu et al. 2023 (ICLR).

    A larger power is finer near the data, as Karras' rho is in sigma / alpha. `functools.partial(rectified, power=1.5)` for another.
    """
    check_number(power, "power", 0.0, open_low=True)
    a, b = (-_ends(sde) / 2).sigmoid() ** (1 / power)
    return _snap(sde.time(-2 * ((a + _fractions(n) * (b - a)) ** power).logit()), sde)


def cosine(sde: LinearSDE, n: int) -> Tensor:
    """Uniform in the angle atan(sigma / alpha): the cosine schedule's t. Nichol & Dhariwal 2021 (ICML), without the offset."""
    a, b = (-_ends(sde) / 2).exp().atan()
    return _snap(sde.time(-2 * (a + _fractions(n) * (b - a)).tan().log()), sde)


def score_sde(sde: LinearSDE, n: int) -> Tensor:
    """The times of score_sde_pytorch: n + 1 of them uniform in t, float32 as it draws them. For comparison with it: use `uniform`.

    Its N is the number of points, n + 1 here, while its step is 1 / N; ours are the differences of the grid.
    """
    points = torch.linspace(sde.t_max, sde.t_min, check_count(n, "n") + 1, dtype=torch.float32)
    return _snap(points.double(), sde)


def interval(sde: LinearSDE, n: int = 1) -> Tensor:
    """The two end points alone: the grid of an adaptive solver. n is 1."""
    if check_count(n, "n") != 1:
        raise ValueError(f"n is {n}; the interval grid has one step: an adaptive solver chooses its own inside")
    return uniform(sde, 1)
