"""Samples by index, wherever they lie: arrays and tensors, `.npy` files (mapped, not read) and folders of images (decoded when asked)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from .checks import check_count, shape_of
from .images import gathered, mapped, picture, survey

__all__ = ["Rows", "Source", "of_array", "of_folder", "of_npy"]

PIECE = 2**24  # bytes looked at together where a whole source is read through


@dataclass(frozen=True)
class Rows:
    """What numpy's indexing cannot say of a stored array: `rows[i]`, i int64 `[n]`, is `read(i)`, a new array `[n, *shape[1:]]`."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[np.ndarray], np.ndarray] = field(repr=False)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        return self.read(rows)


@dataclass(frozen=True, eq=False)
class Source:
    """Samples and their labels: what a training run reads.

    x: `[N, *shape]`, an array, a mapped file or Rows, indexed by int64 `[n]`; uint8 (int32 above 256 levels) of images, channels first,
    and float32 or float64 of vectors; labels: int64 `[N]`, 0 .. classes - 1, or None; levels: of integer images, else None. Raises
    ValueError for no samples, for labels that are not one a sample, and for a dtype that is none of these.
    """

    x: np.ndarray | Rows = field(repr=False)
    name: str = "array"
    labels: np.ndarray | None = field(default=None, repr=False)
    classes: int = 0
    levels: int | None = None

    def __post_init__(self) -> None:
        if self.x.dtype not in (np.uint8, np.int32, np.float32, np.float64) or len(self.x.shape) < 2:
            raise ValueError(f"{self.name} is {_of(self.x)}; wanted images or vectors [N, *shape]: scoresde.data.load makes them")
        if not all(self.x.shape):
            raise ValueError(f"{self.name} is {_of(self.x)}, and so holds no samples; wanted at least one")
        if self.labels is None:
            return
        if self.labels.dtype != np.int64 or self.labels.shape != self.x.shape[:1]:
            raise ValueError(f"labels of {self.name} are {_of(self.labels)}; wanted one a sample, int64 [{len(self)}]")
        if not 0 <= int(self.labels.min()) <= int(self.labels.max()) < self.classes:
            span = f"{self.labels.min()} .. {self.labels.max()}"
            raise ValueError(f"labels of {self.name} span {span}; wanted 0 .. {self.classes - 1}, of {self.classes} classes")

    def __len__(self) -> int:
        return self.x.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a sample, channels first."""
        return tuple(self.x.shape[1:])

    @property
    def dtype(self) -> np.dtype:
        """Of a sample."""
        return self.x.dtype

    @cached_property
    def sha256(self) -> str:
        """Of shape, dtype, samples and labels, however they are stored: one pass over all of the data when first asked for."""
        kind = self.dtype.newbyteorder("<")
        digest = hashlib.sha256(f"{list(self.x.shape)} {kind.str}\n".encode())
        for _, part in pieces(self.x):
            digest.update(np.ascontiguousarray(part, kind).data)
        if self.labels is not None:
            digest.update(f"{self.classes} classes\n".encode())
            digest.update(np.ascontiguousarray(self.labels, "<i8").data)
        return digest.hexdigest()

    def rows(self, rows: np.ndarray, name: str) -> Source:
        """The samples of these indices, int64 `[n]`, as a view: nothing is read."""
        x = self.x
        view = Rows((len(rows), *self.shape), self.dtype, lambda i: x[rows[i]])
        return Source(view, name, None if self.labels is None else self.labels[rows], self.classes, self.levels)


def pieces(x: np.ndarray | Rows) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, rows) through all of x, some megabytes at a time."""
    many = max(1, PIECE // max(1, int(np.prod(x.shape[1:], dtype=np.int64)) * x.dtype.itemsize))
    for first in range(0, x.shape[0], many):
        yield first, x[np.arange(first, min(first + many, x.shape[0]))]


def of_array(x: Any, labels: Any = None, levels: int | None = None, name: str = "array") -> Source:
    """A source of a tensor or an array, which it does not copy: integer images, or floats, read once for NaN.

    Integers: `[N, C, H, W]`, `[N, H, W]` (one channel) or, of uint8, `[N, H, W, C]` with C of 1 or 3 where the second axis is neither;
    `levels` (default 256) of them, 0 .. levels - 1, checked where the dtype could hold others. Floats: float32 or float64 `[N, *shape]`.
    labels: integers `[N]`, or None. Raises TypeError or ValueError for all else, before anything is drawn from it.
    """
    x = _numpy(x, name)
    if not isinstance(x, np.ndarray):
        raise TypeError(f"{name} is {shape_of(x)}; wanted a tensor or array of integers (images), float32 or float64 (vectors)")
    found = _images(x, levels, name) if x.dtype.kind in "iu" else _vectors(x, levels, name)
    known = None if labels is None else _labels(labels, len(x), name)
    levels = (256 if levels is None else levels) if found.dtype.kind in "iu" else None
    return Source(found, name, known, 0 if known is None else int(known.max(initial=-1)) + 1, levels)


def of_npy(path: Path, labels: Any = None, levels: int | None = None) -> Source:
    """A source of a `.npy` file, mapped: samples and labels as in `of_array`; labels: by default NAME.labels.npy beside NAME.npy."""
    beside = path.with_suffix(".labels.npy")
    if labels is None and beside.is_file():
        labels = beside
    return of_array(mapped(path, "images or vectors"), labels, levels, str(path))


def of_folder(path: Path, labels: Any = None) -> Source:
    """A source of image files, decoded whenever they are asked for: uint8 `[C, H, W]`, C = 1 where all are grey and else 3.

    The files of the folder by name; or those of the folders in it, one a class, which are numbered by name. 8 bits, opaque, of one
    size: the headers are read here, and the pixels when asked for. Reading them needs Pillow.
    """
    files, sizes = gathered(path)
    known, classes = labels, len(sizes)
    if sizes:
        if labels is not None:
            raise ValueError(f"{path} has a folder a class, and labels are given too; wanted one or the other: leave out labels")
        known = np.repeat(np.arange(classes), sizes)
    shape = survey(files)
    x = Rows((len(files), *shape), np.dtype(np.uint8), lambda i: np.stack([picture(files[j], shape) for j in np.atleast_1d(i)]))
    known = None if known is None else _labels(known, len(files), str(path))
    return Source(x, str(path), known, classes or (0 if known is None else int(known.max()) + 1), 256)


# --- what is taken -------------------------------------------------------------------------------------------------------
def _of(x: Any) -> str:
    return f"{list(x.shape)} {x.dtype}"


def _numpy(x: Any, name: str) -> Any:
    """A tensor's numbers as an array, not copied; what is no tensor as it came."""
    try:
        return x.detach().cpu().numpy() if isinstance(x, Tensor) else x
    except (TypeError, RuntimeError) as error:  # bfloat16, sparse, quantized
        raise TypeError(
            f"{name} is {shape_of(x)} ({error}); wanted a dense tensor of integers, float32 or float64: x.float()"
        ) from error


def _images(x: np.ndarray, levels: int | None, name: str) -> np.ndarray | Rows:
    if (levels := 256 if levels is None else check_count(levels, "levels", 2)) > 2**31:
        raise ValueError(f"levels is {levels}; wanted at most 2^31, of int32: such fine levels are floats")
    if x.ndim < 3:
        mend = "x.astype(np.float32) of vectors, images with all their axes"
        raise ValueError(f"{name} is {_of(x)}; wanted integer images [N, C, H, W] or [N, H, W], or floats [N, *shape]: {mend}")
    shape, move = x.shape, None
    if x.ndim == 3:
        shape, move = (len(x), 1, *x.shape[1:]), lambda part: part[:, None]
    elif x.ndim == 4 and x.shape[-1] in (1, 3) and x.shape[1] not in (1, 3):
        if x.dtype != np.uint8:
            raise ValueError(f"{name} is {_of(x)}; channels last are taken of uint8 alone: np.moveaxis(x, -1, 1)")
        shape, move = (len(x), x.shape[-1], *x.shape[1:3]), lambda part: np.moveaxis(part, -1, 1)
    if levels < 256 or x.dtype != np.uint8:
        for first, part in pieces(x):
            if part.size and not 0 <= int(part.min()) <= int(part.max()) < levels:
                row = first + int(((part < 0) | (part >= levels)).reshape(len(part), -1).any(1).argmax())
                raise ValueError(
                    f"{name}: sample {row} spans {x[row].min()} .. {x[row].max()}; wanted 0 .. {levels - 1}: check levels"
                )
    kind = np.dtype(np.uint8 if levels <= 256 else np.int32)
    if move is None and x.dtype == kind:
        return x
    return Rows(shape, kind, lambda i: np.array((move(x[i]) if move else x[i]), dtype=kind, order="C"))


def _vectors(x: np.ndarray, levels: int | None, name: str) -> np.ndarray | Rows:
    if x.dtype.kind != "f" or x.dtype.itemsize not in (4, 8):
        mend = "images are integers and vectors float32 or float64: x.astype(np.float32)"
        raise TypeError(f"{name} is {_of(x)}; {mend}")
    if levels is not None:
        raise ValueError(f"levels is {levels} and {name} is {_of(x)}; levels are of integer images: leave it out")
    if x.ndim < 2:
        raise ValueError(f"{name} is {_of(x)}; wanted [N, *shape] with at least one axis of a sample: x[:, None]")
    for first, part in pieces(x):
        if not np.isfinite(part).all():
            rows = first + np.flatnonzero(~np.isfinite(part).reshape(len(part), -1).all(1))
            raise ValueError(
                f"{name} has NaN or infinite entries in rows {rows[:8].tolist()}; wanted finite numbers: clean the data first"
            )
    return x if x.dtype.isnative else Rows(x.shape, kind := x.dtype.newbyteorder("="), lambda i: x[i].astype(kind))


def _labels(labels: Any, count: int, name: str) -> np.ndarray:
    """int64 `[count]` of integers from 0 on, given or in a `.npy` file."""
    found = mapped(Path(labels), "labels") if isinstance(labels, (str, Path)) else labels
    found = np.asarray(_numpy(found, f"labels of {name}"))
    if found.dtype.kind not in "iu":
        raise TypeError(
            f"labels of {name} are {found.dtype}; wanted integers, one a sample: np.unique(names, return_inverse=True)[1]"
        )
    if found.shape != (count,):
        raise ValueError(f"labels of {name} are {_of(found)}; wanted one a sample, [{count}]")
    if found.size and not 0 <= int(found.min()) <= int(found.max()) < 2**31:
        raise ValueError(f"labels of {name} span {found.min()} .. {found.max()}; wanted 0 .. classes - 1")
    return found.astype(np.int64)
