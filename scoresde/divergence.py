"""The divergence of a denoiser, tr J with J = d x0 / dx: exact, or without bias from products with random probes."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .checks import check_count
from .noise import PROBE, Noise

__all__ = ["Divergence", "coloured", "default", "exact", "gaussian", "hutchpp", "rademacher"]


class Mode:
    """How the derivatives of a network are taken, kept for a solve: `name`, forward or reverse.

    wanted: a mode, or None for reverse on a CPU, where it is the faster one (`benchmarks/likelihood.py`), and elsewhere forward, which
    keeps no graph, or reverse from the first operation on that has no forward derivative or cannot be batched. Where gradients are kept
    (grad is enabled) it is reverse: torch's layer_norm has a forward derivative whose own gradient is wrong, without a word (2.13).
    """

    def __init__(self, wanted: str | None, device: torch.device) -> None:
        if wanted == "forward" and torch.is_grad_enabled():
            raise ValueError(
                "mode='forward' has no gradients that can be relied on; use mode='reverse', or do without differentiable"
            )
        self.name = wanted or ("reverse" if device.type == "cpu" or torch.is_grad_enabled() else "forward")
        self.fixed = wanted is not None
        self.batched = True  # several vectors in one pass back


class Jacobian:
    """x0 = f(x) and, as a function, its products with vectors v `[k, B, *shape]`: J v (forward mode) or J' v (reverse), of that shape.

    One pass of the network gives x0 and the first products. record: told of the cost, 1 a product forward and 2 back, and of passes
    that a second call repeats (forward mode; reverse mode keeps the graph). Gradients flow through both where grad is enabled (`Mode`).
    """

    def __init__(self, f: Callable[[Tensor], Tensor], x: Tensor, mode: Mode, record: Callable[[str, float], None]) -> None:
        self.f, self.mode, self.record = f, mode, record
        self.x, self.track = x, torch.is_grad_enabled()
        self._x0: Tensor | None = None
        self._graph: tuple[Tensor, Tensor] | None = None  # of reverse mode: f(x) and x

    @property
    def x0(self) -> Tensor:
        """f(x)."""
        x0 = self.f(self.x) if self._x0 is None else self._x0
        return x0 if self.track else x0.detach()

    def __call__(self, vectors: Tensor) -> Tensor:
        """Their products."""
        if self.mode.name == "forward":
            try:
                return self._forward(vectors)
            except RuntimeError:  # what the network itself raises comes again
                if self.mode.fixed:
                    raise
                self.mode.name = "reverse"
        return self._reverse(vectors)

    def _forward(self, vectors: Tensor) -> Tensor:
        x = self.x.contiguous()  # an expanded one cannot be dual
        jvp: Any = lambda v: torch.func.jvp(self.f, (x,), (v,))
        if len(vectors) == 1:
            x0, product = jvp(vectors[0])
            products = product[None]
        else:
            several: Any = torch.vmap(jvp, out_dims=(None, 0))  # type: ignore[bad-argument-type]
            x0, products = several(vectors)
        self.record("divergence", float(len(vectors)))
        if self._x0 is not None:
            self.record("repeated", 1.0)
        self._x0 = x0
        return products

    def _reverse(self, vectors: Tensor) -> Tensor:
        with torch.enable_grad():
            if self._graph is None:
                leaf = self.x if self.track and self.x.requires_grad else self.x.detach().requires_grad_()
                self._graph = self.f(leaf), leaf
            x0, x = self._graph
            self._x0 = x0
            self.record("divergence", 2.0 * len(vectors))
            if not x0.requires_grad:
                return torch.zeros_like(vectors)
            back = functools.partial(torch.autograd.grad, x0, x, retain_graph=True, create_graph=self.track, materialize_grads=True)
            if self.mode.batched and not self.track:  # vmap silences what cannot be differentiated twice
                try:
                    return back(vectors, is_grads_batched=True)[0]
                except RuntimeError:  # some ops have no batching rule (pooling, custom kernels)
                    self.mode.batched = False
            return torch.stack([back(v)[0] for v in vectors])


@dataclass(frozen=True)
class Divergence(ABC):
    """A way to find tr J of each sample. A subclass draws probes and makes estimates of products with them.

    mode: "forward" or "reverse" derivatives, or None to choose by device and by what the network's operations have (`Mode`).
    """

    mode: str | None = field(default=None, kw_only=True, repr=False)
    random = True  # draws probes
    frozen = False  # one set of probes for a whole solve, always

    def __post_init__(self) -> None:
        if self.mode not in (None, "forward", "reverse"):
            raise ValueError(f"mode is {self.mode!r}; wanted 'forward', 'reverse' or None for what the network can")

    @property
    def chains(self) -> int:
        """Independent estimates that ride in one solve; their spread is the standard error."""
        return 1

    @abstractmethod
    def probes(self, noise: Noise, x: Tensor) -> Tensor:
        """What is drawn for an evaluation, `[n, B, *shape]`."""

    @abstractmethod
    def trace(self, jacobian: Jacobian, x: Tensor, probes: Tensor) -> Tensor:
        """tr J, `[chains, B]`."""


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Over the event: `[k, B]` of two `[k, B, *shape]`."""
    return (a * b).flatten(2).sum(2)


@dataclass(frozen=True)
class exact(Divergence):
    """tr J = sum_i e_i' J e_i over the D unit vectors, `chunk` in one batched pass. Any event shape; D products an evaluation."""

    chunk: int = 64
    random = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.chunk, "chunk")

    def probes(self, noise: Noise, x: Tensor) -> Tensor:
        """None are drawn."""
        return x.new_zeros(0, *x.shape)

    def trace(self, jacobian: Jacobian, x: Tensor, probes: Tensor) -> Tensor:
        """tr J, `[1, B]`."""
        d, found = x.shape[1:].numel(), x.new_zeros(len(x))
        for first in range(0, d, self.chunk):
            part = torch.arange(first, min(first + self.chunk, d), device=x.device)
            basis = torch.zeros(len(part), d, dtype=x.dtype, device=x.device).scatter_(1, part[:, None], 1.0)
            vectors = basis.reshape(-1, 1, *x.shape[1:]).expand(-1, *x.shape)
            found = found + _dot(jacobian(vectors), vectors).sum(0)
        return found[None]


@dataclass(frozen=True)
class rademacher(Divergence):
    """p' J p for k probes p of random signs: E p p' = I. Hutchinson 1990 (Commun. Stat. 19); a diagonal J has no error.

    frozen: the same probes at every evaluation of a solve, as adaptive solvers always have it, whose error estimate must not see noise;
    else fresh ones, whose errors average out along a fixed grid.
    """

    k: int = 2
    frozen: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.k, "k")

    @property
    def chains(self) -> int:
        """k."""
        return self.k

    def probes(self, noise: Noise, x: Tensor) -> Tensor:
        """Signs."""
        return torch.stack([noise.signs(x, PROBE) for _ in range(self.k)])

    def trace(self, jacobian: Jacobian, x: Tensor, probes: Tensor) -> Tensor:
        """p' J p."""
        return _dot(jacobian(probes), probes)


@dataclass(frozen=True)
class gaussian(rademacher):
    """p' J p for k probes p of unit normals. Its variance is 2 |S|^2, S the symmetric part of J: never less than of signs."""

    def probes(self, noise: Noise, x: Tensor) -> Tensor:
        """Unit normals."""
        return torch.stack([noise.draw(x, PROBE) for _ in range(self.k)])


@dataclass(frozen=True)
class coloured(Divergence):
    """sum_c p_c' J p_c, p_c random signs on the c-th of k dilated lattices: only J between numbers of one colour, far apart, errs.

    k products an estimate; `chains` estimates ride in one solve. Unbiased for every J; exact where J does not reach from a pixel to the
    next of its colour. Tang & Saad 2012 (Numer. Linear Algebra Appl. 19), who take k until it does.
    """

    k: int = 2
    chains: int = 2  # type: ignore[assignment]
    frozen: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.k, "k")
        check_count(self.chains, "chains")

    def probes(self, noise: Noise, x: Tensor) -> Tensor:
        """Signs for all colours at once."""
        return torch.stack([noise.signs(x, PROBE) for _ in range(self.chains)])

    def trace(self, jacobian: Jacobian, x: Tensor, probes: Tensor) -> Tensor:
        """The sum over the colours."""
        of_colour = torch.arange(self.k).reshape(-1, *[1] * (x.ndim - 1)) == torch.from_numpy(colours(tuple(x.shape[1:]), self.k))
        vectors = (probes[:, None] * of_colour.to(x)[None, :, None]).flatten(0, 1)
        return _dot(jacobian(vectors), vectors).unflatten(0, (self.chains, self.k)).sum(1)


@functools.lru_cache(maxsize=16)
def colours(shape: tuple[int, ...], k: int) -> np.ndarray:
    """A colour 0 .. k-1 for each number of an event: sum_i a_i place_i mod k with the a that keeps equal colours farthest apart.

    Axes before the last two (channels) count as one step apart, however far. Only the last axis is used for vectors.
    """
    grids = np.indices(shape)
    if len(shape) == 1:
        return grids[0] % k
    near = np.stack(np.meshgrid(*[np.arange(-min(n - 1, 8), min(n - 1, 8) + 1) for n in shape], indexing="ij"), -1).reshape(
        -1, len(shape)
    )
    near = near[np.abs(near).any(1)]
    size = (near[:, -2:] ** 2).sum(1) + (near[:, :-2] != 0).sum(1)
    best, chosen = (-1.0, 0), (1,) * len(shape)
    for a in np.ndindex(*[k] * (len(shape) - 1)):
        meet = size[(near @ np.array([*a, 1])) % k == 0]
        least = meet.min() if len(meet) else np.inf
        score = (float(least), -int((meet == least).sum()))  # far, and few of the nearest
        if score > best:
            best, chosen = score, (*a, 1)
    return np.tensordot(np.array(chosen), grids, 1) % k


@dataclass(frozen=True)
class hutchpp(Divergence):
    """tr(Q' J Q) + tr(G' (I - Q Q') J (I - Q Q') G) / r, Q an orthonormal basis of J S; S and G of r = k / 3 random signs each.

    k products an estimate in two passes; `chains` estimates. For comparison: it pays where a few directions carry J, which a
    denoiser's near-projection does not. Meyer, Musco, Musco & Woodruff 2021 (SOSA), algorithm 1.
    """

    k: int = 6
    chains: int = 2  # type: ignore[assignment]
    frozen: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.chains, "chains")
        if check_count(self.k, "k", 3) % 3:
            raise ValueError(f"k is {self.k}; wanted a multiple of 3: a third each for the sketch, its trace and the rest")

    def probes(self, noise: Noise, x: Tensor) -> Tensor:
        """Signs for S and G of every chain."""
        return torch.stack([noise.signs(x, PROBE) for _ in range(2 * self.chains * self.k // 3)])

    def trace(self, jacobian: Jacobian, x: Tensor, probes: Tensor) -> Tensor:
        """The trace on the sketched range and an estimate of that off it."""
        r, d, shape = self.k // 3, x.shape[1:].numel(), x.shape[1:]
        if r >= d:
            raise ValueError(f"k is {self.k} for events of {d} numbers; wanted k < {3 * d}: exact() takes {d} products")
        s, g = probes.split(len(probes) // 2)
        columns = lambda v: v.flatten(2).unflatten(0, (self.chains, r)).permute(0, 2, 3, 1)  # [chains, B, D, r]
        q = torch.linalg.qr(columns(jacobian(s))).Q
        rest = columns(g)
        rest = rest - q @ (q.mT @ rest)
        vectors = torch.cat([q, rest], 3).permute(0, 3, 1, 2).reshape(2 * r * self.chains, len(x), *shape)
        on, off = _dot(jacobian(vectors), vectors).reshape(self.chains, 2, r, len(x)).unbind(1)
        return on.sum(1) + off.mean(1)


def default(shape: Any) -> Divergence:
    """What is used unless told: exact up to 256 numbers an event, beyond them the winner of `benchmarks/likelihood.py`."""
    return exact() if torch.Size(shape).numel() <= 256 else coloured(2, 2)
