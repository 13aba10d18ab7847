"""The files of samples: what they are called, their table, and how the samples of a whole folder are read."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from . import images
from .pages import RECORDS, Facts, Pages
from .resume import MEND
from .seeds import Seeds, parse_seeds

__all__ = ["COLUMNS", "COSTS", "FILE", "Layout", "Samples", "digest", "files", "folders", "samples_of", "table"]

COSTS = ("score", "denoise", "rejected", "network")  # of the ledger; a row has the means over its batch
COLUMNS = ("seed", "file", "label", "nfe", "status", *COSTS, "digest")

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

    def read(
        self, out: Path, shape: Sequence[int], seeds: Sequence[int], wanted: Mapping[int, str] | None = None
    ) -> list[np.ndarray]:
        """The samples of these seeds, from their files; ValueError that names a file which is not as it was written.

        wanted: the digest of each sample, None: not compared.
        """
        found: list[np.ndarray] = []
        for name, part in itertools.groupby(seeds, self.file):
            of = list(part)
            try:
                made = [images.picture(out / name, tuple(shape))] if self.format == "png" else _shard(out / name, of)
                if strange := [s for s, x in zip(of, made, strict=True) if x.shape != tuple(shape)]:
                    raise ValueError(f"{out / name} has seed {strange[0]} of another shape than {list(shape)}")
            except MemoryError:
                raise
            except Exception as error:  # numpy, zipfile and zlib raise all kinds at what is damaged
                words = " ".join(str(error).split("; ")[0].split())  # without the mend, which is another one here
                if not (out / name).is_file():
                    words = f"{out / name} is missing"
                elif str(out / name) not in words or (self.format == "npz" and "seed" not in words):  # numpy's are of pickles
                    words = f"{out / name} cannot be read as samples ({type(error).__name__})"
                raise ValueError(f"{words}; {_mend(out, name)}") from error
            for s, x in zip(of, made, strict=True):
                if wanted is not None and digest(x) != wanted.get(s):
                    raise ValueError(f"{out / name} has not the sample of seed {s} that was written there; {_mend(out, name)}")
            found += made
        return found


def _shard(path: Path, seeds: Sequence[int]) -> list[np.ndarray]:
    """The samples of these seeds in an npz file."""
    with np.load(path, allow_pickle=False) as shard:
        at, x = {int(s): i for i, s in enumerate(shard["seeds"])}, shard["x"]
    if missing := [s for s in seeds if s not in at]:
        raise ValueError(f"{path} has no seed {missing[0]}")
    return [x[at[s]] for s in seeds]


def _mend(out: Path, name: str) -> str:
    """What makes a damaged file again; a run of many pages looks at no files of those that are recorded as whole."""
    record = f" and {RECORDS}" if (out / RECORDS).exists() else ""
    return f"delete {Path(name).name}{record} and run the command again that made the samples"


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

    low, high: the ends of the range that the levels cut into cells, None for floats; sha256: that of summary.json, of all the samples;
    seeds: as text.
    """

    count: int
    shape: tuple[int, ...]
    levels: int | None
    low: float | None
    high: float | None
    sha256: str
    seeds: str
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
    found = _summary(folder)
    seeds, shape = parse_seeds(found["seeds"]), tuple(found["shape"])
    layout = Layout(found["format"], found["subdirs"], found["batch"])
    pages = table(folder, layout, seeds)
    rows = pages.seen()
    if rows is None or rows[1] != found["sha256"]:
        raise ValueError(f"{folder} has not the rows of samples that its summary.json speaks of; delete that, and {mend}")

    @functools.lru_cache(maxsize=2)
    def digests(page: int) -> dict[int, str]:
        return {i: row[-1] for i, row in pages.rows(pages.path(page), page).items()}

    def read(first: int, stop: int) -> np.ndarray:
        if not 0 <= first < stop <= seeds.count:
            raise ValueError(f"samples {first} .. {stop - 1} are asked for; {folder} has 0 .. {seeds.count - 1}")
        asked = list(seeds.at(first, stop))
        return np.stack(layout.read(folder, shape, asked, {s: digests(s // pages.span).get(s, "") for s in asked}))

    ends = (found["levels"], found["low"], found["high"])
    return Samples(seeds.count, shape, *ends, found["sha256"], found["seeds"], read)


def _summary(folder: Path) -> dict[str, Any]:
    """What summary.json says; ValueError unless it is of `scoresde sample` and of the settings that lie beside it."""
    path = folder / "summary.json"
    try:
        found, beside = dict(json.loads(path.read_text())), folder / "settings.json"
        settings = dict(json.loads(beside.read_text())) if beside.exists() else {}  # the summary holds them too
        number = lambda value: isinstance(value, (int, float)) and not isinstance(value, bool)
        whole = lambda value, least: number(value) and value == int(value) >= least
        shape, levels, ends = found["shape"], found["levels"], (found["low"], found["high"])
        good = {
            "seeds": isinstance(found["seeds"], str),
            "shape": isinstance(shape, list) and bool(shape) and all(whole(side, 1) for side in shape),
            "format": found["format"] in ("png", "npz"),
            "subdirs": found["subdirs"] is None or isinstance(found["subdirs"], bool),
            "batch": whole(found["batch"], 1),
            "levels": levels is None or whole(levels, 2),
            "low": levels is None or (all(map(number, ends)) and ends[0] < ends[1]),
            "sha256": isinstance(found["sha256"], str),
        }
        if bad := [name for name in good if not good[name] or (name in settings and settings[name] != found[name])]:
            raise ValueError(f"{bad[0]} is {found[bad[0]]!r}")
        parse_seeds(found["seeds"])
    except (AttributeError, KeyError, OSError, OverflowError, TypeError, ValueError) as error:
        words = f"{type(error).__name__}: {error}"
        mend = "delete it and run the command again that made the samples"
        raise ValueError(f"{path} is damaged, edited, or none of `scoresde sample` of this version ({words}); {mend}") from error
    return found
