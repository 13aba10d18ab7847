"""Ours against published updates for which no peer here runs, and against Karras et al.'s algorithm 1 in full."""

import math
from functools import partial
from itertools import pairwise

import published
import pytest
import torch
from peers import EXACT, SDES, D, Problem, agree, karras, problems, ramp

import scoresde
from scoresde import DEIS, EDM, IPNDM, DPMSolverPP, Heun, UniPC, variables
from scoresde.solvers import bh1, bh2

RHO = karras(14)


@problems
@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_tab_deis(order: int, problem: Problem):
    """Zhang & Chen 2023's tAB: the polynomial of eps is in the SDE's own time, so it alone differs from SDE to SDE."""
    x, time = problem.start(RHO), lambda lam: problem.time(torch.exp(-lam))
    wanted = published.adams_bashforth(problem, x, RHO, ramp(14, order + 1), coordinate=time)
    agree(problem.ours(DEIS(order, startup=False), x, RHO), wanted, EXACT)


@problems
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ipndm(order: int, problem: Problem):
    x = problem.start(RHO)
    agree(problem.ours(IPNDM(order), x, RHO), published.ipndm(problem, x, RHO, ramp(14, order)), EXACT)


@problems
@pytest.mark.parametrize(("B", "weights"), [(lambda h: h, bh1), (torch.expm1, bh2)], ids=["bh1", "bh2"])
def test_unipc_4(B, weights, problem: Problem):
    x = problem.start(RHO)
    wanted = published.unipc(problem, x, RHO, ramp(14, 4), B)
    agree(problem.ours(UniPC(4, weights, startup=False), x, RHO), wanted, EXACT)


# --- Karras et al. 2022 -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n", [2, 18])
def test_edm_algorithm_1(n: int):
    """sigma(t) = t, s(t) = 1, the times of eq. 5 with rho = 7 and t_N = 0: 2 n - 1 evaluations, 35 at n = 18. All of it is ours."""
    sde, u = EDM(), torch.linspace(0, 1, n, dtype=D)
    denoiser = scoresde.Mixture(sde, torch.tensor([[1.0, 0.3], [-0.8, 0.9]], dtype=D), torch.tensor([0.35, 0.25], dtype=D))
    times = (80 ** (1 / 7) + u * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    x = denoiser.sample(16, torch.tensor(80.0, dtype=D), seeds=range(16))
    wanted = published.edm(denoiser, x, torch.cat([times, times.new_zeros(1)]))
    found = scoresde.sample(denoiser, x.shape, Heun(), nfe=2 * n - 1, x=x, seeds=range(16))
    assert found.nfe == 2 * n - 1
    agree(found.x, wanted, EXACT)


def test_edm_algorithm_1_in_the_time_of_vp():
    """The same algorithm with VP's sigma(t) and s(t) of table 1 and any times is Heun on dx/dt as it stands."""
    problem, sde = Problem("VP", 2), SDES["VP"]
    times = torch.linspace(1.0, 0.01, 30, dtype=D)
    x = problem.denoiser.sample(16, times[0], seeds=range(16))

    def sigma(t):  # sqrt(e^B - 1), B' = beta
        s = torch.expm1(sde.B(t)).sqrt()
        return s, sde.beta(t) * (s**2 + 1) / (2 * s)

    def scale(t):  # 1 / sqrt(sigma^2 + 1) = e^(-B/2)
        return torch.exp(-sde.B(t) / 2), -sde.beta(t) / 2 * torch.exp(-sde.B(t) / 2)

    wanted = published.edm(problem.denoiser, x, times, sigma, scale)
    found = scoresde.sample(problem.denoiser, x.shape, Heun(variables.time), times=times, x=x, denoise=False, seeds=range(16))
    agree(found.x, wanted, EXACT)


# --- the third order of DPM-Solver++(3M) -------------------------------------------------------------------------------------
class Path(scoresde.Denoiser):
    """x0 along one exact path of a Gaussian's flow, whatever x: every history a solver builds on it is exact.

    Of data N(0, c^2), z(rho) = z(1) sqrt((c^2 + rho^2) / (c^2 + 1)) and x0 = c^2 / (c^2 + rho^2) z.
    """

    c = torch.tensor([[0.3, 0.7, 1.1]], dtype=D)

    def forward(self, x, t):
        return self.c**2 / (self.c**2 + t**2) * self.z(t)

    def z(self, t):
        return ((self.c**2 + t**2) / (self.c**2 + 1)).sqrt()

    # what `published` asks of a problem
    x0 = forward
    alpha = staticmethod(torch.ones_like)
    sigma = staticmethod(lambda rho: rho)


def local_slopes(run) -> list[float]:
    """Halving h, from log2 of the error that the third step alone adds: what is left of x when its inherited error is taken away."""
    path, errors = Path(SDES["EDM"]), []
    for k in range(6):
        h = 0.4 / 2**k
        rho = torch.exp(-torch.tensor([-1.9 * h, -0.7 * h, 0.0, h], dtype=D))  # uneven steps 1.2, 0.7, 1 times h
        before, after = (run(path, path.z(rho[0]), rho[:m]) - path.z(rho[m - 1]) for m in (3, 4))
        errors.append(float((after - rho[3] / rho[2] * before).abs().max()))
    return [math.log2(a / b) for a, b in pairwise(errors)]


def test_3m_wants_the_factor_2():
    """With an exact history the local order is 4 with the factor 2 on the second difference (ours), 3 with the peers' factor 1."""
    update = lambda p, x, rho, d2: published.dpmpp_multistep(p, x, rho, ramp(len(rho) - 1, 3), d2=d2, exact=True)
    right, halved = local_slopes(partial(update, d2=2.0)), local_slopes(partial(update, d2=1.0))
    assert abs(right[-1] - 4) < 0.1
    assert abs(halved[-1] - 3) < 0.1
    ours = lambda p, x, rho: scoresde.sample(p, x.shape, DPMSolverPP(3, startup=False), times=rho, x=x, denoise=False, seeds=[0]).x
    assert local_slopes(ours) == pytest.approx(right, abs=1e-4)
