"""Training on many processes: the gradient of a batch that is cut over them, and a network that is (FSDP2).

`fit(training, Batches(source, 256, rank=group.rank, world=group.world), group=group)` is DistributedDataParallel: each process has the
whole network and a share of every batch. After `shard(training, group)` it has a share of the network, optimizer and averages too.
"""

from __future__ import annotations

import copy
import functools
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
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from .checks import check_count, shape_of
from .denoiser import Denoiser, Preconditioned
from .loss import Objective, Weight
from .objectives import TWICE
from .parallel import Elsewhere, Group
from .pieces import cut, in_pieces, local
from .training import Training

__all__ = ["Share", "Together", "check_once", "shard"]

MEND = "train without sharding it (sharded: false): DistributedDataParallel can"
SMALL = 2**16  # parameters; blocks of fewer are gathered with the rest of the network
LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


# --- a sharded training --------------------------------------------------------------------------------------------------
def shard(training: Training, group: Group, *, least: int = SMALL) -> None:
    """Cut network, optimizer state and averages over the processes, each an even piece of every tensor (FSDP2), in place.

    Before the first step or after `restore`, with the same training in every process; alone it does nothing. Blocks of at least `least`
    parameters (members of the network's lists of modules) are gathered one after the other as they run, the rest at once.
    `training.tensors()`, `moments()` and `whole()` give whole tensors from then on, and are calls of all processes. Scalars, and what an
    objective learns, stay whole in each. Raises ValueError for an objective that differentiates the network (`check_once`), for
    parameters that are not contiguous, and for processes whose trainings differ.
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
    group.agree("the training that is to be sharded", training.digest())
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(training.device.type, (group.world,))
    before = list(training.denoiser.parameters())
    training.skeleton = copy.deepcopy(
        training.denoiser, {id(p): nn.Parameter(p.to("meta"), requires_grad=p.requires_grad) for p in before}
    )
    scalars = {p for p in root.parameters() if not p.ndim}
    for block in _blocks(root, check_count(least, "least", 0)):
        fully_shard(block, mesh=mesh, ignored_params=scalars)
    fully_shard(root, mesh=mesh, ignored_params=scalars)  # type: ignore[no-matching-overload]
    root.register_forward_hook(functools.partial(_watch, training))
    after = list(training.denoiser.parameters())
    _exchange(training.optimizer, {id(old): new for old, new in zip(before, after, strict=True)})
    for e in training.emas:
        of = dict(zip(map(id, e.module.parameters()), after, strict=True))
        for module in e.module.modules():
            for name, p in module._parameters.items():
                if p is not None and in_pieces(of[id(p)]):
                    module._parameters[name] = nn.Parameter(cut(p, of[id(p)]), requires_grad=False)


def _blocks(module: nn.Module, least: int) -> Iterator[nn.Module]:
    """The outermost members of lists of modules that have `least` parameters and a forward."""
    for child in module.children():
        size = sum(p.numel() for p in child.parameters())
        if isinstance(module, LISTS) and not isinstance(child, LISTS[:2]) and size >= max(1, least):
            yield child
        else:
            yield from _blocks(child, least)


def _exchange(optimizer: torch.optim.Optimizer, new: dict[int, nn.Parameter]) -> None:
    """Give the optimizer the sharded parameters for the whole ones, with its state of each, cut alike."""
    for group in optimizer.param_groups:
        found = [new.get(id(p), p) for p in group["params"]]
        if (group.get("foreach") or group.get("fused")) and len({in_pieces(p) for p in found}) > 1:
            raise ValueError(
                "the optimizer takes its parameters all at once (foreach or fused), and some of a group are sharded, others not; wanted "
                "foreach=False, or a group of their own for scalars and for what the objective learns"
            )
        for i, old in enumerate(group["params"]):
            if old in optimizer.state and found[i] is not old:
                state = optimizer.state.pop(old)
                optimizer.state[found[i]] = {
                    k: cut(v, found[i]) if isinstance(v, Tensor) and v.shape == old.shape else v for k, v in state.items()
                }
        group["params"][:] = found


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
        while True:
            number, x0, cond, failure = 0, None, None, None
            try:
                number, batch = next(stream, (0, None))
                if number:
                    x0, cond = parts(batch, number)
            except Exception as error:
                failure = error
            kind = "" if x0 is None else repr((x0.shape[1:], x0.dtype, None if cond is None else (cond.shape[1:], cond.dtype)))
            told = self.group.numbers(-1 if failure else number, 0 if x0 is None else len(x0), zlib.crc32(kind.encode()))
            if failure is not None:
                raise failure
            if any(n < 0 for n, _, _ in told):
                raise Elsewhere(1)
            if x0 is None or not all(n for n, _, _ in told):
                return
            if len({(n, key) for n, _, key in told}) > 1:
                self.group.agree(
                    "what a batch holds", f"step {number}: rows of {list(x0.shape[1:])} {x0.dtype}, labels {shape_of(cond)}"
                )
            sizes = [n for _, n, _ in told]
            first = sum(sizes[: self.group.rank])
            yield Share(number, x0, cond, slice(first, first + len(x0)), sum(sizes), min(sizes))

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
            return self.outer(x0, t, cond, noise)

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
        squares = lambda found: math.fsum(float(local(g).double().square().sum()) for g in found)
        if sharded:
            parts = squares([g for g in grads if in_pieces(g)]), squares([g for g in grads if not in_pieces(g)])
        else:
            parts = float(get_total_norm(grads)), 0.0
        told = self.group.reals(float(loss), *parts, changed())
        norm = (sum(square for _, square, _, _ in told) + told[0][2]) ** 0.5 if sharded else told[0][1]
        return sum(part for part, *_ in told), norm, any(flag for *_, flag in told)

    def clip(self, largest: float, norm: float) -> float:
        """Scale the gradients down to a norm of `largest`; return the norm they had, which alone is not yet known."""
        parameters = self.training.parameters
        if self.group.world == 1:
            return float(nn.utils.clip_grad_norm_(parameters, largest))
        if not self.training.sharded:
            like = next((p.grad for p in parameters if p.grad is not None), torch.zeros(()))
            clip_grads_with_norm_(parameters, largest, torch.tensor(norm, dtype=like.dtype, device=like.device))
        elif math.isfinite(norm) and (factor := largest / (norm + 1e-6)) < 1:
            for p in parameters:
                if p.grad is not None:
                    local(p.grad).mul_(factor)
        return norm

    def spread_buffers(self) -> None:
        """Those of the first process for all: statistics of its share, say."""
        for module, name, b in self.training.buffers():
            value = b.contiguous()
            dist.broadcast(value, src=0)
            module._buffers[name] = value
