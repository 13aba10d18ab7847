"""Adaptive solvers of the probability flow."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchdiffeq import odeint

from ..checks import NonFiniteError, check_count, check_number
from ..denoiser import flow
from ..grid import interval
from ..oracle import Oracle
from .base import Solver

__all__ = ["TorchDiffEq"]

_ORDERS = {"dopri8": 8, "dopri5": 5, "bosh3": 3, "fehlberg2": 2, "adaptive_heun": 2}


class _Field:
    """dx/dt as torchdiffeq calls it: (t, x), bounded, finite, never outside [t, s]; rejected steps are told to the ledger."""

    def __init__(self, oracle: Oracle, x: Tensor, t: Tensor, s: Tensor, max_nfe: int) -> None:
        self.oracle, self.max_nfe = oracle, max_nfe
        self.ends = (float(t), float(s))
        self.calls = self.settled = 0
        self.lost = self.of_rows(~x.isfinite())  # samples that met NaN stand still from there, and end as NaN

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        if self.calls >= self.max_nfe:
            raise RuntimeError(
                f"the solve from t = {self.ends[0]:.6g} to {self.ends[1]:.6g} has used max_nfe = {self.max_nfe} evaluations and is at "
                f"t = {float(t):.6g}; loosen rtol and atol, or allow more with max_nfe="
            )
        self.calls += 1
        u = t.detach().to("cpu", torch.float64).clamp(min(self.ends), max(self.ends))
        if bool(u.isnan()):
            raise RuntimeError(
                f"the step size from t = {self.ends[0]:.6g} to {self.ends[1]:.6g} is not finite; loosen rtol and atol"
            )
        dx = flow(self.oracle, x, u)
        bad = self.of_rows(~dx.isfinite()) & ~self.lost
        if bool(bad.any()):
            rows = self.oracle.names[bad.flatten().cpu()].unique().tolist()
            if self.oracle.throw:
                raise NonFiniteError(
                    f"dx/dt of samples {rows[:8]} ({len(rows)} of {len(self.oracle.names.unique())}) is not finite at "
                    f"t = {float(u):.6g}, evaluation {self.calls}: the denoiser returned NaN or infinity there; check the network at "
                    "that time, or use throw=False and read .status"
                )
            self.lost = self.lost | bad
        return dx.masked_fill(self.lost, 0.0)

    @staticmethod
    def of_rows(where: Tensor) -> Tensor:
        """Whether any entry of a row is marked, `[B, 1, ..., 1]`."""
        return where.flatten(1).any(1).reshape(-1, *[1] * (where.ndim - 1))

    def norm(self, ratio: Tensor) -> Tensor:
        """Largest over the samples not lost: the tolerance holds for each, whoever its mates are.

        Detached: a gradient is that of the steps taken, not of the rule that chose them.
        """
        return self.oracle.denoiser.error_norm(ratio.detach().masked_fill(self.lost, 0.0)).max()

    def callback_accept_step(self, t: Tensor, x: Tensor, dt: Tensor) -> None:
        self.settled = self.calls

    def callback_reject_step(self, t: Tensor, x: Tensor, dt: Tensor) -> None:
        self.oracle.record("rejected", self.calls - self.settled)
        self.settled = self.calls


@dataclass(frozen=True)
class TorchDiffEq(Solver):
    """An adaptive method of torchdiffeq on dx/dt, time from t to s: dopri5, dopri8, bosh3, fehlberg2 or adaptive_heun.

    rtol, atol bound the local error of each sample (root mean square over its entries; a likelihood's l-channels apart). The step is
    one for the whole batch (the worst sample's), so a sample's last digits depend on its batch mates; `microbatch=1` makes them
    independent. max_nfe bounds the work of one interval: RuntimeError. NonFiniteError names the samples and t. Chen et al. 2018
    (NeurIPS); Dormand & Prince 1980 for dopri5.
    """

    method: str = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5
    max_nfe: int = 10_000
    grid = staticmethod(interval)
    adaptive = True
    independent = False
    invariant = False

    def __post_init__(self) -> None:
        if self.method not in _ORDERS:
            raise ValueError(f"method is {self.method!r}; wanted one of {sorted(_ORDERS)}")
        check_number(self.rtol, "rtol", 0.0, 1.0)
        check_number(self.atol, "atol", 0.0, open_low=True)
        check_count(self.max_nfe, "max_nfe")

    @property
    def order(self) -> int:
        """Order of the method's solution; the error is set by the tolerances."""
        return _ORDERS[self.method]

    def evaluations(self, steps: int) -> int:
        """Unknown before the solve: TypeError."""
        raise TypeError("an adaptive solver chooses its steps: read .nfe of the solution; max_nfe= bounds it")

    def step(self, oracle: Oracle, x: Tensor, t: Tensor, s: Tensor, state: Any) -> tuple[Tensor, Any]:
        """x_s from x_t, any number of evaluations."""
        if not len(x):
            return x, None
        field = _Field(oracle, x, t, s, self.max_nfe)
        options = {"step_t": s[None], "norm": field.norm}  # step_t: it would step past s and interpolate back
        span = torch.stack([t, s]).to(x.device)
        try:
            x = odeint(
                field, x.masked_fill(field.lost, 0.0), span, rtol=self.rtol, atol=self.atol, method=self.method, options=options
            )[-1]
        except AssertionError as error:
            raise RuntimeError(
                f"torchdiffeq gave up between t = {float(t):.6g} and {float(s):.6g} after {field.calls} evaluations ({error}); loosen "
                "rtol and atol, solve in float64, or check that the denoiser is smooth"
            ) from error
        return x.masked_fill(field.lost, math.nan), None
