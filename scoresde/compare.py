"""A comparison of solvers: rows (problem x solver x budget), run in processes, resumable, written as one tidy table."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .denoiser import Denoiser
from .sample import sample
from .solvers import Solver

__all__ = ["Row", "run", "table", "write"]


@dataclass(frozen=True)
class Row:
    """One line of a comparison: `solver` on `problem` at `nfe` evaluations a sample (None for an adaptive solver)."""

    problem: str
    solver: Solver
    nfe: int | None = None
    label: str = ""  # of the solver in tables; default its class's name

    @property
    def key(self) -> str:
        """What makes the row the same row in a later run."""
        return f"{self.problem} | {self.solver!r} | {self.nfe}"


_MADE: dict[str, Denoiser] = {}  # of this worker process


def _start(threads: int) -> None:
    """In a worker: its threads, and its end with its parent's, for what a killed run leaves must not compute on."""
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _work(make: Callable[[], Denoiser], row: Row, shape: Sequence[int], seeds: Sequence[int]) -> tuple[Tensor, Tensor, float]:
    """(x, nfe of each, seconds) of one process's share of a row."""
    if row.problem not in _MADE:
        _MADE[row.problem] = make()
    started = time.perf_counter()
    found = sample(_MADE[row.problem], (len(seeds), *shape), row.solver, nfe=row.nfe, seeds=seeds)
    return found.x, found.nfe_each, time.perf_counter() - started


def pool(processes: int) -> ProcessPoolExecutor:
    """Worker processes of one thread each.

    They inherit, unless set already, glibc's thresholds for giving memory back: at the defaults every call of a small network maps
    and faults its activations anew, which made training several times slower on a busy machine.
    """
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"):
        os.environ.setdefault(name, "1000000000")
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=_start, initargs=(1,))


def shares(items: Sequence[Any], parts: int) -> list[Sequence[Any]]:
    """`items` in `parts` pieces of nearly equal length, in order."""
    return [items[i * len(items) // parts : (i + 1) * len(items) // parts] for i in range(parts)]


def run(
    workers: ProcessPoolExecutor, processes: int, rows: Sequence[Row], problems: Mapping[str, Callable[[], Denoiser]],
    shape: Sequence[int], seeds: Sequence[int], score: Callable[[Tensor], Mapping[str, Any]], done: Path | None = None,
) -> Iterator[tuple[Row, dict[str, Any], Tensor | None]]:  # fmt: skip
    """Yield (row, result, x) a row, in order; every row draws the same `seeds`, split over the processes by sample.

    problems: name -> a picklable function that makes the denoiser (run once a process); score: x `[N, *shape]` -> named numbers;
    done: a JSON-lines file of finished rows: a row found there is yielded from it (x None), a new one is added as it ends. result:
    problem, solver, settings, steps (grid), nfe (counted, mean and largest over samples), the scores, seconds (the slowest process).
    """
    finished: dict[str, dict[str, Any]] = {}
    if done is not None and done.exists():
        for line in done.read_text().splitlines():
            record = json.loads(line)
            finished[record["key"]] = record
    key = lambda row: f"{row.key} | {len(seeds)} samples from seed {seeds[0]}"
    waiting: dict[str, list[Future[Any]]] = {
        key(row): [workers.submit(_work, problems[row.problem], row, shape, part) for part in shares(seeds, processes)]
        for row in rows
        if key(row) not in finished
    }
    for row in rows:
        if key(row) in finished:
            yield row, {k: v for k, v in finished[key(row)].items() if k != "key"}, None
            continue
        xs, nfe, seconds = zip(*(future.result() for future in waiting[key(row)]), strict=True)
        x, each = torch.cat(xs), torch.cat(nfe)
        result = {
            "problem": row.problem, "solver": row.label or repr(row.solver).partition("(")[0], "settings": repr(row.solver),
            "grid": row.solver.grid.__name__, "budget": row.nfe, "nfe": float(each.double().mean()), "nfe_max": int(each.max()),
            **score(x), "samples": len(x), "seconds": round(max(seconds), 2),
        }  # fmt: skip
        if done is not None:
            with done.open("a") as file:
                file.write(json.dumps({"key": key(row), **result}) + "\n")
        yield row, result, x


def write(folder: Path, name: str, results: Sequence[Mapping[str, Any]], record: Mapping[str, Any]) -> None:
    """`name`.csv (the rows) and `name`.json (the rows with `record`: versions, seeds, device)."""
    columns = list(dict.fromkeys(column for result in results for column in result))
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(results)
    (folder / f"{name}.json").write_text(json.dumps({**record, "rows": list(results)}, indent=1, allow_nan=False) + "\n")


def table(results: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """A Markdown table: `columns` maps a heading to the format of its key, as in {"FID": "{fid:.2f}"}; what a row lacks is '-'."""

    def cell(form: str, result: Mapping[str, Any]) -> str:
        try:
            return form.format(**result)
        except (KeyError, ValueError, TypeError):
            return "-"

    body = [[cell(form, result) for form in columns.values()] for result in results]
    widths = [max(len(line[i]) for line in [list(columns), *body]) for i in range(len(columns))]
    lines = [" | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in [list(columns), *body]]
    rule = "-|-".join("-" * width for width in widths)
    return "\n".join(f"| {line} |" for line in lines[:1]) + f"\n|-{rule}-|\n" + "\n".join(f"| {line} |" for line in lines[1:])
