"""Models and training runs in folders of safetensors and JSON: no pickle, nothing overwritten unasked, every byte verified on loading.

A model's folder has `model.safetensors`, `config.json` and, written last, `manifest.json`. A training run has a folder a step,
`step-00001000`, with the averages, the optimizer and the state besides, and the same config.json: `load` reads either.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import codec, nets, parameterizations, store
from . import sde as sdes
from .checks import check_count, shape_of
from .denoiser import Preconditioned
from .linear import LinearSDE
from .pieces import in_pieces

__all__ = ["Snapshot", "describe", "find", "from_pretrained", "load", "read", "save", "save_pretrained", "write"]

FORMATS = (1, 2)  # 1: no manifest, the SHA-256 of the weights in config.json alone
FORMAT = 2
CAST = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


# --- what a config says --------------------------------------------------------------------------------------------------
def _name(module: Any, value: Any) -> tuple[str, bool]:
    """What config.json calls a class or function, and whether it is `module`'s own: one's own of the same name is not taken for it."""
    name = getattr(value, "__name__", repr(value))
    known = name in module.__all__ and getattr(module, name) is value
    return (name if known else f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', name)}"), known


def describe(denoiser: Preconditioned) -> dict[str, Any]:
    """The SDE, parameterization and network of a denoiser by name and settings: what config.json has of it, and `load` makes it from.

    What is not the library's own is named and no more: `load` wants it as an argument. Raises TypeError for a denoiser without a network,
    ValueError for settings that a name cannot carry.
    """
    if not isinstance(denoiser, Preconditioned):
        raise TypeError(f"denoiser is a {type(denoiser).__name__}; wanted Preconditioned: only a network has weights to save")
    name, known = _name(sdes, type(denoiser.sde))
    sde = {"name": name}
    if known:
        fields = {f.name: getattr(denoiser.sde, f.name) for f in dataclasses.fields(denoiser.sde) if f.init}  # type: ignore[arg-type]
        sde |= {} if any(callable(value) for value in fields.values()) else fields
    fn, settings = denoiser.parameterization, dict[str, Any]()
    if isinstance(fn, functools.partial):
        if fn.args:
            raise ValueError(f"the parameterization is {fn} with {len(fn.args)} settings by place; give them by name")
        fn, settings = fn.func, dict(fn.keywords)
    name, known = _name(parameterizations, fn)
    parameterization = {"name": name, **(settings if known else {})}
    name, known = _name(nets, type(denoiser.net))
    net = {"name": name, **(getattr(denoiser.net, "config", {}) if known else {})}
    return {"format": FORMAT, "sde": sde, "parameterization": parameterization, "net": net}


def _known(module: Any, name: Any, what: str) -> Any:
    """The object of this name that `module` exports (a function for a parameterization, else a class); names reach no further."""
    known = sorted(n for n in module.__all__ if isinstance(getattr(module, n), type) == (what != "parameterization"))
    if name not in known:
        raise ValueError(f"config.json names the {what} {name!r}; known are {known}: pass {what}= to load your own")
    return getattr(module, name)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _build(module: Any, settings: dict[str, Any], what: str) -> Any:
    """The object that `settings` describe: name and arguments."""
    kind = _known(module, settings.pop("name", None), what)
    try:
        return kind(**{key: _tuples(value) for key, value in settings.items()})
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError) as error:
        raise ValueError(f"config.json does not describe a {what} ({error}); pass {what}= to load your own") from error


def _parameterization(settings: dict[str, Any]) -> Callable[..., Any]:
    fn = _known(parameterizations, settings.pop("name", None), "parameterization")
    return functools.partial(fn, **settings) if settings else fn


# --- a model in a folder -------------------------------------------------------------------------------------------------
def _cast(state: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[dict[str, Tensor], str]:
    """Floating tensors in `dtype`, which holds every one of them, and the name of the dtype they had."""
    names = {str(value.dtype).removeprefix("torch.") for value in state.values() if value.is_floating_point()}
    if dtype not in CAST.values() or len(names) != 1 or not names <= CAST.keys():
        raise ValueError(f"dtype is {dtype} for weights of {sorted(names)}; wanted one of {list(CAST)} for weights of one of them")
    found = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    for name, value in found.items():
        if not torch.equal(value.isfinite(), state[name].isfinite()):
            raise ValueError(f"{name} has weights too large for {dtype}; save them in bfloat16, or as they are")
    return found, names.pop()


def save(
    folder: str | os.PathLike[str], denoiser: Preconditioned, *, overwrite: bool = False, dtype: torch.dtype | None = None
) -> Path:
    """Write a network with its SDE and parameterization into `folder` (made if missing); return the folder.

    dtype: of the weights in the file, to halve it (torch.float16, bfloat16); `load` brings them back to the dtype they had, rounded.
    Raises FileExistsError when a checkpoint is there and not overwrite, TypeError for a denoiser without a network, ValueError for
    settings that JSON cannot hold, for tied weights and for weights beyond `dtype`, RuntimeError while another process writes there,
    `scoresde.store.SaveError` (an OSError) when the disk refuses. A kill while overwriting leaves the old model, the new one, or what
    `load` refuses.
    """
    config, folder = describe(denoiser), Path(folder)
    if any(map(in_pieces, denoiser.parameters())):
        raise ValueError("the network is sharded over processes; wanted training.whole(denoiser), a call of all of them")
    if (folder / "config.json").exists() and not overwrite:
        raise FileExistsError(f"{folder} holds a checkpoint; choose another folder or pass overwrite=True")
    state: Mapping[str, Tensor] = denoiser.net.state_dict()
    if dtype is not None:
        state, config["dtype"] = _cast(state, dtype)
    weights = codec.to_tensors(state, "the network's state")
    config["sha256"] = hashlib.sha256(weights).hexdigest()
    files = {"model.safetensors": weights, "config.json": _text(config, denoiser)}
    with store.saving(folder, "the model"), store.locked(folder):
        store.clear(folder)
        store.put(folder, files)
    return folder


def _text(config: Mapping[str, Any], of: Any = None) -> bytes:
    what = "the config" if of is None else f"what describes {of.sde!r}, the parameterization or the network"
    return codec.to_json(config, what)


def find(folder: str | os.PathLike[str]) -> Path:
    """The folder that `load` and `read` take for this one: itself, or of a training run its newest step, unverified."""
    folder = Path(folder)
    if (folder / "model.safetensors").is_file():
        return folder
    return store.latest(folder / "checkpoints") or store.latest(folder) or folder


def _verified(folder: Path, links: bool = False) -> dict[str, bytes]:
    """The files of a folder, each as it was written; of a damaged step of a run, the error says which other one is whole."""
    try:
        return store.read(folder, links=links)
    except ValueError as error:
        if not store.STEP.fullmatch(folder.name):
            raise
        before = store.whole(folder.parent)
        mend = f"the newest whole checkpoint is {before}: name it, or delete {folder}" if before else "no other checkpoint is whole"
        raise ValueError(f"{error}. {mend}") from error


def load(
    folder: str | os.PathLike[str], *, sde: LinearSDE | None = None, net: nn.Module | None = None,
    parameterization: Callable[..., Any] | None = None, weights: str | None = None,
) -> Preconditioned:  # fmt: skip
    """Read what `save` or `write` wrote, in eval mode on the CPU; of a training run's folder, the newest step.

    sde, net, parameterization: your own object in place of the named one. weights: "model" or an average such as "ema_0.999"; default
    the first average of config["emas"], else the model. Raises FileNotFoundError, or ValueError that names the file which is missing,
    damaged, cut off or swapped, or the name that is unknown; a damaged newest step is not passed over for an older one.
    """
    return _load(Path(folder), sde, net, parameterization, weights)


def _load(
    given: Path, sde: LinearSDE | None = None, net: nn.Module | None = None, parameterization: Callable[..., Any] | None = None,
    weights: str | None = None, links: bool = False,
) -> Preconditioned:  # fmt: skip
    folder = find(given)
    if folder == given:
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name} is missing; {folder} is no checkpoint of scoresde.checkpoint.save")
    first = folder == given and not (folder / store.MANIFEST).exists()  # of format 1, or it has lost its manifest
    names = ("config.json", "model.safetensors")
    files = {name: (folder / name).read_bytes() for name in names} if first else _verified(folder, links)
    path = folder / "config.json"
    try:
        config = dict(codec.from_json(files["config.json"], "config.json"))
        parts = [dict(config[key]) for key in ("sde", "parameterization", "net")]
        found, wanted = config["format"], config["sha256"]
        averages = tuple(config.get("emas", ()))
        dtype = CAST[config["dtype"]] if "dtype" in config else None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a checkpoint's config ({error!r}); was it edited or cut off?") from error
    if found not in FORMATS:
        raise ValueError(
            f"{folder} is of format {found}; this version reads {FORMATS[0]} and {FORMATS[1]}: install a newer scoresde"
        )
    if first and found != 1:
        raise ValueError(f"{folder / store.MANIFEST} is missing; {folder} is of format {found}, which has one: it is not whole")
    usual = averages[0] if averages else "model"
    name = f"{weights or usual}.safetensors"
    if name not in files:
        known = sorted(n.removesuffix(".safetensors") for n in files if n.startswith(("model.", "ema_")))
        raise ValueError(f"weights is {weights or usual!r}; {folder} has {known}")
    if name == f"{usual}.safetensors" and hashlib.sha256(files[name]).hexdigest() != wanted:
        raise ValueError(f"{folder / name} is not the file config.json was written with; it is damaged or was swapped")
    sde = sde or _build(sdes, parts[0], "sde")
    parameterization = parameterization or _parameterization(parts[1])
    own, state = net is not None, codec.from_tensors(files[name], str(folder / name))
    if dtype is not None:
        state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    net = _build(nets, parts[2], "net") if net is None else net
    try:  # the named net takes the dtype of the file; a net of the caller's keeps its own
        net.load_state_dict(state, assign=not own)
    except RuntimeError as error:
        raise ValueError(f"the weights do not fit the {type(net).__name__} ({error}); pass net= as it was trained") from error
    return Preconditioned(net, sde, parameterization).eval()


# --- a training run, a folder a step -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Snapshot:
    """A step of training, verified: its number and folder; tensors by file, then by name, on the CPU; what else `write` was given."""

    step: int
    path: Path
    tensors: dict[str, dict[str, Tensor]]
    optimizer: dict[str, Any] | None
    config: dict[str, Any]
    state: dict[str, Any]


def write(
    folder: str | os.PathLike[str], step: int, tensors: Mapping[str, Mapping[str, Tensor]], *, optimizer: Mapping[str, Any] | None,
    config: Mapping[str, Any], state: Mapping[str, Any], keep: int = 3,
) -> Path:  # fmt: skip
    """Commit a step of training to `folder / step-00001000`, whole or not at all, then remove all but the newest `keep`; return it.

    folder: `checkpoints` of the run's folder, which is there; tensors: "model", the state_dict of the network (not of the denoiser), and
    others of one's own such as "ema_0.999"; optimizer: its state_dict; config: plain JSON, {**describe(denoiser), ...}, with the names of
    the averages in "emas", the one to sample from first; state: numbers, strings, None, tensors, and lists, tuples and dictionaries of
    them (the place in the data, random states). Numbers and tensors come back to the bit. Raises, before anything is written, TypeError
    or ValueError for what cannot be held and for a step not above the newest one, RuntimeError while another process writes there;
    `scoresde.store.SaveError` (an OSError) when the disk refuses: the earlier checkpoints are whole, and training can go on.
    """
    check_count(step, "step", 0)
    check_count(keep, "keep")
    files, folder = _files(step, tensors, optimizer, config, state), Path(folder)
    with store.saving(folder, f"step {step}"):
        folder.parent.stat()  # a disk that is gone is not made anew under its old name
        with store.locked(folder):
            store.clear(folder)
            newest = max(store.steps(folder), default=-1)
            if step <= newest:
                raise ValueError(f"step is {step} and {folder} holds step {newest}; delete what is newer, or choose another folder")
            path = store.commit(folder / store.step_name(step), files, step=step)
            store.prune(folder, keep)
    return path


def _files(
    step: int, tensors: Mapping[str, Mapping[str, Tensor]], optimizer: Mapping[str, Any] | None, config: Mapping[str, Any],
    state: Mapping[str, Any],
) -> dict[str, bytes]:  # fmt: skip
    for what, value in {"tensors": tensors, "config": config, "state": state}.items():
        if not isinstance(value, Mapping):
            raise TypeError(f"{what} is {shape_of(value)}; wanted a dictionary")
    for name in tensors:
        if not isinstance(name, str) or not store.NAME.fullmatch(f"{name}.safetensors") or name in ("optimizer", "state"):
            raise ValueError(f"tensors has {name!r}; wanted a name of letters, digits and _ . + -, other than optimizer and state")
    if missing := [key for key in ("sde", "parameterization", "net") if key not in config]:
        raise ValueError(f"config has no {missing}; wanted {{**checkpoint.describe(denoiser), ...}}")
    averages = list(config.get("emas", ()))
    if missing := [name for name in ["model", *averages] if name not in tensors]:
        raise ValueError(
            f"tensors has {sorted(tensors)} and not {missing}; wanted the model and the averages that config names in emas"
        )
    if state.get("step", step) != step:
        raise ValueError(f"step is {step} and state['step'] is {state['step']}; wanted the same")
    files = {f"{name}.safetensors": codec.to_tensors(group, f"tensors[{name!r}]") for name, group in tensors.items()}
    usual = files[f"{averages[0] if averages else 'model'}.safetensors"]
    files["config.json"] = _text({**config, "format": FORMAT, "sha256": hashlib.sha256(usual).hexdigest()})
    files |= {} if optimizer is None else codec.to_files("optimizer", optimizer)
    return files | codec.to_files("state", {**state, "step": step})


def read(folder: str | os.PathLike[str]) -> Snapshot:
    """A step of training from its folder, or the newest from that of a run; nothing of it is used before all of it is verified.

    Raises FileNotFoundError, or ValueError that names the file which is missing, damaged, cut off or swapped, and the newest step that is
    whole: name that one, or delete the damaged one. None is passed over in silence.
    """
    given = Path(folder)
    path = find(given)
    if path == given and not (path / "config.json").exists() and not (path / store.MANIFEST).exists():
        raise FileNotFoundError(f"{given} holds no checkpoint; wanted the folder of a run, or a step-00001000 of it")
    files = _verified(path)
    if not {"config.json", "state.json"} <= files.keys():
        raise ValueError(f"{path} is no step of training; scoresde.checkpoint.load reads a model")
    groups = [name.removesuffix(".safetensors") for name in files if name.endswith(".safetensors")]
    tensors = {n: codec.from_tensors(files[f"{n}.safetensors"], str(path / n)) for n in groups if n not in ("optimizer", "state")}
    config, state = codec.from_json(files["config.json"], str(path / "config.json")), codec.from_files("state", files)
    if not isinstance(config, dict) or not isinstance(state.get("step"), int):
        raise ValueError(f"{path} has a config.json or state.json that no training wrote; it was made by hand")
    optimizer = codec.from_files("optimizer", files) if "optimizer.json" in files else None
    return Snapshot(state["step"], path, tensors, optimizer, config, state)


# --- the hub -------------------------------------------------------------------------------------------------------------
def save_pretrained(
    denoiser: Preconditioned, folder: str | os.PathLike[str], *, push_to_hub: str | None = None, overwrite: bool = False,
    dtype: torch.dtype | None = None,
) -> Path:  # fmt: skip
    """`save`, by the name that other libraries have for it; push_to_hub: also upload it to this id "owner/name" (extra `hub`)."""
    if push_to_hub is None:
        return save(folder, denoiser, overwrite=overwrite, dtype=dtype)
    from . import hub

    hub.module(push_to_hub)  # refused before anything is written
    path = save(folder, denoiser, overwrite=overwrite, dtype=dtype)
    hub.upload(path, push_to_hub, sorted([*store.read(path), store.MANIFEST]))
    return path


def from_pretrained(name: str | os.PathLike[str], *, revision: str | None = None, **kwargs: Any) -> Preconditioned:
    """`load` of a folder, or of a hub id "owner/name" (extra `hub`), of which only .safetensors and .json files are fetched.

    revision: a branch, tag or commit of the hub's; kwargs: those of `load`. Downloads are verified like any folder.
    """
    if isinstance(name, os.PathLike) or Path(name).exists():
        if revision is not None:
            raise ValueError(f"revision is {revision!r} and {name} is a folder; only a hub id has revisions")
        return load(name, **kwargs)
    from . import hub

    return _load(hub.download(name, revision), links=True, **kwargs)
