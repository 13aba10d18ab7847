"""What a run looks at every so many steps: the loss of held-out data, samples, a Frechet distance. None of it touches the training."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import config as configs
from . import reports
from .choices import build
from .command import warn
from .data import split
from .denoiser import Preconditioned
from .images import is_picture
from .job import Job, spread
from .logs import Log
from .reports import Scorer
from .resume import write_json
from .train import loss_by_level

__all__ = ["Watch"]

T = TypeVar("T")
FORGIVEN = (ArithmeticError, ModuleNotFoundError, OSError, ValueError)  # a picture or a score is not worth the training


class Watch:
    """The reports of a run, each of which leaves the training as it was. The processes of a group share the work; the first writes."""

    def __init__(self, job: Job, folder: Path, log: Log, levels: Log) -> None:
        self.job, self.folder, self.log, self.levels, self.group = job, folder, log, levels, job.group
        self.scorer: Scorer | None = None
        self.shape = tuple(job.source.shape)
        self.classes = job.source.classes if job.config.data.conditional else 0
        every = job.config.every
        if every.sample:
            module = "PIL" if is_picture(self.shape) else "matplotlib"
            if importlib.util.find_spec(module) is None:
                raise ModuleNotFoundError("every.sample draws pictures: pip install 'scoresde[plots]', or set it to 0")
        if every.fid:
            self._check_fid()

    def _check_fid(self) -> None:
        """What a Frechet distance needs, before the first step."""
        job, taught = self.job, self._taught()
        if job.config.samples.features is not None:
            self.features: Any = reports.load_features(Path(job.config.samples.features))
        elif not taught and math.prod(self.shape) > 4096:
            raise ValueError(
                f"every.fid is {job.config.every.fid}, and samples of {math.prod(self.shape)} numbers without labels have no features to "
                "compare; wanted samples.features, a folder of them, or data.labels"
            )
        if len(job.held_out or job.source) < (2 if job.held_out else 4):
            raise ValueError(
                f"every.fid is {job.config.every.fid} and there are {len(job.held_out or job.source)} entries to compare with"
            )

    def _taught(self) -> bool:
        """Whether the labels can teach features of images."""
        labels = self.job.source.labels is not None and self.job.source.classes > 1
        return labels and len(self.shape) == 3 and min(self.shape[1:]) >= 4

    def __call__(self, step: int) -> None:
        """After a step: what is due then, or at the last one."""
        every = self.job.config.every
        for period, report in ((every.validate, self.validate), (every.sample, self.sample), (every.fid, self.fid)):
            if period and (step % period == 0 or step == self.job.config.steps):
                average = self.job.average
                mode = average.training
                average.eval()
                try:
                    report(step, average)
                except FORGIVEN as error:
                    if self.group.first:
                        warn(f"step {step}: no {report.__name__}: {error}")
                finally:
                    average.train(mode)

    def _alike(self, work: Callable[[], T]) -> T | None:
        """What the work returns; what it raises and is forgiven in one process is raised in all, at the same place."""
        found, failure = None, None
        try:
            found = work()
        except FORGIVEN as error:
            failure = error
        told = [text for text in self.group.objects(None if failure is None else str(failure)) if text is not None]
        if failure is not None or told:
            raise failure or ValueError(told[0])
        return found

    def _first(self, work: Callable[[], object]) -> None:
        """The work in the first process, for which the others wait."""
        self._alike(lambda: work() if self.group.first else None)

    def _drawn(self, model: Preconditioned, count: int) -> Tensor:
        """Samples of the seeds 0 .. count - 1, in the first process; nothing in the others."""
        draw = lambda: reports.draw(model, self.shape, count, self.job.config.samples.nfe, self.classes, group=self.group)
        if self.group.world == 1:
            return draw()
        parts = self.group.to_first(self._alike(lambda: draw().cpu()))
        return torch.cat(parts) if parts else torch.empty(0)  # type: ignore[no-matching-overload]

    @cached_property
    def _held_out(self) -> tuple[Tensor, Tensor | None]:
        """What is validated on and its labels, read once."""
        source: Any = self.job.held_out
        x0 = self.job.seen(source, 10_000).to(self.job.training.device)
        return x0, torch.from_numpy(source.labels[spread(source, 10_000)]).to(x0.device) if self.classes else None

    def validate(self, step: int, model: Preconditioned) -> None:
        """The loss of what is held out, by noise level and its mean."""
        x0, cond = self._alike(lambda: self._held_out) or self._held_out
        weight = build(self.job.config.weight, configs.WEIGHTS, "weight")
        logsnr, loss = loss_by_level(model, x0, cond=cond, weight=weight, seed=self.job.config.seed, group=self.group)
        for a, b in zip(logsnr.tolist(), loss.tolist(), strict=True):
            self.levels.add({"step": step, "logsnr": a, "loss": b})
        self.log.add({"step": step, "validation_loss": float(loss.mean())})

    def sample(self, step: int, model: Preconditioned) -> None:
        """A grid of samples; its seeds are the same at every step."""
        chosen = self.job.config.samples
        x = self._drawn(model, chosen.count)
        data = lambda: self.job.seen(self.job.source, 1000)

        def show() -> None:
            (self.folder / "samples").mkdir(exist_ok=True)
            reports.show(self.folder / "samples" / f"step-{step:08d}.png", x, data, self.job.scale, chosen.columns)

        self._first(show)

    def fid(self, step: int, model: Preconditioned) -> None:
        """Frechet distance of samples to the held-out data, or to the training's where nothing is held out."""
        x = self._drawn(model, self.job.config.samples.fid)

        def score() -> None:
            scorer = self.scorer = self.scorer or self._scorer()
            self.log.add({"step": step, scorer.name: scorer(x)})

        self._first(score)

    def _scorer(self) -> Scorer:
        job, chosen = self.job, self.job.config.samples
        features: Any = reports.Pixels()
        if chosen.features is not None:
            features = self.features
        elif self._taught():
            own = self.folder / "features"
            if not (own / "manifest.json").exists():
                rows = spread(job.source, reports.TAUGHT)
                known: Any = job.source.labels
                labels = torch.from_numpy(known[rows])
                order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
                images = job.scale.seen(job.source.x[rows])
                reports.learn_features(own, images[order], labels[order], job.source.classes)
            features = reports.load_features(own)
        # The floor is of data that the reference does not have.
        real, reference = (job.source, job.held_out) if job.held_out else split(job.source, 0.5, seed=job.config.seed)
        scorer = Scorer(features, job.seen(reference, 10_000), job.scale, chosen.fid)
        real = job.seen(real, chosen.fid)
        record = scorer.record(
            scorer(real), of="held out" if job.held_out else "training", floor_samples=len(real), nfe=chosen.nfe,
            seeds=f"0 .. {chosen.fid - 1}", weights=job.training.emas[0].name if job.training.emas else "model",
        )  # fmt: skip
        write_json(self.folder / "fid.json", record)
        return scorer
