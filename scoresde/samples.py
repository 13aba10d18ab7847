"""The files of samples: what they are called, their table, and how the samples of a whole folder are read."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from . import images
from .pages import Facts, Pages
from .seeds import Seeds, parse_seeds

__all__ = ["COLUMNS", "COSTS", "FILE", "MEND", "Layout", "Samples", "digest", "files", "folders", "samples_of", "table"]

COSTS = ("score", "denoise", "rejected", "network")  # of the ledger; a row has the means over its batch
COLUMNS = ("seed", "file", "label", "nfe", "status", *COSTS, "digest")
MEND = "choose another --out, or pass --overwrite to start afresh"

FILE = re.compile(r"[0-9]{8,20}\.png|samples-[0-9]{8,20}-[0-9]{8,20}\.npz")
FOLDER = re.compile(r"[0-9]{8,20}")


@dataclass(frozen=True)
class Layout:
    """Which file a seed is in: a PNG file a sample, in folders of a thousand or not, or an npz file a batch."""

    format: str | None
    subdirs: bool | None
    batch: int

    def file(self, seed: int) -> str:
        """The file that a seed is in, a function of nothing else."""
        if self.format == "npz":
            first, last = seed // self.batch * self.batch, min((seed // self.batch + 1) * self.batch, 2**64) - 1
            return f"samples-{first:08d}-{last:08d}.npz"
        return f"samples/{seed - seed % 1000:08d}/{seed:08d}.png" if self.subdirs else f"samples/{seed:08d}.png"

    def read(self, out: Path, shape: Sequence[int], seeds: Sequence[int]) -> list[np.ndarray]:
        """The samples of these seeds, from their files."""
        if self.format == "png":
            return [images.picture(out / self.file(s), tuple(shape)) for s in seeds]
        found: list[np.ndarray] = []
        for name, part in itertools.groupby(seeds, self.file):
            with np.load(out / name, allow_pickle=False) as shard:
                at = {int(s): i for i, s in enumerate(shard["seeds"])}
                x = shard["x"]
                found += [x[at[s]] for s in part]
        return found


def digest(x: np.ndarray) -> str:
    """The first 16 digits of the SHA-256 of a sample's numbers, whatever file they are in."""
    return hashlib.sha256(x.tobytes()).hexdigest()[:16]


def folders(out: Path) -> Iterator[Path]:
    """Where samples are: the folders of thousands, that of all PNG files, which the grid would be one of, and `out`."""
    inner = out / "samples"
    if inner.is_dir():
        yield from (path for path in inner.iterdir() if FOLDER.fullmatch(path.name) and path.is_dir())
        yield inner
    yield out


def files(out: Path) -> Iterator[Path]:
    """The files of samples in a folder."""
    return (path for folder in folders(out) for path in folder.iterdir() if FILE.fullmatch(path.name) and path.is_file())


def table(out: Path, layout: Layout, seeds: Seeds) -> Pages:
    """The table of the seeds; a good row is of a sample that is in the file it names."""
    good = lambda row: row[4] == "0" and row[1] == layout.file(int(row[0]))
    facts = lambda rows: Facts.of(COLUMNS, rows, ("nfe", *COSTS))
    return Pages(out, "samples", COLUMNS, ("file", "digest"), MEND, seeds, layout.batch, good, facts)


@dataclass(frozen=True)
class Samples:
    """`read(first, stop)` -> samples first .. stop - 1 in the order of their seeds, `[n, *shape]`: levels, or floats where levels is None.

    low, high: the ends of the range that the levels cut into cells, None for floats; sha256: that of summary.json, of all the samples.
    """

    count: int
    shape: tuple[int, ...]
    levels: int | None
    low: float | None
    high: float | None
    sha256: str
    read: Callable[[int, int], np.ndarray] = field(repr=False)


def samples_of(folder: str | Path) -> Samples:
    """The samples that `scoresde sample` has written into a folder; ValueError unless all that its summary speaks of are there."""
    folder = Path(folder)
    path = folder / "summary.json"
    mend = "the command that made it, run again, goes on with what is missing"
    if not path.is_file():
        raise ValueError(
            f"{folder} has no summary.json, so its samples are not all there, or are none of `scoresde sample`; {mend}"
        )
    try:
        found = json.loads(path.read_text())
        seeds, shape = parse_seeds(found["seeds"]), tuple(found["shape"])
        layout = Layout(found["format"], found["subdirs"], found["batch"])
        ends, sha256 = (found["levels"], found["low"], found["high"]), found["sha256"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is none of `scoresde sample` of this version ({type(error).__name__}: {error})") from error
    rows = table(folder, layout, seeds).seen()
    if rows is None or rows[1] != sha256:
        raise ValueError(f"{folder} has not the rows of samples that its summary.json speaks of; {mend}")

    def read(first: int, stop: int) -> np.ndarray:
        if not 0 <= first < stop <= seeds.count:
            raise ValueError(f"samples {first} .. {stop - 1} are asked for; {folder} has 0 .. {seeds.count - 1}")
        try:
            return np.stack(layout.read(folder, shape, list(seeds.at(first, stop))))
        except (KeyError, OSError) as error:
            raise ValueError(f"{folder} has not all its samples ({type(error).__name__}: {error}); {mend}") from error

    return Samples(seeds.count, shape, *ends, sha256, read)
