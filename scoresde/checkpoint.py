"""A denoiser in a folder: `model.safetensors` and `config.json`. No pickle, nothing overwritten unasked, weights verified on load."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from . import nets, parameterizations
from . import sde as sdes
from .denoiser import Preconditioned
from .linear import LinearSDE

__all__ = ["load", "save"]

FORMAT = 1


def _known(module: Any, name: Any, what: str) -> Any:
    """The object of this name that `module` exports (a function for a parameterization, else a class); names reach no further."""
    known = sorted(n for n in module.__all__ if isinstance(getattr(module, n), type) == (what != "parameterization"))
    if name not in known:
        raise ValueError(f"config.json names the {what} {name!r}; known are {known}: pass {what}= to load your own")
    return getattr(module, name)


def _build(module: Any, settings: dict[str, Any], what: str) -> Any:
    """The object that `settings` describe: name and arguments."""
    kind = _known(module, settings.pop("name", None), what)
    arguments = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    try:
        return kind(**arguments)
    except TypeError as error:
        raise ValueError(f"config.json does not describe a {what} ({error}); pass {what}= to load your own") from error


def _parameterization(settings: dict[str, Any]) -> Callable[..., Any]:
    fn = _known(parameterizations, settings.pop("name", None), "parameterization")
    return functools.partial(fn, **settings) if settings else fn


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all: a temporary neighbour, flushed to the disk, then renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _describe(denoiser: Preconditioned) -> dict[str, Any]:
    fn = denoiser.parameterization
    settings = dict(fn.keywords) if isinstance(fn, functools.partial) else {}
    fn = fn.func if isinstance(fn, functools.partial) else fn
    fields = {f.name: getattr(denoiser.sde, f.name) for f in dataclasses.fields(denoiser.sde) if f.init}  # type: ignore[arg-type]
    return {
        "format": FORMAT,
        "sde": {"name": type(denoiser.sde).__name__, **fields},
        "parameterization": {"name": getattr(fn, "__name__", repr(fn)), **settings},
        "net": {"name": type(denoiser.net).__name__, **getattr(denoiser.net, "config", {})},
    }


def save(folder: str | os.PathLike[str], denoiser: Preconditioned, *, overwrite: bool = False) -> Path:
    """Write a network with its SDE and parameterization into `folder` (made if missing); return the folder.

    Raises FileExistsError when a checkpoint is there and not overwrite, TypeError for a denoiser without a network, ValueError for
    settings that JSON cannot hold (an SDE given by functions: save the network, and pass sde= on loading).
    """
    if not isinstance(denoiser, Preconditioned):
        raise TypeError(f"denoiser is a {type(denoiser).__name__}; wanted Preconditioned: only a network has weights to save")
    folder = Path(folder)
    if (folder / "config.json").exists() and not overwrite:
        raise FileExistsError(f"{folder} holds a checkpoint; choose another folder or pass overwrite=True")
    state = {name: value.detach().cpu().contiguous() for name, value in denoiser.net.state_dict().items()}
    weights = save_tensors(state)
    config = _describe(denoiser)
    if any(callable(value) for value in config["sde"].values()):
        config["sde"] = {"name": type(denoiser.sde).__name__}
    config["sha256"] = hashlib.sha256(weights).hexdigest()
    try:
        text = json.dumps(config, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the settings of {denoiser.sde!r} or of its network are not plain JSON ({error})") from error
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "model.safetensors", weights)
    _write(folder / "config.json", text.encode())
    return folder


def load(
    folder: str | os.PathLike[str], *, sde: LinearSDE | None = None, net: nn.Module | None = None,
    parameterization: Callable[..., Any] | None = None,
) -> Preconditioned:  # fmt: skip
    """Read what `save` wrote, in eval mode on the CPU. sde, net, parameterization: your own object in place of the named one.

    Raises FileNotFoundError, or ValueError when the weights are not the ones config.json states or a name is unknown.
    """
    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing; {folder} is no checkpoint of scoresde.checkpoint.save")
    try:
        config = json.loads((folder / "config.json").read_text())
        parts = [dict(config[key]) for key in ("sde", "parameterization", "net")]
        found, wanted = config["format"], config["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'} is not a checkpoint's config ({error!r}); was it edited or cut off?") from error
    if found != FORMAT:
        raise ValueError(f"{folder} is of format {found}; this version reads {FORMAT}: install a newer scoresde")
    weights = (folder / "model.safetensors").read_bytes()
    if hashlib.sha256(weights).hexdigest() != wanted:
        raise ValueError(
            f"{folder / 'model.safetensors'} is not the file config.json was written with; it is damaged or was swapped"
        )
    sde = sde or _build(sdes, parts[0], "sde")
    parameterization = parameterization or _parameterization(parts[1])
    state, own = load_tensors(weights), net is not None
    net = net or _build(nets, parts[2], "net")
    try:  # the named net takes the dtype of the file; a net of the caller's keeps its own
        net.load_state_dict(state if own else {name: value.clone() for name, value in state.items()}, assign=not own)
    except RuntimeError as error:
        raise ValueError(f"the weights do not fit the {type(net).__name__} ({error}); pass net= as it was trained") from error
    return Preconditioned(net, sde, parameterization).eval()
