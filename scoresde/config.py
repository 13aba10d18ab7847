# ruff: noqa: RUF009 -- `key` is dataclasses.field
"""The configuration of a training run: typed, checked, and the same in Python as in a YAML, JSON or TOML file."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from . import datasets, loss, nets, objectives, parameterizations
from . import sde as sdes
from .choices import Choice, Registry, build
from .ema import EMA, PowerEMA
from .linear import LinearSDE
from .nets import presets
from .sections import Section, key, override, read, tree_of
from .strict import MAX_LENGTH, emit, nearest, parse

__all__ = ["Average", "Choice", "Config", "Data", "Every", "Samples", "dump", "load"]

SETS = tuple(datasets.SETS)
SDES = Registry.of(sdes, extra={"VE": {"from_data": bool}})
PRESETS = {name: functools.partial(kind, **options) for name, (kind, options) in presets.PRESETS.items()}
NETS = Registry({**Registry.of(nets, given=("shape", "classes")).known, **PRESETS}, ("shape", "classes"))
PARAMETERIZATIONS = Registry.of(parameterizations, calls=("sde", "t"))
WEIGHTS = Registry.of(loss, calls=("sde", "t"))
TIMES = Registry({**Registry.of(loss, calls=("sde", "u")).known, "importance": loss.importance}, ("sde", "u", "of"))
SPREADS = {"stratified": loss.stratified, "low_discrepancy": loss.low_discrepancy, "none": lambda times: times}
LOSS = ("denoiser", "x0", "t", "weight", "noise")
MADE = {
    name: getattr(objectives, name) for name in ("Uncertainty", "antithetic", "controlled")
}  # classes whose instances are losses
OBJECTIVES = Registry({**Registry.of(loss, objectives, calls=LOSS).known, **MADE}, LOSS)
TWICE = tuple(objective.__name__ for objective in objectives.TWICE)
OPTIMIZERS = Registry({name: getattr(torch.optim, name) for name in ("AdamW", "Adam", "SGD", "RMSprop")}, ("params",))


# --- the tree ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Data(Section):
    """What is learned."""

    source: str = key(f"a set ({', '.join(SETS)}), an .npy file, or a folder of images, written with a / as in ./images")
    part: str | None = key("of a set; null: train", None, among=("train", "test"))
    folder: str | None = key("where the files of a set already lie", None)
    labels: str | None = key("an .npy file of whole numbers, one an entry of an .npy or a folder; null: what lies with it", None)
    levels: int | None = key("grey levels of an .npy of integers; null: 256", None, low=2)
    conditional: bool = key("give the labels to the network", False)
    flip: bool = key("mirror images left to right, every other one by chance", False)
    held_out: int = key("entries kept out of the training, for every.validate", 0, low=0)
    dequantize: bool = key("add noise uniform within each grey level, for likelihoods", False)
    low: float = key("the number of the darkest grey", -1.0)
    high: float = key("the number of the brightest", 1.0)
    workers: int = key("threads that read ahead", 0, low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.source not in SETS and "/" not in self.source and os.sep not in self.source and not self.source.endswith(".npy"):
            raise ValueError(f"source is {self.source[:60]!r}; {nearest(self.source, SETS)}; a file ends in .npy, a folder has a /")
        if not self.high - self.low < 1e30:
            raise ValueError(f"low is {self.low:g}, high is {self.high:g}; wanted a range that float32 resolves, such as -1 and 1")
        if self.low >= self.high:
            raise ValueError(f"low is {self.low:g}, high is {self.high:g}; wanted low < high: swap them?")
        others = ("labels", "levels") if self.source in SETS else ("part", "folder")
        if given := [name for name in others if getattr(self, name) is not None]:
            kind = "a set, which has its own" if self.source in SETS else "a path: give that of the part"
            raise ValueError(f"{given[0]} is {getattr(self, given[0])!r} and source is {self.source[:60]!r}, {kind}; wanted null")


@dataclass(frozen=True)
class Average(Section):
    """A moving average of the weights: one of the two."""

    decay: float | None = key("exponential, of this decay a step", None, low=0.0, below=1.0)
    std: float | None = key("power function, this share of the training wide", None, above=0.0, high=12**-0.5)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.decay is None) == (self.std is None):
            raise ValueError(f"decay is {self.decay}, std is {self.std}; wanted one of them")


@dataclass(frozen=True)
class Every(Section):
    """Steps from one to the next; 0 is never."""

    log: int = key("line of the loss", 50, low=0)
    checkpoint: int = key("checkpoint, from which the same command goes on", 1000, low=0)
    keep: int = key("how many checkpoints are kept", 3, low=1)
    average: int = key("averages stored for good, for scoresde.run.average", 0, low=0)
    validate: int = key("loss of the entries held out", 0, low=0)
    sample: int = key("grid of samples", 0, low=0)
    fid: int = key("Frechet distance of samples and data", 0, low=0)


@dataclass(frozen=True)
class Samples(Section):
    """The samples of every.sample and every.fid."""

    count: int = key("in a grid", 64, low=1)
    nfe: int = key("evaluations a sample", 35, low=1)
    columns: int = key("of the grid", 8, low=1)
    fid: int = key("of a Frechet distance", 1000, low=2)
    features: str | None = key("folder of a saved feature network", None)


@dataclass(frozen=True)
class Config(Section):
    """A training run. A part with a name is written as the name, or as {name: ..., its options}; null for the network is by the data."""

    data: Data = key("what is learned")
    sde: Choice = key("the forward process; VE takes from_data: true for the sigma_max of the data", Choice("VP"), among=SDES)
    net: Choice | None = key("the network; null: an MLP for vectors, a UNet for images; or a preset", None, among=NETS)
    parameterization: Choice = key("what the network predicts", Choice("edm"), among=PARAMETERIZATIONS)
    weight: Choice = key("of the error at a time", Choice("edm"), among=WEIGHTS)
    times: Choice = key("the distribution of times in training", Choice("log_normal"), among=TIMES)
    spread: str = key("the times of a batch", "stratified", among=tuple(SPREADS))
    objective: Choice = key("the loss", Choice("dsm_loss"), among=OBJECTIVES)
    optimizer: Choice = key("of torch.optim", Choice("AdamW"), among=OPTIMIZERS)
    steps: int = key("of the optimizer", 5000, low=1)
    batch: int = key("entries a step", 128, low=1)
    accumulate: int = key("parts that a batch is worked off in", 1, low=1)
    clip: float = key("largest gradient norm; .inf: none", 1.0, above=0.0, infinite=True)
    warmup: int = key("steps over which the learning rate rises", 0, low=0)
    decay: str = key("of the learning rate", "none", among=("none", "linear", "cosine", "sqrt"))
    precision: str = key("of the network's arithmetic", "float32", among=("float32", "bf16", "fp16"))
    compile: bool = key("run the network through torch.compile", False)
    channels_last: bool = key("memory format of images", False)
    sharded: bool = key("shard parameters, gradients, optimizer and averages over the processes (FSDP2)", False)
    label_dropout: float = key("share of labels left out, for guidance", 0.0, low=0.0, below=1.0)
    patience: int = key("steps in a row without a finite gradient before the run stops", 8, low=1)
    ema: tuple[Average, ...] = key("averages of the weights", (Average(0.999),))
    every: Every = key("how often what is done", Every())
    samples: Samples = key("of every.sample and every.fid", Samples())
    seed: int = key("of weights, order, times and noise", 0, low=0)
    device: str = key("cpu, cuda, cuda:1, ...", "cpu")
    tensorboard: bool = key("write the log for TensorBoard too", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        wrong = {
            f"accumulate is {self.accumulate}; wanted at most batch, {self.batch}": self.accumulate > self.batch,
            f"label_dropout is {self.label_dropout:g} and data.conditional is false; wanted 0, or labels to drop":
                self.label_dropout > 0 and not self.data.conditional,
            "sharded and channels_last are true, and FSDP2 cuts contiguous tensors alone; wanted one of them":
                self.sharded and self.channels_last,
            f"sharded is true and objective {self.objective.name} differentiates the network, and FSDP2 has no double backward; wanted "
            "sharded: false, where DistributedDataParallel can": self.sharded and self.objective.name in TWICE,
            f"sharded is true, precision is fp16 and objective {self.objective.name} learns numbers that are not sharded; wanted bf16":
                self.sharded and self.precision == "fp16" and self.objective.name == "Uncertainty",
            f"every.validate is {self.every.validate} and data.held_out is 0; wanted entries to validate on":
                self.every.validate > 0 and not self.data.held_out,
        }  # fmt: skip
        if words := [text for text, is_wrong in wrong.items() if is_wrong]:
            raise ValueError(words[0])
        try:
            torch.device(self.device)
        except RuntimeError as error:
            raise ValueError(f"device is {self.device[:60]!r}; wanted cpu, cuda, cuda:1, ...") from error
        _probe(self)


# --- objects -------------------------------------------------------------------------------------------------------------
def sde_of(choice: Choice, x: Tensor | None = None) -> LinearSDE:
    """The SDE; x `[N, *shape]`: data, for a VE with from_data: true, whose sigma_max is then the data's (`VE.from_data`)."""
    options = dict(choice.options)
    from_data = options.pop("from_data", False)
    if from_data and "sigma_max" in options:
        raise ValueError(f"sde.sigma_max is {options['sigma_max']} and from_data is true; wanted one of them")
    sde = build(Choice(choice.name, options), SDES, "sde")
    if not from_data:
        return sde
    if x is None:
        raise TypeError("x is None; wanted the data [N, *shape], for a VE with from_data: true")
    return dataclasses.replace(sde, sigma_max=sdes.VE.from_data(x, sde.sigma_min).sigma_max)


def net_of(choice: Choice | None, shape: Sequence[int], classes: int = 0, seed: int = 0) -> nn.Module:
    """The network for samples of this shape; for None an MLP for vectors, a UNet for images. seed: where the options have none."""
    choice = choice or Choice("UNet" if len(shape) == 3 else "MLP")
    return build(Choice(choice.name, {"seed": seed, **choice.options}), NETS, "net", shape=tuple(shape), classes=classes)


def times_and_weight_of(config: Config) -> tuple[loss.Times, loss.Weight]:
    """The distribution of times in training, spread over a batch, and the weight; times of importance change both."""
    weight = build(config.weight, WEIGHTS, "weight")
    if config.times.name == "importance":
        times = build(config.times, TIMES, "times", of=weight)
        return SPREADS[config.spread](times), times.weight
    return SPREADS[config.spread](build(config.times, TIMES, "times")), weight


def optimizer_of(choice: Choice, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of these parameters."""
    return build(choice, OPTIMIZERS, "optimizer", params=list(parameters))


def average_of(average: Average, module: nn.Module) -> EMA:
    """The average of this module's weights."""
    return EMA(module, average.decay) if average.std is None else PowerEMA(module, average.std)  # type: ignore[bad-argument-type]


def _try(choice: Choice) -> None:
    """One step of the optimizer on one number."""
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = optimizer_of(choice, [parameter])
    parameter.grad = torch.ones(1)
    try:
        optimizer.step()
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"optimizer: {choice.name} with {dict(choice.options)} takes no step ({error}); leave out that option"
        ) from error
    if not bool(parameter.isfinite()):
        raise ValueError(f"optimizer: {choice.name} with {dict(choice.options)} steps to {parameter.item()}; wanted finite options")


def _probe(config: Config) -> None:
    """Make and call what needs no data: the ranges of options are known to the parts alone."""
    sde = sde_of(config.sde, torch.tensor([[-50.0], [50.0]]))
    u = torch.tensor([0.25, 0.75], dtype=torch.float64)
    build(config.objective, OBJECTIVES, "objective")
    _try(config.optimizer)
    times, weight = times_and_weight_of(config)
    t = sde.t_min + u * (sde.t_max - sde.t_min)
    calls = {"times": lambda: times(sde, u), "weight": lambda: weight(sde, t)}
    parts = {**calls, "parameterization": lambda: torch.stack(build(config.parameterization, PARAMETERIZATIONS, "")(sde, t))}
    for path, call in parts.items():
        choice = getattr(config, path)
        try:
            found = torch.as_tensor(call())
        except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            raise ValueError(f"{path}: {choice.name}: {error}") from error
        dead = {"weight": found < 0, "parameterization": found[1] == 0}.get(path, torch.tensor(False))  # [1]: c_out
        if not bool(found.isfinite().all()) or bool(dead.any()):
            raise ValueError(f"{path} is {tree_of(choice)}, which gives {found.tolist()}; wanted other options")


# --- files ---------------------------------------------------------------------------------------------------------------
FORMS = {".yaml": "yaml", ".yml": "yaml", ".json": "json", ".toml": "toml"}


def load(source: os.PathLike[str] | str, overrides: Sequence[str] = ()) -> Config:
    """The configuration in a file (a Path: .yaml, .yml, .json, .toml) or in a text (a str: YAML), with `overrides` key.sub=value.

    Values of overrides are YAML too, the last one of a key counts, and what is under a part with a name is an option of it. Raises
    ValueError or TypeError that names the key, what came, what was wanted and the nearest name; OSError for a file that is not read.
    """
    where = "" if isinstance(source, str) else f"{source}: "
    try:
        tree = parse(source) if isinstance(source, str) else parse(_text(Path(source)), FORMS[Path(source).suffix.lower()])
        if tree is not None and not isinstance(tree, dict):
            raise TypeError(
                f"it is a {type(tree).__name__}; wanted a mapping, such as data: {{source: digits}}, or a Path of a file"
            )
        tree = tree or {}
        for text in overrides:
            override(Config, tree, text)
        return read(Config, tree)
    except (TypeError, ValueError) as error:
        raise (TypeError if isinstance(error, TypeError) else ValueError)(f"{where}{error}") from error


def dump(config: Config) -> str:
    """YAML of every key, which loads as an equal Config."""
    return emit(tree_of(config))


def _text(path: Path) -> str:
    if path.suffix.lower() not in FORMS:
        raise ValueError(f"wanted a file that ends in {', '.join(FORMS)}")
    with path.open("rb") as file:
        data = file.read(4 * MAX_LENGTH + 1)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError("it is no text in UTF-8") from error
