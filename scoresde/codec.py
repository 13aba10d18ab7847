"""Tensors and plain values as bytes and back, exact: safetensors and JSON. Nothing in them can run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from .checks import shape_of

__all__ = ["from_files", "from_json", "from_tensors", "to_files", "to_json", "to_tensors"]


def to_tensors(tensors: Mapping[str, Tensor], what: str) -> bytes:
    """Safetensors of dense tensors by name, wherever they are and however they lie in memory.

    Raises TypeError for what is no tensor by a name, ValueError for tied tensors, which would come back untied, and for those that
    safetensors cannot hold (sparse, complex128, without memory). what: their name in a message.
    """
    seen: dict[tuple[str, int], str] = {}
    if not isinstance(tensors, Mapping):
        raise TypeError(f"{what} is {shape_of(tensors)}; wanted a dictionary of tensors, such as net.state_dict()")
    for name, value in tensors.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise TypeError(f"{what}[{name!r}] is {shape_of(value)}; wanted a tensor by a name, as a state_dict has them")
        if name == "__metadata__":
            raise ValueError(f"{what} has a tensor named {name!r}, a word of the file format; rename it")
        if value.layout != torch.strided or value.is_meta:
            raise ValueError(
                f"{what}[{name!r}] is {value.layout} on {value.device}; wanted a dense tensor with memory: .to_dense()"
            )
        place = (str(value.device), value.data_ptr())
        if value.numel() and seen.setdefault(place, name) != name:
            raise ValueError(
                f"{what}[{name!r}] and {what}[{seen[place]!r}] share memory and would come back untied; save one of them, or a clone()"
            )
    try:
        return save_tensors({name: value.detach().cpu().contiguous() for name, value in tensors.items()})
    except (RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"{what} cannot be written as safetensors ({error}); wanted dense tensors that share no memory") from error


def from_tensors(data: bytes, what: str) -> dict[str, Tensor]:
    """The tensors of `to_tensors`, on the CPU in memory of their own; ValueError for any other bytes."""
    try:
        return {name: value.clone() for name, value in load_tensors(data).items()}
    except Exception as error:  # bytes of any origin: the reader's own errors have no common kind
        raise ValueError(f"{what} is no safetensors file ({error}); it is damaged or was made by hand") from error


def to_json(value: Any, what: str) -> bytes:
    """Plain JSON text; tuples become lists. Raises ValueError for what JSON cannot hold."""
    try:
        return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not plain JSON ({error}); wanted finite numbers, strings, lists and dictionaries") from error


def from_json(data: bytes, what: str) -> Any:
    """The value of a JSON text; ValueError for any other bytes."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is no JSON ({error}); was it edited or cut off?") from error


# --- a tree: JSON, with the tensors in a file beside it ---------------------------------------------------------------------
def _below(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """What JSON has as itself; the rest as {"$kind": ...}, so that it comes back as what it was."""
    if value is None or isinstance(value, (bool, str)) or type(value) is int:
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": str(float(value))}
    if isinstance(value, Tensor):
        if path in tensors:
            raise ValueError(f"two tensors are at {path}; wanted names without dots that tell them apart")
        tensors[path] = value
        return {"$tensor": path}
    if type(value) in (list, tuple):
        found = [_encode(entry, _below(path, i), tensors) for i, entry in enumerate(value)]
        return found if type(value) is list else {"$tuple": found}
    if isinstance(value, Mapping):
        if bad := [key for key in value if type(key) not in (str, int)]:
            raise TypeError(f"{path} has the key {bad[0]!r}; wanted strings and integers")
        found = {key: _encode(entry, _below(path, key), tensors) for key, entry in value.items()}
        plain = all(isinstance(key, str) and not key.startswith("$") for key in found)
        return found if plain else {"$items": [[key, entry] for key, entry in found.items()]}
    raise TypeError(
        f"{path} is {value!r} ({type(value).__name__}); wanted numbers, strings, None, tensors, and lists, tuples and dictionaries of them"
    )


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(entry, tensors) for entry in value]
    if not isinstance(value, dict):
        return value
    if not any(key.startswith("$") for key in value):
        return {key: _decode(entry, tensors) for key, entry in value.items()}
    ((kind, content),) = value.items()
    if kind == "$tensor":
        return tensors[content]
    if kind == "$tuple":
        return tuple(_decode(content, tensors))
    if kind == "$float":
        return {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[content]
    if kind == "$items":
        return {key: _decode(entry, tensors) for key, entry in content}
    raise ValueError(f"unknown kind {kind}")


def to_files(name: str, value: Mapping[str, Any]) -> dict[str, bytes]:
    """`name.json` with the value, and `name.safetensors` with its tensors by their paths, where it has any.

    value: numbers, strings, None, tensors, and lists, tuples and dictionaries of them, such as an optimizer's state_dict; raises
    TypeError for anything else.
    """
    tensors: dict[str, Tensor] = {}
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} is {shape_of(value)}; wanted a dictionary, such as {name}.state_dict()")
    files = {f"{name}.json": to_json(_encode(value, "", tensors), name)}
    return {**files, f"{name}.safetensors": to_tensors(tensors, name)} if tensors else files


def from_files(name: str, files: Mapping[str, bytes]) -> dict[str, Any]:
    """The value of `to_files`, equal in type and to the bit; ValueError for any other bytes."""
    tree = from_json(files[f"{name}.json"], f"{name}.json")
    data = files.get(f"{name}.safetensors")
    tensors = {} if data is None else from_tensors(data, f"{name}.safetensors")
    try:
        return dict(_decode(tree, tensors))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{name}.json does not fit {name}.safetensors ({error!r}); it was made by hand or by another version"
        ) from error
