"""Rows by the billion: a run's table in pages, which any number of processes fill; those that are whole are not read again.

- samples.csv, samples-000000050048.csv, ...: a page's rows by index: those of whole batches, 50,000 or a few more.
- pages.jsonl: of several pages, a line each: what was asked of it, size and SHA-256 of its file, what a summary says of its rows, and
  a hash of the line itself: one that was altered is as if it were not there.
- .rows: rows and lines of processes at work, each in files of its own; a start or the end of a page brings them home; `run` in it names
  the run that is at work: whoever is left of an earlier one sees it and stops.
- .writing: files while they are written.

Every index is in one batch and every batch in one page, whoever computes it: of a group, each process takes the next batch that none has
taken, and who ends the last batch of a page brings all its rows home. What a kill leaves is of this kind too, so the next run, of any
number of processes, begins by bringing it home. A page with its line is not read again: whether the files that its rows speak of are
still there is looked at in a job of up to 20 pages; in a larger one after pages.jsonl, or the page's line in it, was removed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
import shutil
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .resume import WRITING, rows_of, text_of
from .seeds import Seeds
from .store import write_file

__all__ = ["PATIENCE", "ROWS", "Facts", "Pages", "current", "guarded", "vouched"]

PAGE = 50_000
LOOKED = 20  # pages of a job in which a start looks for the files of those that are recorded
RECORDS, ROWS, RUN = "pages.jsonl", ".rows", "run"
UNIT = 2148  # sums are whole numbers of 2^-2148, of which every float is some, and its square
FEW = 9
LINE = re.compile(rb'(\{"page":([0-9]{1,20}),.*),"line":"([0-9a-f]{16})"\}\n')
PATIENCE = 120  # half seconds until what one machine has written must show on another
Row = list[str]


# --- lines that vouch for themselves, runs that are over -------------------------------------------------------------------
def vouched(content: Mapping[str, Any]) -> bytes:
    """A line of pages.jsonl, with the beginning of the SHA-256 of what is in it."""
    text = json.dumps(content, separators=(",", ":")).encode()[:-1]
    return text + b',"line":"%s"}\n' % hashlib.sha256(text).hexdigest()[:16].encode()


def _page(line: bytes) -> int | None:
    """Which page a line is of; None for one that is torn or altered."""
    found = LINE.fullmatch(line)
    return int(found[2]) if found and hashlib.sha256(found[1]).hexdigest()[:16].encode() == found[3] else None


def current(folder: Path, run: str) -> None:
    """RuntimeError where the run of this name is no longer the one at work in the folder; "" is of none."""
    for attempt in range(PATIENCE if run else 0):
        time.sleep(0.5 if attempt else 0.0)  # another machine's word may show late
        with suppress(OSError):
            if (folder / ROWS / RUN).read_text() == run:
                return
    if run:
        raise RuntimeError(f"another run has begun in {folder} since: this one stops, and what it has written is kept")


def guarded(data: bytes, folder: Path, run: str) -> Iterator[bytes]:
    """The data of a file for `write_file`, which gives up if the run is over by then.

    The file is under way in .writing before this looks, and a start names itself before it empties .writing: so what an earlier run
    writes is in its place before a later one looks at any file, or never.
    """
    yield data
    current(folder, run)


# --- what a summary says of rows -----------------------------------------------------------------------------------------
def _sum(cells: Iterable[str], power: int = 1) -> int:
    total = 0
    for cell, n in Counter(cells).items():
        a, b = float(cell or 0).as_integer_ratio()
        total += n * a**power << UNIT - power * (b.bit_length() - 1)
    return total


@dataclass
class Facts:
    """Of rows: how many, the largest nfe, sums of columns and, under "name^2", of their squares; how many bad ones, and the first few.

    Exact sums are the same in whatever order and pages they are taken.
    """

    n: int = 0
    nfe: int = 0
    sums: dict[str, int] = field(default_factory=dict)
    bad: int = 0
    first_bad: list[Row] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        columns: Sequence[str],
        rows: Sequence[Row],
        sums: Iterable[str],
        squares: Iterable[str] = (),
        counts: Mapping[str, int] = {},
    ) -> Facts:
        """The facts of good rows with these columns, nfe among them; counts: of them, summed as columns are."""
        column = lambda name: (row[columns.index(name)] for row in rows)
        found = {name: _sum(column(name)) for name in sums} | {f"{name}^2": _sum(column(name), 2) for name in squares}
        found |= {name: n << UNIT for name, n in counts.items()}
        return cls(len(rows), max(map(int, column("nfe")), default=0), found)

    def add(self, other: Facts) -> None:
        """Take those of later rows in."""
        self.n, self.nfe, self.bad = self.n + other.n, max(self.nfe, other.nfe), self.bad + other.bad
        self.sums = {name: self.sums.get(name, 0) + value for name, value in other.sums.items()}
        self.first_bad = [*self.first_bad, *other.first_bad][:FEW]

    def sum(self, name: str) -> float:
        """Of a column, rounded once."""
        return float(Fraction(self.sums[name], 1 << UNIT))

    def mean(self, name: str) -> float:
        """Of a column."""
        return self.sum(name) / self.n

    def stdev(self, name: str) -> float:
        """Of a column, over n - 1; that of its rows, and not of rounded sums."""
        mean = Fraction(self.sums[name], self.n << UNIT)
        return math.sqrt((Fraction(self.sums[f"{name}^2"], 1 << UNIT) - self.n * mean * mean) / (self.n - 1))

    def packed(self) -> dict[str, Any]:
        """For JSON: a sum is [a, b], a / 2^b."""
        sums = {}
        for name, value in self.sums.items():
            zeros = min((value & -value).bit_length() - 1, UNIT) if value else UNIT
            sums[name] = [value >> zeros, UNIT - zeros]
        return {"n": self.n, "nfe": self.nfe, "sums": sums, "bad": self.bad, "first_bad": self.first_bad}

    @classmethod
    def unpacked(cls, found: Mapping[str, Any]) -> Facts:
        """What `packed` gave."""
        sums = {name: a << UNIT - b for name, (a, b) in found["sums"].items()}
        return cls(found["n"], found["nfe"], sums, found["bad"], found["first_bad"])


# --- the pages of a run --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Pages:
    """The table `name` of the indices asked for, in `folder`; good: of a row, whether it is what was wanted; facts: of good rows."""

    folder: Path
    name: str
    columns: Sequence[str]
    texts: Sequence[str]
    mend: str
    asked: Seeds
    batch: int
    good: Callable[[Row], bool]
    facts: Callable[[list[Row]], Facts]

    @cached_property
    def span(self) -> int:
        """Indices of a page."""
        return math.ceil(PAGE / self.batch) * self.batch

    @cached_property
    def numbers(self) -> Seeds:
        """The pages that are asked for."""
        return Seeds.of((part.start // self.span, (part.stop - 1) // self.span + 1) for part in self.asked.ranges)

    @property
    def many(self) -> bool:
        """Whether they are several, and recorded."""
        return self.numbers.count > 1

    def file(self, page: int) -> str:
        """The name of a page's file."""
        return f"{self.name}-{page * self.span:012d}.csv" if page else f"{self.name}.csv"

    def path(self, page: int) -> Path:
        """The file of a page."""
        return self.folder / self.file(page)

    def part(self, page: int) -> Seeds:
        """What is asked of a page."""
        return self.asked.within(page * self.span, (page + 1) * self.span)

    def batches(self, page: int) -> list[tuple[int, list[int]]]:
        """The batches of a page that are asked for: first index, those asked for."""
        parts = itertools.groupby(self.part(page), lambda i: i // self.batch)
        return [(b * self.batch, list(part)) for b, part in parts]

    def rows(self, path: Path, page: int) -> dict[int, Row]:
        """The rows in a file of a page, by index; ValueError for those of another page."""
        found, _ = rows_of(path, self.columns, self.mend, self.texts)
        return self.checked(found, path, page)

    def checked(self, rows: dict[int, Row], path: Path, page: int) -> dict[int, Row]:
        """The rows, which are of this page."""
        if strange := [i for i in rows if i // self.span != page]:
            raise ValueError(
                f"{path} has a row of {strange[0]}, which belongs into {self.path(strange[0] // self.span).name}; {self.mend}"
            )
        return rows

    def lacking(self, rows: Mapping[int, Row], page: int) -> list[int]:
        """The first of what is asked of a page and has no row."""
        return list(itertools.islice((i for i in self.part(page) if i not in rows), FEW))

    def whole(self, there: Callable[[Row], bool]) -> str | None:
        """As the SHA-256 of `sums`, if there is a good row for all that is asked; of one page, if what it speaks of is there too."""
        if self.many:
            found = self.seen()
            return found[1] if found and not found[0].bad else None
        page = self.numbers.ranges[0].start
        rows = self.rows(self.path(page), page)
        good = all(i in rows and self.good(rows[i]) and there(rows[i]) for i in self.part(page))
        return self.summed(rows, page)[1] if good else None

    def _asked(self, page: int) -> str:
        text = str(self.part(page))
        return text if len(text) < 100 else hashlib.sha256(text.encode()).hexdigest()

    def summed(self, rows: Mapping[int, Row], page: int) -> tuple[Facts, str]:
        """Facts of the rows that are asked for, and the SHA-256 of a file that has just these."""
        asked = [rows[i] for i in self.part(page)]
        bad = [row for row in asked if not self.good(row)]
        found = self.facts([row for row in asked if self.good(row)] if bad else asked)
        found.bad, found.first_bad = len(bad), bad[:FEW]
        return found, hashlib.sha256(text_of([self.columns, *asked])).hexdigest()

    # --- records -------------------------------------------------------------------------------------------------------------
    def record(self, rows: Mapping[int, Row], page: int, name: str) -> None:
        """A line on a page whose file has these rows, onto the disk, into the process's own file of lines."""
        facts, sha256 = self.summed(rows, page)
        line = {
            "page": page,
            "asked": self._asked(page),
            "bytes": self.path(page).stat().st_size,
            "sha256": sha256,
            **facts.packed(),
        }
        with (self.folder / ROWS / name).open("ab", buffering=0) as file:
            file.write(vouched(line))
            os.fsync(file.fileno())

    def records(self) -> Iterator[dict[str, Any]]:
        """The lines in pages.jsonl that are, in order, of pages asked for, of what is asked of them now, and of the files as they are."""
        path, folder, numbers, last = self.folder / RECORDS, str(self.folder), self.numbers, -1
        if not path.exists():
            return
        with path.open("rb") as file:
            for line in file:
                page = _page(line)
                if page is None or page <= last or page not in numbers:  # as if it were not there
                    continue
                found = json.loads(line)
                with suppress(OSError):
                    if found["asked"] == self._asked(page) and found["bytes"] == os.stat(f"{folder}/{self.file(page)}").st_size:
                        last = page
                        yield found

    def gather(self) -> None:
        """The lines of all processes into pages.jsonl, by page, the newest of each."""
        paths = [self.folder / RECORDS, *sorted((self.folder / ROWS).glob("pages.*.jsonl"))]
        if not paths[1:]:
            return
        pages, places = array("q"), array("q")  # of a billion indices less than a megabyte
        for k, path in enumerate(paths):
            with suppress(FileNotFoundError), path.open("rb") as file:
                offset = 0
                for line in file:
                    if (page := _page(line)) is not None:
                        pages.append(page)
                        places.append(offset * len(paths) + k)
                    offset += len(line)
        order = np.argsort(np.array(pages), kind="stable")
        newest = np.append(np.diff(np.array(pages)[order]) > 0, True)[: len(order)]
        write_file(self.folder / RECORDS, _lines(paths, np.array(places)[order[newest]]), self.folder / WRITING)
        for path in paths[1:]:
            path.unlink()

    # --- the first process, before and after all -----------------------------------------------------------------------------
    def begin(self, run: str = "", files: Callable[[Seeds], bool] = lambda part: True) -> tuple[Seeds, int]:
        """Bring home what a killed run left; which pages are not whole, and how many indices are in those that are.

        run: a name for this one; files: whether the files are there of a part that is recorded, asked in a job of up to 20 pages.
        """
        (self.folder / ROWS).mkdir(exist_ok=True)
        # First: who is left of another run writes no more, and what it has under way goes.
        (self.folder / ROWS / RUN).write_text(run)
        shutil.rmtree(self.folder / WRITING, ignore_errors=True)
        (self.folder / WRITING).mkdir(exist_ok=True)
        look = self.numbers.count <= LOOKED
        segments: dict[int, list[Path]] = {}
        pattern = re.compile(rf"{self.name}(?:-([0-9]{{12,20}}))?\.[0-9a-f]+\.rank[0-9]+\.csv")
        for path in sorted((self.folder / ROWS).iterdir()):
            if found := pattern.fullmatch(path.name):
                segments.setdefault(int(found[1] or 0) // self.span, []).append(path)
        for page, paths in segments.items():
            self.fold(page, paths)
            for path in paths:
                path.unlink()
        self.gather()
        if not self.many:
            return self.numbers, 0
        whole: list[list[int]] = []
        done = 0
        for found in self.records():
            if not found["bad"] and not (look and not files(self.part(found["page"]))):
                done += found["n"]
                if whole and whole[-1][1] == found["page"]:
                    whole[-1][1] += 1
                else:
                    whole.append([found["page"], found["page"] + 1])
        return self.numbers.without(Seeds.of((start, stop) for start, stop in whole)), done

    def fold(self, page: int, segments: Sequence[Path]) -> None:
        """Add the whole lines of these files to that of a page, as they are: who takes up the page reads and, at its end, sorts them."""
        head, parts = text_of([self.columns]), []
        for path in [self.path(page), *segments]:
            data = path.read_bytes() if path.exists() else b""
            if (whole := data[: data.rfind(b"\n") + 1]) and not whole.startswith(head):
                raise ValueError(f"line 1 of {path} is none that this version writes; {self.mend}")
            parts.append(whole.removeprefix(head))
        write_file(self.path(page), [head, *parts], self.folder / WRITING)

    def write(self, rows: Mapping[int, Row], page: int, run: str = "") -> None:
        """The file of a page in the order of the indices, whole or not at all, by this run; one that is so already stays."""
        path, data = self.path(page), text_of([self.columns, *(rows[i] for i in sorted(rows))])
        if not path.exists() or path.read_bytes() != data:
            write_file(path, guarded(data, self.folder, run), self.folder / WRITING)

    def sums(self, patience: int = 1) -> tuple[Facts, str]:
        """The facts of all that is asked for, and one SHA-256: of a page as it would be with these rows alone, of several of their list.

        RuntimeError where a row is missing, after so many looks.
        """
        for attempt in range(patience):
            time.sleep(0.5 if attempt else 0.0)
            self.gather()
            if found := self.seen():
                return found
        raise RuntimeError(f"{self.folder} has not all the rows that were computed: has something else changed it? Run again")

    def seen(self) -> tuple[Facts, str] | None:
        """As `sums`, None where a row is missing, of what is at home: it writes nothing."""
        if not self.many:
            page = self.numbers.ranges[0].start
            rows = self.rows(self.path(page), page)
            return None if self.lacking(rows, page) else self.summed(rows, page)
        total, pages, digest = Facts(), 0, hashlib.sha256()
        for found in self.records():
            digest.update(f"{found['sha256']}\n".encode())
            total.add(Facts.unpacked(found))
            pages += 1
        return (total, digest.hexdigest()) if pages == self.numbers.count else None

    def close(self) -> None:
        """Remove the folders of work under way, in which nothing is left."""
        shutil.rmtree(self.folder / WRITING, ignore_errors=True)
        with suppress(OSError):
            (self.folder / ROWS / RUN).unlink()
            (self.folder / ROWS).rmdir()

    def drop(self) -> None:
        """Remove the table and all that belongs to it."""
        self.close()
        shutil.rmtree(self.folder / ROWS, ignore_errors=True)
        for path in [self.folder / RECORDS, *self.files()]:
            path.unlink(missing_ok=True)

    def files(self) -> list[Path]:
        """The files of pages that are there, found by looking at all."""
        pattern = re.compile(rf"{self.name}(-[0-9]{{12,20}})?\.csv")
        return [path for path in self.folder.iterdir() if pattern.fullmatch(path.name)] if self.folder.is_dir() else []


def _lines(paths: Sequence[Path], places: Iterable[int]) -> Iterator[bytes]:
    """The lines at places, each offset * len(paths) + which of the paths."""
    with ExitStack() as stack:
        files: dict[int, BinaryIO] = {}
        for place in places:
            offset, k = divmod(int(place), len(paths))
            file = files.get(k) or files.setdefault(k, stack.enter_context(paths[k].open("rb")))
            file.seek(offset)
            yield file.readline()
