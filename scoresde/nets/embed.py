"""What the nets share: weights from a seed, the checks of a call, and the embedding of noise level and label."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from scoresde.checks import check_count, shape_of

__all__ = ["Conditioning", "Net", "check_call", "check_shape", "fourier", "gaussian", "seeded"]

# c_noise = log(sigma / alpha) / 4 spans about [-3, 3]. A period of 2 pi / 0.5 covers that without a repeat; one of
# 2 pi / 16 still resolves a factor of 5 in sigma, and no finer: high-order solvers need a net that is smooth in time.
OMEGA_LOW, OMEGA_HIGH = 0.5, 16.0


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Build modules whose weights are a function of `seed` alone, on the CPU, with every global generator untouched.

    Args:
        seed: an integer in [0, 2**63), or None for fresh entropy.

    Raises:
        TypeError, ValueError: `seed` is neither.
    """
    if seed is not None and check_count(seed, "seed", 0) >= 2**63:
        raise ValueError(f"seed is {seed}; wanted an integer below 2**63: seed % 2**63")
    # The CPU generator alone is seeded, then restored: torch.manual_seed would reseed every accelerator as well.
    # A net on the meta device has shapes and no weights, so there is nothing to draw.
    device = "meta" if torch.get_default_device().type == "meta" else "cpu"
    with torch.random.fork_rng(devices=[]), torch.device(device):
        if seed is None:
            torch.default_generator.seed()
        else:
            torch.default_generator.manual_seed(seed)
        yield


def fourier(c: Tensor, features: int) -> Tensor:
    """Embed a number as sqrt(2) [sin(omega c), cos(omega c)] with log-spaced omega (Vaswani et al. 2017, section 3.5).

    Args:
        c: [B] float32 or float64; the arithmetic stays in this dtype.
        features: an even number, the length of the embedding.

    Returns:
        [B, features], each entry of mean square 1 over a period.
    """
    low, high = math.log(OMEGA_LOW), math.log(OMEGA_HIGH)
    return _waves(c, torch.linspace(low, high, features // 2, dtype=c.dtype, device=c.device).exp())


def gaussian(c: Tensor, features: int, scale: float) -> Tensor:
    """Embed a number as sqrt(2) [sin(2 pi w c), cos(2 pi w c)], w the quantiles of |normal(0, scale^2)| at (k + 1/2) / n.

    Song et al. 2021 (score SDE), appendix C, draw w; the quantiles are as spread, hold no weights and are the same in every dtype.
    (A negative w changes the sign of a sine, which the next layer can do.)

    Args:
        c: [B] float32 or float64; the arithmetic stays in this dtype.
        features: 2 n, the length of the embedding.
        scale: standard deviation of w, in periods a unit of c.

    Returns:
        [B, features], each entry of mean square 1 over a period.
    """
    middles = (torch.arange(features // 2, dtype=c.dtype, device=c.device) + 0.5) / (features // 2)
    return _waves(c, 2 * math.pi * scale * torch.special.ndtri((1 + middles) / 2))


def _waves(c: Tensor, omega: Tensor) -> Tensor:
    angle = c[:, None] * omega
    return math.sqrt(2) * torch.cat([angle.sin(), angle.cos()], dim=1)


class Conditioning(nn.Module):
    """Embed the noise level, and the label where there are classes: e = silu(W2 silu(W1 embed(c) + label)).

    Args:
        features: even length of the Fourier embedding.
        width: length of the result.
        classes: number of labels, 0 for none. Row 0 of the table is "no label"; label k is row k + 1.
        embed: the Fourier embedding, a function (c, features) -> [B, features].
    """

    def __init__(self, features: int, width: int, classes: int, embed: Callable[[Tensor, int], Tensor] = fourier) -> None:
        super().__init__()
        self.features, self.embed = features, embed
        self.classes = check_count(classes, "classes", 0)
        self.first = nn.Linear(features, width)
        self.second = nn.Linear(width, width)
        self.labels = nn.Embedding(classes + 1, width) if classes else None

    def forward(self, c_noise: Tensor, cond: Tensor | None) -> Tensor:
        """Return the embedding [B, width] of c_noise [B] and cond (None, or labels [B]), in the dtype of the weights."""
        # bfloat16 has 8 bits, so neighbouring noise levels would share an embedding: only the features are cast.
        e = self.first(self.embed(c_noise, self.features).to(self.first.weight.dtype))
        if self.labels is not None:
            e = e + (self.labels.weight[0] if cond is None else self._look_up(self.labels, cond))
        return silu(self.second(silu(e)))

    def _look_up(self, labels: nn.Embedding, cond: Tensor) -> Tensor:
        # The look-up is itself the range check: no pass over the labels, no sync, and it works under vmap.
        try:
            return labels(cond + 1)
        except IndexError as error:
            wanted = f"0 ... {self.classes - 1}, or -1 for no label"
            raise ValueError(f"cond has labels out of range; wanted {wanted}: build the net with more classes") from error


class Net(nn.Module):
    """What the nets share: a call is checked, noise level and label are embedded, and `_run` does the rest.

    A net has `shape` of one sample, `condition`, `enter` (its first layer), `config` and `_run(x, e) -> shape of x`.
    """

    shape: tuple[int, ...]
    config: dict[str, Any]
    condition: Conditioning
    enter: nn.Linear | nn.Conv2d

    def forward(self, x: Tensor, c_noise: Tensor, cond: Tensor | None = None) -> Tensor:
        """Return the net's output, of the shape and dtype of x.

        Args:
            x: [B, *shape] in the dtype of the weights.
            c_noise: [B] float32 or float64, a smooth number of the noise level such as log(sigma / alpha) / 4.
            cond: None, or int64 labels [B] in 0 ... classes - 1, with -1 for a row without a label.

        Raises:
            TypeError, ValueError: an argument is not what is said above. Labels out of range raise on the CPU; on an
                accelerator they trip its own index assertion, since reading them here would cost a sync at every call.
        """
        check_call(x, c_noise, cond, self.shape, self.condition.classes, self.enter.weight.dtype)
        return self._run(x, self.condition(c_noise, cond))

    def _run(self, x: Tensor, e: Tensor) -> Tensor:
        raise NotImplementedError


def check_call(x: Any, c_noise: Any, cond: Any, shape: tuple[int, ...], classes: int, dtype: torch.dtype) -> None:
    """Raise unless x is [B, *shape] in the net's dtype, c_noise [B] float32 or float64, cond None or int64 [B].

    The range of the labels is left to the look-up in `Conditioning`.
    """
    wanted = f"[B, {', '.join(map(str, shape))}]"
    if not isinstance(x, Tensor):
        raise TypeError(f"x is {shape_of(x)}; wanted a tensor {wanted}: torch.as_tensor(...) makes one")
    if x.shape[1:] != shape or x.ndim != len(shape) + 1:
        raise ValueError(f"x is {shape_of(x)}; wanted {wanted}: reshape x, or build the net with another shape")
    if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"x is {shape_of(x)}; the weights are {dtype}: net.to(x.dtype), or x.to({dtype})")
    if not isinstance(c_noise, Tensor) or c_noise.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"c_noise is {shape_of(c_noise)}; wanted a float32 or float64 tensor [B]: c_noise.float()")
    if c_noise.shape != x.shape[:1]:
        raise ValueError(f"c_noise is {shape_of(c_noise)}; wanted [{len(x)}], one a row of x: c_noise.expand(len(x))")
    if cond is None:
        return
    if not classes:
        raise ValueError("cond was given to a net without classes; wanted None: build the net with classes=...")
    if not isinstance(cond, Tensor) or cond.dtype != torch.int64:
        raise TypeError(f"cond is {shape_of(cond)}; wanted an int64 tensor of labels [B]: cond.long()")
    if cond.shape != x.shape[:1]:
        raise ValueError(f"cond is {shape_of(cond)}; wanted [{len(x)}], one a row of x: cond.expand(len(x))")


def check_shape(shape: Any) -> tuple[int, ...]:
    """Return the shape of one sample as a tuple of positive integers; the integer n is (n,)."""
    if isinstance(shape, int):
        shape = (shape,)
    if not isinstance(shape, Sequence) or isinstance(shape, str) or not shape:
        raise TypeError(f"shape is {shape!r}; wanted the shape of one sample, without the batch: shape=(1, 8, 8)")
    return tuple(check_count(n, f"shape[{i}]") for i, n in enumerate(shape))
