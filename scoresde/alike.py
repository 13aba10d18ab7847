"""What processes must do alike to train together, found out before it can do harm: blocks and parameters of a sharded network, batches."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .parallel import Group
from .pieces import in_pieces

__all__ = ["ALIKE", "MEND", "Order", "check_batches", "check_optimizer", "check_parameters"]

MEND = "train without sharding it (sharded: false): DistributedDataParallel can"
ALIKE = f"; FSDP2 wants the same blocks and parameters in the same order in every process and step, or {MEND}"


def check_parameters(root: nn.Module, blocks: list[nn.Module]) -> None:
    """Raise ValueError for what FSDP2 cannot gather, before anything is cut."""
    of = {id(module): n for n, block in enumerate(blocks[:-1]) for module in block.modules()}
    seen, kinds = dict[int, tuple[str, int]](), dict[int, tuple[str, torch.dtype]]()
    for path, module in root.named_modules(remove_duplicate=False):
        for name, p in module.named_parameters(path, recurse=False):
            if not p.ndim:
                continue
            n = of.get(id(module), len(blocks) - 1)
            first, m = seen.setdefault(id(p), (name, n))
            if n != m:
                raise ValueError(f"{first} and {name} are tied, and in blocks that are gathered one by one; wanted to {MEND}")
            other, kind = kinds.setdefault(n, (name, p.dtype))
            if p.is_complex() or p.dtype != kind:
                what = f"{name} is {p.dtype}" + ("" if p.is_complex() else f" and {other} {kind}")
                raise ValueError(f"{what}; FSDP2 wants real parameters of one type: net.float(), or {MEND}")


def check_optimizer(optimizer: torch.optim.Optimizer, cut: set[int]) -> None:
    """Raise ValueError for an optimizer that would take sharded parameters and others at once."""
    for group in optimizer.param_groups:
        if (group.get("foreach") or group.get("fused")) and len({id(p) in cut for p in group["params"]}) > 1:
            raise ValueError(
                "the optimizer takes its parameters all at once (foreach or fused), and some of a group are sharded, others not; wanted "
                "foreach=False, or a group of their own for scalars and for what the objective learns"
            )


def check_batches(batches: Any, group: Group) -> None:
    """Raise ValueError, in all, where the batches of one, as `data.Batches`, are those of another place among processes."""
    inner = getattr(batches, "batches", batches)  # of what is prefetched
    place = getattr(inner, "rank", group.rank), getattr(inner, "world", group.world)
    for rank, (its, world) in enumerate(group.objects(place)):
        if (its, world) != (rank, group.world):
            raise ValueError(
                f"the batches of rank {rank} of {group.world} are those of rank {its} of {world}; wanted Batches(..., rank=group.rank, "
                "world=group.world)"
            )


class Order:
    """Which blocks run, and which of their parameters get gradients: what processes that are not alike in it would send to each other
    is hung, mixed up or of wrong length, in silence. In a first pass they ask each other before each block; later passes must be like it.
    """

    def __init__(self, root: nn.Module, blocks: list[nn.Module]) -> None:
        self.root = root
        names = {id(module): name for name, module in root.named_modules()}
        self.names = [names[id(block)] or "the network" for block in blocks]
        self.group: Group | None = None  # while a loss is computed
        for n, block in enumerate(blocks):
            block.register_forward_pre_hook(functools.partial(self._starts, n), prepend=True)
            block.register_forward_pre_hook(functools.partial(self._has, n))  # after it is gathered
        self.known = dict[Tensor, str]()
        self.begin()

    def begin(self) -> None:
        """Of a training: the next pass is its first."""
        self.ran, self.before, self.used = list[int](), list[int](), set[str]()
        self.asks = True

    @contextmanager
    def told(self, group: Group) -> Iterator[list[Tensor]]:
        """A pass, whose losses are put into the list."""
        self.group, self.ran, losses = group, [], []
        try:
            yield losses
            self._starts(-1)
            used = _reached(losses[0], self.known)
            if self.asks:
                told = group.objects(zlib.crc32(repr(sorted(used)).encode()))
                if len(set(told)) > 1:
                    every = [set(each) for each in group.objects(sorted(used))]
                    some = sorted(set.union(*every) - set.intersection(*every))
                    raise ValueError(f"{some[0]} gets a gradient in {_ranks(some[0], every)} and not in the others{ALIKE}")
                self.before, self.used = self.ran, used
            elif used != self.used:
                name = min(used ^ self.used)
                raise ValueError(f"{name} gets {'a' if name in used else 'no'} gradient, unlike in the first step{ALIKE}")
            self.asks = False
        finally:
            self.group = None

    def _starts(self, n: int, *_: Any) -> None:
        if self.group is None:
            return
        name = lambda n: self.names[n] if n >= 0 else "nothing more"
        self.ran.append(n)
        if self.asks:
            told = [other for (other,) in self.group.numbers(n)]
            for rank, other in enumerate(told):
                if other != told[0]:
                    raise ValueError(f"rank 0 runs {name(told[0])} where rank {rank} runs {name(other)}{ALIKE}")
        elif n != (was := self.before[len(self.ran) - 1]):
            raise ValueError(f"this process runs {name(n)} where the first step ran {name(was)}{ALIKE}")

    def _has(self, n: int, block: nn.Module, _: Any) -> None:
        if self.group is not None:
            for name, p in block.named_parameters():
                if p.ndim and not in_pieces(p):
                    self.known.setdefault(p, name if block is self.root else f"{self.names[n]}.{name}")


def _ranks(name: str, every: list[set[str]]) -> str:
    found = [str(rank) for rank, each in enumerate(every) if name in each]
    return f"rank{'s' * (len(found) > 1)} {', '.join(found)}"


def _reached(losses: Tensor, known: dict[Tensor, str]) -> set[str]:
    """The names of those that a backward pass of the losses comes to."""
    waiting, seen, found = [losses.grad_fn], set[Any](), set[str]()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (p := getattr(node, "variable", None)) is not None and p in known:
            found.add(known[p])
        waiting += [deeper for deeper, _ in node.next_functions]
    return found
