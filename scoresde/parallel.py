"""Many processes, one answer: who this one is among those that torchrun started, and the few words they say to each other.

    with joined("cuda") as group:           # alone when not started by torchrun
        for step in fit(training, Batches(source, 256, rank=group.rank, world=group.world), group=group):
            ...

Nothing else here needs a process group. Samples, densities and statistics are split by index, so that what is computed does not depend
on who computes it; of training see `scoresde.sharded`.
"""

from __future__ import annotations

import datetime
import math
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .checks import check_count

__all__ = ["ALONE", "Elsewhere", "Group", "joined", "timeout"]

T = TypeVar("T")
TIMEOUT = "SCORESDE_TIMEOUT"
SECONDS = 1800.0
PATIENCE = 20  # half seconds until what one machine has written must show on another
ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Elsewhere(SystemExit):
    """Another process of the job has failed, and has said why: this one ends with status 1, in silence."""


@dataclass(frozen=True)
class Group:
    """Process `rank` of `world`, process `local` of `locals` on its machine; alone by default, where every call returns at once.

    All calls but `claim` and `tally` are collective: every process makes them, in the same order, and each waits for the others up to
    the timeout (`joined`), after which, or when one of them has died, it raises RuntimeError. They move numbers and small objects in
    host memory, over gloo, whatever the device.
    """

    rank: int = 0
    world: int = 1
    local: int = 0
    locals: int = 1
    store: Any = None  # torch.distributed.Store, of keys and values that any process may read and write at any time

    @property
    def first(self) -> bool:
        """Whether this is the process that writes what is of all."""
        return self.rank == 0

    def share(self, n: int) -> slice:
        """Which of n things in order are this process's: parts differ by one at most, and together are all."""
        return slice(n * self.rank // self.world, n * (self.rank + 1) // self.world)

    def place(self, device: str) -> str:
        """The device of this process, for that of the job: cuda is cuda:0 for the first on a machine, cuda:1 for the second."""
        named = torch.device(device)
        if self.locals == 1 or named.type == "cpu":
            return device
        if named.index is not None:
            raise ValueError(
                f"device is {device!r} and {self.locals} processes run on this machine; wanted {named.type!r}: one each"
            )
        count = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
        if self.local >= count:
            raise ValueError(
                f"device is {device!r}, {self.locals} processes run on this machine and {count} such devices are there; wanted one each: "
                f"torchrun --nproc-per-node={max(1, count)}"
            )
        return f"{named.type}:{self.local}"

    # --- collective --------------------------------------------------------------------------------------------------------
    def numbers(self, *values: int) -> list[list[int]]:
        """The numbers of every process, by rank."""
        return self._gathered(values, torch.int64)

    def reals(self, *values: float) -> list[list[float]]:
        """The same of float64."""
        return self._gathered(values, torch.float64)

    def _gathered(self, values: tuple[Any, ...], dtype: torch.dtype) -> list[list[Any]]:
        if self.world == 1:
            return [list(values)]
        mine = torch.tensor(values, dtype=dtype)
        found = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(found, mine)
        return [each.tolist() for each in found]

    def any(self, flag: bool) -> bool:
        """Whether it is so for any process."""
        return any(value for (value,) in self.numbers(int(flag)))

    def objects(self, value: T) -> list[T]:
        """The values of every process, by rank; pickled, so of what is small: numbers, texts, statistics."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def to_first(self, value: T) -> list[T]:
        """The values of every process, by rank, in the first process; nothing in the others."""
        if self.world == 1:
            return [value]
        found: list[Any] | None = [None] * self.world if self.first else None
        dist.gather_object(value, found, dst=0)
        return found or []

    def barrier(self) -> None:
        """Wait until all are here."""
        self.numbers(0)  # without any there is nothing to wait for

    def by_first(self, work: Callable[[], T]) -> T:
        """What `work` returns in the first process, for all; what it raises there ends the others as `Elsewhere`."""
        if self.world == 1:
            return work()
        found: list[Any] = [False, None]
        try:
            if self.first:
                found = [True, work()]
        finally:  # the others learn that it failed, too
            dist.broadcast_object_list(found, src=0)
        if not found[0]:
            raise Elsewhere(1)
        return found[1]

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """The block in the first process of each machine, then in its others: what the first has fetched or built is there for them.

        An error of any of them ends all: what it raises there, `Elsewhere` in the others.
        """
        for turn in (0, 1) if self.world > 1 else ():
            if turn == min(self.local, 1):
                yield from self._attempt()
            elif self.any(False):
                raise Elsewhere(1)
        if self.world == 1:
            yield

    def _attempt(self) -> Iterator[None]:
        failed = True
        try:
            yield
            failed = False
        finally:
            others = self.any(failed)
        if others:
            raise Elsewhere(1)

    def agree(self, what: str, value: str) -> None:
        """Raise ValueError unless all have the same value; `what` names it."""
        found = self.objects((value, socket.gethostname()))
        if others := {rank: each for rank, (each, _) in enumerate(found) if each != found[0][0]}:
            ours = found[0][0]
            at = min(_same(ours, each) for each in others.values())
            words = "; ".join(f"rank {rank} on {found[rank][1]}: {_around(each, at)}" for rank, each in others.items())
            raise ValueError(f"the processes differ in {what}. Rank 0 on {found[0][1]}: {_around(ours, at)}; {words}")

    def check_shared(self, folder: Path) -> None:
        """Raise ValueError unless all processes see the folder that the first sees: on many machines, on a shared disk."""
        token, path = f"{socket.gethostname()} {os.getpid()}", folder / ".shared"

        def write() -> str:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(token)
            return token

        if self.world == 1:
            return
        wanted = self.by_first(write)
        for _ in range(PATIENCE):  # a network disk may show what is new some seconds later
            if seen := path.is_file() and path.read_text() == wanted:
                break
            time.sleep(0.5)
        alone = self.any(not seen)
        if self.first:
            path.unlink(missing_ok=True)
        if alone:
            where = "; this process does not see it" if not seen else ""
            raise ValueError(
                f"{folder} is not one folder for all {self.world} processes{where}; wanted a disk that all machines share"
            )

    # --- not collective ----------------------------------------------------------------------------------------------------
    def claim(self, name: str) -> int:
        """0, 1, 2, ... under this name, each to one process: a place in a queue of work that all have in the same order."""
        return self.tally(name, 1) - 1

    def tally(self, name: str, n: int) -> int:
        """Add n to the counter of this name, from 0, and return what it has come to, over all processes."""
        if self.store is None:
            raise RuntimeError(f"{name} is counted by a group that has no store; wanted one of `joined`")
        return int(self.store.add(name, n))


def _same(a: str, b: str) -> int:
    """How many characters two texts begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _around(text: str, at: int, most: int = 200) -> str:
    """So much of a text, with its character `at` in it."""
    first = 0 if len(text) <= most else max(0, at - most // 4)
    return ("... " if first else "") + text[first : first + most] + (" ..." if first + most < len(text) else "")


ALONE = Group()  # of whoever is given no other


@contextmanager
def joined(device: str = "cpu") -> Iterator[Group]:
    """The processes that torchrun has started, as a Group, for the length of the block; a Group that is alone without torchrun.

    Where torch.distributed is initialised already, its default group is used and left as it is; it then needs gloo for the CPU, as
    init_process_group("cpu:gloo,cuda:nccl") gives. Else RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are read, and gloo, for a
    CUDA device nccl too, is set up. The environment variable SCORESDE_TIMEOUT is the number of seconds (default 1800) that a process waits
    for another. Raises ValueError for an environment that is torchrun's in part.
    """
    if dist.is_available() and dist.is_initialized():
        from torch.distributed.distributed_c10d import _get_default_store

        yield _group(dist.get_rank(), dist.get_world_size(), dist.PrefixStore("scoresde", _get_default_store()))
        return
    missing = [name for name in ENVIRONMENT if name not in os.environ]
    if "RANK" not in os.environ or (not missing and _number("WORLD_SIZE") == 1):
        yield Group()
        return
    if missing:
        raise ValueError(
            f"RANK is set and {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not; wanted what torchrun sets"
        )
    patience = datetime.timedelta(seconds=timeout())
    rank, world = _number("RANK"), _number("WORLD_SIZE")
    if not rank < world:
        raise ValueError(f"RANK is {rank} and WORLD_SIZE {world}; wanted what torchrun sets")
    store, rank, world = next(dist.rendezvous("env://", timeout=patience))
    store = _fresh(store, rank, world, patience.total_seconds())
    backend = "cpu:gloo,cuda:nccl" if torch.device(device).type == "cuda" else "gloo"
    group = _group(rank, world, dist.PrefixStore("scoresde", store))
    place = torch.device(group.place(device))
    if place.type == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group(backend, store=dist.PrefixStore("group", store), rank=rank, world_size=world, timeout=patience)
    yield group
    dist.destroy_process_group()  # not after an error: the others are no longer there to agree, and the process ends


def _fresh(store: Any, rank: int, world: int, seconds: float) -> Any:
    """The store under a name of this start alone: torchrun keeps one store, and in it the words of processes that it has ended.

    The first process makes the name up; each other asks for it under a name of its own, and says when it has heard. They look again and
    again, for a wait inside of the store would not hear a signal.
    """
    mine, until, answered = uuid.uuid4().hex, time.monotonic() + seconds, dict[int, bytes]()
    waiting = set(range(1, world)) if rank == 0 else {0}
    if rank:
        store.set(f"asks {rank}", mine)
    while waiting:
        for other in sorted(waiting):
            if rank:
                if store.check([f"answer {mine}"]):
                    mine = store.get(f"answer {mine}").decode()
                    store.set(f"heard {mine} {rank}", "")
                    waiting.clear()
            elif store.check([f"heard {mine} {other}"]):
                waiting.discard(other)
            elif store.check([f"asks {other}"]) and (asked := store.get(f"asks {other}")) != answered.get(other):
                store.set(f"answer {asked.decode()}", mine)
                answered[other] = asked
        if waiting and time.monotonic() > until:
            raise RuntimeError(
                f"rank {rank} of {world} has waited {seconds:g} s ({TIMEOUT}) for {sorted(waiting)}; have they started?"
            )
        time.sleep(0.01 if waiting else 0)
    return dist.PrefixStore(mine, store)


def _group(rank: int, world: int, store: Any) -> Group:
    return Group(rank, world, _number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", 1), store)


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise ValueError(f"{name} is {text!r} in the environment; wanted a whole number, as torchrun sets")
    return check_count(int(text), name, 0)


def timeout() -> float:
    """Seconds that a process waits for another, as the environment says."""
    text = os.environ.get(TIMEOUT, str(SECONDS))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < 1e9:
        raise ValueError(f"{TIMEOUT} is {text!r}; wanted seconds above 0, as in 1800")
    return seconds
