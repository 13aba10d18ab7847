"""Where randomness comes from: one generator, seeds a sample, or a Brownian path a sample; never a global generator.

A seeded draw is a function of (seed, stream, draw, element) and of nothing else; its bits are those of `philox`, settled for ever.
"""

from __future__ import annotations

import copy
import math
import operator
import secrets
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from .checks import STATE_DTYPES, check_count, check_number, check_rows, check_state, check_time, shape_of
from .philox import CHUNK, HALF, normals, philox, unit

__all__ = ["Noise", "brownian", "entropy_seeds", "gaussian", "seeded"]

INITIAL, STEP, CORRECTOR, PROBE, DEQUANTIZE, BROWNIAN, DATA = range(7)  # the streams of a seed; `bounds` and `data` have others

LEVELS = 32  # depth of the Brownian tree: leaves of 2^-32 of the interval
REUSED = 16  # levels of the last descent that are kept: neighbouring times share the upper ones
BITS = 46  # times are rounded to 2^-46 of the interval, a tick: those that differ by rounding are one time


class Noise(ABC):
    """A source of randomness: the start, the noise of a step, and whatever else one solve draws.

    x is the state `[B, *shape]`; t and s are times, () or `[B, 1, ..., 1]`; results have the dtype and device of x. The same
    call again gives fresh draws, except that a Brownian path is one path for ever (`path`). A stream is one of the constants above.
    """

    path: ClassVar[bool] = False

    @abstractmethod
    def draw(self, x: Tensor, stream: int) -> Tensor:
        """Unit normal like x that belongs to no interval: a corrector's, say."""

    @abstractmethod
    def signs(self, x: Tensor, stream: int) -> Tensor:
        """Independent +1 and -1 like x, each with probability 1/2 (Rademacher)."""

    @abstractmethod
    def uniform(self, x: Tensor, stream: int) -> Tensor:
        """Uniform in (0, 1) like x: neither end is reached, in float32 either."""

    @abstractmethod
    def select(self, index: Any) -> Noise:
        """The noise of these rows (slice, list, LongTensor or mask): its later draws are those these rows would have got."""

    def initial(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str | None = None) -> Tensor:
        """Standard normal of shape (B, *shape), drawn in float64 and cast: the start, the same for every solver.

        Raises: TypeError for a dtype other than float32 and float64 or a shape not of integers; ValueError for one without B.
        """
        if dtype not in STATE_DTYPES or not isinstance(shape, Sequence):
            raise TypeError(f"initial({shape}, {dtype}); wanted the whole shape (B, *shape) and torch.float32 or torch.float64")
        sizes = [check_count(size, "a size in shape", 0) for size in shape]
        return self.draw(torch.empty(sizes, dtype=torch.float64, device=device), INITIAL).to(dtype)

    def __call__(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Unit normal like x for the interval t -> s: (W_s - W_t) / sqrt|s - t|."""
        _gap(x, t, s)
        return self.draw(x, STEP)

    def pair(self, x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """The increment dW = W_s - W_t and its integral dZ = int (W_u - W_t) d|u - t| over t -> s, jointly exact.

        With h = |s - t|: dW = sqrt(h) z1 and dZ = h^(3/2) / 2 (z1 + z2 / sqrt 3), so that Var dW = h, Var dZ = h^3 / 3,
        Cov = h^2 / 2. Source: Kloeden and Platen, 1992, section 10.4.
        """
        h, like = _gap(x, t, s).abs(), torch.empty_like(x, dtype=torch.float64)
        root, z1, z2 = h.sqrt(), self.draw(like, STEP), self.draw(like, STEP)
        return (root * z1).to(x.dtype), (h * root * HALF * (z1 + z2 * (1 / math.sqrt(3)))).to(x.dtype)


def _gap(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """s - t in float64, on the device of x where it has rows."""
    check_state(x)
    gap = check_time(s, x, "s").detach().double() - check_time(t, x).detach().double()
    return gap.to(x.device) if gap.ndim else gap


def _check(x: Tensor, stream: Any) -> Tensor:
    if check_count(stream, "stream", 0) == BROWNIAN or stream >= 2**32:
        raise ValueError(f"stream is {stream}; wanted one in [0, 2^32) other than {BROWNIAN}, the Brownian path's own")
    return check_state(x)


def _inside(u: Tensor) -> Tensor:
    return u.clamp_(2.0**-33, 1 - torch.finfo(u.dtype).eps / 2)  # float32 rounds 1 - 2^-33 to 1


class _Gaussian(Noise):
    def __init__(self, generator: torch.Generator):
        self._by: Any = {"generator": generator, "device": generator.device}

    def draw(self, x: Tensor, stream: int) -> Tensor:
        return torch.randn(_check(x, stream).shape, dtype=x.dtype, **self._by).to(x.device)

    def signs(self, x: Tensor, stream: int) -> Tensor:
        return torch.randint(0, 2, _check(x, stream).shape, **self._by).to(x).mul_(2).sub_(1)

    def uniform(self, x: Tensor, stream: int) -> Tensor:
        return _inside(torch.rand(_check(x, stream).shape, dtype=x.dtype, **self._by).to(x.device))

    def select(self, index: Any) -> Noise:
        return self


class _Seeded(Noise):
    def __init__(self, key: Tensor):
        self._key, self._draws, self._kind = key, Counter(), None
        self._ahead: dict[int, tuple[int, Tensor]] = {}  # stream: (a draw, that draw and the next ones)

    def _next(self, x: Tensor, stream: int) -> tuple[int, int]:
        """(elements a row, number of this draw)."""
        n = self._rows(_check(x, stream))
        self._draws[stream] += 1
        return n, self._draws[stream] - 1

    def _rows(self, x: Tensor) -> int:
        check_rows(self._key, len(x), "seeds")
        self._key = self._key.to(x.device)
        return math.prod(x.shape[1:])

    def draw(self, x: Tensor, stream: int) -> Tensor:
        n, draw = self._next(x, stream)
        first, ahead = self._ahead.get(stream, (0, x[:0]))
        like = (x.shape, x.dtype, x.device)
        if not (first <= draw < first + len(ahead) and like == (ahead.shape[1:], ahead.dtype, ahead.device)):
            # A small draw is all call overhead: after the first, several are made at once. They are the same draws.
            count = max(1, min(16, 4 * CHUNK // max(x.numel(), 1))) if draw else 1
            index = torch.arange(draw, draw + count, device=x.device).repeat_interleave(len(x))
            z = normals(self._key.repeat(count), index, stream, n, x.dtype)
            first, ahead = self._ahead[stream] = draw, z.reshape(count, *x.shape)
        return ahead[draw - first].clone() if len(ahead) > 1 else self._ahead.pop(stream)[1][0]

    def signs(self, x: Tensor, stream: int) -> Tensor:
        n, draw = self._next(x, stream)
        words = philox(self._key, draw, stream, -(-n // 32))  # element j is bit j % 32 of word j // 32
        bits = (words[:, :, None] >> torch.arange(32, device=x.device)).bitwise_and_(1).flatten(1)[:, :n]
        return bits.to(x.dtype).mul_(-2).add_(1).reshape(x.shape)

    def uniform(self, x: Tensor, stream: int) -> Tensor:
        n, draw = self._next(x, stream)
        return _inside(unit(philox(self._key, draw, stream, n)).to(x.dtype)).reshape(x.shape)

    def select(self, index: Any) -> Noise:
        return self._rows_of(index)

    def _rows_of(self, index: Any) -> Self:
        if not isinstance(index, slice):
            index = torch.as_tensor(index, device=self._key.device)
            if index.ndim != 1:
                raise TypeError(f"index is {shape_of(index)}; wanted rows of the batch: a slice, [3] or a LongTensor [n]")
            index = index if len(index) else index.long()  # an empty list arrives as floats
        noise = copy.copy(self)
        noise._key, noise._draws, noise._ahead, noise._kind = self._key[index], self._draws.copy(), {}, None
        return noise


class _Brownian(_Seeded):
    """A node of the tree holds W, the increment over its interval [a, a + h], and its space-time Levy area H.

    H = 1/h int (W_u - W_a - (u - a) / h W) du ~ N(0, h / 12), independent of W, and int (W_u - W_a) du = h (W / 2 + H).
    """

    path = True

    def __init__(self, key: Tensor, low: float, high: float):
        super().__init__(key)
        self._low, self._high = low, high
        self._kind: Any = None  # (elements a row, device): what the two caches hold for
        self._path: list[tuple[int, Tensor, Tensor, Tensor, Tensor]] = []  # the last descent: (node, W, H, W_a, J_a)
        self._known: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}  # the last two times: (W, J)

    def __call__(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        gap, (w_t, _), (w_s, _), _ = self._ends(x, t, s)
        return ((w_s - w_t) * gap.abs().sqrt_().reciprocal_()).to(x.dtype).reshape(x.shape)

    def pair(self, x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        gap, (w_t, j_t), (w_s, j_s), length = self._ends(x, t, s)
        dz = (j_s - j_t - w_t * length) * gap.sign()  # downwards d|u - t| = -du
        return (w_s - w_t).to(x.dtype).reshape(x.shape), dz.to(x.dtype).reshape(x.shape)

    def _ends(self, x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Any, Any, Any]:
        """s - t as given, (W, J) at t, (W, J) at s, and s - t between ticks."""
        gap = _gap(x, t, s)
        if bool((gap == 0).any()):
            raise ValueError(f"t = s in {int((gap == 0).sum())} of {gap.numel()} intervals; wanted t != s: a corrector uses draw()")
        kind = (self._rows(x), x.device)
        if kind != self._kind:
            self._kind, self._path, self._known = kind, [], {}
        a, b = self._ticks(t), self._ticks(s)
        length = (self._number(b) - self._number(a)) * ((self._high - self._low) * 2.0**-BITS)
        return gap.reshape(-1, 1) if gap.ndim else gap, self._at(a), self._at(b), length

    def _ticks(self, t: Tensor) -> tuple[int, ...]:
        """(t - t_min) / (t_max - t_min) in ticks: one number where all rows agree, else one a row."""
        low, high, times = self._low, self._high, t.detach().double().flatten().tolist()
        slack = 1e-12 * max(abs(low), abs(high))
        for time in times:
            if not low - slack <= time <= high + slack:
                raise ValueError(f"time {time!r} is outside the path's [{low!r}, {high!r}]; wanted float64 times inside, "
                                 "as of brownian(seeds, sde.t_min, sde.t_max)")  # fmt: skip
        ticks = tuple(min(max(round((time - low) / (high - low) * 2**BITS), 0), 2**BITS) for time in times)
        return ticks[:1] if len(set(ticks)) == 1 else ticks

    def _number(self, ticks: tuple[int, ...]) -> Any:
        """A float, or float64 `[B, 1]`: what follows rounds both alike."""
        one = len(ticks) == 1
        return float(ticks[0]) if one else torch.tensor(ticks, dtype=torch.float64, device=self._key.device)[:, None]

    def _at(self, ticks: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """W and J = int W du from t_min to these ticks, float64 `[B, n]`: functions of the seeds and the ticks alone."""
        value = self._known.pop(ticks, None) or self._meet(ticks)
        self._known = {**dict([*self._known.items()][-1:]), ticks: value}
        return value

    def _meet(self, ticks: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Row by row: one that was at this time in either of the last two queries is not sent down the tree again."""
        if len(ticks) == 1 or not self._known:
            return self._descend(ticks)
        w, j = (torch.empty(len(ticks), self._kind[0], dtype=torch.float64, device=self._kind[1]) for _ in range(2))
        at, new = torch.tensor(ticks), torch.ones(len(ticks), dtype=torch.bool)
        for key, (w_key, j_key) in self._known.items():
            old = new & (at == torch.tensor(key))
            w[old], j[old] = w_key[old], j_key[old]
            new &= ~old
        if bool(new.any()):
            part, left = self._rows_of(new), at[new].tolist()
            part._kind, part._path = self._kind, []
            w[new], j[new] = part._descend(tuple(left[:1] if len(set(left)) == 1 else left))
        return w, j

    def select(self, index: Any) -> Noise:
        """The paths of these rows, which remember where they were."""
        noise = self._rows_of(index)
        noise._path, noise._kind = [], self._kind
        rows = lambda key: key if len(key) == 1 else tuple(torch.tensor(key)[index].tolist())
        noise._known = {rows(key): (w[index], j[index]) for key, (w, j) in self._known.items()}
        return noise

    def _splits(self, ticks: tuple[int, ...], levels: range) -> Iterator[tuple[Tensor, Tensor]]:
        """The two normals of every node on the way down, those of several levels at once where the batch is small."""
        n, rows = self._kind[0], len(self._key)
        some = max(1, 2 * CHUNK // max(1, rows * n))
        leaf = torch.tensor([2**BITS + k for k in ticks], dtype=torch.int64, device=self._key.device).expand(rows)
        for part in (levels[i : i + some] for i in range(0, len(levels), some)):
            nodes = torch.cat([leaf >> (BITS - level) for level in part])
            z = normals(self._key.repeat(len(part)), nodes, BROWNIAN, 2 * n).view(len(part), rows, n, 2)
            yield from zip(z[..., 0], z[..., 1], strict=True)

    def _descend(self, ticks: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Down from the root, or from the last descent's lowest node that holds the time, to a leaf or a node's left end."""
        h, n, path, level = self._high - self._low, self._kind[0], self._path, 0
        if not path:
            z = normals(self._key, 0, BROWNIAN, 2 * n).view(len(self._key), n, 2)
            zero = torch.zeros_like(z[..., 0])
            path.append((1, z[..., 0] * math.sqrt(h), z[..., 1] * math.sqrt(h / 12), zero, zero))
        u = self._number(ticks) * 2.0**-BITS
        one, number = (True, float) if isinstance(u, float) else (False, Tensor.double)
        while one and level + 1 < len(path) and path[level + 1][0] == 2**BITS + ticks[0] >> BITS - level - 1:
            level += 1
        _, w, area, w_a, j_a = path[level]
        last = number(u == 1)  # the right end of the path: all of it lies behind, and nothing is left to descend
        w_a, j_a = w_a + last * w, j_a + last * h * (w / 2 + area)
        h, u = h * 2.0**-level, (u - last) * 2.0**level % 1.0
        depth = max((BITS + 1 - (k & -k).bit_length() for k in ticks if k), default=0)
        levels = range(level, min(depth, LEVELS))
        for level, (z1, z2) in zip(levels, self._splits(ticks, levels), strict=True):
            # Given W and H: the left minus the right half's W, then the sum and the difference of their H.
            delta = 3 * area + math.sqrt(h) / 2 * z1
            both, tilt = 2 * area - delta / 2, math.sqrt(h / 12) * z2
            right, h = number(u >= 0.5), h / 2
            if not one or right:
                w_left = (w + delta) / 2
                j_a = j_a + right * h * (w_a + w_left / 2 + (both + tilt) / 2)
                w_a = w_a + right * w_left
            side = 1 - 2 * right
            w, area, u = (w + side * delta) / 2, (both + side * tilt) / 2, 2 * u - right
            if one and level + 1 < REUSED:
                path[level + 1 :] = [(2**BITS + ticks[0] >> BITS - level - 1, w, area, w_a, j_a)]
        # Below the leaf, the mean of the path given W and H: the parabola W u + 6 H u (1 - u), and its integral.
        return w_a + u * (w + 6 * (1 - u) * area), j_a + h * u * (w_a + u * (w / 2 + (3 - 2 * u) * area))


def _keys(seeds: Any) -> Tensor:
    """The seeds as int64 `[B]` in two's complement."""
    if isinstance(seeds, Tensor):
        if seeds.ndim != 1 or seeds.is_floating_point() or seeds.is_complex() or seeds.dtype == torch.bool:
            raise TypeError(f"seeds is {shape_of(seeds)}; wanted integers, one a row: range(B) or a LongTensor [B]")
        seeds = seeds.tolist()
    if isinstance(seeds, (str, bytes)) or not isinstance(seeds, Iterable):
        raise TypeError(f"seeds is {seeds!r} ({type(seeds).__name__}); wanted one seed a row: range(B), or [17] for one row")
    keys = []
    for i, seed in enumerate(seeds):
        if isinstance(seed, bool) or not hasattr(seed, "__index__"):
            raise TypeError(f"seeds[{i}] is {seed!r} ({type(seed).__name__}); wanted an integer in [0, 2^64): int(seed)")
        if not 0 <= operator.index(seed) < 2**64:
            raise ValueError(f"seeds[{i}] is {seed}; wanted an integer in [0, 2^64): seed % 2**64")
        keys.append(operator.index(seed) - (operator.index(seed) >= 2**63) * 2**64)
    return torch.tensor(keys, dtype=torch.int64, device="cpu")


def entropy_seeds(n: int) -> list[int]:
    """n consecutive seeds from fresh entropy of the operating system, for a caller who gave none.

    Raises: TypeError or ValueError when n is not an integer of at least 0.
    """
    first = secrets.randbelow(2**64 - check_count(n, "n", 0) + 1)
    return list(range(first, first + n))


def gaussian(generator: torch.Generator) -> Noise:
    """Noise from one torch.Generator: fast, but a row's noise depends on its batch mates; that of `seeded` does not.

    Draws are made on the generator's device; `select` returns this same source, which draws for whatever batch it meets.

    Raises: TypeError when this is not a torch.Generator.
    """
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator is {shape_of(generator)}; wanted a torch.Generator: torch.Generator().manual_seed(0)")
    return _Gaussian(generator)


def seeded(seeds: Sequence[int] | Tensor) -> Noise:
    """Noise that is a function of (seed, stream, draw, element): a row's never depends on its batch mates.

    Args: seeds, an integer in [0, 2^64) a row: a range, list or integer tensor `[B]`.
    Raises: TypeError where they are not integers, ValueError for one out of range and, when drawing, for other than B rows.

    >>> x = torch.zeros(3, 2)
    >>> torch.equal(seeded([5, 6, 7]).draw(x, PROBE)[1:2], seeded([6]).draw(x[1:2], PROBE))
    True
    """
    return _Seeded(_keys(seeds))


def brownian(seeds: Sequence[int] | Tensor, t_min: float, t_max: float) -> Noise:
    """Noise from one Brownian path a row over [t_min, t_max]: any intervals, in any order, are increments of that path.

    The path is a virtual tree of dyadic intervals, whose normals are functions of (seed, node). A time k / 2^d of the way costs
    2 d normals an element, any other 64; below the 32nd level the path is its conditional mean, so that intervals near
    2^-32 (t_max - t_min) are too smooth. Memory: up to 16 x 4 float64 states, however many the queries. `initial`, `draw`,
    `signs` and `uniform` are those of `seeded`.

    Args: seeds, as in `seeded`; t_min and t_max, numbers.
    Raises: as `seeded`; ValueError unless t_min < t_max, and for a time outside by more than rounding or an interval t = s.
    Source: Levy's construction, with space-time areas as in Foster, Lyons and Oberhauser, 2020.
    """
    low, high = check_number(t_min, "t_min"), check_number(t_max, "t_max")
    if not low < high:
        raise ValueError(f"t_min is {low:g} and t_max {high:g}; wanted t_min < t_max: exchange them")
    return _Brownian(_keys(seeds), low, high)
