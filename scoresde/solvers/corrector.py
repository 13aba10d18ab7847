"""Markov chains that leave p_t alone, at one fixed time, and their marriage to a predictor. Song et al. 2021 (ICLR), app. G."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import check_callable, check_count, check_number, shape_of
from ..linear import cast
from ..noise import CORRECTOR
from ..oracle import Oracle
from .base import Solver, StochasticSolver

__all__ = ["MALA", "Langevin", "PredictorCorrector"]


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
class PredictorCorrector(StochasticSolver):
    """`predictor` from t to s, then `corrections` moves of `corrector` at s. Song et al. 2021 (ICLR), algorithm 1.

    Any solver predicts; the corrector is a chain at fixed time (Langevin, MALA). The weak order is the lesser of the two's (a biased
    corrector leaves its bias however many the steps), and 1 at most around a predictor with a past, which is of states before the move.
    """

    predictor: Solver
    corrector: Langevin = Langevin()
    corrections: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.predictor, Solver) or not isinstance(self.corrector, Langevin):
            raise TypeError(f"predictor is {self.predictor!r}, corrector is {self.corrector!r}; wanted a Solver and a Langevin")
        check_count(self.corrections, "corrections")

    @property
    def grid(self) -> Any:
        """The predictor's."""
        return self.predictor.grid

    @property
    def adaptive(self) -> bool:
        """The predictor's."""
        return self.predictor.adaptive

    @property
    def batchwise(self) -> bool:
        """The predictor's."""
        return self.predictor.batchwise

    @property
    def invariant(self) -> bool:
        """The predictor's."""
        return self.predictor.invariant

    @property
    def weak_order(self) -> float:
        """The lesser of the predictor's (of a flow: its order) and the corrector's; 1 at most around a predictor with a past."""
        predictor = self.predictor.weak_order if self.predictor.stochastic else float(self.predictor.order)  # type: ignore[attr-defined]
        return min(predictor, self.corrector.weak_order, 1.0 if self.predictor.past else math.inf)

    @property
    def strong_order(self) -> float:
        """0: the corrector's noise has no path to converge along."""
        return 0.0

    def start(self, sde: Any, times: Tensor) -> Any:
        """The predictor's state."""
        return self.predictor.start(sde, times)

    def evaluations(self, steps: int) -> int:
        """The predictor's and the moves'."""
        return self.predictor.evaluations(steps) + self.corrector.evaluations(steps * self.corrections)

    def step(self, oracle: Oracle, x: Tensor, t: Tensor, s: Tensor, state: Any) -> tuple[Tensor, Any]:
        """x_s from x_t."""
        x, state = self.predictor.step(oracle, x, t, s, state)
        for _ in range(self.corrections):
            x, _ = self.corrector.step(oracle, x, s, s, None)
        return x, state
