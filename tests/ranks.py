"""Processes that form a group, kept from test to test: starting them costs seconds, a call next to nothing."""

import multiprocessing
import os
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

SECONDS = 60  # a call, and what one process waits for another


def _serve(rank, world, file, pipe):
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": "", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world, timeout=timedelta(seconds=SECONDS))
    from scoresde.parallel import joined

    while True:
        try:
            work, args = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            with joined() as group:
                pipe.send((True, work(group, *args)))
        except BaseException as error:
            pipe.send((False, (type(error), str(error), traceback.format_exc())))


def _ranks(group):
    return [rank for (rank,) in group.numbers(group.rank)]


class Failed(AssertionError):
    """What the processes raised, by rank: (type, text) or None where the call returned."""

    def __init__(self, errors, text):
        super().__init__(text)
        self.errors = errors


class Ranks:
    """`Ranks(2)(work, *args)`: what work(group, *args) returns in each process, by rank; work is a function of a module."""

    def __init__(self, world):
        self.world, self.workers = world, []

    def __call__(self, work, *args):
        if not self.workers:
            self._start()
        for _, pipe in self.workers:
            pipe.send((work, args))
        found = []
        for _, pipe in self.workers:
            found.append(pipe.recv() if pipe.poll(2 * SECONDS) else (False, (TimeoutError, "no answer", "no answer")))
        if all(good for good, _ in found):
            return [value for _, value in found]
        if not self._in_step():
            self.close()  # who has raised may have left the others waiting
        errors = [None if good else value[:2] for good, value in found]
        raise Failed(errors, "\n".join(f"rank {r}: {v[2]}" for r, (good, v) in enumerate(found) if not good))

    def _in_step(self):
        """Whether all still answer, and hear each other."""
        for _, pipe in self.workers:
            pipe.send((_ranks, ()))
        wanted = (True, list(range(self.world)))
        return all(pipe.poll(5) and pipe.recv() == wanted for _, pipe in self.workers)

    def _start(self):
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            arguments = (rank, self.world, str(Path(self.folder.name) / "store"), theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.workers.append((process, ours))

    def close(self):
        for process, pipe in self.workers:
            pipe.close()
            process.kill()
        for process, _ in self.workers:
            process.join()
        if self.workers:
            self.folder.cleanup()
        self.workers = []
