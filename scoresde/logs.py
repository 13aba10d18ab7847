"""The record of a training: a line of JSON a row, cut back when training goes on from an earlier step, and the same as CSV."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .store import write_file

__all__ = ["Log"]


class Log:
    """`NAME.jsonl` in a folder: one object a row, each with its `step`; `NAME.csv` has the same rows, written by `table()`.

    It is opened for a training that has done `step` steps: later rows, and a line that a kill left torn, are cut off. A number that
    is not finite is null. tensorboard: also event files of the numbers, in the folder's `tensorboard` (extra `tensorboard`).
    """

    def __init__(self, folder: Path, name: str = "metrics", step: int = 0, *, tensorboard: bool = False) -> None:
        self.path, self.csv = folder / f"{name}.jsonl", folder / f"{name}.csv"
        self.rows: list[dict[str, Any]] = []
        kept = 0
        for i, line in enumerate(self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else ()):
            try:
                row = json.loads(line)
                after = int(row["step"]) > step
            except (ValueError, KeyError, OverflowError, TypeError) as error:
                if not line.endswith(b"\n"):
                    break
                raise ValueError(
                    f"line {i + 1} of {self.path} is no row of a training's log ({error!r}); move the file away"
                ) from error
            if after or not line.endswith(b"\n"):
                break
            kept += len(line)
            self.rows.append(row)
        if self.path.exists() and kept != self.path.stat().st_size:
            with self.path.open("r+b") as file:
                file.truncate(kept)
        self._whole, self._waiting = kept, b""  # bytes of the file that are rows; rows that a full disk has not taken yet
        self._writer = _tensorboard(folder / "tensorboard", step) if tensorboard else None

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row; it is in the file at once, and on the disk after `flush`. What the disk refuses is written with the next one."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._waiting += (json.dumps(clean, allow_nan=False) + "\n").encode()
        self.rows.append(clean)
        try:
            self._write()
        except OSError as error:
            warnings.warn(
                f"{self.path} could not be written ({error}); the training goes on, and this is tried again", stacklevel=2
            )
        for key, value in clean.items() if self._writer is not None else ():
            if key != "step" and isinstance(value, (int, float)):
                self._writer.add_scalar(key, value, clean["step"])  # type: ignore[missing-attribute]

    def _write(self) -> None:
        if not self._waiting:
            return
        with self.path.open("ab") as file:
            file.truncate(self._whole)  # half a row that a full disk had taken
            file.write(self._waiting)
        self._whole, self._waiting = self._whole + len(self._waiting), b""

    def flush(self) -> None:
        """See the rows onto the disk: what a checkpoint vouches for must outlive it."""
        self._write()
        if self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    def table(self) -> None:
        """Write the CSV: a column a name, in the order of their appearance, empty where a row lacks it."""
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: "" if v is None else v for k, v in row.items()} for row in self.rows)
        write_file(self.csv, buffer.getvalue().encode())

    def close(self) -> None:
        """Of the event files."""
        if self._writer is not None:
            self._writer.close()


def require_tensorboard() -> None:
    """Raise before any work when it is missing."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ModuleNotFoundError("tensorboard: true needs it: pip install 'scoresde[tensorboard]'")


def _tensorboard(folder: Path, step: int) -> Any:
    require_tensorboard()
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)
