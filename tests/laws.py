"""What the law tests and the table of docs/solvers.md share: the problems, the lists that follow `__all__`, the measurements."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import torch
from torch import Tensor

import scoresde
from scoresde import sde as sdes
from scoresde import solvers, variables
from scoresde.exact import Gaussian, Mixture
from scoresde.noise import Noise
from scoresde.sample import solve, steps_within

D = torch.float64
STEPS = (48, 96, 192, 384)


def every_sde() -> dict[str, sdes.LinearSDE]:
    """One of each exported SDE, at its defaults where it has them."""
    made: dict[str, sdes.LinearSDE] = {}
    for name in sdes.__all__:
        kind = getattr(sdes, name)
        if kind in (sdes.SDE, sdes.LinearSDE):
            continue
        if kind is sdes.DiscreteVP:
            made[name] = sdes.VP.from_betas(torch.linspace(1e-4, 0.02, 1000, dtype=D))
        elif kind is sdes.Tabulated:
            made[name] = sdes.LinearSDE.from_coefficients(lambda t: -0.05 - 9.95 * t, lambda t: (0.1 + 19.9 * t).sqrt())
        else:
            made[name] = kind()
    return made


SIX = ("VP", "SubVP", "VE", "EDM", "Cosine", "Rectified")
VARIANTS = {
    "AdamsBashforth": [
        dict(order=2, variable=variables.velocity), dict(order=3, variable=variables.velocity), dict(order=4, variable=variables.velocity),
        dict(order=3, variable=variables.eps), dict(order=4, variable=variables.x0), dict(order=3, variable=variables.time),
        dict(order=2, variable=variables.v),
        dict(order=3, variable=variables.velocity, startup=False), dict(order=4, variable=variables.eps, lower_final=True),
    ],
    "AdamsMoulton": [
        dict(order=2, variable=variables.velocity), dict(order=3, variable=variables.eps), dict(order=4, variable=variables.velocity),
        dict(order=3, variable=variables.V(0.5)),
    ],
    "Ancestral": [dict(upper=0.0), dict(upper=1.0)],
    "DDIM": [dict(eta=0.0), dict(eta=1.0), dict(eta=0.5)],
    "DEIS": [
        dict(order=0), dict(order=1), dict(order=2), dict(order=3), dict(order=3, coordinate=variables.rho),
        dict(order=3, coordinate=variables.lam),
    ],
    "DPMSolver": [dict(order=1), dict(order=2), dict(order=3)],
    "DPMSolverPP": [
        dict(order=1), dict(order=2), dict(order=3), dict(order=2, weights=solvers.exact), dict(order=2, singlestep=True),
        dict(order=3, singlestep=True),
    ],
    "Euler": [dict(), dict(variable=variables.time)],
    "Heun": [dict(), dict(variable=variables.time)],
    "IPNDM": [dict(order=1), dict(order=2), dict(order=3), dict(order=4)],
    "PredictorCorrector": [
        dict(predictor=solvers.EulerMaruyama(), corrector=solvers.Langevin(0.1)),
        dict(predictor=solvers.Ancestral(), corrector=solvers.Langevin(0.1), corrections=2),
        dict(predictor=solvers.DDIM(), corrector=solvers.MALA(0.1)),
    ],
    "RK4": [dict(), dict(variable=variables.velocity)],
    "UniPC": [
        dict(order=1), dict(order=2), dict(order=3), dict(order=4), dict(order=2, weights=solvers.bh1),
        dict(order=3, weights=solvers.exact), dict(order=3, variable=variables.eps),
    ],
}  # fmt: skip


def every_solver() -> list[solvers.Solver]:
    """Each exported solver, in each variant worth a row; a new class or function in `__all__` is here without an edit."""
    made = []
    for name in solvers.__all__:
        kind = getattr(solvers, name)
        if kind in (solvers.Solver, solvers.StochasticSolver):
            continue
        made += [kind(**settings) for settings in VARIANTS.get(name, [{}])]
    return made


SOLVERS = every_solver()
FLOWS = [s for s in SOLVERS if not s.stochastic and not s.adaptive]
STOCHASTIC = [s for s in SOLVERS if s.stochastic]


def label(solver: object) -> str:
    return repr(solver).replace("()", "")


def mixture(sde: sdes.LinearSDE) -> Mixture:
    """The 2-D problem: three Gaussians of different widths and weights."""
    means = torch.tensor([[1.0, 0.3], [-0.8, 0.9], [-0.2, -1.1]], dtype=D)
    return Mixture(sde, means, torch.tensor([0.35, 0.25, 0.5], dtype=D), weights=torch.tensor([0.5, 0.2, 0.3], dtype=D))


def logsnr_times(sde: sdes.LinearSDE, n: int, low: float = -4.0, high: float = 4.0) -> Tensor:
    """n steps uniform in logsnr on [low, high], down in time."""
    return sde.time(torch.linspace(low, high, n + 1, dtype=D))


def run(denoiser: scoresde.Denoiser, solver: solvers.Solver, x: Tensor, times: Tensor, noise: Noise | None = None) -> Tensor:
    return solve(denoiser, x, solver, times, noise, None).x


TIGHT = solvers.TorchDiffEq("dopri8", rtol=1e-12, atol=1e-12)


def order_in_x(solver: solvers.Solver, sde: sdes.LinearSDE, samples: int = 64) -> tuple[list[float], list[float]]:
    """(errors, slopes) over STEPS: RMS distance to the flow solved by dopri8 at 1e-12, from the exact p_T down to logsnr 4."""
    denoiser = mixture(sde)
    ends = logsnr_times(sde, 1)
    x = denoiser.sample(samples, ends[0], seeds=range(samples))
    truth = run(denoiser, TIGHT, x, ends)
    errors = [float((run(denoiser, solver, x, logsnr_times(sde, n)) - truth).square().mean().sqrt()) for n in STEPS]
    return errors, [math.log2(a / b) for a, b in pairwise(errors)]


def order_in_log_p(solver: solvers.Solver, sde: sdes.LinearSDE, samples: int = 64) -> tuple[list[float], list[float]]:
    """(errors, slopes) over STEPS: RMS error of log p at logsnr 4 against the closed form, with the exact p_T as prior."""
    denoiser = mixture(sde)
    ends = logsnr_times(sde, 1)
    x = denoiser.sample(samples, ends[1], seeds=range(samples))
    truth = denoiser.log_prob(x, ends[1])
    errors = []
    for n in STEPS:
        found = scoresde.log_prob(
            denoiser, x, solver, times=logsnr_times(sde, n).flip(0), prior=lambda z: denoiser.log_prob(z, ends[0])
        )
        errors.append(float((found.value - truth).square().mean().sqrt()))
    return errors, [math.log2(a / b) for a, b in pairwise(errors)]


def full_range(solver: solvers.Solver, sde: sdes.LinearSDE, budgets: tuple[int, ...], samples: int = 64) -> list[float | None]:
    """RMS distance to the flow from t_max to t_min, on the grid the solver recommends, within each budget of evaluations."""
    denoiser = mixture(sde)
    ends = torch.tensor([sde.t_max, sde.t_min], dtype=D)
    x = denoiser.sample(samples, ends[0], seeds=range(samples))
    truth = run(denoiser, TIGHT, x, ends)
    errors: list[float | None] = []
    for nfe in budgets:
        if solver.evaluations(1) > nfe:
            errors.append(None)
            continue
        times = solver.grid(sde, steps_within(solver, nfe))
        errors.append(float((run(denoiser, solver, x, times) - truth).square().mean().sqrt()))
    return errors


class Impulses(Noise):
    """Noise that is zero but for one unit entry a row: row 2 + k feels draw k // D in dimension k % D. Probes a linear chain."""

    def __init__(self, rows: int) -> None:
        self.rows, self.draws = rows, 0

    def draw(self, x: Tensor, stream: int) -> Tensor:
        z = torch.zeros_like(x)
        d = x[0].numel()
        for j in range(d):
            row = 1 + d + self.draws * d + j
            if row < self.rows:
                z.view(len(x), -1)[row, j] = 1
        self.draws += 1
        return z

    uniform = signs = None

    def select(self, index: object) -> Noise:
        return self


def linear_law(solver: solvers.Solver, denoiser: Gaussian, times: Tensor, draws: int) -> tuple[Tensor, Tensor]:
    """Exact (mean, covariance) of a stochastic solver's x on a Gaussian problem: its chain is affine in x and in each draw.

    One run with a row for the offset, one a dimension for the map, one a draw and dimension for the noise: no Monte Carlo.
    """
    d = denoiser.shape.numel()
    rows = 1 + d + draws * d
    x = torch.zeros(rows, d, dtype=D)
    x[1 : 1 + d] = torch.eye(d, dtype=D)
    noise = Impulses(rows)
    last = run(denoiser, solver, x, times, noise)
    if noise.draws != draws:
        raise AssertionError(f"{solver!r} drew {noise.draws} times, the test allowed for {draws}")
    offset, effect = last[0], last[1:] - last[0]
    a, b = effect[:d], effect[d:]
    start_mean, start_cov = gaussian_law(denoiser, times[0])
    return offset + start_mean @ a, a.T @ start_cov @ a + b.T @ b


def gaussian_law(denoiser: Gaussian, t: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of x_t."""
    a, s = denoiser.sde.alpha(t), denoiser.sde.sigma(t)
    q, r = denoiser.basis[0], denoiser.spectrum[0]
    eye = torch.eye(len(q), dtype=D)
    cov = q @ torch.diag(r) @ q.T + denoiser.tail[0] * (eye - q @ q.T)
    return a * denoiser.means[0], a**2 * cov + s**2 * eye


def describe(solver: solvers.Solver) -> dict[str, object]:
    return {f.name: getattr(solver, f.name) for f in dataclasses.fields(solver)}
