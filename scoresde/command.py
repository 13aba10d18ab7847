"""What every command does: know which process it is, warn, open a saved model, name what failed."""

from __future__ import annotations

import errno
import functools
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import checkpoint
from .denoiser import Preconditioned
from .store import MENDS, SaveError

__all__ = ["DeviceError", "check_device", "given", "loaded", "opened", "outcome", "place", "ran", "said", "tag", "versions", "warn"]


class DeviceError(ValueError):
    """A device that cannot be computed on here; on other machines of a job it may be there."""


def place() -> tuple[int, int]:
    """Which of how many processes this is, as torchrun says in the environment: 0 of 1 without it."""
    rank, world = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    return (int(rank), int(world)) if rank.isdecimal() and world.isdecimal() else (0, 1)


def tag() -> str:
    """What stands before the words of this process where there are others."""
    rank, world = place()
    return f"rank {rank}: " if world > 1 else ""


def warn(text: str, *, own: bool = False) -> None:
    """A line on stderr, for what does not end a run; of many processes the first says it, of what is their own each."""
    if own or place()[0] == 0:
        print(f"scoresde: {tag() if own else ''}{text}", file=sys.stderr)


def given(settings: object, names: Iterable[str]) -> dict[str, Any]:
    """Those of the settings that are not left open."""
    return {name: value for name in names if (value := getattr(settings, name)) is not None}


def check_device(device: str) -> str:
    """Return the name of a device that can be computed on here; DeviceError, a ValueError, for any other."""
    try:
        torch.empty(1, device=device).add_(1)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        what = str(error).splitlines()[0]
        raise DeviceError(f"device is {device!r}, which cannot be used here ({what}); wanted cpu, cuda, ...") from error
    return device


@functools.lru_cache(maxsize=1)
def loaded(folder: Path, config: str, device: str, weights: str | None = None) -> Preconditioned:
    """The checkpoint, loaded once a process; config: the text of its config.json when the run began; weights: which, if it has several."""
    model = checkpoint.load(folder, weights=weights).to(device)
    if (folder / "config.json").read_text() != config:
        raise ValueError(f"{folder} has been written anew since the run began; copy a checkpoint whose training goes on")
    return model


def opened(folder: Path, device: str, weights: str | None = None) -> tuple[Path, str, Preconditioned]:
    """The checkpoint in a folder, of a training run its newest step: where it is, the text of its config.json, the model."""
    folder = checkpoint.find(folder.resolve())
    text = (folder / "config.json").read_text() if (folder / "config.json").is_file() else ""
    return folder, text, loaded(folder, text, device, weights)


def said(error: BaseException) -> str:
    """The words of an error: of the system's with the file and what to do, of a lost connection with what that means."""
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror and error.errno is not None:
        if isinstance(error, SaveError):
            return error.strerror
        path = Path(os.fsdecode(error.filename)) if isinstance(error.filename, (str, bytes)) else None
        number, mend = error.errno, MENDS.get(error.errno, "")
        if (number == errno.ENOENT and (path is None or path.parent.is_dir())) or (
            path and path.is_file() and number == errno.EACCES
        ):
            mend = ""  # it is the file that is missing, or may not be read
        return f"{f'{path}: ' if path else ''}{error.strerror}{mend and f'; {mend[0].lower()}{mend[1:]}'}"
    if place()[1] > 1 and isinstance(error, RuntimeError) and error.__cause__ is None and _is_lost(error):
        return (
            "another process of this job has ended or was not heard of for SCORESDE_TIMEOUT seconds: see what it said; torchrun "
            f"--max-restarts=3 starts all of them again ({text.splitlines()[0][:120]})"
        )
    return text


def _is_lost(error: RuntimeError) -> bool:
    """Whether this is what gloo, nccl or the store of torch.distributed say when another process does not answer."""
    words = r"\bgloo\b|\bnccl|c10d|TCPStore|Connection closed by peer|Connection reset by peer|^Timed out|wait timeout"
    return type(error).__name__.startswith("Dist") or re.search(words, str(error), re.IGNORECASE) is not None


def outcome(result: Callable[[], Any], piece: str) -> Any:
    """What the work on a piece gave (`resume.finished`); RuntimeError that names the piece, or says that a process was killed."""
    try:
        return result()
    except BrokenExecutor as error:
        mend = "run again with fewer --processes or a smaller --batch; what is done is kept"
        raise RuntimeError(f"a worker process was killed, for want of memory perhaps: {mend}") from error
    except Exception as error:
        raise RuntimeError(f"{piece}: {type(error).__name__}: {said(error)}") from error


# --- what a summary says of its making -----------------------------------------------------------------------------------
def versions() -> dict[str, str]:
    """Of the programs that decide the bits of what is computed."""
    from . import __version__

    return {"scoresde": __version__, "torch": torch.__version__}


def ran(started: float, computed: int, processes: int, world: int, device: str) -> dict[str, Any]:
    """All versions, and how a run that began at `time.perf_counter()` = started has gone: nothing here decides a number."""
    return {
        "versions": {**versions(), "numpy": np.__version__, "python": platform.python_version()},
        "run": {
            "seconds": round(time.perf_counter() - started, 1), "computed": computed, "processes": processes, "world": world,
            "device": f"{device} ({platform.machine()}, {platform.system()})",
        },
    }  # fmt: skip
