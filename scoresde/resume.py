"""Long work in pieces: a table on disk that survives a kill, the settings it was made with, and processes that do the pieces."""

from __future__ import annotations

import csv
import io
import json
import math
import multiprocessing
import os
import signal
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from .compare import pool
from .store import locked, write_file

__all__ = ["MEND", "WRITING", "Table", "extend", "finished", "locked", "pin", "rows_of", "text_of", "write_json"]

MEND = "choose another --out, or pass --overwrite to start afresh"
WRITING = ".writing"  # the folder in a run's own where files are while they are written


def write_json(path: Path, value: Mapping[str, Any], aside: Path | None = None) -> None:
    """Whole or not at all."""
    write_file(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode(), aside)


def pin(folder: Path, settings: Mapping[str, Any], mend: str) -> None:
    """Keep what decides the numbers in `settings.json`; FileExistsError that says what differs when a run had other settings."""
    path = folder / "settings.json"
    if not path.exists():
        write_json(path, settings, folder / WRITING)
        return
    try:
        before = dict(json.loads(path.read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is not what a run writes ({error}); {mend}") from error
    if names := [name for name in {**before, **settings} if before.get(name) != settings.get(name)]:
        differs = "; ".join(f"{name} was {before.get(name)}, is {settings.get(name)}" for name in names)
        raise FileExistsError(f"{folder} holds a run with other settings: {differs}. {mend}")


# --- rows ----------------------------------------------------------------------------------------------------------------
def _number(cell: str) -> bool:
    try:
        return cell == "" or math.isfinite(float(cell))
    except ValueError:
        return False


def _whole(cell: str) -> bool:
    return cell.isdecimal() and len(cell) <= 20


def rows_of(path: Path, columns: Sequence[str], mend: str, texts: Sequence[str] = ()) -> tuple[dict[int, list[str]], int]:
    """The rows of a CSV file by their number, the first of `columns`, and its length without what a kill left torn.

    All cells but those of the columns `texts` are finite numbers or empty, nfe a whole one. Of rows with one number the last stands.
    """
    try:
        return _rows_of(path, columns, mend, texts)
    except csv.Error as error:
        raise ValueError(f"{path} is no table that this version writes ({error}); {mend}") from error


def _rows_of(path: Path, columns: Sequence[str], mend: str, texts: Sequence[str]) -> tuple[dict[int, list[str]], int]:
    rows: dict[int, list[str]] = {}
    numbers = [k for k, name in enumerate(columns) if k and name not in texts]
    nfe = columns.index("nfe") if "nfe" in columns else None
    before: list[str] = []
    data = path.read_bytes() if path.exists() else b""
    whole = data[: data.rfind(b"\n") + 1]
    for i, row in enumerate(csv.reader(io.StringIO(whole.decode(errors="replace"), newline=""))):
        if len(row) != len(columns) or (row != list(columns) if i == 0 else not _whole(row[0])):
            raise ValueError(f"line {i + 1} of {path} is none that this version writes; {mend}")
        if i:
            cells = [row[k] for k in numbers]
            if cells != before:  # those of one batch are often alike
                if not all(map(_number, cells)):
                    raise ValueError(f"line {i + 1} of {path} has a cell that is no finite number; {mend}")
                if nfe is not None and not _whole(row[nfe]):
                    raise ValueError(f"line {i + 1} of {path} has nfe {row[nfe][:40]!r}, which is no whole number; {mend}")
            before = cells
            rows[int(row[0])] = row
    return rows, len(whole)


def text_of(rows: Iterable[Sequence[Any]]) -> bytes:
    """Rows as they stand in a file; floats are written so that they read back exactly."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue().encode()


def extend(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Add rows to a file, which a new one begins with the columns, and see them onto the disk."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        data = memoryview(text_of(rows if os.fstat(file).st_size else [columns, *rows]))
        while data:
            data = data[os.write(file, data) :]
        os.fsync(file)
    finally:
        os.close(file)


class Table:
    """Rows by their number in a CSV file that only grows, as `rows_of` reads them: what a kill leaves torn is cut off."""

    def __init__(self, path: Path, columns: Sequence[str], mend: str, texts: Sequence[str] = ()) -> None:
        self.path, self.columns = path, list(columns)
        self.rows, length = rows_of(path, columns, mend, texts)
        if path.exists() and path.stat().st_size != length:
            os.truncate(path, length)

    def append(self, rows: Iterable[Sequence[Any]]) -> None:
        """Add rows and see them onto the disk."""
        text = [list(map(str, row)) for row in rows]
        extend(self.path, self.columns, text)
        self.rows.update((int(row[0]), row) for row in text)


# --- processes -----------------------------------------------------------------------------------------------------------


def _submit(workers: ProcessPoolExecutor, *call: Any) -> Future[Any]:
    """`workers.submit`; a process it starts is born deaf to Ctrl-C, which is its parent's to answer: held back meanwhile, not lost."""
    mask = getattr(signal, "pthread_sigmask", None)
    if mask is None:  # where there are no masks
        return workers.submit(*call)
    before = mask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return workers.submit(*call)
    finally:
        mask(signal.SIG_SETMASK, before)


def finished(
    processes: int, work: Callable[..., Any], pieces: Iterable[Any], arguments: Callable[[Any], tuple[Any, ...]]
) -> Generator[tuple[Any, Callable[[], Any]], None, None]:
    """(piece, what gives or raises the result of work(*arguments(piece))) as they end, each in one thread of one of the processes.

    Close it when leaving early: no process outlives it, and none goes on with what is no longer wanted.
    """
    if processes == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in the workers: sums over threads are rounded otherwise
        try:
            for piece in pieces:
                yield piece, lambda piece=piece: work(*arguments(piece))
        finally:
            torch.set_num_threads(threads)
        return
    others, left, waiting = set(multiprocessing.active_children()), iter(pieces), dict[Future[Any], Any]()
    with pool(processes) as workers:
        try:
            while True:
                while len(waiting) < 2 * processes and (piece := next(left, waiting)) is not waiting:
                    waiting[_submit(workers, work, *arguments(piece))] = piece
                if not waiting:
                    return
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    yield waiting.pop(future), future.result
        except BaseException:
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()
            raise
