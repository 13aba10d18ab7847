"""The only caller of a denoiser while solving: it counts, checks and hands out noise."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .checks import NonFiniteError, Status, UnfinishedError
from .denoiser import Denoiser, check_denoiser
from .linear import LinearSDE
from .noise import Noise
from .parameterizations import Prediction

__all__ = ["Oracle"]

_ROUNDING = 1e-12  # relative: a time this far outside [t_min, t_max] is rounding of the end point


class Oracle:
    """A denoiser being queried: `oracle(x, t) -> Prediction`, counted; a context manager that counts network passes while open.

    denoiser: what is asked; noise: where a stochastic solver's randomness comes from (None: asking for it is an error);
    rows: the number of rows B, of which the first `kept` (all) are samples and the others padding, not counted; exact: the network
    must always see B rows, so that what asks for fewer pads them (`pad`). `nfe` `[B]` int64 on the CPU counts evaluations a sample.
    `ledger` splits the cost of a sample:
    score (solver evaluations), denoise (the final mean), rejected (evaluations of rejected adaptive steps, counted in score too),
    network (passes of the leaves that own a network, in rows / B), guidance (network passes beyond one an evaluation) and
    divergence (derivative passes in forward-equivalents: 1 a JVP, 2 a VJP) and, where JVPs come in several passes, repeated (network
    passes that each of them makes again). names: the numbers of the rows in the caller's batch, for
    errors; throw: a solver that meets NaN may raise at once (False: it leaves the sample NaN and goes on with the others).
    """

    def __init__(
        self, denoiser: Denoiser, rows: int, noise: Noise | None = None, *, names: Tensor | None = None, throw: bool = True,
        kept: int | None = None, exact: bool = False,
    ) -> None:  # fmt: skip
        self.denoiser, self.noise_source = check_denoiser(denoiser), noise
        self.sde: LinearSDE = denoiser.sde
        self.throw = throw
        self.names = torch.arange(rows) if names is None else names
        self._size, self.kept, self.exact = rows, rows if kept is None else kept, exact
        self._samples = self.kept  # of the whole batch, whatever is selected
        self._calls = [0]  # of the whole batch; one list for this oracle and its selections
        self._each = torch.zeros(rows, dtype=torch.int64)  # and those of selections, by row
        self._rows: Tensor | None = None  # of the root's batch, when this is a selection
        self._kind = "score"
        self._passes = 0
        self._now = [float(max(1, rows)), 1.0]  # the rows of the last question, and its share of the samples
        self._counts = dict.fromkeys(("score", "denoise", "rejected", "network", "divergence"), 0.0)
        self._handles: list[RemovableHandle] = []
        self._watched: WeakSet[Denoiser] | None = None  # while open
        self._recorder, self._hook = self.record, self._on_forward  # this oracle's, in its selections too
        self._marks: list[Tensor] = []
        self._lost = torch.zeros(rows, dtype=torch.int64)
        self._began = torch.zeros(rows, dtype=torch.int64)  # nfe when the trajectory began
        slack = _ROUNDING * self.sde.t_max
        self._span = (self.sde.t_min - slack, self.sde.t_max + slack)

    # --- asking -----------------------------------------------------------------------------------------------------------
    def __call__(self, x: Tensor, t: Tensor) -> Prediction:
        """The prediction at (x, t), counted once for every row."""
        self._count(t)
        return self.denoiser.predict(x, t)

    def mean(self, x: Tensor, t: Tensor) -> Tensor:
        """x0 at (x, t) alone, counted as a call: what a solver that needs nothing else of the prediction asks for."""
        if type(self.denoiser).predict is not Denoiser.predict:  # someone's own: it decides
            return self(x, t).x0
        self._count(t)
        return self.denoiser._mean(x, t)

    def _count(self, t: Tensor) -> None:
        low, high = self._span
        if t.device.type == "cpu" and not (
            low <= float(t) <= high if t.ndim == 0 else low <= float(t.min()) and float(t.max()) <= high
        ):
            raise ValueError(
                f"t = {t.flatten()[:4].tolist()} is outside [{self.sde.t_min}, {self.sde.t_max}], where {type(self.sde).__name__} "
                "is regular; choose times inside or give the SDE another t_min, t_max"
            )
        counts = self._counts
        if self._rows is None:
            self._calls[0] += 1
            share = 1.0
        else:
            self._each[self._rows] += 1
            share = self._share(self._rows)
        self._now[:] = [max(1, self._size if self._rows is None else len(self._rows)), share]
        counts[self._kind] += share
        counts["network"] += self._passes * share

    predict = __call__

    @property
    def nfe(self) -> Tensor:
        """Evaluations a sample, `[B]` int64 on the CPU."""
        return self._each + self._calls[0]

    @property
    def noise(self) -> Noise:
        """The noise source: `oracle.noise(x, t, s)` is unit noise for an interval."""
        if self.noise_source is None:
            raise ValueError("this solve has no noise source and the solver asks for noise; pass seeds= or generator=")
        return self.noise_source

    def select(self, index: Tensor) -> Oracle:
        """The oracle of these rows of the batch (a LongTensor): it counts into the same ledger."""
        part = object.__new__(Oracle)
        part.__dict__.update(self.__dict__)
        index = torch.as_tensor(index).cpu()
        part.denoiser = self.denoiser.select(index)
        part.noise_source = None if self.noise_source is None else self.noise_source.select(index)
        part._rows = index if self._rows is None else self._rows[index]
        part.names, part.kept = self.names[index], len(index)
        part._attach()
        return part

    def pad(self, index: Tensor) -> Tensor:
        """These rows, and copies of the last up to the size of the batch where the network must always see as many (`exact`)."""
        return torch.cat([index, index[-1:].expand(self._size - len(index))]) if self.exact else index

    def _share(self, rows: Tensor) -> float:
        """Part of the samples that these rows of the whole batch are: padding does not count."""
        return len(rows[rows < self._samples].unique()) / max(1, self._samples)

    def _whole(self, rows: Tensor) -> Tensor:
        """Where these rows are in the whole batch."""
        return rows if self._rows is None else self._rows[rows]

    def spent(self, rows: Tensor) -> Tensor:
        """Evaluations of these rows since the trajectory began, like rows."""
        rows = self._whole(rows)
        return self._each[rows] + self._calls[0] - self._began[rows]

    @property
    def lost(self) -> Tensor:
        """Which rows were given up, `[B]` on the CPU."""
        return self._lost != 0

    # --- counting ---------------------------------------------------------------------------------------------------------
    def record(self, name: str, amount: float) -> None:
        """Add `amount` network passes of kind `name`, for each sample of the last question, to the ledger."""
        self._counts[name] = self._counts.get(name, 0.0) + amount * self._now[1]

    def reject(self, rows: Tensor, amount: float) -> None:
        """Note that the last `amount` evaluations of these rows were of steps not taken."""
        self._counts["rejected"] += amount * self._share(self._whole(rows))

    @contextmanager
    def counting(self, kind: str) -> Iterator[None]:
        """Book the evaluations made inside under `kind`: score, denoise."""
        before, self._kind = self._kind, kind
        try:
            yield
        finally:
            self._kind = before

    @property
    def ledger(self) -> dict[str, float]:
        """Cost a sample, by kind (see the class)."""
        counts = dict(self._counts)
        extra = counts["network"] - counts["score"] - counts["denoise"] - counts.get("repeated", 0.0)
        return {**counts, "guidance": max(0.0, extra) if counts["network"] else 0.0}

    def __enter__(self) -> Oracle:
        self._watched = WeakSet()
        # One denoiser owns the network: an evaluation is one pass, and a hook would cost more than the count.
        self._passes = int(sum(isinstance(m, Denoiser) for m in self.denoiser.modules()) == 1)
        self._attach()
        return self

    def _attach(self) -> None:
        """Have the denoisers that are new to this solve tell what they do; a selection of a wrapper is a new one."""
        if self._watched is None:
            return
        for m in self.denoiser.modules():
            if isinstance(m, Denoiser) and m not in self._watched:
                self._watched.add(m)
                if self._recorder not in m.recorders:
                    m.recorders.append(self._recorder)
                if not self._passes and not any(isinstance(c, Denoiser) for c in m.modules() if c is not m):
                    self._handles.append(m.register_forward_hook(self._hook, with_kwargs=True))

    def __exit__(self, *_: Any) -> None:
        self._passes = 0
        while self._handles:
            self._handles.pop().remove()
        for m in self._watched or ():
            if self._recorder in m.recorders:
                m.recorders.remove(self._recorder)
        self._watched = None

    def _on_forward(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _out: Any) -> None:
        x, (rows, share) = args[0] if args else kwargs["x"], self._now
        self._counts["network"] += len(x) / rows * share

    def begin(self, x: Tensor) -> None:
        """Start to watch a trajectory from x `[B, *shape]`."""
        if x.shape[0] != self._size and self._rows is None:
            raise ValueError(f"x has {len(x)} rows, the oracle was made for {self._size}: Oracle(denoiser, {len(x)}, noise)")
        self._marks.clear()
        self._lost.zero_()
        self._began = self.nfe

    # --- watching ---------------------------------------------------------------------------------------------------------
    def watch(self, x: Tensor) -> None:
        """Note the state after a step: one sum a sample, left on its device, so that a fixed grid costs no synchronisation."""
        x = x.detach() if x.requires_grad else x
        self._marks.append((x if x.ndim == 2 else x.flatten(1)).sum(1))

    def status(self) -> Tensor:
        """`[B]` int64 on the CPU: 0 for a finite sample, else the number (from 1) of the first step that left it non-finite, or a

        negative `Status` of one given up (`lose`).
        """
        marks = torch.stack(self._marks) if self._marks else torch.zeros(1, self._size)
        if math.isfinite(float(marks.sum())):
            return self._lost.clone()
        bad = ~marks.isfinite().cpu()
        return torch.where(self.lost, self._lost, torch.where(bad.any(0), bad.int().argmax(0) + 1, 0))

    def lose(self, rows: Tensor, status: Status, problem: str) -> None:
        """Give these rows up with a status; raises what it means when the oracle throws: `problem` says where they are and the mend.

        Status.DONE is for rows that met NaN. The solver leaves NaN in all of them.
        """
        if self.throw:
            error = UnfinishedError if status else NonFiniteError
            raise error(f"{self._who(self.names[rows])} {problem}")
        self._lost[self._whole(rows)] = int(status) or len(self._marks) + 1  # the step under way

    def _who(self, names: Tensor) -> str:
        names, everyone = names.unique(), self.names.unique()  # padding repeats a row
        return f"samples {names[:8].tolist()}{' and more' if len(names) > 8 else ''} ({len(names)} of {len(everyone)})"

    def check(self, times: Tensor) -> Tensor:
        """The status; raises NonFiniteError when a watched state was not finite, naming samples, step and times."""
        status = self.status()
        if self.throw and bool(status.any()):
            step = int(status[status > 0].min())
            n = len(times) - 1
            there = (
                f"step {step} of {n} (t = {times[step - 1]:.6g} -> {times[step]:.6g})"
                if step <= n
                else f"the mean at t = {times[n]:.6g}"
            )
            raise NonFiniteError(
                f"the state of {self._who(self.names[status > 0])} is not finite after {there}: the "
                "denoiser returned NaN or infinity there, or the step overflowed; check the network at that time, or use throw=False "
                "and read .status"
            )
        return status
