"""Kills and damage: the newest or the previous checkpoint is whole, and what is not whole is refused by name."""

import errno
import itertools
import os
import random
import resource
import shutil
import signal
import time
import warnings

import pytest
import torch

import scoresde as s
from scoresde import checkpoint, store
from scoresde.noise import seeded

KILLED = 137


def numbers(seed, shape=(3, 5)):
    return seeded([seed]).initial((1, *shape), torch.float32)[0]


def parts(step):
    """What a small training has at this step: every number of it says which step it is of."""
    net = s.MLP(2, width=8, depth=1, seed=5)
    model = {name: value + step for name, value in net.state_dict().items()}
    state = {i: {"step": torch.tensor(float(step)), "exp_avg": numbers(i) + step, "exp_avg_sq": numbers(9 + i)} for i in range(2)}
    return {
        "tensors": {"model": model, "ema_0.9": {n: v / 2 for n, v in model.items()}, "ema_0.999": {n: -v for n, v in model.items()}},
        "optimizer": {"state": state, "param_groups": [{"lr": 1e-3 / (1 + step), "betas": (0.9, 0.999), "params": [0, 1]}]},
        "config": {**checkpoint.describe(s.Preconditioned(net, s.VP())), "emas": ["ema_0.999", "ema_0.9"]},
        "state": {"data": step * 7, "random": numbers(step).view(torch.uint8)},
    }  # fmt: skip


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return type(a) is type(b) and a == b


def is_whole(snapshot, step):
    wanted = parts(step)
    return (
        snapshot.step == step
        and same(snapshot.tensors, wanted["tensors"])
        and same(snapshot.optimizer, wanted["optimizer"])
        and same(snapshot.state, {**wanted["state"], "step": step})
    )


def fork(work):
    """The process id of a child that does `work` and leaves with 0, or with 1 after an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a fork among threads: those are torch's, and asleep
        pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)


def in_child(work):
    """The exit status of a child process that does `work`."""
    return os.waitstatus_to_exitcode(os.waitpid(fork(work), 0)[1])


# --- a kill at every call ------------------------------------------------------------------------------------------------
CALLS = ("open", "write", "fsync", "ftruncate", "close", "mkdir", "rename", "replace", "unlink", "rmdir")


def die_at(n, torn):
    """In this process: leave, as SIGKILL makes it, at the n-th call to the system, before it or with a write half done."""
    count = itertools.count(1)

    def wrap(name):
        real = getattr(os, name)

        def call(*args, **kwargs):
            if next(count) == n:
                if torn and name == "write":
                    real(args[0], bytes(args[1])[: len(args[1]) // 2])
                os._exit(KILLED)
            return real(*args, **kwargs)

        setattr(os, name, call)

    for name in CALLS:
        wrap(name)


@pytest.fixture
def unsynced(monkeypatch):
    """No flushing, for speed: a kill takes nothing of what the system was given. Of the order of flushes see test_store."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


TORN = [pytest.param(False, marks=pytest.mark.slow, id="before"), pytest.param(True, id="torn")]


@pytest.mark.parametrize("keep", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("torn", TORN)
@pytest.mark.usefixtures("unsynced")
def test_a_kill_at_every_call_of_a_save(torn, keep, tmp_path):
    """Pruning included: an old checkpoint is whole or gone, the newest or the previous one is there, and the next save clears up."""
    run, last = tmp_path / "run", keep
    folder = run / "checkpoints"
    run.mkdir()
    for step in range(1, last + 1):
        checkpoint.write(folder, step, **parts(step), keep=keep)
    shutil.copytree(run, tmp_path / "before")
    new, ends = parts(last + 1), []

    def save(n):
        die_at(n, torn)
        checkpoint.write(folder, last + 1, **new, keep=keep)

    for n in itertools.count(1):
        code = in_child(lambda n=n: save(n))
        found = store.steps(folder)
        newest = max(found)
        assert newest in (last, last + 1)
        assert set(range(newest - keep + 1, newest + 1)) <= found.keys() <= set(range(1, newest + 1)), f"killed at call {n}"
        for step, path in found.items():
            assert is_whole(checkpoint.read(path), step), f"killed at call {n}: {path}"
        assert checkpoint.read(run).step == newest
        ends.append(newest)
        if code == 0:
            break
        assert code == KILLED
        if n % 5 == 0:  # the next save works, and clears up
            checkpoint.write(folder, last + 2, **parts(last + 2), keep=1)
            assert [p.name for p in folder.iterdir()] == [store.step_name(last + 2)]
        shutil.rmtree(run)
        shutil.copytree(tmp_path / "before", run)
    assert ends.count(last) > 30  # kills before the commit
    assert ends.count(last + 1) > 10  # and while pruning
    assert sorted(p.name for p in folder.iterdir()) == [store.step_name(i) for i in range(2, last + 2)]


@pytest.mark.parametrize("torn", TORN)
@pytest.mark.usefixtures("unsynced")
def test_a_kill_at_every_call_of_an_overwrite(torn, tmp_path):
    """A model in its folder: the old one, the new one, or refused by name; and saved again it is whole."""
    old, new = (s.Preconditioned(s.MLP(2, width=8, depth=1, seed=seed), sde) for seed, sde in ((1, s.VP()), (2, s.EDM())))
    folder = checkpoint.save(tmp_path / "model", old)
    seen = set()

    def save(n):
        die_at(n, torn)
        checkpoint.save(folder, new, overwrite=True)

    for n in itertools.count(1):
        code = in_child(lambda n=n: save(n))
        try:
            back = checkpoint.load(folder)
        except ValueError as error:
            assert any(name in str(error) for name in ("model.safetensors", "config.json", "manifest.json"))  # noqa: PT017
            seen.add("refused")
        else:
            which = old if back.sde == old.sde else new
            assert same(dict(back.net.state_dict()), dict(which.net.state_dict()))
            seen.add("old" if which is old else "new")
        if code == 0:
            break
        assert code == KILLED
        checkpoint.save(folder, old, overwrite=True)
        assert checkpoint.load(folder).sde == old.sde
        assert sorted(p.name for p in folder.iterdir()) == ["config.json", "manifest.json", "model.safetensors"]
    assert n > 20
    assert seen == {"old", "new", "refused"}


# --- SIGKILL, at any time ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kills", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_random_kills_leave_the_newest_or_the_previous_whole(kills, tmp_path):
    """A process saves step after step and says so; it is killed some time after a first, second, ... of them."""
    rng, folder = random.Random(kills), tmp_path / "checkpoints"  # noqa: S311
    ready = [parts(i) for i in range(8)]

    def save(i):
        fixed = {"optimizer": None, "config": ready[0]["config"], "keep": 2}
        checkpoint.write(folder, i, ready[i % 8]["tensors"], state={"i": i, "x": ready[i % 8]["state"]["random"]}, **fixed)

    def child(first, pipe):
        for i in itertools.count(first):
            os.write(pipe, b"x")
            save(i)

    start = time.perf_counter()
    save(0)
    step, took, between = 0, time.perf_counter() - start, 0
    for _ in range(kills):
        ours, theirs = os.pipe()
        pid = fork(lambda first=step + 1, pipe=theirs: child(first, pipe))
        os.close(theirs)
        said = 0
        for _ in range(rng.randint(1, 2)):
            said += len(os.read(ours, 1))
        time.sleep(rng.uniform(0, took))
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        said += len(os.read(ours, 10**6))
        os.close(ours)
        newest = checkpoint.read(tmp_path).step
        assert newest in (step + said - 1, step + said)  # the save under way is there or is not; the one before is
        assert all(is_step(path, i, ready) for i, path in store.steps(folder).items())
        assert len(store.steps(folder)) >= min(2, newest + 1)
        between += any(p.name.startswith(".step") for p in folder.iterdir())
        step = newest
    assert between > 0  # some fell into the midst of a save
    save(step + 1)
    assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []


def is_step(path, step, ready):
    found = checkpoint.read(path)
    return found.state["i"] == step and same(found.tensors, ready[step % 8]["tensors"])


# --- damage --------------------------------------------------------------------------------------------------------------
FILES = [
    "config.json", "ema_0.9.safetensors", "ema_0.999.safetensors", "manifest.json", "model.safetensors", "optimizer.json",
    "optimizer.safetensors", "state.json", "state.safetensors",
]  # fmt: skip


def refused(folder, name):
    for reader in (checkpoint.read, checkpoint.load):
        with pytest.raises(ValueError, match=rf"{folder.name}/{name}"):
            reader(folder)
    return 1


def test_flips_and_truncations_are_refused_by_name(tmp_path):
    """300 flipped bits and 64 truncations over all files: 364 of 364."""
    folder = checkpoint.write(tmp_path / "checkpoints", 5, **parts(5))
    assert sorted(p.name for p in folder.iterdir()) == FILES
    rng, caught = random.Random(0), 0  # noqa: S311
    for i in range(364):
        path = folder / FILES[i % len(FILES)]
        good = path.read_bytes()
        if i < 300:
            bad, bit = bytearray(good), rng.randrange(8 * len(good))
            bad[bit // 8] ^= 1 << bit % 8
        else:
            bad = good[: rng.randrange(len(good))]
        path.write_bytes(bad)
        caught += refused(folder, path.name)
        path.write_bytes(good)
    assert caught == 364
    assert is_whole(checkpoint.read(folder), 5)


def test_swapped_files_are_refused_by_name(tmp_path):
    """Within a checkpoint, and for the same file of another step."""
    one, two = (checkpoint.write(tmp_path / "checkpoints", step, **parts(step)) for step in (5, 6))
    for a, b in itertools.combinations(FILES, 2):
        data = (one / a).read_bytes(), (one / b).read_bytes()
        (one / a).write_bytes(data[1])
        (one / b).write_bytes(data[0])
        refused(one, f"({a}|{b}|manifest.json)")
        (one / a).write_bytes(data[0])
        (one / b).write_bytes(data[1])
    for name in FILES:
        data = (one / name).read_bytes()
        if data == (two / name).read_bytes():
            assert name == "config.json" or name == "optimizer.json"
            continue
        (one / name).write_bytes((two / name).read_bytes())
        refused(one, "manifest.json" if name == "manifest.json" else name)
        (one / name).write_bytes(data)
    assert is_whole(checkpoint.read(one), 5)
    one.rename(tmp_path / "x")
    two.rename(one)
    (tmp_path / "x").rename(two)
    refused(one, "manifest.json")


def test_a_damaged_newest_step_is_not_passed_over(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    paths = [checkpoint.write(run / "checkpoints", step, **parts(step)) for step in (1, 2, 3)]
    for path in paths[1:]:
        (path / "state.json").write_text("{")
    for reader in (checkpoint.read, checkpoint.load):
        for folder in (run, run / "checkpoints", paths[2]):
            with pytest.raises(
                ValueError, match=r"00003/state.json has .*newest whole checkpoint is \S*00001: name it, or delete \S*00003"
            ):
                reader(folder)
    assert is_whole(checkpoint.read(paths[0]), 1)
    (paths[0] / "manifest.json").unlink()
    with pytest.raises(ValueError, match="no other checkpoint is whole"):
        checkpoint.read(run)


# --- a disk that refuses -------------------------------------------------------------------------------------------------
@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    checkpoint.write(folder / "checkpoints", 1, **parts(1))
    return folder


def goes_on(run):
    """The old checkpoint is whole, no scrap is left, and the next save works."""
    assert is_whole(checkpoint.read(run), 1)
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000001"]
    checkpoint.write(run / "checkpoints", 3, **parts(3))
    assert is_whole(checkpoint.read(run), 3)


def test_a_disk_that_fills_up(run):
    """As the system says it: a file may not grow above some bytes, in a process of its own."""

    def save():
        for limit in (0, 100, 900, 1500):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            with pytest.raises(
                store.SaveError, match=r"step 2 was not saved .*File too large.* newest whole one is .*00001\. .*ulimit"
            ):
                checkpoint.write(run / "checkpoints", 2, **parts(2))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        checkpoint.write(run / "checkpoints", 2, **parts(2))

    assert in_child(save) == 0
    assert is_whole(checkpoint.read(run), 2)
    assert is_whole(checkpoint.read(run / "checkpoints" / "step-00000001"), 1)


@pytest.mark.parametrize(
    ("call", "code", "mend"),
    [
        ("write", errno.ENOSPC, "Free some space"), ("fsync", errno.ENOSPC, "Free some space"), ("mkdir", errno.EROFS, "Make the disk"),
        ("open", errno.EACCES, "Make the folder writable"), ("rename", errno.EIO, "choose another folder"),
    ],
)  # fmt: skip
def test_a_full_or_read_only_disk(call, code, mend, run, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    real = os.open
    monkeypatch.setattr(
        os, call, (lambda p, f, *a, **k: refuse() if f & os.O_CREAT else real(p, f, *a, **k)) if call == "open" else refuse
    )
    with pytest.raises(store.SaveError, match=rf"step 2 was not saved .*{os.strerror(code)}") as info:
        checkpoint.write(run / "checkpoints", 2, **parts(2))
    monkeypatch.undo()
    assert info.value.errno == code
    assert f"the newest whole one is {run / 'checkpoints' / 'step-00000001'}. " in str(info.value)
    assert mend in str(info.value)
    goes_on(run)


def test_a_folder_that_vanishes(run, monkeypatch):
    """Before the save, and in the midst of it: an error that says so, and nothing is made where a disk may have been."""
    hidden = run.with_name("hidden")
    run.rename(hidden)
    with pytest.raises(
        store.SaveError, match=r"step 2 was not saved .*No such file .*no earlier checkpoint is there\. Make the folder again"
    ):
        checkpoint.write(run / "checkpoints", 2, **parts(2))
    assert not run.exists()
    hidden.rename(run)
    count, real = itertools.count(), os.write

    def write(*args):
        if next(count) == 4:
            run.rename(hidden)
        return real(*args)

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(store.SaveError, match="No such file"):
        checkpoint.write(run / "checkpoints", 2, **parts(2))
    assert not run.exists()
    monkeypatch.undo()
    hidden.rename(run)
    assert is_whole(checkpoint.read(run), 1)
    checkpoint.write(run / "checkpoints", 2, **parts(2))
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000001", "step-00000002"]


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(
        store.SaveError, match=r"step 2 was not saved .*(File exists|Not a directory).* Move the file of that name away"
    ):
        checkpoint.write(tmp_path / "checkpoints", 2, **parts(2))


def test_two_writers(run):
    with store.locked(run / "checkpoints"):
        with pytest.raises(RuntimeError, match=f"another run is at work .* process {os.getpid()} on"):
            checkpoint.write(run / "checkpoints", 2, **parts(2))
        assert is_whole(checkpoint.read(run), 1)  # reading needs no lock
    goes_on(run)
    model = s.Preconditioned(s.MLP(2, width=8), s.VP())
    with store.locked(run / "model"), pytest.raises(RuntimeError, match="another run is at work"):
        checkpoint.save(run / "model", model)
