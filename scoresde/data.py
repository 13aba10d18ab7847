"""Batches as a function of the step: the order of the data is computed, not stored, so that any step can be had at any time.

    batches = Batches(load("fashion-mnist"), 128, seed=0, flip=True)
    images, labels = batches(1)             # uint8 [128, 1, 28, 28] and int64 [128]; the device moves and scales them

Resuming at a step, the number of workers and the cutting of a batch among ranks change nothing in what step k sees.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import datasets
from .checks import check_callable, check_count, check_number, shape_of
from .philox import philox
from .sources import Source, of_array, of_folder, of_npy

__all__ = ["Batch", "Batches", "Prefetched", "Source", "load", "permuted", "prefetched", "split"]

Batch = Tensor | tuple[Tensor, Tensor]

ORDER, FLIP, SPLIT = 32, 33, 34  # streams of a seed; those of `noise` and `bounds` lie below
ROUNDS, SMALL = 8, 64
LARGEST = 2**40  # samples: the halves of an index have 20 bits, far below the 64 of a round's word
MIX = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # SplitMix64's constants


def load(
    what: Any, *, part: str | None = None, labels: Any = None, folder: str | Path | None = None, levels: int | None = None
) -> Source:
    """The source that `what` names: samples by index, with labels where there are any; nothing large is read before it is asked for.

    A tensor or array `[N, *shape]`, or a `.npy` file of one, mapped: integer images (channels first; `[N, H, W]` and uint8 with channels
    last are understood; `levels` of them, default 256), or float32 or float64 vectors; labels: integers `[N]`, also as a `.npy` file
    (default: NAME.labels.npy beside NAME.npy, if there). A folder of image files, or of one folder a class. Or the name of a set,
    "digits", "mnist", "fashion-mnist" or "cifar10", whose part is "train" (default) or "test"; folder: where its files already lie, as
    in `scoresde.datasets`. A str that is the name of a set is the set: a folder called mnist is "./mnist", or a Path. Raises TypeError
    or ValueError for what is none of these or cannot be used, FileNotFoundError, and OSError for a set that cannot be had.
    """
    if isinstance(what, str) and what in datasets.SETS:
        if labels is not None or levels is not None:
            raise ValueError(f"the set {what!r} has labels and levels of its own; leave out labels and levels")
        return datasets.SETS[what](part="train" if part is None else part, folder=folder)
    sets = ", ".join(datasets.SETS)
    if part is not None or folder is not None:
        given = what if isinstance(what, (str, Path)) else shape_of(what)
        raise ValueError(
            f"part and folder are of a named set ({sets}), and {given} is none: leave them out, or give the path of the part"
        )
    if isinstance(what, (str, Path)):
        path = Path(what)
        if path.is_dir():
            if levels not in (None, 256):
                raise ValueError(f"levels is {levels} and {path} a folder of image files, which have 256; save the data as .npy")
            return of_folder(path, labels)
        if not path.exists():
            raise FileNotFoundError(f"{what} does not exist; wanted a .npy file, a folder of images or one of {sets}")
        if path.suffix != ".npy":
            raise ValueError(
                f"{path} is neither a .npy file nor a folder; np.save writes the one, a lone image goes into the other"
            )
        return of_npy(path, labels, levels)
    return of_array(what, labels, levels)


def split(source: Source, held_out: float, *, seed: int = 0) -> tuple[Source, Source]:
    """(train, held out): views of disjoint samples by a permutation of the seed, each in the order of the source.

    held_out: how many (int) or which share (float in (0, 1), rounded), at least one and not all. Nothing is copied or read.
    """
    n = len(_check_source(source))
    if isinstance(held_out, float):
        count = round(check_number(held_out, "held_out", 0.0, 1.0, open_low=True) * n)
    else:
        count = check_count(held_out, "held_out")
    if not 0 < count < n:
        raise ValueError(f"held_out is {held_out} of {n} samples, and so {count}; wanted at least one, and not all of them")
    order = permuted(np.arange(n), n, seed, 0, stream=SPLIT)
    train, held = np.sort(order[count:]), np.sort(order[:count])
    return source.rows(train, f"{source.name} without {count} held out"), source.rows(held, f"{count} held out of {source.name}")


# --- the order -----------------------------------------------------------------------------------------------------------
def permuted(position: np.ndarray, n: int, seed: int, epoch: np.ndarray | int, *, stream: int = ORDER) -> np.ndarray:
    """P(position), P a pseudo-random permutation of 0 .. n-1 for each (seed, epoch, stream): time and memory O(1) an element.

    int64 `[B]` of position and epoch (or one) -> int64 `[B]`. An index is a pair (l, r) of Z_a x Z_b with a b >= n and a, b near sqrt n;
    each of 8 rounds adds a keyed hash of the one half to the other, l + F(r) mod a and r + F(l) mod b in turn, and what comes out at n
    or beyond goes through again. The keys are Philox words of (seed, epoch), the hash is SplitMix64's. Up to 64 samples are sorted by
    Philox words, where such halves are too small to mix. Raises ValueError for n above 2^40, for a position outside 0 .. n-1, an epoch
    below 0 and a seed outside 0 .. 2^64 - 1.
    Sources: Black & Rogaway 2002 (CT-RSA), generalized Feistel and cycle walking; Steele, Lea & Flood 2014 (OOPSLA), the hash.
    """
    position, epoch = np.asarray(position, np.int64), np.asarray(epoch, np.int64)
    if check_count(n, "n") > LARGEST:
        raise ValueError(f"n is {n}; wanted at most 2^40")
    for name, value, stop in (("position", position, n), ("epoch", epoch, 2**63)):
        if value.size and not 0 <= int(value.min()) <= int(value.max()) < stop:
            raise ValueError(f"{name} spans {value.min()} .. {value.max()}; wanted 0 .. {stop - 1}")
    epochs, which = (epoch.reshape(1), 0) if epoch.ndim == 0 else np.unique(epoch, return_inverse=True)
    if n <= SMALL:
        words = _words(seed, tuple(epochs.tolist()), stream, n)
        return np.argsort(words, axis=1, kind="stable")[which, position].astype(np.int64)
    keys = _words(seed, tuple(epochs.tolist()), stream, ROUNDS).T
    keys = keys if epoch.ndim == 0 else keys[:, which]
    a = math.isqrt(n - 1) + 1
    sides = np.uint64(a), np.uint64(-(-n // a))
    value = _feistel(position.astype(np.uint64), keys, sides)
    while (beyond := np.flatnonzero(value >= n)).size:  # fewer than one in sqrt n
        value[beyond] = _feistel(value[beyond], keys if epoch.ndim == 0 else keys[:, beyond], sides)
    return value.astype(np.int64)


def _feistel(value: np.ndarray, keys: np.ndarray, sides: tuple[np.uint64, np.uint64]) -> np.ndarray:
    """A permutation of 0 .. a b - 1 by `keys`, `[ROUNDS, 1 or B]`."""
    a, b = sides
    left, right = np.divmod(value, b)
    for first, second in zip(keys[::2], keys[1::2], strict=True):
        left = (left + _mix(right, first) % a) % a
        right = (right + _mix(left, second) % b) % b
    return left * b + right


def _mix(value: np.ndarray, key: np.ndarray) -> np.ndarray:
    """64 bits of a number and a key: the output function of SplitMix64."""
    z = value * MIX[0] + key
    z = (z ^ (z >> np.uint64(30))) * MIX[1]
    z = (z ^ (z >> np.uint64(27))) * MIX[2]
    return z ^ (z >> np.uint64(31))


@lru_cache(maxsize=64)
def _words(seed: int, index: tuple[int, ...], stream: int, n: int) -> np.ndarray:
    """The first n 64-bit words of Philox at (seed, index, stream), uint64 `[len(index), n]`; remembered from step to step."""
    words = philox(_key(seed).expand(len(index)), torch.tensor(index), stream, 2 * n).numpy().astype(np.uint64)
    words = (words[:, ::2] << np.uint64(32)) | words[:, 1::2]
    words.setflags(write=False)
    return words


def _key(seed: int) -> Tensor:
    """The seed as philox takes it, int64 `[1]` in two's complement."""
    if check_count(seed, "seed", 0) >= 2**64:
        raise ValueError(f"seed is {seed}; wanted an integer in [0, 2^64): seed % 2**64")
    return torch.tensor([seed - (seed >= 2**63) * 2**64])


@dataclass(frozen=True)
class Batches:
    """`batches(step)`, step = 1, 2, ...: its samples, `[batch, *shape]` in the source's dtype, with int64 labels if any.

    Sample i of a step's `batch` is number k = (step - 1) batch + i of the run: row P(k mod N) of epoch k div N, P the permutation of
    (seed, epoch). So every epoch has every row once, and batches run on across its end. Rank r of `world` takes rows batch r / world to
    batch (r + 1) / world of each batch, rounded down: at least one, and one more or less than another rank. flip: mirror each image left
    to right (its last axis) with probability 1/2, a bit of (seed, k). labels: False leaves them out. Nothing is remembered between
    calls. Raises TypeError or ValueError for settings that cannot be, and for a step below 1.
    """

    source: Source
    batch: int
    _: KW_ONLY
    seed: int = 0
    flip: bool = False
    labels: bool = True
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if len(_check_source(self.source)) > LARGEST:
            raise ValueError(f"{self.source.name} has {len(self.source)} samples; wanted at most 2^40")
        _key(self.seed)
        if check_count(self.batch, "batch") < check_count(self.world, "world"):
            raise ValueError(f"batch is {self.batch} for {self.world} ranks; wanted at least a row each: batch={self.world}")
        if check_count(self.rank, "rank", 0) >= self.world:
            raise ValueError(f"rank is {self.rank} of {self.world}; wanted 0 .. {self.world - 1}")
        for name in ("flip", "labels"):
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"{name} is {value!r}; wanted True or False")
        if self.flip and len(self.source.shape) < 3:
            raise ValueError(f"flip is of images [C, H, W]; {self.source.name} has samples {list(self.source.shape)}: flip=False")

    def __call__(self, step: int) -> Batch:
        """Of that step."""
        k = self._numbers(step)
        epoch, position = np.divmod(k, len(self.source))
        rows = permuted(position, len(self.source), self.seed, epoch if epoch[0] < epoch[-1] else int(epoch[0]))
        x = np.ascontiguousarray(self.source.x[rows])  # a copy already, by the indexing
        if self.flip:
            mirror = _mix(k.astype(np.uint64), _words(self.seed, (0,), FLIP, 1)[0]) >> np.uint64(63) == 1
            x[mirror] = x[mirror, ..., ::-1]
        images = torch.from_numpy(x)
        if self.source.labels is None or not self.labels:
            return images
        return images, torch.from_numpy(self.source.labels[rows])

    def epoch(self, step: int) -> int:
        """The epoch, from 0, that the step's first sample is of."""
        return self._first(step) // len(self.source)

    def position(self, step: int) -> int:
        """Where in that epoch it stands, from 0."""
        return self._first(step) % len(self.source)

    def _first(self, step: int) -> int:
        first = (check_count(step, "step") - 1) * self.batch
        if first + self.batch >= 2**63:
            raise ValueError(f"step is {step}: sample numbers end at 2^63")
        return first

    def _numbers(self, step: int) -> np.ndarray:
        begin, end = (self._first(step) + self.batch * r // self.world for r in (self.rank, self.rank + 1))
        return np.arange(begin, end, dtype=np.int64)


# --- ahead of time -------------------------------------------------------------------------------------------------------
def prefetched(batches: Callable[[int], Batch], workers: int = 2, ahead: int = 4) -> Prefetched:
    """The same function of the step, with the `ahead` steps after the last one asked for computed by `workers` threads meanwhile.

    What it returns does not depend on either, nor on the order of steps; an error is raised at the step it is of. workers=0 computes a
    step when it is asked for. Close it, or use it in `with`; its threads end with it.
    """
    return Prefetched(batches, workers, ahead)


class Prefetched:
    """See `prefetched`; `batches` is the function it was made of."""

    def __init__(self, batches: Callable[[int], Batch], workers: int = 2, ahead: int = 4) -> None:
        self.batches = check_callable(batches, "batches", "a function of the step, as Batches(source, 64)")
        self.workers, self.ahead = check_count(workers, "workers", 0), check_count(ahead, "ahead")
        self._lock, self._closed = threading.Lock(), False
        self._begin()

    def _begin(self) -> None:
        """The threads hold the executor weakly: they end with it, and it with this."""
        self._pool = ThreadPoolExecutor(self.workers, "scoresde-data") if self.workers and not self._closed else None
        self._coming, self._process = dict[int, Future[Batch]](), os.getpid()

    def __call__(self, step: int) -> Batch:
        """Of that step, computed by now if it was foreseen."""
        if self._closed:
            raise RuntimeError("these batches are closed; wanted prefetched(batches) anew")
        if self._process != os.getpid():  # a fork has no threads, and its lock is as the parent left it
            self._lock = threading.Lock()
            self._begin()
        if self._pool is None:
            return self.batches(step)
        check_count(step, "step")
        with self._lock:
            wanted = range(step, step + self.ahead + 1)
            for old in self._coming.keys() - set(wanted):
                self._coming.pop(old).cancel()
            for new in wanted:
                if new not in self._coming:
                    self._coming[new] = self._pool.submit(self.batches, new)
            future = self._coming.pop(step)
        return future.result()

    def close(self) -> None:
        """Drop what is under way and end the threads; at once, and as often as one likes."""
        self._closed = True
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None
        self._coming.clear()

    def __enter__(self) -> Prefetched:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_source(source: Any) -> Source:
    if not isinstance(source, Source):
        raise TypeError(f"source is {shape_of(source)}; wanted what load(...) returns: load(x) of a tensor, load('mnist') of a set")
    return source
