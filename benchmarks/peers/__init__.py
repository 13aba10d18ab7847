"""Other libraries' deterministic solvers, each setting a callable that asks a counted denoiser.

All work in z = x / alpha at noise level rho = sigma / alpha, an exact change of variables, so that a VE, EDM or VP library solves any
linear SDE; every library is asked at continuous times: its nodes are given to it where it would round them. Every setting ends with
the mean D at t_min, as `scoresde.sample` does; what it spends is counted by the callable it asks, and asking too often is an error.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import scoresde

D = torch.float64


class TooMany(RuntimeError):
    """A peer asked more often than the setting allows."""


class Ask:
    """A denoiser in z = x / alpha: ask(z, rho) is E[x_0 | z], counted in `used`, at most `nfe` times."""

    def __init__(self, denoiser: scoresde.Denoiser, nfe: int) -> None:
        self.denoiser, self.sde, self.nfe, self.used = denoiser, denoiser.sde, nfe, 0
        ends = torch.tensor([self.sde.t_max, self.sde.t_min], dtype=D)
        self.top, self.bottom = (float(r) for r in self.sde.rho(ends))

    def __call__(self, z: Tensor, rho: float | Tensor) -> Tensor:
        """The mean at noise level rho, which may be off the ends by rounding alone."""
        self.used += 1
        if self.used > self.nfe:
            raise TooMany(f"more than {self.nfe} evaluations")
        rho = float(rho)
        if not self.bottom * (1 - 1e-5) < rho < self.top * (1 + 1e-5):
            raise ValueError(f"asked at rho = {rho:.6g}, outside [{self.bottom:.6g}, {self.top:.6g}]")
        t = self.sde.time(torch.tensor(-2 * math.log(rho), dtype=D)).clamp(self.sde.t_min, self.sde.t_max)
        return self.denoiser.forward(self.sde.alpha(t) * z, t)

    def start(self, x: Tensor) -> Tensor:
        """Z at t_max."""
        return x / self.sde.alpha(torch.tensor(self.sde.t_max, dtype=D))

    def finish(self, z: Tensor) -> Tensor:
        """The mean at t_min."""
        return self(z, self.bottom)


Run = Callable[[Ask, Tensor], Tensor]


@dataclass(frozen=True)
class Setting:
    """A peer's solver on a grid; run(ask, x_T) -> x_end with at most ask.nfe evaluations."""

    peer: str
    solver: str
    grid: str
    run: Run

    @property
    def name(self) -> str:
        """How a table calls it."""
        return f"{self.peer} {self.solver} | {self.grid}"


@contextlib.contextmanager
def double() -> Iterator[None]:
    """Float64 for the tensors that a library makes without saying of what type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(D)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def rho_of(ask: Ask, t: Tensor) -> Tensor:
    """Noise levels of times, the ends exact."""
    rho = ask.sde.rho(t)
    rho[0], rho[-1] = ask.top, ask.bottom
    return rho


def uniform(ask: Ask, n: int) -> Tensor:
    """N noise levels uniform in the SDE's own t."""
    return rho_of(ask, torch.linspace(ask.sde.t_max, ask.sde.t_min, n, dtype=D))


def quadratic(ask: Ask, n: int) -> Tensor:
    """N noise levels uniform in the root of the SDE's own t."""
    return rho_of(ask, torch.linspace(ask.sde.t_max**0.5, ask.sde.t_min**0.5, n, dtype=D) ** 2)


def shifted(ask: Ask, n: int, shift: float = 1.0) -> Tensor:
    """N noise levels uniform in rho / (shift + rho): the time of rectified flow, shifted."""
    ends = [r / (shift + r) for r in (ask.top, ask.bottom)]
    tau = torch.linspace(*ends, n, dtype=D)
    rho = shift * tau / (1 - tau)
    rho[0], rho[-1] = ask.top, ask.bottom
    return rho


def lent(rules: dict[str, Callable[[scoresde.LinearSDE, int], Tensor]]) -> list[Setting]:
    """The peers' solvers on grids that they do not offer: rules (sde, n) -> times of scoresde, their noise levels handed over."""
    from . import azula, hf, kdiffusion

    nodes = {f"lent {name}": lambda ask, n, rule=rule: rho_of(ask, rule(ask.sde, n - 1)) for name, rule in rules.items()}
    return [s for module in (kdiffusion, hf, azula) for s in module.lent(nodes)]


def every() -> list[Setting]:
    """All settings of all peers."""
    from . import azula, edm, hf, kdiffusion

    found = [s for module in (kdiffusion, hf, azula, edm) for s in module.settings()]
    if len({s.name for s in found}) != len(found):
        raise ValueError("two settings share a name")
    return found
