"""Groups: who is who, what they say to each other, and what happens when one of them fails."""

import os
import socket
import subprocess
import sys
import time

import pytest
import torch
from ranks import Failed

from scoresde import parallel
from scoresde.metrics import Statistics
from scoresde.parallel import Elsewhere, Group, joined

FAIL = "this is why"


def words(group):
    return {
        "numbers": group.numbers(group.rank, 7), "any": (group.any(group.rank == 1), group.any(False)),
        "objects": group.objects({"rank": group.rank}), "first": group.by_first(lambda: f"of {group.rank}"),
        "share": group.share(10), "place": group.place("cpu"), "is_first": group.first,
    }  # fmt: skip


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_process_hears_the_same(world, two, three):
    found = {1: lambda work: [work(Group())], 2: two, 3: three}[world](words)
    for rank, heard in enumerate(found):
        assert heard["numbers"] == [[r, 7] for r in range(world)]
        assert heard["any"] == (world > 1, False)
        assert heard["objects"] == [{"rank": r} for r in range(world)]
        assert heard["first"] == "of 0"
        assert heard["is_first"] == (rank == 0)
        assert heard["place"] == "cpu"
    parts = [list(range(10))[heard["share"]] for heard in found]
    assert [i for part in parts for i in part] == list(range(10))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("world", range(1, 9))
@pytest.mark.parametrize("n", [0, 1, 2, 7, 17, 50_000])
def test_shares_are_all_and_nothing_twice(n, world):
    assert [i for r in range(world) for i in range(n)[Group(r, world).share(n)]] == list(range(n))


def claims(group, name):
    return [group.claim(name) for _ in range(50)], group.tally(f"{name} rows", 3)


def test_what_is_claimed_is_claimed_once(three):
    found = three(claims, "a queue")
    assert sorted(i for mine, _ in found for i in mine) == list(range(150))
    assert sorted(total for _, total in found) == [3, 6, 9]
    with pytest.raises(RuntimeError, match="no store"):
        Group().claim("x")


def statistics(group, n):
    x = torch.randn(n, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 10
    total = Statistics()
    for part in group.objects(Statistics().update(x[group.share(n)])):
        total.merge(part)
    return total.n, total.mean, total.cov


def test_statistics_are_those_of_one_process(two, three):
    (n, mean, cov), *_ = [statistics(Group(), 101)]
    for found in (two(statistics, 101), three(statistics, 101)):
        for other in found:
            assert other[0] == n
            torch.testing.assert_close(other[1], mean, rtol=1e-12, atol=0)
            torch.testing.assert_close(other[2], cov, rtol=1e-12, atol=1e-12)


# --- failure -------------------------------------------------------------------------------------------------------------
def fails(group, where):
    def work():
        raise ValueError(FAIL)

    if where == "by_first":
        group.by_first(work)
    with group.in_turn():
        if group.rank == {"turn first": 0, "turn second": 1}[where]:
            work()
    return "went on"


@pytest.mark.parametrize(("where", "who"), [("by_first", 0), ("turn first", 0), ("turn second", 1)])
def test_one_failure_ends_all_at_once(where, who, two):
    started = time.monotonic()
    with pytest.raises(Failed) as caught:
        two(fails, where)
    assert caught.value.errors[who] == (ValueError, FAIL)
    assert caught.value.errors[1 - who] == (Elsewhere, "1")
    assert time.monotonic() - started < 30  # not after the timeout


def turns(group, folder):
    with group.in_turn():
        if group.local == 0:
            time.sleep(0.2)
            (folder / "made").touch()
        there = (folder / "made").exists()
    group.check_shared(folder)
    group.agree("the colour", "red")
    return there


def test_the_first_of_a_machine_goes_first(two, tmp_path):
    assert two(turns, tmp_path) == [True, True]
    assert list(tmp_path.glob(".*")) == []


def differs(group, folder):
    group.agree("the data", f"data {group.rank}")


def lonely(group, folder):
    parallel.PATIENCE = 2
    group.check_shared(folder / str(group.rank))


@pytest.mark.parametrize(("work", "words"), [(differs, "differ in the data.*data 0.*rank 1.*data 1"), (lonely, "not one folder")])
def test_what_is_not_common_is_refused(work, words, two, tmp_path):
    with pytest.raises(Failed, match=words) as caught:
        two(work, tmp_path)
    assert [error for error, _ in caught.value.errors] == [ValueError, ValueError]


# --- the environment -----------------------------------------------------------------------------------------------------
def test_alone_without_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with joined("cpu") as group, group.in_turn():
        assert group == Group()
        group.agree("x", "y")
        group.barrier()
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with joined() as group:
        assert group.world == 1


TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"MASTER_PORT": None}, "MASTER_PORT is not"),
        ({"WORLD_SIZE": None, "MASTER_ADDR": None}, "WORLD_SIZE, MASTER_ADDR are not"),
        ({"RANK": "two"}, "RANK is 'two'"),
        ({"RANK": "2"}, "RANK is 2 and WORLD_SIZE 2"),
        ({"SCORESDE_TIMEOUT": "soon"}, "SCORESDE_TIMEOUT is 'soon'"),
        ({"SCORESDE_TIMEOUT": "0"}, "wanted seconds above 0"),
    ],
)
def test_an_environment_that_is_not_torchruns(changed, words, monkeypatch):
    for name, value in {**TORCHRUN, **changed}.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words), joined():
        pass


def test_devices():
    assert Group(1, 2, 1, 2).place("cpu") == "cpu"
    assert Group().place("cuda:1") == "cuda:1"
    with pytest.raises(ValueError, match="2 processes run on this machine; wanted 'cuda'"):
        Group(1, 2, 1, 2).place("cuda:0")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"0 such devices.*--nproc-per-node=1"):
            Group(1, 2, 1, 2).place("cuda")


LEFT_ALONE = """
import os, signal, sys, time
from scoresde.parallel import joined
with joined() as group:
    group.barrier()
    if group.rank == 1:
        if sys.argv[1] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    try:
        group.barrier()
    except RuntimeError as error:
        print("left alone", flush=True)
        os._exit(3)
"""


@pytest.mark.parametrize("how", ["killed", "hangs"])
def test_who_is_left_alone_ends_within_the_timeout(how, tmp_path):
    """Without torchrun, which would end it sooner."""
    (tmp_path / "x.py").write_text(LEFT_ALONE)
    common = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "SCORESDE_TIMEOUT": "5", **TORCHRUN}
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    found = [
        subprocess.Popen([sys.executable, str(tmp_path / "x.py"), how], env={**common, "MASTER_PORT": str(port), "RANK": str(r)}, stdout=-1)
        for r in range(2)
    ]  # fmt: skip
    try:
        said, _ = found[0].communicate(timeout=60)
        assert found[0].returncode == 3
        assert b"left alone" in said
    finally:
        for process in found:
            process.kill()
            process.communicate()
