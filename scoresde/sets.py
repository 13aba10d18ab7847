"""The two sets that a metric compares, wherever they lie: folders of samples, sets by name, files of images, vectors or statistics."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from . import data, datasets
from .images import gathered, mapped
from .metrics import Gaussian, from_npz
from .samples import samples_of

__all__ = ["Stream", "check_state", "is_light", "opened", "paired", "state"]

Pair = tuple["Stream | Gaussian", "Stream | Gaussian"]


@dataclass(frozen=True, eq=False)
class Stream:
    """Images or vectors by index, wherever they lie: `read(first, stop)`; levels: of integers, None: floats, in the model's range."""

    name: str
    count: int
    shape: tuple[int, ...]
    levels: int | None
    read: Callable[[int, int], np.ndarray] = field(repr=False)
    digest: Callable[[], str] = field(repr=False)
    low: float | None = None
    high: float | None = None
    seeds: str | None = None

    def probe(self) -> str:
        """What tells two sets apart at the price of three samples."""
        some = b"".join(np.ascontiguousarray(self.read(i, i + 1)).tobytes() for i in (0, self.count // 2, self.count - 1))
        return f"{self.count} of {list(self.shape)}, sha256 of the first, middle and last {hashlib.sha256(some).hexdigest()[:16]}"


def _is_samples(path: Path) -> bool:
    """Whether a folder is one that `scoresde sample` writes, done or not: there are pictures in it that are no samples."""
    return path.is_dir() and ((path / "settings.json").is_file() or any(path.glob("samples*.csv")))


def is_light(what: str) -> bool:
    """Whether its state is had at once, and not file by file."""
    return what in datasets.SETS or not Path(what).is_dir() or _is_samples(Path(what))


def state(what: str) -> str:
    """What changes when the files of a set are written anew: size and time of each, the hashes in a folder of samples.

    Nothing of a named set, whose files are checked by hash; ValueError for no name.
    """
    if not what:
        raise ValueError("the name of a set is empty; wanted a folder, a .npy or .npz file or the name of a set")
    path = Path(what)
    if what in datasets.SETS:
        return ""
    try:
        if _is_samples(path):
            settings = hashlib.sha256((path / "settings.json").read_bytes()).hexdigest()
            return f"{settings} {json.loads((path / 'summary.json').read_text())['sha256']}"
        digest = hashlib.sha256()
        for file in gathered(path)[0] if path.is_dir() else [path]:
            found = file.stat()
            digest.update(f"{file.name} {found.st_size} {found.st_mtime_ns}\n".encode())
        return digest.hexdigest()
    except (KeyError, OSError, TypeError, ValueError):
        return "none"  # and why is said by who opens it


def check_state(what: str, before: str) -> None:
    """Raise ValueError unless this is the state of the set."""
    if state(what) != before:
        raise ValueError(f"{what} has been written anew since the run began; run again, on data that nothing writes meanwhile")


@functools.lru_cache(maxsize=4)
def opened(what: str, part: str | None, levels: int | None) -> Stream | Gaussian:
    """The set of that name or path, opened once a process and run; levels: of a .npy file of integers."""
    path = Path(what)
    if part is not None and (path.suffix == ".npz" or _is_samples(path)):
        raise ValueError(f"part is {part!r}; {what} is no named set and has no parts: leave it out")
    if path.suffix == ".npz":
        return from_npz(path)
    if _is_samples(path):
        made = samples_of(path)
        digest = lambda: made.sha256
        return Stream(what, made.count, tuple(made.shape), made.levels, made.read, digest, made.low, made.high, made.seeds)
    integers = path.suffix == ".npy" and path.is_file() and mapped(path, "images or vectors").dtype.kind in "iu"
    found = data.load(what, part=part, levels=levels if integers else None)
    read = lambda first, stop: found.x[np.arange(first, stop)]
    return Stream(what, len(found), found.shape, found.levels, read, lambda: found.sha256)


def paired(samples: str, reference: str, part: str | None, given: int | None) -> tuple[Pair, int | None]:
    """The two, and the levels of .npy files; ValueError where they cannot be compared."""
    both = ((samples, None), (reference, part))
    others = [opened(*each, None) for each in both if not each[0].endswith(".npy")]
    levels = given
    if levels is None:
        levels = next((each.levels for each in others if isinstance(each, Stream) and each.levels is not None), None)
    a, b = (opened(*each, levels if each[0].endswith(".npy") else None) for each in both)
    streams = [each for each in (a, b) if isinstance(each, Stream)]
    if given is not None and all(each.levels != given for each in streams):
        raise ValueError(f"levels is {given}, and neither set is a .npy file of integers; leave it out")
    if isinstance(a, Stream) and isinstance(b, Stream):
        if a.shape != b.shape:
            grey = len(a.shape) == len(b.shape) == 3 and a.shape[1:] == b.shape[1:]
            mend = ": one is grey and one in colour, and how to change either is yours to choose" if grey else ""
            raise ValueError(f"{samples} has samples {list(a.shape)} and {reference} {list(b.shape)}; wanted the same shape{mend}")
        if None not in (a.levels, b.levels) and a.levels != b.levels:
            raise ValueError(f"{samples} has {a.levels} levels and {reference} {b.levels}; wanted the same")
    return (a, b), levels
