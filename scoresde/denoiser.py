"""What a model is: a denoised mean x0 = E[x_0 | x_t] under an SDE; networks, callables and closed forms all become one."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .checks import check_callable, check_state, check_time, shape_of
from .linear import LinearSDE, cast, check_regular
from .parameterizations import (
    Inverse,
    Parameterization,
    Prediction,
    edm,
    from_eps,
    from_score,
    from_v,
    from_velocity,
    from_x0,
)  # fmt: skip

__all__ = ["Denoiser", "Preconditioned", "Wrapped", "flow", "reverse_drift"]


class Denoiser(nn.Module, ABC):
    """(x, t) -> x0 = E[x_0 | x_t = x] under `sde`. Subclass it with a `forward`; wrappers hold the denoiser they wrap.

    `forward` returns a new tensor each time: solvers keep x0 from step to step.

    x `[B, *shape]` float32 or float64, t () or `[B, 1, ..., 1]` in [t_min, t_max].
    """

    def __init__(self, sde: LinearSDE) -> None:
        super().__init__()
        if not isinstance(sde, LinearSDE):
            raise TypeError(f"sde is {shape_of(sde)}; wanted a LinearSDE such as VP(): is it a class not yet called?")
        self.sde = check_regular(sde)
        self.recorders: list[Callable[[str, float], None]] = []  # the oracles now solving with this denoiser

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x0, of the shape of x."""

    def predict(self, x: Tensor, t: Tensor) -> Prediction:
        """The prediction at (x, t), with the coefficients in float64 (0-dim t) or in x's dtype (per-sample t)."""
        t = check_time(t, check_state(x)).double()
        x0, sde = self._mean(x, t), self.sde
        return Prediction(x, x0, lambda: cast(sde.alpha(t), x), lambda: cast(sde.sigma(t), x))

    def _mean(self, x: Tensor, t: Tensor) -> Tensor:
        """x0 alone, of a state and a float64 time known to be good: the fast way of `predict`."""
        x0 = self(x, t)
        if not isinstance(x0, Tensor) or x0.shape != x.shape or x0.dtype != x.dtype:
            raise ValueError(
                f"{type(self).__name__} returned {shape_of(x0)} for x {shape_of(x)}; wanted x0 of the shape and dtype of x"
            )
        return x0

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        """Gradient of log p_t at x."""
        return self.predict(x, t).score

    def select(self, index: Any) -> Denoiser:
        """The same denoiser for these rows of the batch: itself, unless it holds per-sample tensors."""
        return self

    def tolerance(self, size: Tensor, t: Tensor, rtol: float, atol: float) -> Tensor:
        """What an adaptive solver allows of an error in x at times t `[B, 1, ..., 1]`, size = |x|: rtol |x| + atol (alpha + sigma)."""
        allowed = atol * (self.sde.alpha(t) + self.sde.sigma(t)).to(size) + rtol * size
        return allowed.clamp(min=torch.finfo(size.dtype).tiny)

    def error_norm(self, ratio: Tensor) -> Tensor:
        """Size `[B]` of an error over its tolerance, of the shape of x: what an adaptive solver keeps below 1. Root mean square."""
        return ratio.flatten(1).square().mean(1).sqrt()

    def record(self, name: str, amount: float) -> None:
        """Tell the oracles now solving that a sample has cost `amount` network passes of kind `name`."""
        for recorder in self.recorders:
            recorder(name, amount)


def check_denoiser(value: Any) -> Denoiser:
    """Return a Denoiser; raise a TypeError that says how to make one otherwise."""
    if not isinstance(value, Denoiser):
        raise TypeError(
            f"denoiser is {shape_of(value)}; wanted a Denoiser: Wrapped.from_score(fn, sde) and its kin wrap a callable, "
            "Preconditioned(net, sde) a network; of an EMA take ema.module"
        )
    return value


def _underived(out: Tensor, x: Tensor) -> bool:
    """Whether a derivative of out with respect to x is asked for, in reverse or in forward mode, and there is none."""
    if x.requires_grad and torch.is_grad_enabled():
        return not out.requires_grad
    return forward_ad.unpack_dual(x).tangent is not None and forward_ad.unpack_dual(out).tangent is None


class Preconditioned(Denoiser):
    """x0 = c_skip x + c_out net(c_in x, c_noise): a network and the four coefficients of its `parameterization`.

    net: nn.Module (x `[B, *shape]`, c_noise `[B]`[, cond]) -> shape of x, run in its own dtype; parameterization: a function
    (sde, t) -> (c_skip, c_out, c_in, c_noise), one of `scoresde.parameterizations` or the user's; cond: labels, a row a sample.
    """

    def __init__(
        self, net: nn.Module, sde: LinearSDE, parameterization: Parameterization = edm, cond: Tensor | None = None
    ) -> None:
        super().__init__(sde)
        if not isinstance(net, nn.Module):
            raise TypeError(f"net is {shape_of(net)}; wanted an nn.Module: Wrapped.from_eps and its kin take any callable")
        self.net = net
        self.parameterization = check_callable(parameterization, "parameterization", "a function (sde, t) -> four coefficients")
        if cond is not None and (not isinstance(cond, Tensor) or cond.ndim == 0):
            raise TypeError(f"cond is {shape_of(cond)}; wanted a tensor with a row a sample: torch.full((B,), label)")
        self.cond = cond

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x0, of the shape and dtype of x."""
        c_skip, c_out, c_in, c_noise = self.parameterization(self.sde, check_time(t, x).double())
        dtype = next((p.dtype for p in self.net.parameters() if p.is_floating_point()), x.dtype)
        c_noise = c_noise.to(x.device, torch.promote_types(dtype, torch.float32)).flatten().expand(len(x))
        if self.cond is not None and len(self.cond) != len(x):
            raise ValueError(
                f"cond has {len(self.cond)} labels for {len(x)} rows of x; wanted one a row. In a solve, a wrapper of this denoiser "
                "must pass select(index) on"
            )
        cond = self.cond if self.cond is None or not self.cond.is_inference() else self.cond.clone()  # which no graph can keep
        args = (c_noise,) if cond is None else (c_noise, cond.to(x.device))
        out = self.net((cast(c_in, x) * x).to(dtype), *args)
        if not isinstance(out, Tensor) or out.shape != x.shape:
            raise ValueError(f"the network returned {shape_of(out)} for x {list(x.shape)}; wanted the shape of x")
        if _underived(out, x):
            raise ValueError(
                "the network's output has no gradient to x, so its divergence is unknown; remove no_grad or inference_mode inside it"
            )
        return cast(c_skip, x) * x + cast(c_out, x) * out.to(x.dtype)

    def condition(self, cond: Tensor | None) -> Preconditioned:
        """The same network given these labels `[B]`, one a sample; None for the unconditional one."""
        return Preconditioned(self.net, self.sde, self.parameterization, cond)

    def select(self, index: Any) -> Preconditioned:
        """The same denoiser for these rows of the batch."""
        return self if self.cond is None else self.condition(self.cond[index])


class Wrapped(Denoiser):
    """A user's callable fn(x, t) of what it predicts: `from_score(fn, sde)`, `from_eps`, `from_x0`, `from_v`, `from_velocity`.

    fn gets x as it is and t as float64, () or `[B, 1, ..., 1]`, in the time of `sde`; it returns the shape of x. A model that
    wants one time a row takes `t.flatten().expand(len(x)).to(x)`.
    """

    def __init__(self, fn: Callable[[Tensor, Tensor], Tensor], sde: LinearSDE, inverse: Inverse) -> None:
        super().__init__(sde)
        self.warned = False
        self.fn = check_callable(fn, "fn", "a callable (x, t) -> prediction of the shape of x")
        self.inverse = inverse

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x0 = a x + b fn(x, t)."""
        t = check_time(t, x).double()
        a, b = self.inverse(self.sde.alpha(t), self.sde.sigma(t))
        out = self.fn(x, t)
        if not isinstance(out, Tensor) or out.shape != x.shape:
            raise ValueError(f"fn returned {shape_of(out)} for x {list(x.shape)}; wanted the shape of x")
        if not self.warned and _underived(out, x):
            self.warned = True
            warnings.warn(
                "fn's output has no gradient to x: right for a constant, wrong under no_grad or inference_mode, where a likelihood's "
                "divergence would miss the network; call the network without them",
                stacklevel=2,
            )
        return cast(a, x) * x + cast(b, x) * out.to(x.dtype)

    @classmethod
    def from_score(cls, fn: Callable[[Tensor, Tensor], Tensor], sde: LinearSDE) -> Wrapped:
        """fn is grad log p_t."""
        return cls(fn, sde, from_score)

    @classmethod
    def from_eps(cls, fn: Callable[[Tensor, Tensor], Tensor], sde: LinearSDE) -> Wrapped:
        """fn is the noise eps."""
        return cls(fn, sde, from_eps)

    @classmethod
    def from_x0(cls, fn: Callable[[Tensor, Tensor], Tensor], sde: LinearSDE) -> Wrapped:
        """fn is the denoised mean x0 (k-diffusion's convention)."""
        return cls(fn, sde, from_x0)

    @classmethod
    def from_v(cls, fn: Callable[[Tensor, Tensor], Tensor], sde: LinearSDE) -> Wrapped:
        """fn is v = alpha eps - sigma x0."""
        return cls(fn, sde, from_v)

    @classmethod
    def from_velocity(cls, fn: Callable[[Tensor, Tensor], Tensor], sde: LinearSDE) -> Wrapped:
        """fn is eps - x0."""
        return cls(fn, sde, from_velocity)


@runtime_checkable
class _Predicts(Protocol):
    """A denoiser, or an oracle that counts one."""

    @property
    def sde(self) -> LinearSDE: ...
    def predict(self, x: Tensor, t: Tensor) -> Prediction: ...


def _drift(denoiser: _Predicts, x: Tensor, t: Tensor, share: float) -> Tensor:
    if not isinstance(denoiser, _Predicts):
        check_denoiser(denoiser)
    score, sde, t = denoiser.predict(x, t).score, denoiser.sde, t.double()
    f, g = cast(sde.drift_coefficient(t), x), cast(sde.diffusion(t), x)
    return f * x - share * g**2 * score


def flow(denoiser: _Predicts, x: Tensor, t: Tensor) -> Tensor:
    """Probability flow dx/dt = alpha' x0 + sigma' eps = f x - g^2/2 score, shape of x. Song et al. 2021 (ICLR), eq. 13."""
    return _drift(denoiser, x, t, 0.5)


def reverse_drift(denoiser: _Predicts, x: Tensor, t: Tensor) -> Tensor:
    """Drift of the reverse SDE dx = (f x - g^2 score) dt + g dw, dt < 0, shape of x. Anderson 1982; Song et al. 2021, eq. 6."""
    return _drift(denoiser, x, t, 1.0)
