"""The published updates of the stochastic solvers in float64, in the letters of their papers: own code, slow, and what ours must equal.

Unless it says otherwise a function takes a `Problem`, x at rho[0], the noise levels rho and z, an iterator of unit normals in the order
they are drawn, and returns x at rho[-1]. score_sde's rules (Song et al. 2021, appendices E and G, and its code) are steps i of a grid.
Before and beside them: what feeds the peers and ours the same draws on the same SDE.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import published
import scipy.integrate
import torch
import torchsde
from peers import Problem, karras
from torch import Tensor

import scoresde
from scoresde.noise import CORRECTOR, Noise
from scoresde.solve import solve

D = torch.float64
RHO = karras(12)
Draws = Iterator[Tensor]


# --- the same on both sides -------------------------------------------------------------------------------------------------
class Replay(Noise):
    """These unit normals, in this order, whatever asks."""

    def __init__(self, draws: Sequence[Tensor]) -> None:
        self.left = list(draws)

    def draw(self, x: Tensor, stream: int) -> Tensor:
        return self.left.pop(0)

    signs = uniform = select = None  # nothing here asks for them


def begin(p: Problem, n: int, rho: Tensor = RHO) -> tuple[Tensor, Tensor, list[Tensor]]:
    """x at rho[0], z = x / alpha, and n unit normals like them."""
    x, g = p.start(rho), torch.Generator().manual_seed(n)
    return x, x / p.alpha(rho[0]), [torch.randn(x.shape, generator=g, dtype=D) for _ in range(n)]


@torch.no_grad()
def ours(p: Problem, solver: scoresde.Solver, x: Tensor, times: Tensor, draws: Sequence[Tensor], finish: Any = None) -> Tensor:
    """What scoresde makes of it, every draw used; finish: what follows the last time, as `final_mean`."""
    noise = Replay(draws)
    found = solve(p.denoiser, x, solver, times, noise, None, finish=finish).x
    assert not noise.left
    return found


def replay(monkeypatch: Any, scheduler: Any, draws: Sequence[Tensor]) -> None:
    """Feed a scheduler, which draws by the `randn_tensor` of its module."""
    left = iter(draws)
    monkeypatch.setattr(sys.modules[type(scheduler).__module__], "randn_tensor", lambda *_, **__: next(left))


def sampler(draws: Sequence[Tensor]) -> Callable:
    """k-diffusion's noise_sampler(sigma, sigma_next)."""
    left = iter(draws)
    return lambda sigma, sigma_next: next(left)


class Chain(Problem):
    """The problem under the chain of `betas`; its levels rho are those of the nodes, which `time` gives back exactly."""

    def __init__(self, betas: Tensor, dims: int) -> None:
        super().__init__("VP", dims)
        self.betas, self.sde = betas, scoresde.VP.from_betas(betas)
        self.denoiser.sde, self.rho = self.sde, self.sde.rho(self.sde.nodes())

    def time(self, rho: Tensor) -> Tensor:
        return self.sde.nodes()[(self.rho - rho[..., None]).abs().argmin(-1)]


def score(p, x: Tensor, rho: Tensor) -> Tensor:
    """(alpha x0 - x) / sigma^2."""
    return (p.alpha(rho) * p.x0(x, rho) - x) / p.sigma(rho) ** 2


# --- one evaluation a step -------------------------------------------------------------------------------------------------
def posterior(p, x: Tensor, rho: Tensor, z: Draws, upper: float = 0.0) -> Tensor:
    """Ho et al. 2020, eq. 6-7, log variance between the lower bound beta~ (upper = 0) and beta (1) as Nichol & Dhariwal 2021, eq. 15."""
    for r, s in pairwise(rho):
        a = p.alpha(r) / p.alpha(s)  # sqrt(1 - beta)
        beta = p.sigma(r) ** 2 - a**2 * p.sigma(s) ** 2
        tilde = beta * p.sigma(s) ** 2 / p.sigma(r) ** 2
        mean = a * p.sigma(s) ** 2 / p.sigma(r) ** 2 * x + p.alpha(s) * beta / p.sigma(r) ** 2 * p.x0(x, r)
        x = mean + (tilde ** (1 - upper) * beta**upper).sqrt() * next(z)
    return x


# --- multistep --------------------------------------------------------------------------------------------------------------
THIRD = {  # of D2, the second divided difference in units of h, with phi3 = (phi2 / (k h)) - 1/2
    "right": lambda phi3: -2 * phi3,  # int k e^(-k (h - u)) (u / h)^2 du
    "k-diffusion": lambda phi3: -phi3,  # half of it
    "diffusers": lambda phi3: -(phi3 + 1),  # half of it, +1/2 become -1/2: it tends to -1, not to 0, with h
}


def sde_dpmpp(p, x: Tensor, rho: Tensor, z: Draws, orders, tau: float = 1.0, exact: bool = False, third: str = "right") -> Tensor:
    """SDE-DPM-Solver++(kM), Lu et al. 2022, eq. 16-18, at any tau, k = 1 + tau^2; exact: 2M integrates its line, else the midpoint form."""
    lam, m, k = -rho.log(), [], 1 + tau**2
    for i, order in enumerate(orders):
        s, h = rho[i + 1], lam[i + 1] - lam[i]
        alpha, e = p.alpha(s), torch.expm1(-k * h)
        phi2 = e / (k * h) + 1
        m.append(p.x0(x, rho[i]))
        x = p.sigma(s) / p.sigma(rho[i]) * torch.exp(-(tau**2) * h) * x - alpha * e * m[-1]
        if order > 1:
            r0 = (lam[i] - lam[i - 1]) / h
            D1_0 = D1 = (m[-1] - m[-2]) / r0
        if order > 2:
            r1 = (lam[i - 1] - lam[i - 2]) / h
            D2 = (D1_0 - (m[-2] - m[-3]) / r1) / (r0 + r1)
            D1 = D1_0 + r0 * D2
            x = x + alpha * THIRD[third](phi2 / (k * h) - 1 / 2) * D2
        if order > 1:
            x = x + alpha * (phi2 if exact or order > 2 else -e / 2) * D1
        x = x + p.sigma(s) * (-torch.expm1(-2 * tau**2 * h)).sqrt() * next(z)
    return x


def dpmpp_sde_of_k_diffusion(p, x: Tensor, rho: Tensor, z: Draws, eta: float) -> Tensor:
    """Its SDE-DPM-Solver++(2S), r = 1/2: both levels split by DDIM's eta into down and up; z: of half a step, then of a whole one."""

    def move(y, data, r, s):
        up = eta * (s**2 * (r**2 - s**2) / r**2).sqrt()
        ratio = (s**2 - up**2).sqrt() / r
        return ratio * y + (1 - ratio) * data + up * next(z)

    y = x / p.alpha(rho[0])
    for r, s in pairwise(rho):
        half = (r * s).sqrt()
        inner = move(y, p.x0_of_z(y, r), r, half)
        y = move(y, p.x0_of_z(inner, half), r, s)
    return p.alpha(rho[-1]) * y


def halves(rho: Tensor) -> Tensor:
    """rho with the middle of each step in lambda put in."""
    return torch.cat([torch.stack([rho[:-1], (rho[:-1] * rho[1:]).sqrt()], 1).flatten(), rho[-1:]])


def with_wholes(draws: Sequence[Tensor], rho: Tensor) -> list[Tensor]:
    """(xi of the first half, xi of the whole) of each step from our (xi1, xi2) of its halves, those of one path at tau = 1.

    Noise enters z / rho^2 over a part of the step with variance proportional to the rise of e^(2 (lam - lam_t)).
    """
    made = []
    for r, s, xi1, xi2 in zip(rho[:-1], rho[1:], draws[::2], draws[1::2], strict=True):
        h = (r / s).log()
        a, b = torch.expm1(h).sqrt(), (torch.exp(2 * h) - torch.exp(h)).sqrt()
        made += [xi1, (a * xi1 + b * xi2) / (a**2 + b**2).sqrt()]
    return made


def sa_solver(p, x: Tensor, rho: Tensor, z: Draws, orders: Sequence[int], corrector: int, tau: Callable) -> Tensor:
    """SA-Solver, Xue et al. 2023, eq. 13-15: predictors of `orders` nodes, the corrector with the same noise, PEC; tau(rho) per step.

    With two nodes the integral of the line is replaced by h^2 / 2 times the integrand's factor at the end, the exception of its own code.
    """
    nodes, weights = (torch.as_tensor(v, dtype=D) for v in np.polynomial.legendre.leggauss(48))
    lam, m, last = -rho.log(), {}, (x, x)

    def update(x, i, at, noise):
        k, h, end = 1 + tau(rho[i]) ** 2, lam[i + 1] - lam[i], lam[i + 1]
        u = (lam[i] + end) / 2 + h / 2 * nodes
        measure = k * torch.exp(-k * (end - u)) * h / 2 * weights
        if len(at) == 2:
            slope = k * h**2 / 2 / (lam[at[1]] - lam[at[0]])
            c = [measure.sum() - slope, slope]
        else:
            basis = [math.prod(((u - lam[b]) / (lam[a] - lam[b]) for b in at if b != a), start=torch.ones_like(u)) for a in at]
            c = [(b * measure).sum() for b in basis]
        x = p.sigma(rho[i + 1]) / p.sigma(rho[i]) * torch.exp(-(k - 1) * h) * x
        x = x + p.alpha(rho[i + 1]) * sum(cj * m[j] for cj, j in zip(c, at, strict=True))
        return x + p.sigma(rho[i + 1]) * (-torch.expm1(-2 * (k - 1) * h)).sqrt() * noise

    for i, order in enumerate(orders):
        m[i] = p.x0(x, rho[i])
        if i > 0 and corrector:
            used = min(corrector, orders[i - 1] + 1)
            x = update(last[0], i - 1, [i - 1, i, *range(i - 2, i - used, -1)], last[1])
        last = (x, next(z))
        x = update(x, i, list(range(i, i - order, -1)), last[1])
    return x


def er_sde(p, x: Tensor, rho: Tensor, z: Draws, degree: int, phi: Callable[[float], float]) -> Tensor:
    """ER-SDE-Solver-1, 2, 3: Cui et al. 2023, eq. 17-18, by scipy's adaptive quadrature."""
    integral = partial(scipy.integrate.quad, epsabs=0.0, epsrel=1e-12, limit=200)
    s, y, data, slopes = rho.tolist(), x / p.alpha(rho[0]), [], []
    for n, (a, b) in enumerate(pairwise(s)):
        data.append(p.x0_of_z(y, rho[n]))
        r = phi(b) / phi(a)
        y = r * y + (1 - r) * data[n]
        if n > 0:
            slopes.append((data[n] - data[n - 1]) / (a - s[n - 1]))
        if degree > 1 and n > 0:
            y = y + (b - a + phi(b) * integral(lambda u: 1 / phi(u), b, a)[0]) * slopes[-1]
        if degree > 2 and n > 1:
            bend = 2 * (slopes[-1] - slopes[-2]) / (a - s[n - 2])
            y = y + ((b - a) ** 2 / 2 + phi(b) * integral(lambda u: (u - a) / phi(u), b, a)[0]) * bend
        y = y + math.sqrt(b**2 - a**2 * r**2) * next(z)
    return p.alpha(rho[-1]) * y


# --- single-step ------------------------------------------------------------------------------------------------------------
def seeds(p, x: Tensor, rho: Tensor, z: Draws, degree: int) -> Tensor:
    """SEEDS-1, 2, 3: Gonzalez et al. 2023, algorithms 1-3; r1 = 1/2, or 1/3 and r2 = 2/3. Its noise has a minus: -z in law is z.

    The normals are of the parts that the stages cut the step in; at a stage those before it add, as e^(2 (r - a) h) - e^(2 (r - b) h).
    """
    parts = list(pairwise([k / degree for k in range(degree + 1)]))
    for s, t in pairwise(rho):
        h, e, zs = (s / t).log(), p.eps(x, s), [next(z) for _ in parts]
        at, power = lambda r: s ** (1 - r) * t**r, lambda r: torch.expm1(r * h)

        def move(r, eps):
            noise = sum((power(2 * (r - a)) - power(2 * (r - b))).sqrt() * u for (a, b), u in zip(parts, zs, strict=True) if b <= r)
            return p.alpha(at(r)) / p.alpha(s) * x - 2 * p.sigma(at(r)) * power(r) * eps + p.sigma(at(r)) * noise

        bend = lambda r, over, d: 2 * p.sigma(at(r)) * r / over * (power(r) / (r * h) - 1) * d
        if degree == 1:
            x = move(1, e)
        elif degree == 2:
            x = move(1, p.eps(move(1 / 2, e), at(1 / 2)))
        else:
            e1 = p.eps(move(1 / 3, e), at(1 / 3))
            e2 = p.eps(move(2 / 3, e) - bend(2 / 3, 1 / 3, e1 - e), at(2 / 3))
            x = move(1, e) - bend(1, 2 / 3, e2 - e)
    return x


SRA = {  # Rossler 2010, tables 6.2 and 6.3, whole
    "SRA1": dict(alpha=[1 / 3, 2 / 3], beta1=[1, 0], beta2=[-1, 1], A0=[[], [3 / 4]], B0=[[], [3 / 2]], c0=[0, 3 / 4], c1=[1, 0]),
    "SRA3": dict(
        alpha=[1 / 6, 1 / 6, 2 / 3], beta1=[1, 0, 0], beta2=[-1, 1, 0], A0=[[], [1], [1 / 4, 1 / 4]], B0=[[], [0], [1, 1 / 2]],
        c0=[0, 1, 1 / 2], c1=[1, 0, 0],
    ),
}  # fmt: skip


def reversed_sde(p) -> tuple[Callable, Callable]:
    """a(w, y) and b(w) of dy = a dw + b dW, the reverse SDE of y = x / alpha in w = -t: (g^2 / alpha) score and g / alpha."""
    b = lambda w: p.sde.diffusion(-w) / p.sde.alpha(-w)

    def a(w, y):
        alpha, sigma = p.sde.alpha(-w), p.sde.sigma(-w)
        return b(w) ** 2 * alpha**2 * (p.denoiser(alpha * y, -w) - y) / sigma**2

    return a, b


def sra(p, x: Tensor, times: Tensor, z: Draws, tableau: dict) -> Tensor:
    """Rossler 2010, eq. 6.3-6.4, on `reversed_sde`, down `times`; I_(1), I_(1,0) from two normals (Kloeden & Platen 1992, eq. 10.4.3)."""
    a, b = reversed_sde(p)
    alpha, beta1, beta2, A0, B0, c0, c1 = (tableau[k] for k in ("alpha", "beta1", "beta2", "A0", "B0", "c0", "c1"))
    y = x / p.sde.alpha(times[0])
    for t, s in pairwise(times):
        w, h = -t, t - s
        u1, u2 = next(z), next(z)
        I1, I10 = h.sqrt() * u1, h**1.5 / 2 * (u1 + u2 / math.sqrt(3))
        H, drift = [], []
        for i in range(len(alpha)):
            H.append(y + sum(A0[i][j] * h * drift[j] + B0[i][j] * b(w + c1[j] * h) * I10 / h for j in range(i)))
            drift.append(a(w + c0[i] * h, H[i]))
        y = y + sum(alpha[i] * h * drift[i] + (beta1[i] * I1 + beta2[i] * I10 / h) * b(w + c1[i] * h) for i in range(len(alpha)))
    return p.sde.alpha(times[-1]) * y


def torchsde_srk(p, x: Tensor, times: Tensor, z: Draws) -> Tensor:
    """torchsde's "srk" on `reversed_sde`, a call a step (a dt beyond the end is cut), its path the (W, U = int (W_u - W_t) du) we draw."""
    a, b = reversed_sde(p)
    sde = type("Reversed", (), dict(noise_type="additive", sde_type="ito"))()
    sde.f, sde.g = a, lambda w, y: torch.diag_embed(b(w).expand_as(y))
    y = x / p.sde.alpha(times[0])
    for t, s in pairwise(times):
        h, u1, u2 = t - s, next(z), next(z)
        values = h.sqrt() * u1, h**1.5 / 2 * (u1 + u2 / math.sqrt(3))
        path = lambda *_, values=values, **__: values
        path.shape, path.levy_area_approximation = x.shape, "space-time"
        y = torchsde.sdeint(sde, y, torch.stack([-t, -s]), bm=path, method="srk", dt=float(2 * h))[-1]
    return p.sde.alpha(times[-1]) * y


# --- noise put in and taken out ---------------------------------------------------------------------------------------------
def edm_stochastic(p, x: Tensor, rho: Tensor, z: Draws, s_churn, s_min, s_max, s_noise, heun: bool = True) -> Tensor:
    """Karras et al. 2022, algorithm 2, on z = x / alpha; rho ends in 0. heun=False: without lines 9 to 11. Returns z at 0, which is x."""
    y, n = x / p.alpha(rho[0]), len(rho) - 1
    for t, t_next in pairwise(rho):
        gamma = min(s_churn / n, math.sqrt(2) - 1) if s_min <= t <= s_max else 0.0
        t_hat = t + gamma * t
        if gamma > 0:
            y = y + (t_hat**2 - t**2).sqrt() * s_noise * next(z)
        d = (y - p.x0_of_z(y, t_hat)) / t_hat
        y = y + (t_next - t_hat) * d
        if heun and t_next > 0:
            y = y + (t_next - t_hat) * ((y - p.x0_of_z(y, t_next)) / t_next - d) / 2
    return y


def restart(p, x: Tensor, rho: Tensor, z: Draws, intervals: Sequence[tuple[float, float, int, int]]) -> Tensor:
    """Xu et al. 2023, algorithm 1, with Heun's steps (Karras' algorithm 1) throughout: (t_min, t_max, N_restart - 1, K) each."""
    heun, y = partial(published.edm, p.x0_of_z), x / p.alpha(rho[0])
    for r, s in pairwise(rho):
        y = heun(y, torch.stack([r, s]))
        for low, high, steps, repeats in intervals:
            if s == rho[(rho - low).abs().argmin()]:
                u = torch.linspace(0, 1, steps + 1, dtype=D)
                times = (high ** (1 / 7) + u * (s ** (1 / 7) - high ** (1 / 7))) ** 7
                for _ in range(repeats):
                    y = heun(y + (high**2 - s**2).sqrt() * next(z), times)
    return p.alpha(rho[-1]) * y


# --- score_sde: (p, x, rho, i, z) -> x after one rule of step i, from rho[i] to rho[i + 1]; p.betas are the chain's, rho[0] the last ---
def reverse_diffusion(p, x: Tensor, rho: Tensor, i: int, z: Draws) -> Tensor:
    """x - f + G^2 score + G z: VP f = sqrt(1 - beta) x - x, G = sqrt(beta); VE f = 0, G^2 = sigma_i^2 - sigma_(i-1)^2."""
    if p.name == "VP":
        f, G = (1 - p.betas[-1 - i]).sqrt() * x - x, p.betas[-1 - i].sqrt()
    else:
        f, G = 0.0, (rho[i] ** 2 - rho[i + 1] ** 2).sqrt()
    return x - f + G**2 * score(p, x, rho[i]) + G * next(z)


def ancestral(p, x: Tensor, rho: Tensor, i: int, z: Draws) -> Tensor:
    """VP: (x + beta score) / sqrt(1 - beta) + sqrt(beta) z. VE (SMLD): x + (s^2 - s'^2) score + sqrt(s'^2 (s^2 - s'^2) / s^2) z."""
    if p.name == "VP":
        beta = p.betas[-1 - i]
        return (x + beta * score(p, x, rho[i])) / (1 - beta).sqrt() + beta.sqrt() * next(z)
    gap = rho[i] ** 2 - rho[i + 1] ** 2
    return x + gap * score(p, x, rho[i]) + (rho[i + 1] ** 2 * gap / rho[i] ** 2).sqrt() * next(z)


def langevin(p, x: Tensor, rho: Tensor, i: int, z: Draws, snr: float, batch: bool = True) -> Tensor:
    """Its Langevin (batch: step from batch means of norms) or annealed Langevin (from sigma): 2 alpha_i (snr |z| / |score|)^2."""
    alpha = 1 - p.betas[-1 - i] if p.name == "VP" else 1.0
    grad, noise = score(p, x, rho[i]), next(z)
    ratio = noise.norm(dim=1).mean() / grad.norm(dim=1).mean() if batch else p.sigma(rho[i])
    h = 2 * alpha * (snr * ratio) ** 2
    return x + h * grad + (2 * h).sqrt() * noise


def predictor_corrector(
    p, x: Tensor, rho: Tensor, z: Draws, predictor: Callable, corrector: Callable | None = None, moves: int = 0
):
    """Its sampling loop: `moves` of the corrector at rho[i], then the predictor from there."""
    for i in range(len(rho) - 1):
        for _ in range(moves):
            x = corrector(p, x, rho, i, z)
        x = predictor(p, x, rho, i, z)
    return x


@dataclass(frozen=True)
class BatchNormLangevin(scoresde.Langevin):
    """`langevin` as a corrector of ours, which has none whose step is the batch's: for comparison alone."""

    alpha: Callable[[Tensor], Any] = lambda s: 1.0

    def step(self, oracle: scoresde.Oracle, x: Tensor, t: Tensor, s: Tensor, state: Any) -> tuple[Tensor, Any]:
        grad, noise = oracle(x, s).score, oracle.noise.draw(x, CORRECTOR)
        h = 2 * self.alpha(s) * (self.snr * noise.norm(dim=1).mean() / grad.norm(dim=1).mean()) ** 2
        return x + h * grad + (2 * h).sqrt() * noise, None


def score_sde_ve(scheduler: Any, p, x: Tensor, levels: Tensor, moves: int) -> Tensor:
    """diffusers' loop with ScoreSdeVeScheduler, the score being that at `levels`, to the last mean."""
    mean = x
    for t, level in zip(scheduler.timesteps, levels, strict=True):
        for _ in range(moves):
            x = scheduler.step_correct(score(p, x, level), x).prev_sample
        x, mean = scheduler.step_pred(score(p, x, level), t, x, return_dict=False)
    return mean


def euler_maruyama(p, x: Tensor, times: Tensor, z: Draws, dt: float | None = None) -> Tensor:
    """x + (f - g^2 score) dt + g sqrt(-dt) z from each of times but the last; dt: -1 / N in score_sde, by default the grid's gap."""
    for t, s in pairwise(times):
        step = s - t if dt is None else torch.tensor(dt, dtype=D)
        if p.name == "VP":
            beta = p.sde.beta_min + t * (p.sde.beta_max - p.sde.beta_min)
            f, g = -beta / 2 * x, beta.sqrt()
        else:
            ratio = p.sde.sigma_max / p.sde.sigma_min
            f, g = 0.0, p.sde.sigma_min * ratio**t * math.sqrt(2 * math.log(ratio))
        x = x + (f - g**2 * score(p, x, p.sde.rho(t))) * step + g * (-step).sqrt() * next(z)
    return x
