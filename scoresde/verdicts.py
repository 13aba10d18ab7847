"""The folder of a comparison: a summary that vouches for itself and for the files beside it, or one to be made again."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from . import resume, sums
from .resume import MEND

__all__ = ["begin", "check_finite", "finish"]

STATISTICS = ("samples.npz", "reference.npz")
FILES = ("summary.json", *STATISTICS, "settings.json")  # in the order in which they go
OURS = {*FILES, "units", resume.WRITING, ".lock", ".shared"}


def _read(path: Path) -> dict[str, Any] | None:
    """A file of one JSON object; None for anything else."""
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(path.read_text())
        return found if isinstance(found, dict) else None
    return None


def _hashes(out: Path) -> dict[str, str]:
    return {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in STATISTICS if (out / name).is_file()}


def _sha256(found: Mapping[str, Any]) -> str:
    """Of all that a summary says but for the run itself."""
    said = {name: value for name, value in found.items() if name not in ("run", "sha256")}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _whole(out: Path, pinned: Mapping[str, Any]) -> dict[str, Any] | None:
    """The summary of what is pinned, as it was written, with the files as they were written; None where there is none such."""
    found = _read(out / "summary.json")
    if found is None or found.get("sha256") != _sha256(found) or found.get("files") != _hashes(out):
        return None
    made = {**found, "versions": {name: found["versions"].get(name) for name in pinned["versions"]}}
    return found if dict(pinned) == {name: made.get(name) for name in pinned} else None


def _check_ours(out: Path) -> None:
    """Raise FileExistsError for the folder of another command."""
    before, found = _read(out / "settings.json"), _read(out / "summary.json")
    names = {path.name for path in out.iterdir()} if out.is_dir() else set[str]()
    torn = before is None and "settings.json" in names and names <= OURS and found is None
    if before is not None and "summed" in before:
        return
    if before is not None or (not torn and "summary.json" in names and "summed" not in (found or {})):
        raise FileExistsError(f"{out} holds a run of another command; choose another --out")
    if "settings.json" in names and not names <= OURS:
        raise FileExistsError(f"{out} holds a run of which settings.json is damaged, and other files; choose another --out")


def begin(out: Path, pinned: Mapping[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """The folder as a run of what is pinned wants it; its summary if all is done."""
    _check_ours(out)
    if overwrite:
        sums.end(out / "units")
        for name in FILES:
            (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / resume.WRITING, ignore_errors=True)  # what a kill left torn
    if (out / "settings.json").exists() and _read(out / "settings.json") is None:
        raise ValueError(f"{out / 'settings.json'} is damaged, so whose sums these are is not known; {MEND}")
    resume.pin(out, pinned, MEND)
    if (found := _whole(out, pinned)) is not None:
        sums.end(out / "units")
        shutil.rmtree(out / resume.WRITING, ignore_errors=True)
        return found
    (out / "summary.json").unlink(missing_ok=True)  # none, or one that was tampered with, is made again
    sums.begin(out / "units")
    return None


def check_finite(found: Mapping[str, Any], at: str = "") -> None:
    """Raise ValueError where a number of a metric, at any depth, is not finite."""
    for name, value in found.items():
        if isinstance(value, Mapping):
            check_finite(value, f"{at}{name}.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(
                f"{at}{name} is {value}: the features are too large for the squares of float64; bring them to another scale"
            )


def finish(out: Path, found: Mapping[str, Any]) -> dict[str, Any]:
    """Write the summary, which vouches for itself and the files beside it; what is of the work goes."""
    whole = {**found, "files": _hashes(out)}
    whole = json.loads(json.dumps(whole, allow_nan=False))
    whole["sha256"] = _sha256(whole)
    resume.write_json(out / "summary.json", whole, out / resume.WRITING)
    sums.end(out / "units")
    shutil.rmtree(out / resume.WRITING, ignore_errors=True)
    return whole
