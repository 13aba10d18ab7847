"""Training as a generator: the caller loops, logs, plots and stops. Every draw of step n is a function of (seed, n)."""

from __future__ import annotations

import hashlib
import math
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count, pairwise
from typing import Any

import torch
from torch import Tensor

from .alike import check_batches
from .checks import NonFiniteError, check_callable, check_count, check_finite, check_number, check_state, shape_of
from .denoiser import Denoiser, Preconditioned, check_denoiser
from .ema import EMA
from .loss import Objective, Times, Weight, dsm_loss, edm, log_normal, stratified
from .noise import INITIAL, entropy_seeds, seeded
from .parallel import ALONE, Elsewhere, Group
from .pieces import local
from .sharded import Together
from .training import Training

__all__ = ["Step", "Training", "fit", "loss_by_level"]

FORGIVEN = (ArithmeticError, OSError, ValueError)  # by whoever looks at a loss by level: of numbers and of the disk
SEEDING = threading.RLock()  # the global generators are one for all threads


@dataclass(frozen=True)
class Step:
    """One step: its number from 1, the mean loss of the batch, the gradient's norm before clipping, whether it was skipped, the rate."""

    step: int
    loss: float
    grad_norm: float
    skipped: bool = False
    lr: float = math.nan


def fit(
    denoiser: Denoiser | Training, batches: Callable[[int], Any] | Iterable[Any], *, weight: Weight = edm, times: Times | None = None,
    objective: Objective = dsm_loss, optimizer: torch.optim.Optimizer | None = None, ema: EMA | Iterable[EMA] | None = None,
    rate: Callable[[int], float] | None = None, clip: float = 1.0, accumulate: int = 1, precision: torch.dtype | None = None,
    label_dropout: float = 0.0, transform: Callable[[Tensor, torch.Generator], Tensor] | None = None, patience: int = 8,
    compile: bool = False, steps: int | None = None, seed: int | None = None, generator: torch.Generator | None = None,
    group: Group = ALONE,
) -> Iterator[Step]:  # fmt: skip
    """Train by denoising score matching; yield a Step an optimizer step.

    denoiser: what is trained, or a Training, to be gone on with from its step. batches: a function of the step, as `data.Batches` (then
    training resumed is training that never stopped, to the bit), or an iterable; each batch x0 `[B, *shape]` or a pair (x0, cond).
    weight, times: see `scoresde.loss` (default edm, and a stratified log-normal); objective, optimizer, ema, precision: see Training;
    rate: (step) -> factor on the learning rate; clip: the largest gradient norm (inf: none); accumulate: parts that a batch is
    worked off in, for memory's sake; label_dropout: share of the labels that become "none", for guidance; transform: (batch,
    generator) -> x0, for batches that are not x0 yet; patience: steps in a row with a non-finite loss or gradient before
    NonFiniteError, each of them skipped and counted; compile: run the network through torch.compile; steps: the last step (None: as long
    as `batches` lasts); seed: of times, noise, dropped labels and dropout layers (None: fresh, which no resumed training repeats);
    generator: for times, noise and labels one after the other in place of a seed, which a training that is resumed cannot take up again.

    It is a generator: nothing happens until it is looped over, and the denoiser is left in train mode (an average is in eval mode).
    Raises ValueError for NaN in data. In parts, the loss is the same sum: only its rounding differs.

    group: the processes that train together (`scoresde.parallel.joined`), each of which calls `fit` alike, with its rows of every batch,
    in the order of ranks: Batches(..., rank=group.rank, world=group.world). Times, noise and dropped labels are those of the whole
    batch, and `transform` is given one in which the others' rows are 0, so that a step is that of one process to rounding, for any number
    of them; dropout layers alone draw otherwise, what mixes rows (batch norm, routing by what else is in the batch) sees its process's
    rows only, so that those differ too, and what a forward pass writes into buffers is the first process's. All stop when one has no more
    batches; when one fails, the others end within the timeout. ValueError before the first step where processes differ in what they are
    given, or give the same rows. Plain, this is DistributedDataParallel; of a Training that is sharded, FSDP2 (`sharded.shard`), for
    networks that run the same blocks in every process.
    """
    if not isinstance(denoiser, Training):
        training = Training(denoiser, optimizer, ema, objective=objective, precision=precision)
    elif optimizer is None and ema is None and objective is dsm_loss and precision is None:
        training = denoiser
    else:
        raise ValueError("a Training has its optimizer, averages, objective and precision: give them to Training(...)")
    drawn: Times = check_callable(
        stratified(log_normal) if times is None else times, "times", "a function (sde, u) -> times of u in (0, 1)"
    )
    if clip != math.inf:
        check_number(clip, "clip", 0.0, open_low=True)
    check_count(accumulate, "accumulate")
    check_count(patience, "patience")
    check_number(label_dropout, "label_dropout", 0.0, 1.0)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator is {shape_of(generator)}; wanted a torch.Generator: torch.Generator().manual_seed(0)")
    if generator is not None and seed is not None:
        raise TypeError(f"generator and seed={seed} are given; wanted a torch.Generator or a seed, not both")
    group.agree("seed or generator of fit", f"seed {seed}, {'no' if generator is None else 'a'} generator")
    if seed is None:  # of a generator, for dropout layers alone
        seed = group.by_first(lambda: entropy_seeds(1)[0]) if generator is None else generator.initial_seed()
    check_count(seed, "seed", 0)
    if rate is not None:
        check_callable(rate, "rate", "a function (step) -> factor on the learning rate")
    stream = _numbered(batches, training.step, None if steps is None else check_count(steps, "steps", 0))
    if transform is not None:
        check_callable(transform, "transform", "a function (batch, generator) -> x0")
    if group.world > 1:
        drawing = None if generator is None else hashlib.blake2b(generator.get_state().numpy().tobytes()).hexdigest()
        group.agree(
            "seed, steps or settings of fit", repr((seed, steps, drawing, clip, accumulate, label_dropout, patience, compile))
        )
        group.agree("the training (parameters, averages, optimizer, step)", training.digest())
        for what, value in _settings(training, weight, drawn, rate, steps).items():
            group.agree(what, value)
        check_batches(batches, group)
    model, scaler, parameters = _compiled(training.denoiser) if compile else training.denoiser, training.scaler, training.parameters
    for options in training.optimizer.param_groups:
        options.setdefault("initial_lr", options["lr"])
    training.denoiser.train()
    together = Together(training, model, weight, group)
    for share in together.shares(stream, partial(_parts, plain=transform is None)):
        number, cond, rows, total = share.number, share.cond, share.rows, share.total
        draws = generator or torch.Generator(training.device).manual_seed(_key(seed, number))
        x0 = share.x0.to(training.device, non_blocking=True)
        if transform is not None:
            x0 = together.transformed(share, x0, lambda x, draws=draws: transform(x, draws))
            check_finite(check_state(x0, "x0"), "x0")
        u = torch.rand(total, generator=draws, dtype=torch.float64, device=draws.device).to(x0.device)
        noise = torch.randn((total, *x0.shape[1:]), generator=draws, dtype=x0.dtype, device=draws.device)[rows].to(x0.device)
        t = drawn(model.sde, u).reshape(-1, *[1] * (x0.ndim - 1))[rows]
        if cond is None and label_dropout:
            raise ValueError(f"label_dropout is {label_dropout:g} and batch {number} has no labels; wanted pairs (x0, cond), or 0")
        cond = _labels(cond, label_dropout, model, draws, rows, total)
        kept = [(module, name, b.clone()) for module, name, b in training.buffers()]  # a skipped step must leave no trace in them
        for options in training.optimizer.param_groups if rate is not None else ():
            options["lr"] = options["initial_lr"] * check_number(rate(number), f"rate({number})", 0.0)  # type: ignore[not-callable]
        training.optimizer.zero_grad(set_to_none=True)
        alone = group.world == 1
        summed = torch.zeros((), dtype=torch.float32 if alone else torch.float64, device=x0.device)
        with _seeded(_key(seed, -number, *(() if alone else (group.rank,))), x0.device):  # another key than that of the draws
            parts = _shares(len(x0), min(accumulate, share.least))  # as many in every process: each gathers what is sharded
            for part in parts:
                with together.holding(part is parts[-1]):
                    with torch.autocast(x0.device.type, training.precision, enabled=training.precision is not None):
                        losses = together(x0[part], t[part], None if cond is None else cond[part], noise[part])
                        part_loss = losses.sum() / total
                    scaler.scale(part_loss if alone else part_loss * group.world).backward()  # of which the mean is taken
                summed += part_loss.detach()
        together.settle()
        scaler.unscale_(training.optimizer)
        changed = lambda kept=kept: not all(torch.equal(module.get_buffer(name), before) for module, name, before in kept)
        loss, grad_norm, spread = together.measured(summed, changed)
        grad_norm = together.clip(clip, grad_norm)
        good = math.isfinite(grad_norm) and math.isfinite(loss)
        if good:
            scaler.step(training.optimizer)
            if spread:
                together.spread_buffers()
            for e in training.emas:
                e.update(training.denoiser)
        else:
            for module, name, before in kept:
                module._buffers[name] = before
        if scaler.is_enabled():
            scaler.update()
        training.step, training.skipped = number, training.skipped + (not good)
        training.in_a_row = 0 if good else training.in_a_row + 1
        sick = not good and group.any(not all(bool(local(p).isfinite().all()) for p in parameters))
        if sick or training.in_a_row >= patience:
            state = "an earlier update has made the parameters so" if sick else "the parameters are as they were before these"
            raise NonFiniteError(
                f"step {number}: loss {loss:.4g}, gradient norm {grad_norm:.4g}, the {training.in_a_row}th such step in a row; {state}. "
                "Lower the learning rate, or check the network and the data"
            )
        yield Step(number, loss, grad_norm, not good, training.optimizer.param_groups[0]["lr"])
    if group.first and steps is not None and training.step < steps:
        warnings.warn(
            f"the batches ended after step {training.step} of {steps}; wanted an iterable that goes on, or a function of the step, as "
            "data.Batches",
            stacklevel=2,
        )


def _settings(training: Training, weight: Weight, times: Times, rate: Any, last: int | None) -> dict[str, str]:
    """What the processes of a group must agree on besides, by what it is called; functions by their values, or by name."""
    sde, next_step = training.denoiser.sde, training.step + 1
    u = torch.linspace(0.1, 0.9, 5, dtype=torch.float64, device=training.device)
    t = sde.t_min + (sde.t_max - sde.t_min) * u
    numbers = lambda found: " ".join(f"{v:.6g}" for v in found.double().reshape(-1).tolist())
    plain = lambda v: v.tolist() if isinstance(v, Tensor) else v
    groups = [
        {k: plain(v) for k, v in each.items() if k not in ("params", "initial_lr")} for each in training.optimizer.param_groups
    ]
    return {
        "the optimizer's settings": repr(groups),
        "precision": str(training.precision),
        "objective": _named(training.objective),
        "weight, at five times": numbers(weight(sde, t)),
        "times, at five u": numbers(times(sde, u)),
        "rate, at the first step": f"{rate(next_step):.6g}" if rate is not None and next_step <= (last or next_step) else "",
    }


def _named(fn: Any) -> str:
    """A function or an object by name, which has no address in it."""
    if isinstance(fn, partial):
        return f"{_named(fn.func)}({', '.join([*map(_named, fn.args), *(f'{k}={_named(v)}' for k, v in fn.keywords.items())])})"
    if isinstance(fn, (int, float, str, bool, type(None))):
        return repr(fn)
    named = fn if hasattr(fn, "__qualname__") else type(fn)
    return f"{named.__module__}.{named.__qualname__}"


@torch.no_grad()
def loss_by_level(
    denoiser: Denoiser, x0: Tensor, levels: int = 16, *, cond: Tensor | None = None, weight: Weight = edm, seed: int = 0,
    batch: int = 256, group: Group = ALONE,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(logsnr, mean loss) at `levels` noise levels, uniform in logsnr from t_min to t_max: where a network is good, and where not.

    x0 `[N, *shape]`: held-out data; cond: their labels, for a Preconditioned denoiser that has some. The noise is a function of (seed,
    row, level), so that curves of two networks, or of two steps of one, differ by the networks alone. N levels evaluations, `batch` at
    a time; in the mode the denoiser is in. float64 `[levels]` each. group: processes that share the batches, to the same bits; an
    ArithmeticError, OSError or ValueError in one is a ValueError in the others.
    """
    check_finite(check_state(x0, "x0"), "x0")
    sde = check_denoiser(denoiser).sde
    ends = sde.logsnr(torch.tensor([sde.t_min, sde.t_max], dtype=torch.float64))
    logsnr = torch.linspace(float(ends[0]), float(ends[1]), check_count(levels, "levels", 2), dtype=torch.float64)
    times = sde.time(logsnr).clamp(sde.t_min, sde.t_max)
    starts = range(0, len(x0), check_count(batch, "batch"))
    mine, failure = [], None
    try:
        for start in starts[group.share(len(starts))]:
            rows = x0[start : start + batch]
            model = denoiser if cond is None else denoiser.condition(cond[start : start + batch])  # type: ignore[missing-attribute]
            first = ((seed % 2**32) << 32) + start
            noise = seeded(range(first, first + len(rows)))
            mine.append([float(dsm_loss(model, rows, t, weight, noise.draw(rows, INITIAL)).double().sum()) for t in times])
    except Exception as error:  # said to the others, who wait
        failure = error
    told = group.objects((mine, None if failure is None else (isinstance(failure, FORGIVEN), str(failure))))
    if failure is not None:
        raise failure
    for rank, (_, why) in enumerate(told):
        if why is not None:
            raise ValueError(f"rank {rank}: {why[1]}") if why[0] else Elsewhere(1)
    sums = torch.zeros(levels, dtype=torch.float64)
    for found, _ in told:  # in the order of the rows
        for part in found:
            sums += torch.tensor(part, dtype=torch.float64)
    return logsnr, sums / len(x0)


def _key(*numbers: int) -> int:
    """63 bits of (seed, step), or of more numbers."""
    text = " ".join(map(str, numbers))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@contextmanager
def _seeded(key: int, device: torch.device) -> Iterator[None]:
    """Dropout layers draw from the global generators: here they hold `key`, and afterwards what they held before."""
    with SEEDING, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(key)
        if device.type == "cuda":
            torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index].manual_seed(key)
        yield


def _numbered(batches: Any, done: int, last: int | None) -> Iterator[tuple[int, Any]]:
    """(step, batch) from step done + 1 on."""
    if isinstance(batches, Tensor):
        raise TypeError(f"batches is a tensor {shape_of(batches)}; wanted an iterable of them: [x0], a DataLoader or data.Batches")
    if callable(batches):
        return ((n, batches(n)) for n in (count(done + 1) if last is None else range(done + 1, last + 1)))
    if not isinstance(batches, Iterable):
        raise TypeError(
            f"batches is {shape_of(batches)}; wanted a function of the step, as data.Batches, or an iterable of tensors"
        )
    if done:
        raise ValueError(
            f"the training goes on after step {done}, and an iterable starts where it pleases: its order cannot be resumed. Wanted a "
            "function of the step, as data.Batches is"
        )
    return zip(count(1) if last is None else range(1, last + 1), batches, strict=False)


def _parts(batch: Any, number: int, plain: bool) -> tuple[Tensor, Tensor | None]:
    parts = tuple(batch) if isinstance(batch, (tuple, list)) else (batch, None)
    if len(parts) != 2:
        raise ValueError(f"batch {number} has {len(parts)} parts; wanted a tensor x0 or a pair (x0, cond): (b[0] for b in batches)")
    if parts[1] is not None and not isinstance(parts[1], Tensor):
        raise TypeError(f"the labels of batch {number} are {shape_of(parts[1])}; wanted a tensor [B]: torch.tensor(labels)")
    if not isinstance(parts[0], Tensor) or not len(parts[0]):
        raise TypeError(f"batch {number} is {shape_of(parts[0])}; wanted a tensor [B, *shape] with rows: torch.as_tensor(...)")
    if plain and not parts[0].is_floating_point():
        raise TypeError(
            f"batch {number} is {shape_of(parts[0])}; wanted transform=, which makes integers x0 in the model's range, as "
            "scoresde.reports.Scale(Quantized(256)) does"
        )
    if plain:
        check_finite(check_state(parts[0], "x0"), "x0")
    return parts


def _shares(n: int, parts: int) -> list[slice]:
    ends = [n * k // parts for k in range(parts + 1)]
    return [slice(a, b) for a, b in pairwise(ends) if a < b]


def _labels(
    cond: Tensor | None, dropout: float, model: Denoiser, generator: torch.Generator, rows: slice, total: int
) -> Tensor | None:
    """The labels of these rows of a batch of `total`, a share of them left out."""
    if cond is None:
        return None
    if not isinstance(model, Preconditioned):
        raise TypeError(f"batches give labels and {type(model).__name__} takes none; wanted Preconditioned, or x0 alone")
    if not dropout:
        return cond
    if cond.dtype != torch.int64:
        raise TypeError(f"label_dropout is {dropout}, and cond is {shape_of(cond)}; wanted int64 labels, of which -1 is none")
    dropped = torch.rand(total, generator=generator, device=generator.device)[rows] < dropout
    return cond.masked_fill(dropped.to(cond.device), -1)


def _compiled(denoiser: Denoiser) -> Preconditioned:
    """The same parameters, the network through torch.compile."""
    if not isinstance(denoiser, Preconditioned):
        raise TypeError(
            f"compile=True and the denoiser is a {type(denoiser).__name__}; wanted Preconditioned, whose net is compiled"
        )
    return Preconditioned(torch.compile(denoiser.net), denoiser.sde, denoiser.parameterization).train()  # type: ignore[bad-argument-type]
