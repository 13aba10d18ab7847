"""What training changes, as one thing that can be stored and set back: network, optimizer, averages, counts."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .checks import check_callable, check_count, shape_of
from .denoiser import Denoiser, Preconditioned, check_denoiser
from .ema import EMA
from .loss import Objective, dsm_loss
from .pieces import cut, cut_state, in_pieces, local, raw, whole

__all__ = ["Training"]

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg")
HALVES = {torch.float16: True, torch.bfloat16: False}  # whether its gradients need a scale to stay above its smallest number


class Training:
    """What training changes: the denoiser, the optimizer, the averages, an objective's own parameters, the scale of float16, the step.

    optimizer: default AdamW(lr=1e-3) on the parameters of denoiser and objective; ema: one average or several, updated after every
    step; objective: (denoiser, x0, t, weight, noise) -> loss `[B]`, a module if it has parameters of its own; precision: None, or
    torch.bfloat16 or torch.float16 for the network's arithmetic (autocast; the parameters stay as they are). `state()` and
    `restore()` are all of it as tensors and plain numbers: what a checkpoint keeps, the same for a training that is sharded over
    processes (`scoresde.sharded.shard`); `tensors()`, `moments()` and `whole()` are then calls of all of them.
    """

    def __init__(
        self, denoiser: Denoiser, optimizer: torch.optim.Optimizer | None = None, ema: EMA | Iterable[EMA] | None = None, *,
        objective: Objective = dsm_loss, precision: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self.denoiser = check_denoiser(denoiser)
        self.objective = check_callable(objective, "objective", "a function (denoiser, x0, t, weight, noise) -> loss [B]")
        own = list(objective.parameters()) if isinstance(objective, nn.Module) else []
        if optimizer is None and not any(p.requires_grad for p in denoiser.parameters()):
            raise ValueError(f"{type(denoiser).__name__} has no parameters to train; wanted a network: Preconditioned(net, sde)")
        self.optimizer = torch.optim.AdamW([*denoiser.parameters(), *own], lr=1e-3) if optimizer is None else optimizer
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer is {optimizer!r}; wanted a torch.optim.Optimizer of denoiser.parameters(), as torch.optim.Adam makes"
            )
        moved = {id(p) for p in self.parameters if p.requires_grad}
        known = {id(p) for p in denoiser.parameters()}  # none of a callable that hides its network
        if known and not moved & known:
            raise ValueError(
                "the optimizer moves no parameter of the denoiser; wanted Adam(denoiser.parameters()), with gradients required"
            )
        if not {id(p) for p in own} <= {id(p) for p in self.parameters}:
            raise ValueError(
                "the optimizer lacks the objective's own parameters: [*denoiser.parameters(), *objective.parameters()]"
            )
        if ema is not None and not isinstance(ema, (EMA, Iterable)):
            raise TypeError(f"ema is {ema!r}; wanted EMA(denoiser, decay), PowerEMA(denoiser, std), or several")
        self.emas = [] if ema is None else [ema] if isinstance(ema, EMA) else list(ema)
        if strange := [shape_of(e) for e in self.emas if not isinstance(e, EMA)]:
            raise TypeError(f"ema holds {strange}; wanted EMA or PowerEMA of the denoiser, one or several")
        shapes = lambda module: {name: value.shape for name, value in module.state_dict().items()}
        if strange := [e.name for e in self.emas if shapes(e.module) != shapes(denoiser)]:
            raise ValueError(f"{strange} are averages of another module; wanted EMA(denoiser)")
        if len({e.name for e in self.emas}) != len(self.emas):
            raise ValueError(f"two averages are alike: {[e.name for e in self.emas]}; wanted each once")
        if precision not in (None, *HALVES):
            raise ValueError(f"precision is {precision}; wanted None (the network's own), torch.bfloat16 or torch.float16")
        self.precision = precision
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=HALVES.get(precision, False))  # type: ignore[bad-argument-type]
        self.step = self.skipped = self.in_a_row = 0
        self.skeleton: nn.Module | None = None  # of a sharded training: the denoiser without its parameters, as it was
        self.order: Any = None  # of one, too: what its processes run
        self.inside = False  # while the objective runs

    @property
    def sharded(self) -> bool:
        """Whether each process has a piece of every parameter (FSDP2)."""
        return self.skeleton is not None

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
        return {name: {k: _gathered(v) for k, v in module.state_dict().items()} for name, module in self._modules().items()}

    def moments(self) -> dict[str, Any]:
        """The state_dict of the optimizer, of whole tensors."""
        found = self.optimizer.state_dict()
        if not self.sharded:
            return found
        return {**found, "state": {n: {k: _gathered(v) for k, v in each.items()} for n, each in found["state"].items()}}

    def whole(self, module: Any) -> Any:
        """The denoiser or an average of it: itself, or of a sharded training a whole copy, to be looked at and thrown away."""
        if self.skeleton is None:
            return module
        with torch.no_grad():
            full = [nn.Parameter(whole(p).to(self.device), requires_grad=False) for p in module.parameters()]
        made = copy.deepcopy(self.skeleton, {id(a): b for a, b in zip(self.skeleton.parameters(), full, strict=True)})
        for mine, its in zip(made.buffers(), module.buffers(), strict=True):
            mine.copy_(its)
        return made.train(module.training)

    def digest(self) -> str:
        """Of every tensor that is in one piece, to the bit, and of the counts: processes that train together start alike."""
        found = hashlib.blake2b(repr(self.state()).encode(), digest_size=16)
        moments = [v for each in self.optimizer.state.values() for v in each.values()]
        for v in [*(v for module in self._modules().values() for v in module.state_dict().values()), *moments]:
            if isinstance(v, Tensor) and not in_pieces(v):
                found.update(raw(v))
        return found.hexdigest()

    def state(self) -> dict[str, Any]:
        """The rest, as plain numbers; the optimizer's state apart."""
        scale = dict(self.scaler.state_dict())
        counts = {"step": self.step, "skipped": self.skipped, "in_a_row": self.in_a_row}
        names = {"optimizer": type(self.optimizer).__name__}
        return {**counts, **names, "updates": {e.name: e.updates for e in self.emas}, "scaler": scale}

    def buffers(self) -> list[tuple[nn.Module, str, Tensor]]:
        """(module, name, buffer) of all that a forward pass may change besides parameters: statistics of a batch norm, say."""
        roots = [self.denoiser, *([self.objective] if isinstance(self.objective, nn.Module) else [])]
        return [(m, n, b) for root in roots for m in root.modules() for n, b in m.named_buffers(recurse=False)]

    def finite(self) -> bool:
        """Whether every parameter, average and buffer is: what is stored must be worth going on from. Of this process's pieces."""
        floats = [local(v) for m in self._modules().values() for v in m.state_dict().values() if v.is_floating_point()]
        return all(bool(v.isfinite().all()) for v in floats)

    def restore(
        self, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], optimizer: Mapping[str, Any] | None
    ) -> None:
        """Set everything to what `tensors()`, `state()` and `moments()` gave; ValueError for another training's."""
        modules = self._modules()
        if missing := sorted(modules.keys() ^ tensors.keys()):
            raise ValueError(f"the checkpoint and this training differ in {missing}: same averages, same objective as then")
        kinds = lambda found: {name: (value.shape, value.dtype) for name, value in found.items()}
        for name, module in modules.items():
            here, there = kinds(module.state_dict()), kinds(tensors[name])
            if wrong := [key for key in {**here, **there} if here.get(key) != there.get(key)]:
                raise ValueError(f"{name} of the checkpoint differs in {wrong[:3]}, among {len(wrong)}: same network as then")
        try:
            if optimizer is not None:
                _check_moments(self.optimizer, optimizer, state.get("optimizer"))
            counts = [check_count(state[key], key, 0) for key in ("step", "skipped", "in_a_row")]
            updates = {e.name: check_count(state["updates"][e.name], e.name, 0) for e in self.emas}
            scale = {} if not self.scaler.is_enabled() else {key: state["scaler"][key] for key in self.scaler.state_dict()}
            if optimizer is not None:
                self.optimizer.load_state_dict(self._cut(optimizer))
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"the checkpoint does not fit this training ({type(error).__name__}: {error}): same optimizer as then"
            ) from error
        for name, module in modules.items():
            here = module.state_dict()
            module.load_state_dict({key: cut(value, here[key]) for key, value in tensors[name].items()})
        for e in self.emas:
            e.updates = updates[e.name]
        if scale:
            self.scaler.load_state_dict(scale)
        self.step, self.skipped, self.in_a_row = counts

    def _cut(self, optimizer: Mapping[str, Any]) -> dict[str, Any]:
        """The state of an optimizer, each moment in pieces where its parameter is."""
        numbers = [n for group in optimizer["param_groups"] for n in group["params"]]
        of = dict(zip(numbers, self.parameters, strict=True))
        return {**optimizer, "state": {n: cut_state(each, of[n]) for n, each in optimizer["state"].items()}}


def _gathered(value: Any) -> Any:
    """What a checkpoint keeps of a value: on the host, where it had to be put together."""
    return whole(value).cpu() if in_pieces(value) else value


def _check_moments(optimizer: torch.optim.Optimizer, found: Mapping[str, Any], kind: Any) -> None:
    """Raise unless `found` is a state of an optimizer of this kind, with moments of the shapes of its parameters."""
    if kind not in (None, type(optimizer).__name__):
        raise ValueError(f"its optimizer is {kind}, this one {type(optimizer).__name__}")
    ours = optimizer.param_groups
    if [len(group["params"]) for group in found["param_groups"]] != [len(group["params"]) for group in ours]:
        raise ValueError("its optimizer has other groups of parameters")
    if missing := sorted(
        {key for a, b in zip(ours, found["param_groups"], strict=True) for key in a.keys() - b.keys()} - {"initial_lr"}
    ):
        raise ValueError(f"its optimizer lacks {missing}")
    numbers = [n for group in found["param_groups"] for n in group["params"]]
    parameters = dict(zip(numbers, (p for group in ours for p in group["params"]), strict=True))
    for n, moments in found["state"].items():
        for key, value in moments.items():
            if key in MOMENTS and value is not None and value.shape != parameters[n].shape:
                raise ValueError(f"{key} of parameter {n} is {shape_of(value)}, the parameter {list(parameters[n].shape)}")
