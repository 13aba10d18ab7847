"""What a solver is: a map from time t to time s with explicit state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, ClassVar

from torch import Tensor

from ..grid import logsnr
from ..oracle import Oracle

__all__ = ["Around", "Solver", "StochasticSolver"]


@dataclass(frozen=True)
class Solver(ABC):
    """One step x_t -> x_s of a frozen set of hyperparameters. A deterministic solver goes down (sampling) and up (likelihood).

    Class attributes a subclass may set: `grid`, the rule it recommends for sampling; `adaptive`, it chooses its own inner steps;
    `independent`, no sample's result depends on its batch mates; `invariant`, the step knows the schedule through rho = sigma / alpha
    alone, so that x / alpha is the same under every SDE; `past`, how many earlier evaluations a step uses; `brownian`, its noise must
    be increments of one path a sample, whatever the intervals: `sample` draws it by `noise.brownian`; `replays`, it asks again at
    the same times on the way back of a gradient, so that probes must be the same then.
    `stochastic` is a property: a solver that draws noise states `weak_order` and `strong_order`, not `order`.
    """

    grid: ClassVar[Any] = staticmethod(logsnr)  # a Grid; Any because a checker would bind it as a method
    adaptive: ClassVar[bool] = False
    independent: ClassVar[bool] = True
    invariant: ClassVar[bool] = True
    past: ClassVar[int] = 0
    brownian: ClassVar[bool] = False
    replays: ClassVar[bool] = False

    @property
    def stochastic(self) -> bool:
        """Whether a step draws noise."""
        return False

    @property
    @abstractmethod
    def order(self) -> int:
        """Global order for the probability flow, start-up included; a stochastic solver raises TypeError."""

    @abstractmethod
    def step(self, oracle: Oracle, x: Tensor, t: Tensor, s: Tensor, state: Any) -> tuple[Tensor, Any]:
        """x_s and the next state from x_t `[B, *shape]`; t, s are () float64, or `[B, 1, ..., 1]` in per-sample adaptive steps."""

    def start(self, sde: Any, times: Tensor) -> Any:
        """The state before the first step: the only place that may look at the whole grid."""
        return None

    def evaluations(self, steps: int) -> int:
        """Oracle calls that `steps` intervals cost, exactly; of an adaptive solver unknown before the solve: TypeError."""
        if self.adaptive:
            raise TypeError("an adaptive solver chooses its steps: read .nfe of the solution; max_nfe= bounds it")
        return steps

    def in_pieces(self) -> Solver:
        """The same rule for a path that noise cuts in pieces, each started afresh; its evaluations add up over the pieces."""
        return self

    def starts(self, sde: Any, pieces: Sequence[Tensor]) -> list[Any]:
        """`start` on each of several grids."""
        return [self.start(sde, times) for times in pieces]


@dataclass(frozen=True)
class StochasticSolver(Solver):
    """A solver of the reverse SDE: it states two orders, both as floats, and samples only (times run down)."""

    @property
    def stochastic(self) -> bool:
        """Whether a step draws noise: yes."""
        return True

    @property
    def order(self) -> int:
        """Undefined: see weak_order and strong_order."""
        raise TypeError(f"{self!r} is stochastic: read weak_order and strong_order")

    @property
    @abstractmethod
    def weak_order(self) -> float:
        """Order of the law of x: means and covariances."""

    @property
    @abstractmethod
    def strong_order(self) -> float:
        """Order of the path of x given the Brownian path."""


@dataclass(frozen=True)
class Around(StochasticSolver):
    """A stochastic solver made of another, `inner`, which recommends the grid and says what it is like."""

    strong_order = 0.0  # the noise it adds belongs to no interval of the path

    @property
    @abstractmethod
    def inner(self) -> Solver:
        """The solver that goes from t to s."""

    grid: ClassVar[Any] = property(attrgetter("inner.grid"))
    adaptive: ClassVar[Any] = property(attrgetter("inner.adaptive"))
    independent: ClassVar[Any] = property(attrgetter("inner.independent"))
    invariant: ClassVar[Any] = property(attrgetter("inner.invariant"))
    brownian: ClassVar[Any] = property(attrgetter("inner.brownian"))

    @property
    def weak_order(self) -> float:
        """The inner solver's (of a flow: its order); 1 at most where it has a past, which is of states before the noise."""
        inner = self.inner
        order = inner.weak_order if isinstance(inner, StochasticSolver) else float(inner.order)
        return min(order, 1.0) if inner.past else order
