"""The disk: what is written is whole, one writes at a time, and what is damaged is refused by name."""

import errno
import hashlib
import json
import os
import random
import shutil
import socket
import stat
import subprocess
import sys
import threading

import pytest

from scoresde import resume, store

FILES = {"a.json": b"{}\n", "b.safetensors": bytes(range(256)) * 3, "empty.json": b""}


@pytest.fixture
def folder(tmp_path):
    return store.commit(tmp_path / "step-00000007", FILES, step=7)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# --- there and back ------------------------------------------------------------------------------------------------------
def test_what_is_committed_is_read(folder, tmp_path):
    assert store.read(folder) == FILES == store.read(str(folder))
    manifest = store.verify(folder)
    assert manifest["step"] == 7
    assert manifest["files"]["b.safetensors"] == {"bytes": 768, "sha256": hashlib.sha256(FILES["b.safetensors"]).hexdigest()}
    assert names(tmp_path) == [folder.name]
    assert names(folder) == sorted([*FILES, "manifest.json"])


def test_others_in_the_folder_are_not_looked_at(folder):
    (folder / "README.md").write_text("notes")
    (folder / "more.json").write_text("{")
    assert store.read(folder) == FILES


def test_a_file_is_written_whole_and_without_scraps(tmp_path):
    for data in (b"one", b"", b"three" * 10**6):
        store.write_file(tmp_path / "x", data)
        assert (tmp_path / "x").read_bytes() == data
        assert names(tmp_path) == ["x"]


def test_a_system_that_writes_less_than_asked(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:100]))
    assert store.read(store.commit(tmp_path / "x", FILES)) == FILES


def test_nothing_is_committed_over(folder):
    with pytest.raises(FileExistsError, match="never written over"):
        store.commit(folder, {"a.json": b"other"}, step=7)
    assert store.read(folder) == FILES


BAD_NAMES = ["../x", "/etc/passwd", "a/b", "a\\b", "", ".", "..", ".hidden", "a\0b", "manifest.json", "ä", "a b", "x" * 201, "a\n"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_lead_nowhere_else(name, tmp_path):
    with pytest.raises(ValueError, match="a file is named"):
        store.commit(tmp_path / "x", {name: b""})
    assert names(tmp_path) == []
    good = store.commit(tmp_path / "good", FILES)
    content = json.loads((good / "manifest.json").read_bytes())
    content["files"][name] = content["files"]["a.json"]
    del content["sha256"]
    (good / "manifest.json").write_bytes(store._sealed(content))
    with pytest.raises(ValueError, match=r"manifest.json lists .* none of ours"):
        store.read(good)


def test_modes_are_those_of_the_umask(tmp_path):
    for mask in (0o022, 0o077, 0o002):
        before = os.umask(mask)
        try:
            folder = store.commit(tmp_path / f"{mask:o}", FILES)
        finally:
            os.umask(before)
        assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o666 & ~mask}
        assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~mask


def test_what_is_renamed_is_on_the_disk_before(tmp_path, monkeypatch):
    """Of each file its bytes, of the folder its names, then the new name; and that before anything older goes."""
    store.commit(tmp_path / "step-00000001", FILES, step=1)
    calls, of = [], {}

    def watch(name):
        real = getattr(os, name)

        def call(*args, **kwargs):
            found = real(*args, **kwargs)
            if name == "open":
                of[found] = os.path.basename(args[0])
            calls.append((name, of.get(args[0]) if name in ("write", "fsync") else os.path.basename(args[0])))
            return found

        monkeypatch.setattr(os, name, call)

    for name in ("open", "write", "fsync", "rename", "unlink", "mkdir"):
        watch(name)
    store.commit(tmp_path / "step-00000002", FILES, step=2)
    store.prune(tmp_path, 1)
    monkeypatch.undo()
    new, old = f".step-00000002.{os.getpid()}", "step-00000001"
    at = calls.index(("rename", new))
    for name in ("a.json", "b.safetensors", "empty.json", "manifest.json"):
        assert calls.count(("fsync", name)) == 1
        assert all(i < calls.index(("fsync", name)) for i, call in enumerate(calls) if call == ("write", name))
        assert calls.index(("fsync", name)) <= calls.index(("fsync", "manifest.json"))
    assert calls.index(("fsync", "manifest.json")) < calls.index(("fsync", new)) < at
    synced = [i for i, call in enumerate(calls) if call == ("fsync", tmp_path.name)]
    gone = calls.index(("rename", old))
    assert at < synced[0] < gone < synced[1] < calls.index(("unlink", "a.json"))


# --- steps ---------------------------------------------------------------------------------------------------------------
def test_steps_are_those_with_the_name(tmp_path):
    for step in (3, 20, 123456789, 0):
        store.commit(tmp_path / store.step_name(step), {"a.json": b""}, step=step)
    for name in ("step-5", "step-0000000a", ".step-00000099.1", "step-000000001", "steps", "step-00000001.bak"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000098").write_text("a file")
    assert list(store.steps(tmp_path)) == [0, 3, 20, 123456789]
    assert store.latest(tmp_path) == tmp_path / "step-123456789"
    assert store.whole(tmp_path) == tmp_path / "step-123456789"
    store.prune(tmp_path, 2)
    assert list(store.steps(tmp_path)) == [20, 123456789]
    assert store.steps(tmp_path / "nothing") == {}
    assert store.latest(tmp_path / "nothing") is None
    with pytest.raises(ValueError, match="keep is 0"):
        store.prune(tmp_path, 0)


def test_a_step_has_its_own_name(tmp_path):
    one, two = (store.commit(tmp_path / store.step_name(i), {"a.json": b"%d" % i}, step=i) for i in (1, 2))
    one.rename(tmp_path / "x")
    two.rename(one)
    (tmp_path / "x").rename(two)
    for folder in (one, two):
        with pytest.raises(ValueError, match=r"manifest.json is of step [12]; .* renamed or swapped"):
            store.verify(folder)
    (tmp_path / "link").symlink_to(one)
    with pytest.raises(ValueError, match="renamed or swapped"):
        store.verify(tmp_path / "link")
    one.rename(tmp_path / "copy")  # any other name claims nothing
    assert store.verify(tmp_path / "copy")["step"] == 2


def test_what_killed_writers_left_is_cleared_and_nothing_else(tmp_path):
    left = [".step-00000003.99", ".model.safetensors.12", ".config.json.3"]
    kept = [".lock", ".step-00000003", ".git", "model.safetensors", ".env.1", "step-00000003"]
    for name in (".step-00000003.99", "step-00000003", ".git"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    for name in {*left, *kept} - {".step-00000003.99", "step-00000003", ".git"}:
        (tmp_path / name).write_text("x")
    (tmp_path / ".step-00000004.5").symlink_to(tmp_path / ".git")
    store.clear(tmp_path)
    assert names(tmp_path) == sorted(kept)
    assert (tmp_path / ".git" / "file").exists()


# --- damage --------------------------------------------------------------------------------------------------------------
def test_any_flip_cut_or_swap_is_refused_by_name(folder):
    rng = random.Random(0)  # noqa: S311
    for name in ("manifest.json", "a.json", "b.safetensors"):
        good = (folder / name).read_bytes()
        bits = range(8 * len(good)) if name != "manifest.json" else rng.sample(range(8 * len(good)), 400)
        for bit in list(bits)[::7] if name == "b.safetensors" else bits:
            bad = bytearray(good)
            bad[bit // 8] ^= 1 << bit % 8
            (folder / name).write_bytes(bad)
            with pytest.raises(ValueError, match=name):
                store.read(folder)
        for bad in (good[:-1], good[: len(good) // 2], b"", good + b"\0", good + b"\n", good[::-1]):
            (folder / name).write_bytes(bad)
            with pytest.raises(ValueError, match=name):
                store.read(folder)
        (folder / name).unlink()
        with pytest.raises(ValueError, match=f"{name} is missing"):
            store.read(folder)
        (folder / name).write_bytes(good)
    assert store.read(folder) == FILES
    (folder / "a.json").write_bytes(FILES["b.safetensors"])
    (folder / "b.safetensors").write_bytes(FILES["a.json"])
    with pytest.raises(ValueError, match=r"a.json has 768 bytes, and 3 when it was written"):
        store.read(folder)


def test_an_edit_by_hand_is_vouched_for_on_request(folder):
    (folder / "a.json").write_text('{"edited": 1}')
    with pytest.raises(ValueError, match=r"a.json has .*scoresde.store.seal vouches"):
        store.read(folder)
    store.seal(folder, step=7)
    assert store.read(folder) == {**FILES, "a.json": b'{"edited": 1}'}


MANIFESTS = {
    "empty": b"", "not JSON": b"{", "not UTF-8": b"\xff\xfe{", "a list": b"[]\n", "a number": b"3", "null": b"null",
    "deep": b"[" * 200_000, "deep objects": b'{"a":' * 200_000, "a great number": b'{"sha256": "", "a": ' + b"9" * 10_000 + b"}",
    "NaN": b'{"sha256": "", "a": NaN}', "twice": b'{"sha256": "", "sha256": ""}',
}  # fmt: skip


@pytest.mark.parametrize("name", MANIFESTS)
def test_hostile_manifests_are_refused(name, folder):
    (folder / "manifest.json").write_bytes(MANIFESTS[name])
    with pytest.raises(ValueError, match=r"manifest.json (is no manifest|does not have its own)"):
        store.read(folder)


ENTRIES = [
    None,
    3,
    [],
    "x",
    {},
    {"bytes": 3},
    {"bytes": "3", "sha256": ""},
    {"bytes": 2**63, "sha256": ""},
    {"bytes": -1},
    {"bytes": None},
]


@pytest.mark.parametrize("entry", ENTRIES, ids=repr)
def test_hostile_entries_are_refused(entry, folder):
    """Manifests that vouch for themselves: whoever can write one can make any; it must not crash, hang or lead elsewhere."""
    (folder / "manifest.json").write_bytes(store._sealed({"format": 2, "step": 7, "files": {"a.json": entry}}))
    with pytest.raises(ValueError, match=r"a\.json|lists no files"):
        store.read(folder)


def test_manifests_of_another_format_are_refused(folder):
    for content, words in (
        ({"format": 3, "files": {}}, "format 3"),
        ({"files": {}}, "format None"),
        ({"format": 2}, "lists no files"),
    ):
        (folder / "manifest.json").write_bytes(store._sealed(content))
        with pytest.raises(ValueError, match=words):
            store.read(folder)
    with (folder / "manifest.json").open("wb") as file:
        file.truncate(2**40)  # a hole: it takes no room and must not be read
    with pytest.raises(ValueError, match=r"manifest.json has 1099511627776 bytes"):
        store.read(folder)


@pytest.mark.parametrize("name", ["a.json", "manifest.json"])
def test_links_pipes_and_folders_are_no_files(name, folder, tmp_path):
    path = folder / name
    path.rename(tmp_path / "outside")
    path.symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match=f"{name} is no plain file"):
        store.read(folder)
    assert store.read(folder, links=True) == FILES
    for make in (os.mkfifo, os.mkdir, lambda p: p.symlink_to("/dev/zero"), lambda p: p.symlink_to(p)):
        path.rmdir() if path.is_dir() else path.unlink()
        make(path)
        with pytest.raises((ValueError, OSError), match=name):
            store.read(folder)


def test_a_missing_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("nothing", "file"):
        with pytest.raises(FileNotFoundError, match="is no folder"):
            store.read(tmp_path / name)


# --- one writer ----------------------------------------------------------------------------------------------------------
def test_the_second_writer_is_told_who_the_first_is(tmp_path):
    with store.locked(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}"
        for _ in range(2):
            with (
                pytest.raises(RuntimeError, match=f"another run is at work .*: process {os.getpid()} on .*; wait"),
                store.locked(tmp_path / "run"),
            ):
                pass
    assert names(tmp_path / "run") == []
    with store.locked(tmp_path / "run"):
        pass
    assert resume.locked is store.locked


def test_a_lock_goes_with_its_process(tmp_path):
    code = (
        "import os, signal, sys, pathlib; from scoresde import store\n"
        "with store.locked(pathlib.Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=100, check=False).returncode == -9
    assert names(tmp_path) == [".lock"]
    with store.locked(tmp_path):
        pass
    assert names(tmp_path) == []


def test_one_at_a_time_is_in(tmp_path):
    """Many try at once, over and over; the file's coming and going lets no two in."""
    inside, most, done = [], [], []

    def work(i):
        while len(done) < 300:
            try:
                with store.locked(tmp_path):
                    inside.append(i)
                    most.append(len(inside))
                    inside.remove(i)
                    done.append(i)
            except RuntimeError:
                pass

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1}
    assert names(tmp_path) == []


# --- a disk that refuses -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT], ids=errno.errorcode.get)
@pytest.mark.parametrize("call", ["open", "write", "fsync", "mkdir", "rename", "replace"])
def test_whatever_call_fails_nothing_stays_half_done(call, code, tmp_path, monkeypatch):
    """Every first, second, ... call of the kind fails: there is the old or the new, no scrap, and a word of what is whole."""
    real, calls, bad = getattr(os, call), [], [-1]
    store.commit(tmp_path / "step-00000001", FILES, step=1)

    def maybe(*args, **kwargs):
        calls.append(args)
        if len(calls) == bad[0]:
            raise OSError(code, os.strerror(code), str(args[0]))
        return real(*args, **kwargs)

    def save(run):
        with store.saving(run, "step 2"):
            store.commit(run / "step-00000002", FILES, step=2)
            store.put(run / "step-00000002", {"c.json": b"{}"}, step=2)

    (tmp_path / "other").mkdir()
    monkeypatch.setattr(os, call, maybe)
    save(tmp_path / "other")
    total = len(calls)
    assert total == {"open": 9, "write": 5, "fsync": 9, "mkdir": 1, "rename": 1, "replace": 2}[call]
    for n in range(1, total + 1):
        calls.clear()
        bad[0] = n
        words = rf"{os.strerror(code)}.*the newest whole one is .*step-0000000[12]\. .* save again"
        with pytest.raises(store.SaveError, match=words) as info:
            save(tmp_path)
        assert info.value.errno == code
        bad[0] = -1
        assert list(tmp_path.rglob(".*")) == []
        assert store.read(tmp_path / "step-00000001") == FILES
        shutil.rmtree(tmp_path / "step-00000002", ignore_errors=True)


def test_what_cannot_be_pruned_is_a_warning(tmp_path, monkeypatch):
    for step in (1, 2):
        store.commit(tmp_path / store.step_name(step), FILES, step=step)

    def refuse(*args):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.warns(UserWarning, match=r"step-00000001 is older than the last 1 and could not be removed .*Permission denied"):
        store.prune(tmp_path, 1)
    assert list(store.steps(tmp_path)) == [1, 2]


def test_a_folder_that_cannot_be_flushed_is_not_a_failed_save(tmp_path, monkeypatch):
    real = os.fsync

    def no_folders(file):
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(file)

    monkeypatch.setattr(os, "fsync", no_folders)
    assert store.read(store.commit(tmp_path / "x", FILES)) == FILES
