"""What the law tests and the table of docs/solvers.md share: the problems, the lists that follow `__all__`, the measurements."""

from __future__ import annotations

import dataclasses
import functools
import math
from itertools import pairwise

import torch
from torch import Tensor

import scoresde
from scoresde import sde as sdes
from scoresde import solvers, variables
from scoresde.exact import Gaussian, Mixture
from scoresde.noise import Noise, seeded
from scoresde.orders import affine_law, on_path, slopes
from scoresde.solve import solve, steps_within

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


def first(*quick, of=SIX):
    """All of these names, those that are not quick in the slow suite."""
    import pytest  # scripts without it read this file too

    return [pytest.param(name, marks=[] if name in quick else [pytest.mark.slow]) for name in of]


def square(rho: Tensor) -> Tensor:
    """ER-SDE's phi for the reverse SDE."""
    return rho**2


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
    "Adaptive": [dict(solver=solvers.Heun(), rtol=1e-2, atol=1e-2)],
    "Ancestral": [dict(upper=0.0), dict(upper=1.0), dict(upper=0.5)],
    "AnnealedLangevin": [dict(snr=0.1, moves=3)],
    "Churn": [
        dict(solver=solvers.Heun(), s_churn=10.0), dict(solver=solvers.DDIM(), s_churn=4.0, s_min=0.05, s_max=5.0),
        dict(solver=solvers.AdamsBashforth(3), s_churn=4.0, s_min=0.05, s_max=5.0),
    ],
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
    "ERSDE": [
        dict(degree=1), dict(degree=2), dict(degree=3), dict(degree=3, phi=square), dict(degree=3, phi=square, weights=solvers.exact),
    ],
    "DPMAdaptive": [dict(order=2), dict(order=3)],
    "Euler": [dict(), dict(variable=variables.time)],
    "Heun": [dict(), dict(variable=variables.time)],
    "IPNDM": [dict(order=1), dict(order=2), dict(order=3), dict(order=4)],
    "PredictorCorrector": [
        dict(predictor=solvers.ReverseDiffusion(), corrector=solvers.Langevin(0.1)),
        dict(predictor=solvers.Ancestral(), corrector=solvers.Langevin(0.1), corrector_steps=2),
        dict(predictor=solvers.DDIM(), corrector=solvers.Langevin(0.1), corrector_first=True),
        dict(predictor=solvers.DDIM(), corrector=solvers.MALA(0.1)),
    ],
    "Restart": [
        dict(solver=solvers.Heun(), intervals=((0.06, 0.5, 3, 2),)),
        dict(solver=solvers.UniPC(3), intervals=((0.06, 0.5, 4, 1), (0.5, 2.0, 3, 2))),
    ],
    "RK4": [dict(), dict(variable=variables.velocity)],
    "SASolver": [
        dict(predictor=1), dict(predictor=2), dict(predictor=3), dict(predictor=3, corrector=0), dict(predictor=3, tau=0.5),
        dict(predictor=3, tau=solvers.Band(0.05, 1.0)),
    ],
    "SDEDPMSolverPP": [
        dict(degree=1), dict(degree=2), dict(degree=3), dict(degree=2, weights=solvers.exact), dict(degree=2, tau=0.5),
        dict(degree=2, singlestep=True), dict(degree=3, singlestep=True),
    ],
    "SEEDS": [dict(degree=1), dict(degree=2), dict(degree=3), dict(degree=2, tau=0.5)],
    "StochasticHeun": [dict(), dict(tau=0.5)],
    "TorchDiffEq": [dict(), dict(method="rk4", variable=variables.velocity)],
    "TorchSDE": [dict(method="euler"), dict(method="srk")],
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
STOCHASTIC = [s for s in SOLVERS if s.stochastic and not s.adaptive]


def budget_of(solver: solvers.Solver, steps: int) -> dict[str, int]:
    """So many steps, of a solver that does not choose its own."""
    return {} if solver.adaptive else {"steps": steps}


def coarse(solver: solvers.Solver) -> solvers.Solver:
    """An adaptive solver at a tolerance of 1e-3 at least; any other as it is."""
    if not solver.adaptive:
        return solver
    return dataclasses.replace(solver, rtol=max(solver.rtol, 1e-3), atol=max(solver.atol, 1e-3))


def label(solver: object) -> str:
    return repr(solver).replace("()", "")


def mixture(sde: sdes.LinearSDE) -> Mixture:
    """The 2-D problem: three Gaussians of different widths and weights."""
    means = torch.tensor([[1.0, 0.3], [-0.8, 0.9], [-0.2, -1.1]], dtype=D)
    return Mixture(sde, means, torch.tensor([0.35, 0.25, 0.5], dtype=D), weights=torch.tensor([0.5, 0.2, 0.3], dtype=D))


def unet(**kwargs):
    """A network of images (1, 4, 4) in float64, away from its zero start."""
    net = scoresde.UNet((1, 4, 4), channels=8, **kwargs).double()
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.add_(0.1 * seeded([i]).initial((1, *p.shape), D)[0])
    return scoresde.Preconditioned(net, sdes.VP())


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
    # of a last step of lower order the error is small at first, and its slope is seen later
    for n in (2 * n for n in STEPS) if getattr(solver, "lower_final", False) else STEPS:
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


class Line(scoresde.Denoiser):
    """The exact x0 of N(0.6, 0.45^2), an evaluation as cheap as one can be."""

    mean, var = 0.6, 0.45**2

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        a, s = self.sde.alpha(t), self.sde.sigma(t)
        return self.mean + (a * self.var / (a**2 * self.var + s**2)) * (x - a * self.mean)

    def law(self, t: Tensor) -> tuple[Tensor, Tensor]:
        a, s = self.sde.alpha(t), self.sde.sigma(t)
        return (a * self.mean)[None], (a**2 * self.var + s**2)[None, None]


def weak_errors(solver: solvers.Solver, sde: sdes.LinearSDE, counts: tuple[int, ...]) -> tuple[list[float], list[float]]:
    """(errors, slopes): of mean and deviation of x / alpha, where rho = 1/2 and at t_min, added; no Monte Carlo.

    On the grid the solver recommends. At the end alone some solvers gain an order on a Gaussian, by a cancellation over the whole of lam;
    half way they do not.
    """
    denoiser, errors = Line(sde), []
    for n in counts:
        times = solver.grid(sde, n)
        half = int((sde.rho(solver.grid(sde, counts[0])) - 0.5).abs().argmin()) * n // counts[0]
        error = 0.0
        for part in (times[: half + 1], times):
            (mean, cov), (mean_t, cov_t) = affine_law(denoiser, solver, part, *denoiser.law(times[0])), denoiser.law(part[-1])
            error += float(((mean - mean_t).abs() + (cov.sqrt() - cov_t.sqrt()).abs()[0]) / sde.alpha(part[-1]))
        errors.append(error)
    return errors, slopes(counts, errors)


PATH_SDES = {"VE": sdes.VE(sigma_min=0.1, sigma_max=3.0), "VP": sdes.VP(t_min=0.1), "EDM": sdes.EDM(t_min=0.2, t_max=5.0)}
PATH_STEPS = (128, 256, 512)
EDGES = (0.1 * 30**0.25 * (1 + 1e-3), 0.1 * 30**0.75 * (1 + 1e-3))  # at nodes of VE's grids: between nodes a switch comes O(h) late
SWITCHED = solvers.SASolver(3, tau=solvers.Band(*EDGES))


def path_problem(name: str) -> Mixture:
    """A 1-D mixture of two, whose score bends enough for a term of order 1.5 to show beside those of order 2."""
    m, std = (0.5, 0.05) if name == "VP" else (0.8, 0.3)
    means, widths = torch.tensor([[m], [0.1 - m]], dtype=D), torch.tensor([std, std + 0.1], dtype=D)
    return Mixture(PATH_SDES[name], means, widths, weights=torch.tensor([0.6, 0.4], dtype=D))


@functools.cache
def path_end(solver: solvers.Solver, name: str, steps: int, paths: int) -> Tensor:
    """x at t_min on `steps` uniform steps of t, whose times are dyadic: the path costs least there."""
    denoiser, sde = path_problem(name), PATH_SDES[name]
    times = torch.linspace(sde.t_max, sde.t_min, steps + 1, dtype=D)
    return on_path(denoiser, solver, denoiser.sample(paths, times[0], seeds=range(paths)), times, range(paths))


def strong_slope(
    solver: solvers.Solver, name: str, counts: tuple[int, ...] = PATH_STEPS, paths: int = 2000
) -> tuple[list[float], float]:
    """(errors, slope of the first to the last): RMS distance along one Brownian path a sample to a fine solution.

    Solvers of the reverse SDE are held to SRA3's, so that all have one limit; those of another noise level to their own.
    """
    one = is_of_reverse_sde(solver)
    fine = path_end(solvers.SRA3() if one else solver, name, 2048, paths)
    counts = counts if one else tuple(n // 4 for n in counts)  # their own error, not 0 at 2048 steps, bends the slope less
    errors = [float((path_end(solver, name, n, paths) - fine).square().mean().sqrt()) for n in counts]
    return errors, slopes((counts[0], counts[-1]), (errors[0], errors[-1]))[0]


def is_of_reverse_sde(solver: solvers.Solver) -> bool:
    """Whether a stochastic solver is of the reverse SDE itself, tau = 1, not of another noise level."""
    level = getattr(solver, "level", None)
    if level is None:
        return getattr(solver, "eta", 1.0) == 1
    return getattr(level, "tau", None) == 1 or getattr(level, "phi", None) is square


def gaussian_law(denoiser: Gaussian, t: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of x_t."""
    a, s = denoiser.sde.alpha(t), denoiser.sde.sigma(t)
    q, r = denoiser.basis[0], denoiser.spectrum[0]
    eye = torch.eye(len(q), dtype=D)
    cov = q @ torch.diag(r) @ q.T + denoiser.tail[0] * (eye - q @ q.T)
    return a * denoiser.means[0], a**2 * cov + s**2 * eye


def describe(solver: solvers.Solver) -> dict[str, object]:
    return {f.name: getattr(solver, f.name) for f in dataclasses.fields(solver)}
