"""Integer images on disk, a `.npy` file or a folder of image files, read by index as they stand: never resized, never rounded."""

from __future__ import annotations

import hashlib
import importlib.util
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Images", "files_of", "gathered", "is_picture", "load", "mapped", "picture", "survey"]

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")  # of PIL: what 8-bit RGB and alpha hold without loss
GREY = ("1", "L", "LA")
PARTS = {"test", "train", "val", "valid", "validation"}  # folders of these names are no classes


@dataclass(frozen=True)
class Images:
    """`read(first, stop)` -> integers `[n, *shape]`, uint8 or int64; names: a file's an image, or empty; sha256: of the files' bytes."""

    count: int
    names: Sequence[str] = field(repr=False)
    sha256: str
    read: Callable[[int, int], np.ndarray] = field(repr=False)

    def check(self, first: int, stop: int, levels: int) -> int:
        """The largest level of these images; ValueError when one is not among 0 .. levels - 1, or cannot be read."""
        largest = 0
        for start in range(first, stop, 256):
            part = self.read(start, min(start + 256, stop)).reshape(min(256, stop - start), -1)
            bad = ((part < 0) | (part >= levels)).any(1)
            if bad.any():
                i = int(bad.argmax())
                name = f"image {start + i}{self.names[start + i] and f' ({self.names[start + i]})'}"
                raise ValueError(
                    f"{name} spans {part[i].min()} .. {part[i].max()}; wanted 0 .. {levels - 1}: check the number of levels, {levels}"
                )
            largest = max(largest, int(part.max(initial=0)))
        return largest


def is_picture(shape: Sequence[int]) -> bool:
    """Whether samples of this shape are grey or RGB images."""
    return len(shape) == 3 and shape[0] in (1, 3)


def load(path: Path, shape: Sequence[int]) -> Images:
    """The images of a `.npy` file or a folder, for a network of this event shape; refuses in words what does not fit it.

    A file: integers `[N, *shape]`, without the axis of a single channel if that is left out, or uint8 with channels last. A folder: its
    image files by name, or those of the folders in it, one a class; 8-bit grey or colour of the network's size; grey stands for three
    equal channels and three equal channels for grey. Reading these needs Pillow.
    """
    shape = tuple(shape)
    if path.is_dir():
        return _folder(path, shape)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; wanted a .npy file of integer images or a folder of image files")
    if path.suffix != ".npy":
        raise ValueError(f"{path} is neither a .npy file nor a folder; np.save writes the one, a lone image goes into the other")
    return _array(path, shape)


# --- a file of numbers ---------------------------------------------------------------------------------------------------
def mapped(path: Path, what: str) -> np.ndarray:
    """The array of a `.npy` file, mapped and not read; refuses what is no such file, and objects, which only unpickling would read."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy raises all kinds at a header that is not one
        raise ValueError(f"{path} cannot be read as {what} ({error}); wanted what np.save writes of them") from error
    if not isinstance(found, np.ndarray):
        raise TypeError(f"{path} holds {type(found).__name__}; wanted one array of {what}, as np.save writes it")
    return found


def _array(path: Path, shape: tuple[int, ...]) -> Images:
    found = mapped(path, "integer images")
    if found.dtype.kind not in "iu":
        raise TypeError(
            f"{path} holds {found.dtype}; wanted integers, grey levels as they were read: of floats k / 255 they are "
            "np.round(255 * x).astype(np.uint8). Of vectors there is scoresde.log_prob(checkpoint.load(folder), x)"
        )
    axes, last = found.shape[1:], (*shape[1:], shape[0])
    to_shape: Callable[[np.ndarray], np.ndarray]
    if axes == shape:
        to_shape = lambda x: x
    elif len(shape) == 3 and shape[0] == 1 and axes == shape[1:]:
        to_shape = lambda x: x[:, None]
    elif len(shape) == 3 and axes == last and found.dtype == np.uint8:
        to_shape = lambda x: np.moveaxis(x, -1, 1)
    else:
        mend = "channels last are taken of uint8 alone: np.moveaxis(x, -1, 1)" if len(shape) == 3 and axes == last else ""
        mend = mend or f"wanted [N, {', '.join(map(str, shape))}], the shape of the network"
        raise ValueError(f"{path} is {list(found.shape)} {found.dtype}; {mend}")
    if not len(found):
        raise ValueError(f"{path} holds no images")
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    kind = np.uint8 if found.dtype == np.uint8 else np.int64
    return Images(len(found), _Nameless(len(found)), sha256, lambda a, b: np.array(to_shape(found[a:b]), dtype=kind, order="C"))


class _Nameless(Sequence[str]):
    """So many empty names, which a billion images need not hold."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: Any) -> Any:
        return [""] * len(range(self.n)[i]) if isinstance(i, slice) else ""


# --- a folder of image files ---------------------------------------------------------------------------------------------
def _folder(path: Path, shape: tuple[int, ...]) -> Images:
    if not is_picture(shape):
        raise ValueError(f"image files have 1 or 3 channels, the network wants {list(shape)}; save the data as .npy [N, *shape]")
    files, _ = gathered(path)
    names = [file.relative_to(path).as_posix() for file in files]
    if strange := [name for name in names if not name.isprintable()]:
        raise ValueError(f"the name {strange[0]!r} cannot stand on one line of a table; rename the file")
    digest = hashlib.sha256()
    for name, file in zip(names, files, strict=True):
        digest.update(f"{name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    read = lambda a, b: np.stack([picture(file, shape) for file in files[a:b]])
    return Images(len(files), names, digest.hexdigest(), read)


def gathered(path: Path) -> tuple[list[Path], list[int]]:
    """The image files in a folder by name; or those of the folders in it, one a class, by name, and how many each class has."""
    files = files_of(path)
    inner = {p: files_of(p) for p in sorted(path.iterdir()) if p.is_dir() and not p.name.startswith(".")}
    if files and any(inner.values()):
        raise ValueError(f"{path} holds image files and folders of them; wanted one or the other: give the folder that is meant")
    if files:
        return files, []
    if parts := sorted(p.name for p in inner if p.name.lower() in PARTS):
        raise ValueError(f"{path} holds the folders {parts}, which are no classes; give one of them: {path / parts[0]}")
    if empty := [p for p, found in inner.items() if not found]:
        raise ValueError(f"{empty[0]} holds no image files; wanted PNG or the like in every class's folder, or no such folder")
    if not inner:
        raise ValueError(f"{path} holds no image files; wanted PNG or the like in it, or in one folder a class")
    return [file for found in inner.values() for file in found], [len(found) for found in inner.values()]


def files_of(path: Path) -> list[Path]:
    """The image files in a folder by name, none of those in folders in it; ModuleNotFoundError without Pillow."""
    if importlib.util.find_spec("PIL") is None:
        raise ModuleNotFoundError("image files are read by Pillow: pip install 'scoresde[plots]', or save the images as .npy")
    from PIL import Image

    suffixes = Image.registered_extensions()
    return sorted(p for p in path.iterdir() if p.suffix.lower() in suffixes and p.is_file() and not p.name.startswith("."))


def survey(files: Sequence[Path]) -> tuple[int, int, int]:
    """The shape (C, H, W) of them all, C = 1 where every file is grey and else 3; refuses other sizes, 16 bits, transparency.

    It reads the headers, and of files with an alpha channel the pixels.
    """
    from PIL import Image

    channels, sizes = 1, dict[tuple[int, int], Path]()
    for path in files:
        try:
            with Image.open(path) as image:
                mode, size, frames = _head(image)
                alpha = mode in ("LA", "PA", "RGBA") or "transparency" in image.info
        except Exception as error:
            raise _unreadable(path, error) from error
        _refuse(path, mode, frames)
        if alpha:  # few files have any, and only their pixels say whether they are opaque
            picture(path, (3, size[1], size[0]))
        first, at = next(iter(sizes.items()), (size, path))
        if size != first:
            raise ValueError(
                f"{path} is {size[0]} x {size[1]} and {at} {first[0]} x {first[1]}; wanted one size: nothing is resized here"
            )
        sizes[size] = at
        channels = channels if mode in GREY else 3
    ((width, height),) = sizes
    return channels, height, width


def picture(path: Path, shape: Sequence[int]) -> np.ndarray:
    """uint8 `[C, H, W]` of a file, C of 1 or 3; ValueError for one that is not of this size and kind."""
    from PIL import Image

    channels, height, width = shape
    try:
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            mode, size, frames = _head(image)
            rgba = np.asarray(image.convert("RGBA")) if mode in MODES and size == (width, height) else None
    except Exception as error:
        raise _unreadable(path, error) from error
    if size != (width, height):
        raise ValueError(f"{path} is {size[0]} x {size[1]}; the network wants {width} x {height}, and nothing is resized here")
    _refuse(path, mode, frames)
    if rgba is None or (rgba[..., 3] != 255).any():
        raise ValueError(f"{path} is transparent in places; wanted opaque images: lay it on a background first")
    if channels == 1 and (rgba[..., :1] != rgba[..., 1:3]).any():
        raise ValueError(f"{path} is in colour and the network has one channel; how to make it grey is yours to choose")
    return np.moveaxis(rgba[..., :channels], -1, 0)


def _head(image: Any) -> tuple[str, tuple[int, int], int]:
    """(mode, (width, height), frames); a mode of PIL, or of what it would drop the lower eight bits without a word."""
    deep = ";16" in repr(getattr(image, "tile", ""))
    return "16 bits" if deep else image.mode, image.size, getattr(image, "n_frames", 1)


def _refuse(path: Path, mode: str, frames: int) -> None:
    if mode not in MODES or frames > 1:
        what = f"{frames} frames" if frames > 1 else mode
        raise ValueError(f"{path} is of {what}; wanted one image of 8 bits, grey or RGB: save the data as .npy")


def _unreadable(path: Path, error: Exception) -> ValueError:
    """PIL raises many kinds, SyntaxError among them."""
    return ValueError(f"{path} cannot be read ({type(error).__name__}: {error}); mend or remove it")
