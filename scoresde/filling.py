"""Processes at work on the pages of a table, one alone or those of a group: how they begin, which batches are whose, where rows go."""

from __future__ import annotations

import itertools
import json
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from .command import outcome
from .pages import PATIENCE, ROWS, Pages, current
from .parallel import Elsewhere, Group
from .resume import WRITING, Table, extend, finished
from .seeds import Seeds

__all__ = ["Begun", "Filling", "Piece", "admit", "begin", "together"]

Row = list[str]


@contextmanager
def together(group: Group, failing: Callable[[], object] = lambda: None) -> Iterator[None]:
    """The block in all processes: an error of any ends all at its end, as what it raises there and `Elsewhere` in the others."""
    try:
        yield
    except Exception:
        with suppress(RuntimeError):  # the others may have died
            failing()
            group.any(True)
        raise
    if group.any(False):
        raise Elsewhere(1)


@dataclass(frozen=True)
class Begun:
    """What the first process has found: pages to do, indices in the others, a name for the run; the summary where all is there."""

    todo: Seeds
    done: int
    run: str
    found: dict[str, Any] | None


def admit(pages: Pages, key: str) -> None:
    """FileExistsError for the folder of another command, whose settings.json has no such key, and for files where folders must be."""
    folder, settings = pages.folder, None
    with suppress(OSError, ValueError):
        settings = json.loads((folder / "settings.json").read_text())
    others = any((folder / name).exists() for name in ("config.yaml", "environment.json"))  # a training
    if (folder / "summary.json").exists() and not (folder / "settings.json").exists():
        others = others or not pages.files()
    if others or (isinstance(settings, dict) and settings and key not in settings):
        raise FileExistsError(f"{folder} holds a run of another command, and nothing of it was touched; choose another --out")
    for path in (folder / WRITING, folder / ROWS):
        if path.exists() and not path.is_dir():
            raise FileExistsError(f"{path} is a file, where a run has a folder of what is under way; move it away")


def begin(
    pages: Pages, there: Callable[[Row], bool], same: Mapping[str, Any], figure: str, files: Callable[[Seeds], bool] = lambda part: True
) -> Begun:  # fmt: skip
    """Bring home what a killed run left; a summary that is not of all of `same`, or not of the rows that are there, goes, and its figure.

    files: of a page that is recorded, whether the files of this part are there, as `Pages.begin` asks it.
    """
    run = uuid.uuid4().hex
    todo, done = pages.begin(run, files)
    found, path = None, pages.folder / "summary.json"
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # one that was tampered with is made again
        written = json.loads(path.read_text())
        found = written if dict(same) == {name: written.get(name) for name in same} else None
    if found is not None and not (pages.many and todo.count) and pages.whole(there) == found.get("sha256", ""):
        pages.close()
        return Begun(todo, pages.asked.count, "", found)
    for name in (path.name, figure):  # they are of other rows
        (pages.folder / name).unlink(missing_ok=True)
    return Begun(todo, done, run, None)


class Piece(NamedTuple):
    """A batch to compute: its page and how many batches that has, its first index, those wanted, and those that have rows already."""

    page: int
    batches: int
    first: int
    wanted: list[int]
    known: list[int]


class Filling:
    """The part of one process in filling pages; alone it takes all batches in order and adds rows to the page's own file.

    there: of a good row, whether what it speaks of is there.
    """

    def __init__(self, pages: Pages, begun: Begun, there: Callable[[Row], bool], group: Group) -> None:
        self.pages, self.todo, self.done, self.run, self.there, self.group = pages, begun.todo, begun.done, begun.run, there, group
        self.computed = 0
        self.tables: dict[int, Table] = {}
        self.counts: Counter[str] = Counter()

    def fill(
        self, processes: int, work: Callable[..., Any], arguments: Callable[[Piece], tuple[Any, ...]],
        rows: Callable[[Piece, Any], Sequence[Sequence[Any]]], what: str, unit: str, stop: int = 2**64,
    ) -> int:  # fmt: skip
        """Compute what is missing, `rows` from what work(*arguments(piece)) gives; how many all processes together have computed.

        An error of any ends all. what, unit: of the indices, for words; stop: past the last there is.
        """
        total, last = self.pages.asked.count, lambda i: min(i + self.pages.batch, stop) - 1
        bar = tqdm(total=total, initial=self.done, desc=what, unit=unit, disable=not (self.group.first and self.todo.ranges))
        few = itertools.islice((b for page in self.todo for b in self.pages.batches(page)), processes)
        show = lambda: self.group.first and bar.update(self.done + self._count("rows", 0) - bar.n)
        with bar:
            with (
                together(self.group, self.failing),
                closing(finished(max(1, min(processes, len(list(few)))), work, self.pieces(), arguments)) as results,
            ):
                for piece, result in results:
                    found = outcome(result, f"{unit}s {piece.first} .. {last(piece.first)}")
                    self.add(piece, rows(piece, found))
                    show()
            show()  # with what the others have done since
        return sum(n for (n,) in self.group.numbers(self.computed))

    def _count(self, name: str, n: int) -> int:
        if self.group.world > 1:
            return self.group.tally(f"{self.run}/{name}", n)
        self.counts[name] += n
        return self.counts[name]

    def failing(self) -> None:
        """Let the others know that they need not go on."""
        self._count("failed", 1)

    def pieces(self) -> Iterator[Piece]:
        """The batches that this process is to compute, as it takes them."""
        for page in self.todo:
            batches, rows, entered = self.pages.batches(page), dict[int, Row](), False
            for k in self._taken(page, len(batches)):
                if self._count("failed", 0):
                    return
                if not entered:  # now, as none brings the page home while this batch is not done
                    rows, entered = self._enter(page), True
                first, asked = batches[k]
                known = [i for i in range(first, first + self.pages.batch) if i in rows and self.pages.good(rows[i])]
                have = {i for i in known if self.there(rows[i])}
                piece = Piece(page, len(batches), first, [i for i in asked if i not in have], known)
                self._count("rows", len(asked) - len(piece.wanted))
                if piece.wanted:
                    yield piece
                else:
                    self._end(piece)

    def _taken(self, page: int, n: int) -> Iterator[int]:
        """Which of the n batches of a page are this process's, each when it is asked for."""
        if self.group.world == 1:
            yield from range(n)
            return
        while (k := self.group.claim(f"{self.run}/{page}")) < n:
            yield k

    def _enter(self, page: int) -> dict[int, Row]:
        path = self.pages.path(page)
        if self.group.world > 1:
            return self.pages.rows(path, page)
        self.tables[page] = Table(path, self.pages.columns, self.pages.mend, self.pages.texts)
        return self.pages.checked(self.tables[page].rows, path, page)

    def add(self, piece: Piece, rows: Sequence[Sequence[Any]]) -> None:
        """The rows that were wanted of a batch, onto the disk; with the last of a page it is brought home."""
        if [int(row[0]) for row in rows] != piece.wanted:
            raise RuntimeError(f"the batch at {piece.first} has {len(rows)} rows; wanted those of {piece.wanted}")
        current(self.pages.folder, self.run)
        if self.group.world > 1:
            extend(self._segment(piece.page), self.pages.columns, rows)
            self._count(f"{piece.page}/rows", len(rows))
        else:
            self.tables[piece.page].append(rows)
        self.computed += len(rows)
        self._count("rows", len(rows))
        self._end(piece)

    def _segment(self, page: int) -> Path:
        stem = self.pages.path(page).stem
        return self.pages.folder / ROWS / f"{stem}.{self.run[:8]}.rank{self.group.rank:05d}.csv"

    def _end(self, piece: Piece) -> None:
        """A batch is done; who sees that it was the last of its page brings it home."""
        if self._count(f"{piece.page}/done", 1) < piece.batches:
            return
        page, segments = piece.page, []
        if self.group.world == 1:
            rows = self.tables.pop(page).rows
            self.pages.write(rows, page, self.run)
            del self.counts[f"{page}/done"]
        else:
            rows, segments = self._home(page)
        if self.pages.many:
            self.pages.record(rows, page, f"pages.{self.run[:8]}.rank{self.group.rank:05d}.jsonl")
        for path in segments:
            path.unlink()

    def _home(self, page: int) -> tuple[dict[int, Row], list[Path]]:
        """All rows of a page, now in its file, and the files where they came from, which other machines may show late."""
        folder, start = self.pages.folder / ROWS, f"{self.pages.path(page).stem}.{self.run[:8]}.rank"
        for _ in range(PATIENCE):
            segments = sorted(path for path in folder.iterdir() if path.name.startswith(start))
            new: dict[int, Row] = {}
            for path in segments:
                new |= self.pages.rows(path, page)
            if (lacking := self._count(f"{page}/rows", 0) - len(new)) == 0:
                rows = self.pages.rows(self.pages.path(page), page) | new
                self.pages.write(rows, page, self.run)
                return rows, segments
            time.sleep(0.5)
        raise RuntimeError(f"{lacking} rows that others have written do not show in {folder}; run again, on a disk that all share")
