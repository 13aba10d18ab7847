"""Results of a benchmark by name, kept in a file that is replaced whole, so that an interrupted run goes on where it was."""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
from noise import processor

import scoresde


def rounded(value: Any, digits: int = 5) -> Any:
    """Numbers to so many digits."""
    if isinstance(value, dict):
        return {k: rounded(v, digits) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v, digits) for v in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def options(doc: str | None) -> argparse.ArgumentParser:
    """--fresh and --tables, in the words of the script's own docstring."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("--fresh", "--tables"):
        parser.add_argument(flag, action="store_true")
    return parser


def stored(path: Path, chosen: argparse.Namespace) -> dict[str, Any] | None:
    """What the file holds, None to start anew; --tables without it is an error."""
    found = json.loads(path.read_text()) if path.exists() and not chosen.fresh else None
    if chosen.tables and found is None:
        raise SystemExit(f"{path.name} is missing: run without --tables first")
    return found


def machine() -> dict[str, Any]:
    """Where and with what it runs."""
    versions = {p: version(p) for p in ("scoresde", "torch", "torchdiffeq", "scipy", "numpy", "scikit-learn", "k-diffusion")}
    return {
        "machine": f"{processor()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(), "versions": {"python": platform.python_version(), **versions},
        "load at start": round(os.getloadavg()[0], 2),
    }  # fmt: skip


def check_same(before: dict[str, Any] | None, head: dict[str, Any], fixed: tuple[str, ...], path: Path) -> None:
    """SystemExit when the stored results were made with other settings."""
    if changed := [k for k in fixed if before and before[k] != head[k]]:
        raise SystemExit(f"{path.name} was made with other {', '.join(changed)}: --fresh starts anew")


class Cells:
    """A cell a name, one line each in the file at `path`; what raises one of `failures` is a cell that says so."""

    path: ClassVar[Path]
    failures: ClassVar[tuple[type[Exception], ...]] = (ArithmeticError, scoresde.UnfinishedError)

    def __init__(self, head: dict[str, Any], rows: dict[str, dict[str, Any]]) -> None:
        self.head, self.rows, self.saved = head, rows, time.perf_counter()

    def digits(self, name: str) -> int:
        """Of the numbers of this cell."""
        return 5

    def fill(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The cell, computed where it is lacking."""
        if name not in self.rows:
            began = time.perf_counter()
            try:
                row = make()
            except self.failures as error:
                row = {"error": f"{type(error).__name__}: {error}"[:200]}
            seconds = time.perf_counter() - began
            self.rows[name] = rounded(row, self.digits(name)) | {"seconds": rounded(seconds)}
            self.head["seconds"] = round(self.head["seconds"] + seconds, 1)
            print(f"{self.head['seconds']:7.1f} s  {name}: {json.dumps(self.rows[name])}", flush=True)
            if time.perf_counter() - self.saved > 10:
                self.save()
        return self.rows[name]

    def save(self) -> None:
        """Write all of it."""
        body = ",\n".join(f"{json.dumps(name)}:{json.dumps(row, allow_nan=False)}" for name, row in self.rows.items())
        new = self.path.with_suffix(".new")
        new.write_text(f'{json.dumps(self.head, indent=1)[:-2]},\n "cells": {{\n{body}\n}}}}\n')
        os.replace(new, self.path)
        self.saved = time.perf_counter()
