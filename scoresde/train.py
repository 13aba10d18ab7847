"""Training as a generator: the caller loops, logs, plots and stops. Every draw of step n is a function of (seed, n)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .checks import NonFiniteError, check_callable, check_count, check_finite, check_number, check_state, shape_of
from .denoiser import Denoiser, Preconditioned, check_denoiser
from .ema import EMA
from .loss import Times, Weight, dsm_loss, edm, log_normal, stratified
from .noise import INITIAL, entropy_seeds, seeded

__all__ = ["Step", "Training", "fit", "loss_by_level"]

Objective = Callable[[Denoiser, Tensor, Tensor, Weight, Tensor], Tensor]
HALVES = {torch.float16: True, torch.bfloat16: False}  # whether its gradients need a scale to stay above its smallest number


class Training:
    """What training changes: the denoiser, the optimizer, the averages, an objective's own parameters, the scale of float16, the step.

    optimizer: default AdamW(lr=1e-3) on the parameters of denoiser and objective; ema: one average or several, updated after every
    step; objective: (denoiser, x0, t, weight, noise) -> loss `[B]`, a module if it has parameters of its own; precision: None, or
    torch.bfloat16 or torch.float16 for the network's arithmetic (autocast; the parameters stay as they are). `state()` and
    `restore()` are all of it as tensors and plain numbers: what a checkpoint keeps.
    """

    def __init__(
        self, denoiser: Denoiser, optimizer: torch.optim.Optimizer | None = None, ema: EMA | Iterable[EMA] | None = None, *,
        objective: Objective = dsm_loss, precision: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self.denoiser = check_denoiser(denoiser)
        self.objective = check_callable(objective, "objective", "a function (denoiser, x0, t, weight, noise) -> loss [B]")
        own = list(objective.parameters()) if isinstance(objective, nn.Module) else []
        self.optimizer = torch.optim.AdamW([*denoiser.parameters(), *own], lr=1e-3) if optimizer is None else optimizer
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer is {optimizer!r}; wanted a torch.optim.Optimizer of denoiser.parameters(), as torch.optim.Adam makes"
            )
        if not {id(p) for p in own} <= {id(p) for p in self.parameters}:
            raise ValueError(
                "the optimizer lacks the objective's own parameters: [*denoiser.parameters(), *objective.parameters()]"
            )
        self.emas = [] if ema is None else [ema] if isinstance(ema, EMA) else list(ema)
        if strange := [shape_of(e) for e in self.emas if not isinstance(e, EMA)]:
            raise TypeError(f"ema holds {strange}; wanted EMA or PowerEMA of the denoiser, one or several")
        if len({e.name for e in self.emas}) != len(self.emas):
            raise ValueError(f"two averages are alike: {[e.name for e in self.emas]}; wanted each once")
        if precision not in (None, *HALVES):
            raise ValueError(f"precision is {precision}; wanted None (the network's own), torch.bfloat16 or torch.float16")
        self.precision = precision
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=HALVES.get(precision, False))  # type: ignore[bad-argument-type]
        self.step = self.skipped = self.in_a_row = 0

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those that the optimizer moves."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def device(self) -> torch.device:
        """Of the first of them."""
        return next(iter(self.parameters)).device

    def _modules(self) -> dict[str, nn.Module]:
        inner = lambda d: d.net if isinstance(d, Preconditioned) else d  # as checkpoint.save names the tensors of a network
        found = {"model": inner(self.denoiser), **{e.name: inner(e.module) for e in self.emas}}
        return found | ({"objective": self.objective} if isinstance(self.objective, nn.Module) else {})

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """By file name: model, each average, the objective if it is a module."""
        return {name: dict(module.state_dict()) for name, module in self._modules().items()}

    def state(self) -> dict[str, Any]:
        """The rest, as plain numbers; the optimizer's state apart."""
        scale = dict(self.scaler.state_dict())
        counts = {"step": self.step, "skipped": self.skipped, "in_a_row": self.in_a_row}
        return {**counts, "updates": {e.name: e.updates for e in self.emas}, "scaler": scale}

    def restore(
        self, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], optimizer: Mapping[str, Any] | None
    ) -> None:
        """Set everything to what `tensors()`, `state()` and `optimizer.state_dict()` gave; ValueError for another training's."""
        modules = self._modules()
        if missing := sorted(modules.keys() ^ tensors.keys()):
            raise ValueError(f"the checkpoint and this training differ in {missing}: same averages, same objective as then")
        try:
            for name, module in modules.items():
                module.load_state_dict(dict(tensors[name]))
            if optimizer is not None:
                self.optimizer.load_state_dict(dict(optimizer))
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(f"the checkpoint does not fit this training ({error}): same network and optimizer as then") from error
        for e in self.emas:
            e.updates = int(state["updates"][e.name])
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(dict(state["scaler"]))
        self.step, self.skipped, self.in_a_row = (int(state[k]) for k in ("step", "skipped", "in_a_row"))


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
) -> Iterator[Step]:  # fmt: skip
    """Train by denoising score matching; yield a Step an optimizer step.

    denoiser: what is trained, or a Training, to be gone on with from its step. batches: a function of the step, as `data.Batches` (then
    training resumed is training that never stopped, to the bit), or an iterable; each batch x0 `[B, *shape]` or a pair (x0, cond).
    weight, times: see `scoresde.loss` (default edm, and a stratified log-normal); objective, optimizer, ema, precision: see Training;
    rate: (step) -> factor on the learning rate; clip: the largest gradient norm (inf: none); accumulate: parts that a batch is
    worked off in, for memory's sake; label_dropout: share of the labels that become "none", for guidance; transform: (batch,
    generator) -> x0, for batches that are not x0 yet; patience: steps in a row with a non-finite loss or gradient before
    NonFiniteError, each of them skipped and counted; compile: run the network through torch.compile; steps: the last step (None: as long
    as `batches` lasts); seed: of times, noise, dropped labels and dropout layers (None: fresh); generator: for times, noise and labels one
    after the other in place of a seed, which a training that is resumed cannot take up again.

    It is a generator: nothing happens until it is looped over, and the denoiser is left in train mode (an average is in eval mode).
    Raises ValueError for NaN in data. In parts, the loss is the same sum: only its rounding differs.
    """
    if not isinstance(denoiser, Training):
        training = Training(denoiser, optimizer, ema, objective=objective, precision=precision)
    elif optimizer is None and ema is None and objective is dsm_loss and precision is None:
        training = denoiser
    else:
        raise ValueError("a Training has its optimizer, averages, objective and precision: give them to Training(...)")
    drawn: Times = check_callable(times or stratified(log_normal), "times", "a function (sde, u) -> times of u in (0, 1)")
    if clip != math.inf:
        check_number(clip, "clip", 0.0, open_low=True)
    check_count(accumulate, "accumulate")
    check_count(patience, "patience")
    check_number(label_dropout, "label_dropout", 0.0, 1.0)
    if generator is not None and (seed is not None or not isinstance(generator, torch.Generator)):
        raise TypeError(f"generator is {shape_of(generator)}, seed is {seed}; wanted a torch.Generator or a seed, not both")
    first = entropy_seeds(1)[0] if generator is None else generator.initial_seed()
    seed = first if seed is None else check_count(seed, "seed", 0)
    if rate is not None:
        check_callable(rate, "rate", "a function (step) -> factor on the learning rate")
    stream = _numbered(batches, training.step, None if steps is None else check_count(steps, "steps", 0))
    if transform is not None:
        check_callable(transform, "transform", "a function (batch, generator) -> x0")
    model, scaler, parameters = _compiled(training.denoiser) if compile else training.denoiser, training.scaler, training.parameters
    for group in training.optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    training.denoiser.train()
    for number, batch in stream:
        x0, cond = _parts(batch, number)
        draws = generator or torch.Generator(training.device).manual_seed(_key(seed, number))
        x0 = x0.to(training.device, non_blocking=True)
        x0 = check_finite(check_state(x0 if transform is None else transform(x0, draws), "x0"), "x0")
        u = torch.rand(len(x0), generator=draws, dtype=torch.float64, device=draws.device).to(x0.device)
        noise = torch.randn(x0.shape, generator=draws, dtype=x0.dtype, device=draws.device).to(x0.device)
        t = drawn(model.sde, u).reshape(-1, *[1] * (x0.ndim - 1))
        cond = _labels(cond, label_dropout, model, draws)
        training.optimizer.zero_grad(set_to_none=True)
        value = torch.zeros((), device=x0.device)
        with _seeded(_key(seed, -number), x0.device):
            for part in _shares(len(x0), accumulate):
                inner = model if cond is None else model.condition(cond[part])  # type: ignore[attr-defined]
                with torch.autocast(x0.device.type, training.precision, enabled=training.precision is not None):
                    loss = training.objective(inner, x0[part], t[part], weight, noise[part]).sum() / len(x0)
                scaler.scale(loss).backward()
                value += loss.detach()
        scaler.unscale_(training.optimizer)
        norm = nn.utils.clip_grad_norm_(parameters, clip)
        size, mean = float(norm), float(value)
        good = math.isfinite(size) and math.isfinite(mean)
        for group in training.optimizer.param_groups if rate is not None else ():
            group["lr"] = group["initial_lr"] * float(rate(number))  # type: ignore[not-callable]
        if good:
            scaler.step(training.optimizer)
            for e in training.emas:
                e.update(training.denoiser)
        if scaler.is_enabled():
            scaler.update()
        training.step, training.skipped = number, training.skipped + (not good)
        training.in_a_row = 0 if good else training.in_a_row + 1
        if training.in_a_row >= patience:
            raise NonFiniteError(
                f"step {number}: loss {mean:.4g}, gradient norm {size:.4g}, the {patience}th such step in a row; the parameters are as "
                "they were before these. Lower the learning rate, or check the network and the data"
            )
        yield Step(number, mean, size, not good, training.optimizer.param_groups[0]["lr"])


@torch.no_grad()
def loss_by_level(
    denoiser: Denoiser, x0: Tensor, levels: int = 16, *, weight: Weight = edm, seed: int = 0, batch: int = 256
) -> tuple[Tensor, Tensor]:
    """(logsnr, mean loss) at `levels` noise levels, uniform in logsnr from t_min to t_max: where a network is good, and where not.

    x0 `[N, *shape]`: held-out data; the noise is a function of (seed, row, level), so that curves of two networks, or of two steps of
    one, differ by the networks alone. N levels evaluations, `batch` at a time; in the mode the denoiser is in. float64 `[levels]` each.
    """
    check_finite(check_state(x0, "x0"), "x0")
    sde = check_denoiser(denoiser).sde
    ends = sde.logsnr(torch.tensor([sde.t_min, sde.t_max], dtype=torch.float64))
    logsnr = torch.linspace(float(ends[0]), float(ends[1]), check_count(levels, "levels", 2), dtype=torch.float64)
    times = sde.time(logsnr).clamp(sde.t_min, sde.t_max)
    sums = torch.zeros(levels, dtype=torch.float64)
    for start in range(0, len(x0), check_count(batch, "batch")):
        rows = x0[start : start + batch]
        noise = seeded(range((seed << 32) + start, (seed << 32) + start + len(rows)))
        for k, t in enumerate(times):
            sums[k] += dsm_loss(denoiser, rows, t, weight, noise.draw(rows, INITIAL)).double().sum().cpu()
    return logsnr, sums / len(x0)


def _key(seed: int, step: int) -> int:
    """63 bits of (seed, step)."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {step}".encode(), digest_size=8).digest(), "big") >> 1


@contextmanager
def _seeded(key: int, device: torch.device) -> Iterator[None]:
    """Dropout layers draw from the global generators: here they hold `key`, and afterwards what they held before."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(key)
        if device.type == "cuda":
            torch.cuda.manual_seed(key)
        yield


def _numbered(batches: Any, done: int, last: int | None) -> Iterator[tuple[int, Any]]:
    """(step, batch) from step done + 1 on."""
    if isinstance(batches, Tensor):
        raise TypeError(f"batches is a tensor {shape_of(batches)}; wanted data.Batches of it, or an iterable: [x0], a DataLoader")
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
    numbers = count(1) if last is None else range(1, last + 1)
    return zip(numbers, batches, strict=False)


def _parts(batch: Any, number: int) -> tuple[Tensor, Tensor | None]:
    parts = tuple(batch) if isinstance(batch, (tuple, list)) else (batch, None)
    if len(parts) != 2:
        raise ValueError(f"batch {number} has {len(parts)} parts; wanted a tensor x0 or a pair (x0, cond): (b[0] for b in batches)")
    if not isinstance(parts[0], Tensor) or not len(parts[0]):
        raise TypeError(f"batch {number} is {shape_of(parts[0])}; wanted a tensor [B, *shape] with rows: torch.as_tensor(...)")
    return parts


def _shares(n: int, parts: int) -> list[slice]:
    ends = [n * k // parts for k in range(parts + 1)]
    return [slice(a, b) for a, b in pairwise(ends) if a < b]


def _labels(cond: Tensor | None, dropout: float, model: Denoiser, generator: torch.Generator) -> Tensor | None:
    if cond is None:
        return None
    if not isinstance(model, Preconditioned):
        raise TypeError(f"batches give labels and {type(model).__name__} takes none; wanted Preconditioned, or x0 alone")
    if not dropout:
        return cond
    if cond.dtype != torch.int64:
        raise TypeError(f"label_dropout is {dropout}, and cond is {shape_of(cond)}; wanted int64 labels, of which -1 is none")
    dropped = torch.rand(len(cond), generator=generator, device=generator.device) < dropout
    return cond.masked_fill(dropped.to(cond.device), -1)


def _compiled(denoiser: Denoiser) -> Preconditioned:
    """The same parameters, the network through torch.compile."""
    if not isinstance(denoiser, Preconditioned):
        raise TypeError(
            f"compile=True and the denoiser is a {type(denoiser).__name__}; wanted Preconditioned, whose net is compiled"
        )
    return Preconditioned(torch.compile(denoiser.net), denoiser.sde, denoiser.parameterization).train()  # type: ignore[bad-argument-type]
