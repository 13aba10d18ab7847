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
from .solve import check_solver, solve
from .solvers import Solver, StochasticSolver

__all__ = ["affine_law", "on_path", "slopes", "strong_errors"]


def on_path(denoiser: Denoiser, solver: Solver, x: Tensor, times: Tensor, seeds: Sequence[int] | Tensor) -> Tensor:
    """x at times[-1], driven by the Brownian paths of `seeds` over [t_min, t_max]: the same paths for every solver and every grid.

    x `[B, *shape]` at times[0]; seeds, one a row. float64 is wanted where errors are to be small. No final mean is taken.
    Raises: as `sample`, ValueError for times outside [t_min, t_max] or seeds of another number.
    """
    sde = check_denoiser(denoiser).sde
    times = check_times(times, sde)
    check_solver(solver)
    if isinstance(solver, StochasticSolver) and not solver.strong_order:
        raise ValueError(
            f"{solver!r} has strong order 0: its noise belongs to no interval of a path; wanted a solver with one, as SRA3()"
        )
    if not isinstance(seeds, (Sequence, Tensor)):
        raise TypeError(f"seeds is {seeds!r}; wanted one integer a row: range({len(check_state(x))})")
    check_rows(seeds, len(check_state(x)), "seeds")
    with torch.no_grad():
        return solve(denoiser, x, solver, times, brownian(seeds, sde.t_min, sde.t_max), None).x


def strong_errors(
    denoiser: Denoiser, solver: Solver, x: Tensor, grids: Sequence[Tensor], seeds: Sequence[int] | Tensor, reference: Tensor
) -> list[float]:
    """Root mean square distance of `on_path` to `reference` (a finer solution on the same paths, shape of x), one a grid.

    Where the score bends sharply a few paths, on a watershed between modes, rule a root mean square: look at the rows of `on_path` too.
    """
    if isinstance(grids, Tensor):
        raise TypeError(f"grids is {shape_of(grids)}; wanted a list of times, as [grid.uniform(sde, n) for n in (32, 64)]")
    if not isinstance(reference, Tensor) or reference.shape != check_state(x).shape:
        raise ValueError(f"reference is {shape_of(reference)}; wanted a state like x {shape_of(x)}: on_path(...) on a fine grid")
    return [float((on_path(denoiser, solver, x, times, seeds) - reference).square().mean().sqrt()) for times in grids]


def slopes(steps: Sequence[int], errors: Sequence[float]) -> list[float]:
    """The order between neighbours: -log(error ratio) / log(steps ratio)."""
    if len(errors) != len(steps) or not all(0 < e < math.inf for e in errors) or len(set(steps)) < len(steps) or min(steps) < 1:
        raise ValueError(f"steps is {list(steps)} and errors {list(errors)}; wanted different steps and a positive error for each")
    pairs = zip(steps[:-1], steps[1:], errors[:-1], errors[1:], strict=True)
    return [math.log(e / f) / math.log(n / m) for m, n, e, f in pairs]


class _Impulses(Noise):
    """Noise that is 0 but for one unit entry a row: row first + k feels entry k of all that is drawn; the last three rows feel all."""

    path = True  # as good as one: each draw is felt by a row of its own

    def __init__(self, first: int) -> None:
        self.first, self.drawn = first, 0

    @staticmethod
    def checks(k: Tensor) -> Tensor:
        """Entries k of the last three rows: small and of one sign, large and of both, and minus that. `[3, len(k)]`."""
        large = 4 * torch.cos(2.4 * k)
        return torch.stack([0.3 + 0.2 * torch.sin(k + 1.0), large, -large]).double()

    def draw(self, x: Tensor, stream: int) -> Tensor:
        """The next d entries."""
        z, d = torch.zeros_like(x), x[0].numel()
        entries = torch.arange(self.drawn, self.drawn + d)
        felt = entries + self.first < len(x) - 3
        flat = z.view(len(x), d)
        flat[entries[felt] + self.first, torch.arange(d)[felt]] = 1
        flat[-3:] = self.checks(entries).to(z)
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
    if not isinstance(mean, Tensor) or not isinstance(cov, Tensor) or not mean.ndim:
        raise TypeError(f"mean is {shape_of(mean)}, cov {shape_of(cov)}; wanted tensors [*shape] and [D, D]")
    d, shape = mean.numel(), mean.shape
    check_count(d, "the dimension of mean")
    if cov.shape != (d, d) or not bool(cov.isfinite().all() & mean.isfinite().all()) or bool((cov.diagonal() < 0).any()):
        raise ValueError(f"cov is {shape_of(cov)}; wanted a finite mean {shape_of(mean)} and a covariance [{d}, {d}]")
    mean, cov = mean.flatten().double(), cov.double()
    times, noise = check_times(times, check_denoiser(denoiser).sde), _Impulses(0)
    probe, drawn, far = torch.zeros(5, d), 0, 4 * cov.diagonal().sqrt() * torch.cos(torch.arange(d) * 2.4 + 0.5)
    checked = torch.stack([torch.full_like(mean, 0.5), mean + far, mean - far])
    for _ in range(2):  # to count the draws, then to feel each
        x = torch.zeros(4 + d + drawn, d, dtype=torch.float64)
        x[1 : 1 + d] = torch.eye(d, dtype=torch.float64)
        x[-3:] = checked
        noise = _Impulses(1 + d)
        probe = solve(denoiser, x.reshape(-1, *shape), check_solver(solver), times, noise, None).x.flatten(1)
        drawn = noise.drawn
    o, effect = probe[0], probe[1:-3] - probe[0]
    a, b = effect[:d], effect[d:]
    wanted = o + checked @ a + noise.checks(torch.arange(drawn)) @ b
    gap = float((wanted - probe[-3:]).abs().max())
    if not gap <= 1e-6 * (1 + float(probe.abs().max())):
        raise ValueError(
            f"{solver!r} on {type(denoiser).__name__} is not affine (by {gap:.3g}); wanted an affine score, as Gaussian's, and a step "
            "that draws from oracle.noise alone"
        )
    return o + mean @ a, a.T @ cov @ a + b.T @ b
