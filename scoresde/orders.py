"""Orders, measured: strong along one Brownian path a sample, weak without Monte Carlo. Any two SDE solvers can be compared on one path."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import check_count, check_rows, check_state, shape_of
from .denoiser import Denoiser, check_denoiser
from .grid import check_times
from .noise import Noise, brownian
from .sample import check_solver, solve
from .solvers import Solver

__all__ = ["affine_law", "on_path", "slopes", "strong_errors"]


def on_path(denoiser: Denoiser, solver: Solver, x: Tensor, times: Tensor, seeds: Sequence[int] | Tensor) -> Tensor:
    """x at times[-1], driven by the Brownian paths of `seeds` over [t_min, t_max]: the same paths for every solver and every grid.

    x `[B, *shape]` at times[0]; seeds, one a row. float64 is wanted where errors are to be small. No final mean is taken.
    Raises: as `sample`, ValueError for times outside [t_min, t_max] or seeds of another number.
    """
    sde = check_denoiser(denoiser).sde
    times = check_times(times, sde)
    check_rows(seeds, len(check_state(x)), "seeds")
    with torch.no_grad():
        return solve(denoiser, x, check_solver(solver), times, brownian(seeds, sde.t_min, sde.t_max), None).x


def strong_errors(
    denoiser: Denoiser, solver: Solver, x: Tensor, grids: Sequence[Tensor], seeds: Sequence[int] | Tensor, reference: Tensor
) -> list[float]:
    """Root mean square distance of `on_path` to `reference` (a finer solution on the same paths, shape of x), one a grid."""
    if not isinstance(reference, Tensor) or reference.shape != check_state(x).shape:
        raise ValueError(f"reference is {shape_of(reference)}; wanted a state like x {shape_of(x)}: on_path(...) on a fine grid")
    return [float((on_path(denoiser, solver, x, times, seeds) - reference).square().mean().sqrt()) for times in grids]


def slopes(steps: Sequence[int], errors: Sequence[float]) -> list[float]:
    """The order between neighbours: -log(error ratio) / log(steps ratio)."""
    check_rows(errors, len(steps), "errors")
    pairs = zip(steps[:-1], steps[1:], errors[:-1], errors[1:], strict=True)
    return [math.log(e / f) / math.log(n / m) for m, n, e, f in pairs]


class _Impulses(Noise):
    """Noise that is 0 but for one unit entry a row: row first + k feels entry k of all that is drawn; the last row feels all, at half."""

    def __init__(self, first: int) -> None:
        self.first, self.drawn = first, 0

    def draw(self, x: Tensor, stream: int) -> Tensor:
        """The next d entries."""
        z, d = torch.zeros_like(x), x[0].numel()
        rows = torch.arange(d) + self.first + self.drawn
        felt = rows < len(x) - 1
        z.view(len(x), d)[rows[felt], torch.arange(d)[felt]] = 1
        z[-1] = 0.5
        self.drawn += d
        return z

    def signs(self, x: Tensor, stream: int) -> Tensor:
        """Refused: what draws them is not affine."""
        raise TypeError("the solver draws signs or uniforms: its step is not affine in x and in normal noise, as MALA's is not")

    uniform = signs

    def select(self, index: Any) -> Noise:
        """Refused: a probe is one batch."""
        raise TypeError("a probe has one row an entry of the noise and cannot be split")


@torch.no_grad()
def affine_law(denoiser: Denoiser, solver: Solver, times: Tensor, mean: Tensor, cov: Tensor) -> tuple[Tensor, Tensor]:
    """Mean `[D]` and covariance `[D, D]` of x at times[-1], exactly: x_{times[0]} ~ N(mean, cov) and an affine score (`Gaussian`).

    The chain is then affine in x and in every draw, x' = o + A x + sum_k B_k z_k, and one run with a row for o, one for each entry of x
    and of the z gives o, A and B: the law is N(o + A mean, A cov A' + sum_k B_k B_k'), with no Monte Carlo. Memory: (draws x D)^2.

    Args: mean `[*shape]`, cov `[D, D]`, D = numel(shape), float64. Raises: TypeError or ValueError for a chain that is not affine.
    """
    d, shape = mean.numel(), mean.shape
    check_count(d, "the dimension of mean")
    if cov.shape != (d, d):
        raise ValueError(f"cov is {shape_of(cov)}; wanted [{d}, {d}] for mean {shape_of(mean)}")
    probe, drawn = torch.zeros(2, *shape, dtype=torch.float64), 0
    times = check_times(times, check_denoiser(denoiser).sde)
    noise: Any = None
    for _ in range(2):  # to count the draws, then to feel each
        x = torch.zeros(2 + d + drawn, d, dtype=torch.float64)
        x[1 : 1 + d] = torch.eye(d, dtype=torch.float64)
        x[-1] = 0.5
        noise = _Impulses(1 + d)
        probe = solve(denoiser, x.reshape(-1, *shape), check_solver(solver), times, noise, None).x.flatten(1)
        drawn = noise.drawn
    o, effect = probe[0], probe[1:-1] - probe[0]
    a, b = effect[:d], effect[d:]
    gap = float((o + effect.sum(0) / 2 - probe[-1]).abs().max())
    if not gap <= 1e-6 * (1 + float(probe.abs().max())):
        raise ValueError(
            f"{solver!r} on {type(denoiser).__name__} is not affine (by {gap:.3g}); wanted an affine score: Gaussian(...)"
        )
    return o + mean.flatten().double() @ a, a.T @ cov.double() @ a + b.T @ b
