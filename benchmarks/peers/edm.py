"""EDM's deterministic sampler, written from Karras et al. 2022 (NeurIPS): algorithm 1 in rho, and its family of second order (app. D).

A step of the family asks at the start and at t + a h: Heun's a = 1, the midpoint's 1/2, Ralston's 2/3; the last step jumps to zero
noise from t_min. Nodes of eq. 5 for several rho.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from . import Ask, D, Setting


def nodes(p: float, ask: Ask, n: int) -> Tensor:
    """Eq. 5."""
    return torch.linspace(ask.top ** (1 / p), ask.bottom ** (1 / p), n, dtype=D) ** p


def run(a: float, grid: Callable[[Ask, int], Tensor], ask: Ask, x: Tensor) -> Tensor:
    """Second-order steps between the nodes, then the mean."""
    z, t = ask.start(x), grid(ask, (ask.nfe + 1) // 2)
    for here, there in zip(t[:-1].tolist(), t[1:].tolist(), strict=True):
        h = there - here
        d = (z - ask(z, here)) / here
        middle = here + a * h
        z_mid = z + a * h * d
        d_mid = (z_mid - ask(z_mid, middle)) / middle
        z = z + h * ((1 - 0.5 / a) * d + 0.5 / a * d_mid)
    return ask.finish(z)


def settings() -> list[Setting]:
    """Three members of the family on four values of rho."""
    members = {"Heun": 1.0, "midpoint": 0.5, "Ralston": 2 / 3}
    return [
        Setting("EDM", name, f"rho={p}", partial(run, a, partial(nodes, float(p))))
        for name, a in members.items()
        for p in (3, 5, 7, 10)
    ]
