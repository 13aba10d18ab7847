"""Bytes on a disk that a kill, a full disk or a flipped bit cannot pass off as whole: one file, a folder's files, a folder a step.

What is written is flushed to the disk under a temporary name, then renamed. `manifest.json`, written last, has the size and the SHA-256 of
every file and of its own text; what it does not vouch for is not read. It guards against damage, not against who can write a manifest.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from .checks import check_count

__all__ = [
    "MANIFEST", "SaveError", "clear", "commit", "latest", "locked", "prune", "put", "read", "saving", "seal", "step_name", "steps",
    "verify", "whole", "write_file",
]  # fmt: skip

FORMAT = 2
MANIFEST = "manifest.json"
DAMAGED = "is damaged or was swapped (an edit by hand: scoresde.store.seal vouches for the folder as it is)"
LARGEST = 1 << 24  # bytes of a manifest: what lists a few files is no longer
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}")  # of a file in a manifest: no way out of the folder, nothing hidden
STEP = re.compile(r"step-(\d{8}|[1-9]\d{8,17})")
LEFT = re.compile(
    r"\.(step-\d{8,18}|[A-Za-z0-9_][A-Za-z0-9_.+-]*\.(safetensors|json|yaml|csv|png))\.\d+"
)  # what a killed writer leaves


class SaveError(OSError):
    """The system did not let a save through: says what failed, what is left on the disk, and the mend. What was in memory still is."""


MENDS = {
    errno.ENOSPC: "Free some space on the disk",
    errno.EDQUOT: "Free some of the quota",
    errno.EFBIG: "Raise the largest file size (ulimit -f)",
    errno.EROFS: "Make the disk writable",
    errno.EACCES: "Make the folder writable",
    errno.EPERM: "Make the folder writable",
    errno.ENOENT: "Make the folder again",
    errno.EEXIST: "Move the file of that name away",
    errno.ENOTDIR: "Move the file of that name away",
}


@contextmanager
def saving(folder: Path, what: str) -> Iterator[None]:
    """Turn an OSError of the block into a SaveError that says what of `folder` is whole."""
    try:
        yield
    except OSError as error:
        mend = MENDS.get(error.errno or 0, "Mend that, or choose another folder")
        where = f" ({error.filename})" if error.filename else ""
        raise SaveError(
            error.errno,
            f"{what} was not saved into {folder}: {error.strerror or error}{where}; {_left(folder)}. {mend} and save again: nothing in "
            "memory has changed, and the work can go on",
        ) from error


def _left(folder: Path) -> str:
    try:
        verify(folder)
        return "what is there is whole"
    except (OSError, ValueError):
        path = whole(folder)
    return (
        f"the earlier checkpoints are as they were, and the newest whole one is {path}"
        if path
        else "no earlier checkpoint is there"
    )


# --- one writer ----------------------------------------------------------------------------------------------------------
@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder, made if missing, for this run alone, where the system has such locks; its file `.lock` says who holds it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        words = f"{error.strerror}: it is a file, or below one; wanted a folder, or a name that is free"
        raise type(error)(error.errno, words, str(folder)) from error
    path = folder / ".lock"
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(file, folder)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), path.stat()):  # else its last holder has removed it meanwhile
                    break
        except BaseException:
            os.close(file)
            raise
        os.close(file)
    try:
        os.ftruncate(file, 0)
        _spill(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        with suppress(OSError):  # the disk may be gone: the lock goes with the process
            path.unlink()
        os.close(file)


def _lock(file: int, folder: Path) -> None:
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.read(file, 200).decode(errors="replace") or "a process that has not said which"
        raise RuntimeError(f"another run is at work in {folder}: {holder}; wait for it, or choose another folder") from error
    except (ImportError, OSError):  # no such locks here: two runs at once are the user's to avoid
        pass


# --- writing -------------------------------------------------------------------------------------------------------------
def _spill(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]  # which may take less than all: a system call has a largest size


def _fill(path: Path, data: bytes | Iterable[bytes]) -> None:
    """A new file with these bytes, on the disk, in the mode that the umask gives."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        for part in (data,) if isinstance(data, bytes) else data:
            _spill(file, part)
        os.fsync(file)
    finally:
        os.close(file)


def _sync(folder: Path) -> None:
    """The names in a folder, onto the disk, where the system can."""
    if os.name == "nt":
        return
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network disks have no such call for a folder
            raise
    finally:
        os.close(file)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")


def _swap(files: Mapping[Path, bytes | Iterable[bytes]], aside: Path | None = None) -> None:
    """All of them onto the disk beside their places, or in the folder `aside`, then each into its place, in order."""
    under_way = {path: _beside(path) if aside is None else aside / f"{path.name}.{os.getpid()}" for path in files}
    try:
        for path, data in files.items():
            _fill(under_way[path], data)
        for path in files:
            os.replace(under_way[path], path)
    finally:
        for path in under_way.values():
            with suppress(OSError):
                path.unlink(missing_ok=True)
    for folder in {path.parent: None for path in files}:
        _sync(folder)


def write_file(path: Path, data: bytes | Iterable[bytes], aside: Path | None = None) -> None:
    """Whole or not at all: under a temporary name, flushed to the disk, then renamed.

    data: all of it, or part by part; aside: a folder on the same disk, made if missing, for what is under way (default: beside the
    file), so that what a kill leaves is found without looking at all files.
    """
    if aside is not None:
        aside.mkdir(exist_ok=True)
    _swap({path: data}, aside)


def put(folder: Path, files: Mapping[str, bytes], **facts: Any) -> None:
    """Write files into a folder that may hold others, the manifest last: a kill in between leaves the old ones, or what is refused."""
    _swap({folder / name: data for name, data in {**files, MANIFEST: _manifest(files, facts)}.items()})


def commit(folder: Path, files: Mapping[str, bytes], **facts: Any) -> Path:
    """Make the folder whole or not at all: under a temporary name, the manifest last, then renamed; FileExistsError if it is there."""
    if folder.exists():
        raise FileExistsError(errno.EEXIST, "a checkpoint is never written over", str(folder))
    beside = _beside(folder)
    try:
        os.mkdir(beside)
        for name, data in {**files, MANIFEST: _manifest(files, facts)}.items():
            _fill(beside / name, data)
        _sync(beside)
        os.rename(beside, folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    _sync(folder.parent)
    return folder


def clear(folder: Path) -> None:
    """Remove what killed writers left, for a caller who holds the lock."""
    for path in folder.iterdir():
        if LEFT.fullmatch(path.name):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with suppress(OSError):
                    path.unlink()


# --- manifest ------------------------------------------------------------------------------------------------------------
def _entry(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _sealed(content: Mapping[str, Any]) -> bytes:
    """The one text of this content: with the SHA-256 of the text without it."""
    text = lambda value: (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()
    return text({**content, "sha256": hashlib.sha256(text(content)).hexdigest()})


def _manifest(files: Mapping[str, bytes], facts: Mapping[str, Any]) -> bytes:
    for name in files:
        if not NAME.fullmatch(name) or name == MANIFEST:
            raise ValueError(f"a file is named {name!r}; wanted letters, digits and _ . + -, no path, and not {MANIFEST}")
    return _sealed({**facts, "format": FORMAT, "files": {name: _entry(data) for name, data in files.items()}})


def seal(folder: str | os.PathLike[str], **facts: Any) -> None:
    """Vouch for the .json and .safetensors files of a folder as they are now, after an edit by hand; a checkpoint needs its step=."""
    folder = Path(folder)
    names = sorted(path.name for path in folder.iterdir() if NAME.fullmatch(path.name) and path.suffix in (".json", ".safetensors"))
    write_file(folder / MANIFEST, _manifest({name: (folder / name).read_bytes() for name in names if name != MANIFEST}, facts))


def _refuse(path: Path, why: str, mend: str) -> NoReturn:
    raise ValueError(f"{path} {why}; {mend}")


def _take(path: Path, size: int | None, links: bool) -> bytes:
    """The bytes of a plain file of this size; nothing else is opened: a link leads out of the folder, a pipe never ends."""
    try:
        found = path.stat() if links else path.lstat()
        if not stat.S_ISREG(found.st_mode):
            _refuse(path, "is no plain file", "a checkpoint has no links or folders in it: copy the file itself")
        if size is None and found.st_size > LARGEST:
            _refuse(path, f"has {found.st_size} bytes", f"a manifest has less than {LARGEST}: it is damaged, or none of ours")
        if size is not None and found.st_size != size:
            _refuse(path, f"has {found.st_size} bytes, and {size} when it was written", f"it was cut off, {DAMAGED}")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing; a checkpoint that was interrupted or lost a file cannot be read") from error


def _listed(folder: Path, links: bool) -> dict[str, Any]:
    """The manifest, which vouches for itself."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; wanted that of a checkpoint")
    data = _take(path, None, links)
    try:
        content = dict(json.loads(data))
        content.pop("sha256")
        known = _sealed(content) == data
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} is no manifest ({type(error).__name__}); it is damaged, cut off or was edited") from error
    if not known:
        _refuse(path, "does not have its own SHA-256", "it is damaged, was edited, or is of another version")
    if content.get("format") != FORMAT:
        _refuse(path, f"is of format {content.get('format')!r}; this version reads {FORMAT}", "install a newer scoresde")
    files = content.get("files")
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        _refuse(path, "lists no files", "it is none of ours")
    for name in files:
        if not NAME.fullmatch(name) or name == MANIFEST:
            _refuse(path, f"lists {name!r}", "a checkpoint's files are plain names in its own folder: it is none of ours")
    match = STEP.fullmatch(folder.resolve().name)
    if match and content.get("step") != int(match[1]):
        _refuse(path, f"is of step {content.get('step')!r}", f"{match[0]} was renamed or swapped: give it back its name")
    return content


def read(folder: str | os.PathLike[str], *, links: bool = False) -> dict[str, bytes]:
    """The bytes of every listed file by name, once all have their sizes and SHA-256; others in the folder are not looked at.

    links: follow symbolic links (a download's, into a cache of files). Raises ValueError that names the file that is missing, cut off,
    changed, swapped or no plain file; FileNotFoundError without the folder.
    """
    folder = Path(folder)
    files: dict[str, bytes] = {}
    for name, entry in _listed(folder, links)["files"].items():
        files[name] = _take(folder / name, entry.get("bytes", -1), links)
        if _entry(files[name]) != entry:
            _refuse(folder / name, f"is not the file {MANIFEST} was written with", f"it {DAMAGED}")
    return files


def verify(folder: str | os.PathLike[str], *, links: bool = False) -> dict[str, Any]:
    """The manifest of a folder that is whole; raises as `read`."""
    read(folder, links=links)
    return _listed(Path(folder), links)


# --- a folder a step -----------------------------------------------------------------------------------------------------
def step_name(step: int) -> str:
    """step-00001000."""
    return f"step-{step:08d}"


def steps(folder: str | os.PathLike[str]) -> dict[int, Path]:
    """The checkpoints in a folder by step, ascending, unverified."""
    try:
        found = [path for path in Path(folder).iterdir() if STEP.fullmatch(path.name) and path.is_dir()]
    except OSError:
        return {}
    return {int(path.name[5:]): path for path in sorted(found, key=lambda path: int(path.name[5:]))}


def latest(folder: str | os.PathLike[str]) -> Path | None:
    """The newest checkpoint, unverified; None without any."""
    return next(reversed(steps(folder).values()), None)


def whole(folder: str | os.PathLike[str]) -> Path | None:
    """The newest checkpoint that is whole; None without any."""
    for path in reversed(steps(folder).values()):
        with suppress(OSError, ValueError):
            verify(path)
            return path
    return None


def prune(folder: str | os.PathLike[str], keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, each whole or gone at any time; warns where the system refuses."""
    for path in list(steps(folder).values())[: -check_count(keep, "keep")]:
        try:
            os.rename(path, _beside(path))
            _sync(path.parent)  # before its files go: a torn folder must not come back under its name
            shutil.rmtree(_beside(path))
        except OSError as error:
            warnings.warn(
                f"{path} is older than the last {keep} and could not be removed ({error}); remove it by hand", stacklevel=2
            )
