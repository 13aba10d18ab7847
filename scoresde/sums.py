"""Sums on a disk: those of units of work, left in files by whoever has made them, and their running total, which takes them in order."""

from __future__ import annotations

import hashlib
import io
import itertools
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import parallel, resume
from .command import outcome, warn
from .metrics import Statistics
from .parallel import Elsewhere, Group
from .store import write_file

__all__ = ["Total", "Work", "begin", "end", "left", "put", "take"]

EVERY = 10.0  # seconds between two savings of a total whose units have no files
WINDOW = 4  # units a process that may be done and wait for one before them
PAUSE = 0.05  # seconds between two looks
UNIT = re.compile(r"unit-([0-9]{9,})\.npz")
Sums = dict[str, Statistics]


def _path(folder: Path, k: int) -> Path:
    return folder / f"unit-{k:09d}.npz"


def _digest(of: str, arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(f"{of}\n".encode())
    for name, value in sorted(arrays.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(np.ascontiguousarray(value).data)
    return digest.hexdigest()


def _pack(sums: Mapping[str, Statistics], of: str) -> bytes:
    arrays: dict[str, np.ndarray] = {}
    for name, each in sums.items():
        arrays |= {f"{name}.n": np.array([each.n]), f"{name}.mean": each.mean.numpy(), f"{name}.scatter": each.scatter.numpy()}
    file = io.BytesIO()
    named: dict[str, Any] = {**arrays, "of": np.array(of), "sha256": np.array(_digest(of, arrays))}
    np.savez(file, **named)
    return file.getvalue()


def _unpack(path: Path) -> tuple[str, Sums] | None:
    """What the sums in a file are of, and these; None where they are not as they were written."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        of, sha256 = str(arrays.pop("of")), str(arrays.pop("sha256"))
        if _digest(of, arrays) != sha256:
            return None
        names = [name.removesuffix(".n") for name in arrays if name.endswith(".n")]
        part = lambda name: torch.from_numpy(arrays[name])
        return of, {n: Statistics(int(arrays[f"{n}.n"][0]), part(f"{n}.mean"), part(f"{n}.scatter")) for n in names}
    except Exception:  # numpy and zipfile raise all kinds at what is cut off or damaged
        return None


def put(folder: Path, k: int, sums: Mapping[str, Statistics], key: str) -> None:
    """Leave the sums of unit k, whole or not at all; key: of the run, whose units alone it adds."""
    write_file(_path(folder, k), _pack(sums, f"{key} {k}"))


def take(folder: Path, k: int, key: str) -> Sums | None:
    """Those of unit k; None where the file is damaged or of another run. FileNotFoundError where it is not there."""
    if not _path(folder, k).exists():
        raise FileNotFoundError(f"{_path(folder, k)} does not exist")
    found = _unpack(_path(folder, k))
    return found[1] if found is not None and found[0] == f"{key} {k}" else None


def left(folder: Path) -> list[int]:
    """The units that have files, in order."""
    found = (UNIT.fullmatch(path.name) for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(match[1]) for match in found if match)


def begin(folder: Path) -> None:
    """Make the folder, without what a killed writer left torn; ValueError for a folder where a file of sums would be."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in (*(_path(folder, k) for k in left(folder)), folder / "total.npz"):
        if path.is_dir():
            raise ValueError(f"{path} is a folder, and the name that of a file of this run; move it away")
    for path in folder.glob(".*.npz.*"):
        path.unlink()


def end(folder: Path) -> None:
    """Remove it with all that is in it of a run."""
    if folder.is_dir():
        begin(folder)
        for path in [*(_path(folder, k) for k in left(folder)), folder / "total.npz"]:
            path.unlink(missing_ok=True)
        with suppress(OSError):  # it holds something else
            folder.rmdir()


class Total:
    """The sums of units 0 .. folded - 1, of which those before `saved` are in total.npz; units that it has need no files.

    redo: makes the sums of a unit whose file is damaged; units: how many there are: files of later ones are another run's, and go.
    """

    def __init__(self, folder: Path, key: str, redo: Callable[[int], Sums], units: int) -> None:
        self.folder, self.key, self.redo, self.units = folder, key, redo, units
        self.sums: Sums = {}
        self.folded = self.saved = 0
        path = folder / "total.npz"
        if path.exists():
            found = _unpack(path)
            if found is not None and (match := re.fullmatch(rf"{key} before ([0-9]+)", found[0])):
                self.folded, self.sums = int(match[1]), found[1]
            else:
                warn(f"{path} is damaged or of another run; all units are made anew")
        for k in left(folder):
            if k >= units:
                _path(folder, k).unlink(missing_ok=True)
        self.saved = self.folded
        self._drop()
        self._time = time.monotonic()

    def _drop(self) -> None:
        """The files of units that are in the total on the disk."""
        for k in left(self.folder):
            if k >= self.saved:
                break
            _path(self.folder, k).unlink(missing_ok=True)

    def add(self, k: int, sums: Mapping[str, Statistics]) -> None:
        """Those of the next unit."""
        if k != self.folded:
            raise ValueError(f"unit {k} is added where unit {self.folded} is next")
        for name, each in sums.items():
            self.sums.setdefault(name, Statistics()).merge(each)
        self.folded += 1
        if time.monotonic() - self._time >= EVERY:
            self.save()

    def sweep(self) -> bool:
        """Add the units that have files, as far as none is missing; save if there was one, so that few files wait."""
        before = self.folded
        while self.folded < self.units and _path(self.folder, self.folded).exists():
            found = take(self.folder, self.folded, self.key)
            if found is None:
                warn(f"{_path(self.folder, self.folded)} is damaged or of another run; its unit is made anew")
                found = self.redo(self.folded)
            self.add(self.folded, found)
        if self.folded > before:
            self.save()
        return self.folded > before

    def save(self) -> None:
        """Onto the disk, whole or not at all; then the files that it has made needless go."""
        if self.folded == self.saved:
            return
        write_file(self.folder / "total.npz", _pack(self.sums, f"{self.key} before {self.folded}"))
        self.saved = self.folded
        self._drop()
        self._time = time.monotonic()


# --- all units -----------------------------------------------------------------------------------------------------------
def _leave(folder: Path, key: str, make: Callable[..., Sums], *arguments: Any) -> None:
    put(folder, arguments[-1], make(*arguments), key)


@dataclass
class Work:
    """Units 0 .. units - 1 of a run, each made by one process of the group as make(job, k), and added up by the first.

    make: a function of a module; missing: those without sums, the same list in every process; start: how many the total had then; name:
    of the run, for its processes alone; words: what a unit is called in an error; show: called when there is more in the total.
    """

    units: int
    make: Callable[[Any, int], Sums]
    job: Any
    folder: Path
    key: str
    missing: Sequence[int]
    start: int
    processes: int
    group: Group
    name: str
    total: Total | None  # of the first process
    words: Callable[[int], str] = str
    show: Callable[[], object] = lambda: None

    def __post_init__(self) -> None:
        self._alone, self._held = itertools.count(), list[int]()
        self._several = self.processes * self.group.world > 1  # else the sums stay in memory

    def __call__(self) -> None:
        """All of them; returns in the first process when all are added up, in the others when none is left to begin.

        Where a process fails, its error is raised there, and `Elsewhere` in the others, once each is done with its unit.
        """
        error: BaseException | None = None
        try:
            self._all()
        except (Exception, Elsewhere) as found:
            error = found
            if self.group.world > 1:
                self.group.tally(f"{self.name}/failed", 1)
        if self.group.any(error is not None):
            raise error or Elsewhere(1)

    def _all(self) -> None:
        work: Callable[..., Any] = _leave if self._several else self.make
        before: tuple[Any, ...] = (self.folder, self.key, self.make) if self._several else ()
        self._add()
        while True:
            with closing(resume.finished(self.processes, work, self._mine(), lambda k: (*before, self.job, k))) as results:
                for k, result in results:
                    self._add(k, outcome(result, self.words(k)))
            if not self._held:
                break
            self._wait(lambda: self._held[0] < self._end())
        if self.total is not None:
            total = self.total
            self._wait(lambda: total.folded == self.units)
            total.save()

    def _mine(self) -> Iterator[int]:
        """The units of this process, until there are no more, or the next one would be too far ahead of what is added up."""
        while True:
            if not self._held:
                i = self.group.claim(f"{self.name}/unit") if self.group.world > 1 else next(self._alone)
                if i >= len(self.missing):
                    return
                self._held.append(self.missing[i])
            self._heed()
            if self._several and self._held[0] >= self._end():
                return
            yield self._held.pop()

    def _saved(self) -> int:
        """Units that need no files any more."""
        return self.total.saved if self.total else self.start + self.group.tally(f"{self.name}/saved", 0)

    def _end(self) -> int:
        """The first unit that has to wait, so that few files do."""
        return self._saved() + WINDOW * self.group.world * self.processes

    def _heed(self) -> None:
        if self.group.world > 1 and self.group.tally(f"{self.name}/failed", 0):
            raise Elsewhere(1)

    def _add(self, k: int = -1, found: Sums | None = None) -> bool:
        """To the total: a unit from memory, then those that have files; whether there were any."""
        if self.total is None:
            return False
        before, saved = self.total.folded, self.total.saved
        if found is not None:
            self.total.add(k, found)
        self.total.sweep()
        if self.group.world > 1 and self.total.saved > saved:
            self.group.tally(f"{self.name}/saved", self.total.saved - saved)
        self.show()
        return self.total.folded > before

    def _wait(self, until: Callable[[], bool]) -> None:
        """For the others, as long as they get on."""
        seconds, mark, since = parallel.timeout(), -1, time.monotonic()
        while not until():
            self._heed()
            if not self._add():
                time.sleep(PAUSE)
            if (now := self._saved()) != mark:
                mark, since = now, time.monotonic()
            if time.monotonic() - since > seconds:
                raise RuntimeError(f"no other process has done a unit for {seconds:.0f} s; what is done is kept: run it again")
