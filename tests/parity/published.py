"""The published updates in float64, in the letters of their papers: own code, slow, and what ours must equal to rounding.

Every function takes a `Problem`, x at rho[0] and the noise levels rho, and returns x at rho[-1].
"""

from itertools import pairwise
from math import factorial

import numpy as np
import torch
from torch import Tensor

D = torch.float64


def ddim(p, x: Tensor, rho: Tensor) -> Tensor:
    """Song, Meng & Ermon 2021, eq. 12 with no noise."""
    for r, s in pairwise(rho):
        x0 = p.x0(x, r)
        x = p.alpha(s) * x0 + p.sigma(s) * (x - p.alpha(r) * x0) / p.sigma(r)
    return x


def dpmpp_multistep(p, x: Tensor, rho: Tensor, orders: list[int], d2: float = 2.0, exact: bool = False) -> Tensor:
    """DPM-Solver++(kM), Lu et al. 2022. exact: 2M integrates its line exactly, else it is the midpoint form of algorithm 2.

    d2: the factor of the third-order term, h^2 x0''/2 being its divided difference: 2 is right (Taylor), the peers have 1.
    """
    lam, m = -rho.log(), []
    for i, order in enumerate(orders):
        m.append(p.x0(x, rho[i]))
        h, alpha = lam[i + 1] - lam[i], p.alpha(rho[i + 1])
        e = torch.expm1(-h)
        x = p.sigma(rho[i + 1]) / p.sigma(rho[i]) * x - alpha * e * m[-1]
        if order == 1:
            continue
        r0 = (lam[i] - lam[i - 1]) / h
        D1_0 = (m[-1] - m[-2]) / r0
        if order == 2:
            x = x + alpha * ((e / h + 1) if exact else -e / 2) * D1_0
            continue
        r1 = (lam[i - 1] - lam[i - 2]) / h
        D1_1 = (m[-2] - m[-3]) / r1
        D1, D2 = D1_0 + r0 / (r0 + r1) * (D1_0 - D1_1), (D1_0 - D1_1) / (r0 + r1)
        x = x + alpha * (e / h + 1) * D1 - d2 * alpha * ((e + h) / h**2 - 0.5) * D2
    return x


def singlestep(p, x: Tensor, rho: Tensor, order: int, data: bool, peer_stage: bool = False) -> Tensor:
    """DPM-Solver-2/3 (eps; Lu et al. 2022a, algorithms 1 and 2) and DPM-Solver++(2S/3S) (data), r1 = 1/2, or 1/3 and r2 = 2/3.

    peer_stage: the second stage of 3S as diffusers' singlestep scheduler has it, an inner 2S step rather than the exact line.
    """
    sign = -1 if data else 1  # data: x0 in e^lambda; eps in e^-lambda. The two are mirror images

    def move(x, r, s, q, extra=0.0):  # the exact linear part from r to s, with q held; extra multiplies the same scale
        h = sign * (r / s).log()
        c, scale = (p.sigma(s) / p.sigma(r), p.alpha(s)) if data else (p.alpha(s) / p.alpha(r), p.sigma(s))
        return c * x - scale * (torch.expm1(h) * q + extra)

    def line(r, s, slope):  # the part of a slope (a difference over its fraction of the step)
        h = sign * (r / s).log()
        return (torch.expm1(h) / h - 1) * slope

    q = p.x0 if data else p.eps
    for r, s in pairwise(rho):
        at = lambda f, r=r, s=s: r ** (1 - f) * s**f  # the node at fraction f of the step in lambda
        q0 = q(x, r)
        if order == 2:
            q1 = q(move(x, r, at(1 / 2), q0), at(1 / 2))
            x = move(x, r, s, q1)
        else:
            s1, s2 = at(1 / 3), at(2 / 3)
            q1 = q(move(x, r, s1, q0), s1)
            u2 = move(x, r, s2, q1) if peer_stage else move(x, r, s2, q0, line(r, s2, 2 * (q1 - q0)))
            x = move(x, r, s, q0, line(r, s, 3 / 2 * (q(u2, s2) - q0)))
    return x


def unipc(p, x: Tensor, rho: Tensor, orders: list[int], B, data: bool = True) -> Tensor:
    """UniPC-p, Zhao et al. 2023, algorithms 1 to 4: B(h) is h (bh1) or expm1(h) (bh2), corrector with the predictor's x0.

    The corrector of the last node would need one evaluation more, so x is the prediction there. By its remark on p <= 2, a_1 = 1/2.
    """
    lam, m, last = -rho.log(), [], None
    q = p.x0 if data else p.eps

    def update(x, i, order, new=None):
        """From node i to i + 1 with m[i] and `order` - 1 older values and, for the corrector, the `new` one."""
        h = (lam[i + 1] - lam[i]) * (-1 if data else 1)
        phi = [torch.expm1(h) / h]
        for k in range(1, order + 1):
            phi.append((phi[-1] - 1 / factorial(k)) / h)
        r = [(lam[i - k] - lam[i]) / (lam[i + 1] - lam[i]) for k in range(1, order)]
        ds = [(m[i - k] - m[i]) / r[k - 1] for k in range(1, order)]
        if new is not None:
            r, ds = [*r, torch.ones((), dtype=D)], [*ds, new - m[i]]
        n = len(r)
        R = torch.stack([torch.stack(r) ** k for k in range(n)]) if n else None
        b = torch.stack([factorial(k) * phi[k] * h / B(h) for k in range(1, n + 1)]) if n else None
        a = [] if n == 0 else [0.5] if n == 1 else torch.linalg.solve(R, b)
        c, scale = ("sigma", "alpha") if data else ("alpha", "sigma")
        c, scale = getattr(p, c)(rho[i + 1]) / getattr(p, c)(rho[i]), getattr(p, scale)(rho[i + 1])
        return c * x - scale * (torch.expm1(h) * m[i] + B(h) * sum(ak * dk for ak, dk in zip(a, ds, strict=True)))

    for i, order in enumerate(orders):
        new = q(x, rho[i])
        if i > 0:
            x = update(last, i - 1, orders[i - 1], new)
        m.append(new)
        last, x = x, update(x, i, order)
    return x


def adams_bashforth(p, x: Tensor, rho: Tensor, orders: list[int], coordinate, velocity: bool = False) -> Tensor:
    """DEIS (Zhang & Chen 2023, eq. 15): eps is a polynomial in `coordinate`, a function of lambda, integrated over d rho.

    coordinate: t (tAB), rho (rhoAB, also k-diffusion's LMS), -lambda (log-rho, as diffusers has it). velocity: eps - x0, polynomial and
    measure in tau = rho / (1 + rho), the state x / (alpha + sigma).
    """
    nodes, weights = (torch.as_tensor(v, dtype=D) for v in np.polynomial.legendre.leggauss(48))
    lam, q = -rho.log(), []
    for i, order in enumerate(orders):
        r, s = rho[i], rho[i + 1]
        x0 = p.x0(x, r)
        eps = (x - p.alpha(r) * x0) / p.sigma(r)
        q.append(eps - x0 if velocity else eps)
        u = (lam[i] + lam[i + 1]) / 2 + (lam[i + 1] - lam[i]) / 2 * nodes
        measure = -torch.exp(-u) / ((1 + torch.exp(-u)) ** 2 if velocity else 1) * weights * (lam[i + 1] - lam[i]) / 2
        w, c = [coordinate(lam[i - k]) for k in range(order)], coordinate(u)
        total = 0.0
        for j in range(order):
            lagrange = torch.ones_like(u)
            for k in range(order):
                if k != j:
                    lagrange = lagrange * (c - w[k]) / (w[j] - w[k])
            total = total + (lagrange * measure).sum() * q[i - j]
        scale = lambda r: p.alpha(r) + p.sigma(r) if velocity else p.alpha(r)
        x = scale(s) * (x / scale(r) + total)
    return x


IPNDM = [[1.0], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]


def ipndm(p, x: Tensor, rho: Tensor, orders: list[int]) -> Tensor:
    """iPNDM (Zhang & Chen 2023, after Liu et al. 2022): Adams-Bashforth's uniform-grid coefficients on eps, over d rho."""
    q = []
    for i, order in enumerate(orders):
        q.append(p.eps(x, rho[i]))
        eps = sum(b * q[i - j] for j, b in enumerate(IPNDM[order - 1]))
        x = p.alpha(rho[i + 1]) * (x / p.alpha(rho[i]) + (rho[i + 1] - rho[i]) * eps)
    return x


def edm(x0, x: Tensor, times: Tensor, sigma=lambda t: (t, 1.0), scale=lambda t: (1.0, 0.0)) -> Tensor:
    """Karras et al. 2022, algorithm 1, whole: x0(x, t); sigma(t) and s(t) give value and derivative, by default t and 1."""

    def slope(x, t):  # line 4: (sigma'/sigma + s'/s) x - sigma' s / sigma D(x / s; sigma)
        (s, ds), (a, da) = sigma(t), scale(t)
        return (ds / s + da / a) * x - ds * a / s * x0(x, t)

    for t, t_next in pairwise(times):
        d = slope(x, t)
        euler = x + (t_next - t) * d
        x = euler if sigma(t_next)[0] == 0 else x + (t_next - t) * (d + slope(euler, t_next)) / 2
    return x
