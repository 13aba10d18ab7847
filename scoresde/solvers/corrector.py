"""Markov chains that leave p_t alone, at one fixed time, and their marriage to a predictor. Song et al. 2021 (ICLR), app. G."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..checks import check_callable, check_count, check_number, shape_of
from ..linear import cast
from ..noise import CORRECTOR
from ..oracle import Oracle
from .base import Around, Solver, StochasticSolver

__all__ = ["MALA", "AnnealedLangevin", "Hold", "Langevin", "PredictorCorrector"]


@dataclass(frozen=True)
class Langevin(StochasticSolver):
    """Unadjusted Langevin at time s: x' = x + h score + sqrt(2h) z, h = 2 (snr sigma(s))^2, a function of time alone.

    On N(0, sigma^2 I) its stationary variance is sigma^2 / (1 - snr^2) exactly. A step taken from the norms of the sample's own score
    and noise (or its batch's) is another chain: it does not leave p_s alone even as the step shrinks. As a `step` it ignores t.
    weak_order is 0: the bias snr^2 does not vanish with more steps; strong_order is 0: the chain has no path to converge along.
    """

    snr: float = 0.16
    weak_order = 0.0
    strong_order = 0.0

    def __post_init__(self) -> None:
        check_number(self.snr, "snr", 0.0, 0.999, open_low=True)

    def size(self, oracle: Oracle, x: Tensor, s: Tensor) -> Tensor:
        """h at time s."""
        return cast(2 * (self.snr * oracle.sde.sigma(s)) ** 2, x)

    def step(self, oracle: Oracle, x: Tensor, t: Tensor, s: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One move at time s."""
        h = self.size(oracle, x, s)
        return x + h * oracle(x, s).score + (2 * h).sqrt() * oracle.noise.draw(x, CORRECTOR), None


@dataclass(frozen=True)
class MALA(Langevin):
    """Langevin with a Metropolis test, which leaves p_s alone. Two evaluations a move. Roberts & Tweedie 1996.

    log_prob: (x, s) -> `[B]`, the density of the test; None integrates the score along the move by the trapezoid rule, exact when
    p_s is Gaussian and accurate to h^(3/2) otherwise (Du et al. 2023, ICML, section 4.2).
    """

    log_prob: Callable[[Tensor, Tensor], Tensor] | None = None

    @property
    def weak_order(self) -> float:
        """Unbounded with a density; 0 without: the trapezoid rule's error does not vanish with more steps."""
        return 0.0 if self.log_prob is None else math.inf

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.log_prob is not None:
            check_callable(self.log_prob, "log_prob", "a callable (x, s) -> log p_s(x) [B], or None")

    def evaluations(self, steps: int) -> int:
        """2 steps."""
        return 2 * steps

    def step(self, oracle: Oracle, x: Tensor, t: Tensor, s: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One move at time s; a sample whose proposal is refused stays."""
        h, z = self.size(oracle, x, s), oracle.noise.draw(x, CORRECTOR)
        score = oracle(x, s).score
        y = x + h * score + (2 * h).sqrt() * z
        back = oracle(y, s).score
        if self.log_prob is None:
            gain = ((y - x) * (score + back) / 2).flatten(1).sum(1)
        else:
            gain = self.log_prob(y, s) - self.log_prob(x, s)
            if not isinstance(gain, Tensor) or gain.shape != (len(x),):
                raise ValueError(f"log_prob(x, s) gave {shape_of(gain)} for {len(x)} samples; wanted log-densities [{len(x)}]")
        reverse = (x - y - h * back) / (2 * h).sqrt()  # the z that would lead back
        gain = gain + ((z**2 - reverse**2) / 2).flatten(1).sum(1)
        u = oracle.noise.uniform(x.flatten(1)[:, :1], CORRECTOR).flatten()
        accept = (u.log() < gain).reshape(-1, *[1] * (x.ndim - 1))
        lost = gain.isnan().reshape(accept.shape)  # of a NaN score: refused for ever, it would go unseen
        return torch.where(accept, y, x).masked_fill(lost, math.nan), None


@dataclass(frozen=True)
class PredictorCorrector(Around):
    """`predictor` from t to s and `corrector_steps` moves of `corrector`, at s after it or (corrector_first) at t before it.

    Any solver predicts; the corrector is a chain at fixed time (Langevin, MALA). The weak order is the lesser of the two's (a biased
    corrector leaves its bias however many the steps), and 1 at most around a predictor with a past, which is of states before the move.
    Song et al. 2021 (ICLR), algorithm 1; corrector_first is the order of their code.
    """

    predictor: Solver
    corrector: Langevin = Langevin()
    corrector_steps: int = 1
    corrector_first: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.predictor, Solver) or not isinstance(self.corrector, Langevin):
            raise TypeError(
                f"predictor is {self.predictor!r}, corrector is {self.corrector!r}; wanted a Solver and a Langevin(0.16)"
            )
        check_count(self.corrector_steps, "corrector_steps")
        if not isinstance(self.corrector_first, bool):
            raise TypeError(f"corrector_first is {self.corrector_first!r}; wanted True or False")

    @property
    def inner(self) -> Solver:
        """The predictor."""
        return self.predictor

    @property
    def weak_order(self) -> float:
        """The lesser of the predictor's and the corrector's; 1 at most around a predictor with a past."""
        return min(super().weak_order, self.corrector.weak_order)

    def in_pieces(self) -> PredictorCorrector:
        """The predictor in pieces."""
        return replace(self, predictor=self.predictor.in_pieces())

    def start(self, sde: Any, times: Tensor) -> Any:
        """The predictor's state."""
        return self.predictor.start(sde, times)

    def starts(self, sde: Any, pieces: Sequence[Tensor]) -> list[Any]:
        """The predictor's states."""
        return self.predictor.starts(sde, pieces)

    def evaluations(self, steps: int) -> int:
        """The predictor's and the moves'."""
        return self.predictor.evaluations(steps) + self.corrector.evaluations(steps * self.corrector_steps)

    def step(self, oracle: Oracle, x: Tensor, t: Tensor, s: Tensor, state: Any) -> tuple[Tensor, Any]:
        """x_s from x_t."""
        if not self.corrector_first:
            x, state = self.predictor.step(oracle, x, t, s, state)
        at = t if self.corrector_first else s
        for _ in range(self.corrector_steps):
            x, _ = self.corrector.step(oracle, x, at, at, None)
        return self.predictor.step(oracle, x, t, s, state) if self.corrector_first else (x, state)


@dataclass(frozen=True)
class Hold(Solver):
    """x / alpha as it is, with no evaluation: the predictor of annealed Langevin dynamics. Order 0: it moves nothing."""

    order = 0

    def evaluations(self, steps: int) -> int:
        """None."""
        return 0

    def step(self, oracle: Oracle, x: Tensor, t: Tensor, s: Tensor, state: Any) -> tuple[Tensor, Any]:
        """(alpha_s / alpha_t) x."""
        return cast(oracle.sde.alpha(s) / oracle.sde.alpha(t), x) * x, state


def AnnealedLangevin(snr: float = 0.16, moves: int = 100) -> PredictorCorrector:
    """Annealed Langevin dynamics (NCSN): at each time but the first `moves` moves of `Langevin(snr)`, from the end of the last.

    At the first, t_max, x has the law of the prior already. `moves` evaluations a step. NCSN's step eps sigma_i^2 / sigma_L^2 is 2 h:
    snr = sqrt(eps) / (2 sigma_L), which is 0.2236 for its eps = 2e-5, sigma_L = 0.01 and 100 moves. Its bias does not vanish with more
    steps (weak order 0). Song & Ermon 2019 (NeurIPS), algorithm 1, under any SDE by x / alpha.
    """
    return PredictorCorrector(Hold(), Langevin(snr), check_count(moves, "moves"))
