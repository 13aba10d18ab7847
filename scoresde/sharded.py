"""Training on many processes: the gradient of a batch that is cut over them, and a network that is (FSDP2).

`fit(training, Batches(source, 256, rank=group.rank, world=group.world), group=group)` is DistributedDataParallel: each process has the
whole network and a share of every batch. After `shard(training, group)` it has a share of the network, optimizer and averages too.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import math
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .alike import ALIKE, MEND, Order, check_optimizer, check_parameters
from .checks import check_count, shape_of
from .denoiser import Denoiser, Preconditioned
from .loss import Objective, Weight
from .objectives import TWICE
from .parallel import Elsewhere, Group
from .pieces import cut, cut_state, in_pieces, local, raw
from .training import Training

__all__ = ["Share", "Together", "check_once", "shard"]

SMALL = 2**16  # parameters; blocks of fewer are gathered with the rest of the network
LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


# --- a sharded training --------------------------------------------------------------------------------------------------
def shard(training: Training, group: Group, *, least: int = SMALL) -> None:
    """Cut network, optimizer state and averages over the processes, each an even piece of every tensor (FSDP2), in place.

    Before the first step or after `restore`, with the same training in every process; alone it does nothing. Blocks of at least `least`
    parameters (members of the network's lists of modules) are gathered one after the other as they run, the rest at once.
    `training.tensors()`, `moments()` and `whole()` give whole tensors from then on, and are calls of all processes. Scalars, and what an
    objective learns, stay whole in each. Raises ValueError for an objective that differentiates the network (`check_once`), for
    parameters that are not contiguous, complex, of two types or tied over blocks, and for processes whose trainings differ.

    Every process must run the same blocks in the same order, and each of their parameters in all processes or in none, in every forward
    pass of a training: FSDP2 pairs what they send by its order alone. A network that routes rows, as a mixture of experts, does not;
    `fit` refuses it, and DistributedDataParallel trains it.
    """
    if group.world == 1:
        return
    if training.sharded:
        raise ValueError("the training is sharded already; wanted one call of shard")
    check_once(training.objective)
    root = training.denoiser.net if isinstance(training.denoiser, Preconditioned) else training.denoiser
    for name, p in root.named_parameters():
        if not p.is_contiguous():
            raise ValueError(
                f"{name} is not contiguous, and FSDP2 cuts no such tensor; wanted channels_last: false, or "
                "net.to(memory_format=torch.contiguous_format)"
            )
    blocks = [*_blocks(root, check_count(least, "least", 0)), root]
    scalars = {p for p in root.parameters() if not p.ndim}
    check_parameters(root, blocks)
    check_optimizer(training.optimizer, {id(p) for p in root.parameters()} - set(map(id, scalars)))
    group.agree("the training that is to be sharded", training.digest())
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(training.device.type, (group.world,))
    before = list(training.denoiser.parameters())
    training.skeleton = copy.deepcopy(
        training.denoiser, {id(p): nn.Parameter(p.to("meta"), requires_grad=p.requires_grad) for p in before}
    )
    for block in blocks:
        fully_shard(block, mesh=mesh, ignored_params=scalars)  # type: ignore[no-matching-overload]
    training.order = Order(root, blocks)
    root.register_forward_hook(functools.partial(_watch, training))
    after = list(training.denoiser.parameters())
    _exchange(training.optimizer, {id(old): new for old, new in zip(before, after, strict=True)})
    for e in training.emas:
        news = {  # one for each, so that what is tied stays tied
            p: nn.Parameter(cut(p, new), requires_grad=False) if in_pieces(new) else p
            for p, new in zip(e.module.parameters(), after, strict=True)
        }
        for module in e.module.modules():
            module._parameters.update({name: news[p] for name, p in module._parameters.items() if p is not None})
        e.module.register_forward_pre_hook(_refuse)


def _blocks(module: nn.Module, least: int) -> Iterator[nn.Module]:
    """The outermost members of lists of modules that have `least` parameters and a forward."""
    for child in module.children():
        size, runs = sum(p.numel() for p in child.parameters()), type(child).forward is not nn.Module.forward
        if isinstance(module, LISTS) and runs and size >= max(1, least):
            yield child
        else:
            yield from _blocks(child, least)


def _exchange(optimizer: torch.optim.Optimizer, new: dict[int, nn.Parameter]) -> None:
    """Give the optimizer the sharded parameters for the whole ones, with its state of each, cut alike."""
    for group in optimizer.param_groups:
        found = [new.get(id(p), p) for p in group["params"]]
        for i, old in enumerate(group["params"]):
            if old in optimizer.state and found[i] is not old:
                optimizer.state[found[i]] = cut_state(optimizer.state.pop(old), found[i])
        group["params"][:] = found


def _refuse(_: nn.Module, __: Any) -> None:
    raise ValueError("the average is sharded over processes; wanted training.whole(average), a call of all of them")


def _watch(training: Training, _: nn.Module, __: Any, out: Any) -> None:
    """Find out at once what torch would in the second backward, as memory that is not there."""

    def check(_: Tensor) -> None:
        if training.inside:
            raise ValueError(f"the objective differentiates the network, and FSDP2 has no double backward; wanted to {MEND}")

    if isinstance(out, Tensor) and out.requires_grad:
        out.register_hook(check)


def check_once(objective: Any) -> None:
    """Raise ValueError for an objective that needs a double backward, also one within another: under FSDP2 there is none."""
    inner = objective.func if isinstance(objective, functools.partial) else objective
    if inner in TWICE:
        raise ValueError(f"{inner.__name__} differentiates the network, and FSDP2 has no double backward; wanted to {MEND}")
    if inner is not None and callable(deeper := getattr(inner, "objective", None)):
        check_once(deeper)


# --- the loss as one module ----------------------------------------------------------------------------------------------
class _Loss(nn.Module):
    """A loss from its arguments to a number a row, as one module: what DistributedDataParallel wraps, whatever an objective calls."""

    def __init__(self, denoiser: Denoiser, training: Training, weight: Weight) -> None:
        super().__init__()
        self.denoiser, self.weight, self.training_of = denoiser, weight, training
        self.objective: Objective = training.objective
        known = {id(p) for p in self.parameters()}
        # Of a callable that hides its network.
        self.others = nn.ParameterList([p for p in training.parameters if id(p) not in known])
        # DistributedDataParallel looks for parameters that a step does not use, and complains if there are none.
        self.idle = nn.Parameter(local(training.parameters[0]).detach().new_zeros(1))

    def forward(self, x0: Tensor, t: Tensor, cond: Tensor | None, noise: Tensor) -> Tensor:
        inner = self.denoiser if cond is None else self.denoiser.condition(cond)  # type: ignore[attr-defined]
        self.training_of.inside = True
        try:
            losses = self.objective(inner, x0, t, self.weight, noise)
        finally:
            self.training_of.inside = False
        if not isinstance(losses, Tensor) or losses.shape != t.shape[:1]:
            raise ValueError(f"the objective returned {shape_of(losses)}; wanted a loss a row, [{len(t)}]: no mean")
        return losses


@dataclass(frozen=True)
class Share:
    """Of a step's batch, `total` rows, those that this process has: x0, cond, and which they are; least: the fewest of any process."""

    number: int
    x0: Tensor
    cond: Tensor | None
    rows: slice
    total: int
    least: int


class Together:
    """What the processes do alike in each step of a training: share the batch, add up gradients, norms and losses."""

    def __init__(self, training: Training, model: Denoiser, weight: Weight, group: Group) -> None:
        if training.sharded and group.world == 1:
            raise ValueError("the training is sharded; wanted the group it is sharded over: fit(..., group=group)")
        self.training, self.group = training, group
        self.inner = _Loss(model, training, weight)
        self.outer: Any = self.inner
        if training.sharded:
            training.order.begin()
        self.loose = [p for p in training.parameters if training.sharded and not in_pieces(p)]
        if training.scaler.is_enabled() and self.loose:
            raise ValueError(
                "float16 scales the gradients of what is sharded, and scalars or what the objective learns are not; wanted bfloat16"
            )
        if group.world > 1 and not training.sharded:
            with warnings.catch_warnings():  # of a new name for broadcast_buffers, which older versions lack
                warnings.simplefilter("ignore", FutureWarning)
                self.outer = nn.parallel.DistributedDataParallel(self.inner, broadcast_buffers=False, find_unused_parameters=True)

    # --- rows ------------------------------------------------------------------------------------------------------------
    def shares(
        self, stream: Iterator[tuple[int, Any]], parts: Callable[[Any, int], tuple[Tensor, Tensor | None]]
    ) -> Iterator[Share]:
        """The batches of this process as shares of those of all; they end when any process has no more."""
        if self.group.world == 1:
            for number, batch in stream:
                x0, cond = parts(batch, number)
                yield Share(number, x0, cond, slice(0, len(x0)), len(x0), len(x0))
            return
        begun = False
        while True:
            number, x0, cond, failure, key = 0, None, None, None, 0
            try:
                number, batch = next(stream, (0, None))
                if number:
                    x0, cond = parts(batch, number)
                    key = 0 if begun else _key(x0, cond)
            except Exception as error:
                failure = error
            kind = "" if x0 is None else repr((x0.shape[1:], x0.dtype, None if cond is None else (cond.shape[1:], cond.dtype)))
            told = self.group.numbers(-1 if failure else number, 0 if x0 is None else len(x0), zlib.crc32(kind.encode()), key)
            if failure is not None:
                raise failure
            if any(n < 0 for n, *_ in told):
                raise Elsewhere(1)
            if x0 is None or not all(n for n, *_ in told):
                return
            if len({(n, kind) for n, _, kind, _ in told}) > 1:
                self.group.agree(
                    "what a batch holds", f"step {number}: rows of {list(x0.shape[1:])} {x0.dtype}, labels {shape_of(cond)}"
                )
            first = dict[int, int]()
            for rank, (*_, key) in enumerate(told):
                if key and (other := first.setdefault(key, rank)) != rank:
                    raise ValueError(
                        f"rank {other} and rank {rank} give the same rows at step {number}; wanted Batches(..., rank=group.rank, "
                        "world=group.world)"
                    )
            begun, sizes = True, [n for _, n, *_ in told]
            start = sum(sizes[: self.group.rank])
            yield Share(number, x0, cond, slice(start, start + len(x0)), sum(sizes), min(sizes))

    def transformed(self, share: Share, x0: Tensor, transform: Callable[[Tensor], Tensor]) -> Tensor:
        """The transform of the share as that of the whole batch would have it: it may draw for every row."""
        if self.group.world == 1:
            return transform(x0)
        every = x0.new_zeros(share.total, *x0.shape[1:])
        every[share.rows] = x0
        return transform(every)[share.rows]

    # --- gradients -------------------------------------------------------------------------------------------------------
    def holding(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients of all parts but the last wait for it; those of a sharded network, which has no room for them, do not."""
        return self.outer.no_sync() if self.outer is not self.inner and not last else nullcontext()

    def __call__(self, x0: Tensor, t: Tensor, cond: Tensor | None, noise: Tensor) -> Tensor:
        """Losses of these rows, `[n]`."""
        if not self.training.sharded:
            return self.outer(x0, t, cond, noise)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)  # returned a view, which nothing writes to
            with self.training.order.told(self.group) as losses:
                losses.append(self.outer(x0, t, cond, noise))
            return losses[0]

    def settle(self) -> None:
        """The mean over processes of the gradients that neither wrapper knows of: of scalars and objectives beside a sharded network."""
        if not self.loose:
            return
        had = [any(flags) for flags in zip(*self.group.numbers(*(p.grad is not None for p in self.loose)), strict=True)]
        for p, any_has in zip(self.loose, had, strict=True):
            if any_has:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                dist.all_reduce(p.grad)
                p.grad /= self.group.world

    def measured(self, loss: Tensor, changed: Callable[[], bool]) -> tuple[float, float, bool]:
        """(mean loss of the batch, norm of its gradient, whether a buffer has changed), the same numbers in every process."""
        if self.group.world == 1:
            return float(loss), math.nan, False
        parameters, sharded = self.training.parameters, self.training.sharded
        grads = [p.grad for p in parameters if p.grad is not None]
        parts = _square([g for g in grads if in_pieces(g)]), _square([g for g in grads if not in_pieces(g)])
        kinds = repr([(name, b.shape, b.dtype) for _, name, b in self.training.buffers()])
        had = repr([p.grad is not None for p in parameters])
        told = self.group.reals(float(loss), *parts, changed(), zlib.crc32(kinds.encode()), zlib.crc32(had.encode()))
        if len({each[5] for each in told}) > 1:
            raise ValueError(f"not the same parameters have gradients in all processes{ALIKE if sharded else ''}")
        if len({each[4] for each in told}) > 1:
            found = {name: list(b.shape) for _, name, b in self.training.buffers()}
            self.group.agree("the shapes of their buffers, which are to be the first one's in all", repr(found))
        norm = (sum(square for _, square, *_ in told) + told[0][2]) ** 0.5
        return sum(part for part, *_ in told), norm, any(each[3] for each in told)

    def clip(self, largest: float, norm: float) -> float:
        """Scale the gradients down to a norm of `largest`; return the norm they had, which alone is not yet known."""
        parameters = self.training.parameters
        if self.group.world == 1:
            return float(nn.utils.clip_grad_norm_(parameters, largest))
        if math.isfinite(norm) and (factor := largest / (norm + 1e-6)) < 1:
            torch._foreach_mul_([local(p.grad) for p in parameters if p.grad is not None], factor)
        return norm

    def spread_buffers(self) -> None:
        """Those of the first process for all: statistics of its share, say."""
        for module, name, b in self.training.buffers():
            value = b.contiguous()
            if value.numel():
                dist.broadcast(value.reshape(-1).view(torch.uint8), src=0)  # bytes: not every type can be sent
            module._buffers[name] = value


def _square(grads: list[Tensor]) -> float:
    """Of their norm, of what this process has of them; in float64, whatever they are in."""
    wide = lambda g: torch.complex128 if g.is_complex() else torch.float64
    norms = [torch.linalg.vector_norm(g, dtype=wide(g)) for g in map(local, grads) if g.numel()]
    return float(torch.stack(norms).square().sum()) if norms else 0.0


def _key(*values: Tensor | None) -> int:
    """Of the bits of a share of rows; 0 where they are all the same, or one."""
    rows = values[0]
    if rows is None or bool((rows == rows[:1]).all()):
        return 0
    found = hashlib.blake2b(digest_size=7)
    for value in values:
        if value is not None:
            found.update(raw(value))
    return int.from_bytes(found.digest(), "big") + 1
