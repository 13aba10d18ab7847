"""Typed settings: frozen dataclasses whose values are checked, and their form as plain values, which files and options have."""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, field
from typing import Any

from .choices import Choice, Registry
from .strict import check, emit, nearest, parse, plain, short

__all__ = ["Section", "describe", "key", "override", "read", "tree_of"]


def key(
    text: str, default: Any = MISSING, *, low: float | None = None, above: float | None = None, high: float | None = None,
    below: float | None = None, among: Sequence[str] | Registry | None = None, infinite: bool = False,
) -> Any:  # fmt: skip
    """A field: what it is, its default, and what it may be: low <= value <= high, above < value < below, one `among` these."""
    bounds = {"low": low, "above": above, "high": high, "below": below, "among": among, "infinite": infinite}
    metadata = {"text": text, **bounds}
    if isinstance(default, (Choice, Section)):
        return field(default_factory=lambda: default, metadata=metadata)
    return field(default=default, metadata=metadata)


class Section:
    """A part of the configuration, whose values are checked against the type hints and the bounds of its fields."""

    def __post_init__(self) -> None:
        hints = _hints(type(self))
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            value, limits = getattr(self, f.name), f.metadata
            if _kind(hints[f.name]):
                object.__setattr__(self, f.name, _section(value, hints[f.name], limits, f.name))
                continue
            value = plain(check(value, hints[f.name], f.name), f.name)
            object.__setattr__(self, f.name, value)
            if isinstance(value, str):
                if not value or (limits["among"] and value not in limits["among"]):
                    raise ValueError(f"{f.name} is {value[:60]!r}; {nearest(value, limits['among'] or ['a name'])}")
            elif isinstance(value, (int, float)) and not isinstance(value, bool):
                _bounded(value, f.name, limits)


def _bounded(value: float, name: str, limits: Mapping[str, Any]) -> None:
    low, above, high, below = (limits[bound] for bound in ("low", "above", "high", "below"))
    wrong = (
        (low is not None and value < low) or (above is not None and value <= above) or (high is not None and value > high)
        or (below is not None and value >= below) or (math.isinf(value) and not limits["infinite"])
    )  # fmt: skip
    if wrong:
        wanted = {">=": low, ">": above, "<=": high, "<": below}
        text = " and ".join(f"{sign} {bound:g}" for sign, bound in wanted.items() if bound is not None)
        raise ValueError(f"{name} is {value:g}; wanted a {'finite ' if not text else ''}number {text}".rstrip())


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _kind(hint: Any) -> type | None:
    """The Choice or Section that a hint wants, in a tuple or not; None for plain values."""
    if isinstance(hint, type) and issubclass(hint, (Choice, Section)):
        return hint
    return next(filter(None, map(_kind, typing.get_args(hint))), None)


def _section(value: Any, hint: Any, limits: Mapping[str, Any], name: str) -> Any:
    """A Choice, a Section or a tuple of Sections, as the hint wants it."""
    kind = _kind(hint)
    if kind is None or (value is None and type(None) in typing.get_args(hint)):
        return value
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (tuple, list)) or not all(isinstance(v, kind) for v in value):
            raise TypeError(f"{name} is {short(value)}; wanted a tuple of {kind.__name__}")
        if len(set(value)) < len(value):
            raise ValueError(f"{name} has one entry twice; wanted each once")
        return tuple(value)
    if not isinstance(value, kind):
        raise TypeError(f"{name} is a {type(value).__name__}; wanted a {kind.__name__}")
    return limits["among"].check(value, name) if isinstance(value, Choice) else value


# --- plain values ----------------------------------------------------------------------------------------------------------
def read(cls: type, tree: Any, path: str = "") -> Any:
    """A Section of plain values; path: where they stand, for the messages."""
    hints, at = _hints(cls), f"{path}." if path else ""
    if not isinstance(tree, dict):
        raise TypeError(f"{path} is {short(tree)}; wanted a mapping of {', '.join(hints)}")
    for name in tree:
        if name not in hints:
            raise ValueError(f"{at}{name[:60]} is no key; {nearest(name, hints)}")
    for f in dataclasses.fields(cls):
        if f.default is MISSING and f.default_factory is MISSING and f.name not in tree:
            raise ValueError(f"{at}{f.name} is missing; wanted {f.metadata['text']}")
    values = {name: _part(value, hints[name], f"{at}{name}") for name, value in tree.items()}
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise (TypeError if isinstance(error, TypeError) else ValueError)(f"{at}{error}") from error


def _part(value: Any, hint: Any, path: str) -> Any:
    kind = _kind(hint)
    if kind is None or (value is None and type(None) in typing.get_args(hint)):
        return value
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise TypeError(f"{path} is {short(value)}; wanted a list")
        return tuple(read(kind, v, f"{path}[{i}]") for i, v in enumerate(value))
    if kind is not Choice:
        return read(kind, value, path)
    named = {"name": value} if isinstance(value, str) else value
    if not isinstance(named, dict):
        raise TypeError(f"{path} is {short(value)}; wanted a name, or a mapping {{name: ..., its options}}")
    if not isinstance(named.get("name"), str):
        raise ValueError(f"{path}.name is {short(named.get('name'))}; wanted a name, as in {path}: {{name: ..., its options}}")
    return Choice(named["name"], {name: v for name, v in named.items() if name != "name"})


def override(cls: type, tree: dict[str, Any], text: str) -> None:
    """Set key.sub=value in the plain values of such a Section: the value is YAML, what is under a Choice is an option of it."""
    dotted, equals, value = text.partition("=")
    *path, last = dotted.strip().split(".")
    if not equals or not all((*path, last)):
        raise ValueError(f"--set {text[:60]!r}; wanted KEY=VALUE, as in optimizer.lr=1e-3")
    node: dict[str, Any] = tree
    for i, name in enumerate(path):
        here, hints = ".".join(path[: i + 1]), _hints(cls) if issubclass(cls, Section) else {}
        if name not in hints:
            raise ValueError(f"--set {dotted[:60]}: {here[:60]} is no key; {nearest(name, hints)}")
        kind, held = _kind(hints[name]), node.get(name)
        if kind is None or typing.get_origin(hints[name]) is tuple:
            raise ValueError(f"--set {dotted[:60]}: {here} has no keys of its own; wanted its whole value: --set {here}=...")
        if kind is Choice and not isinstance(held, dict):
            default = tree_of(next(_default(f) for f in dataclasses.fields(cls) if f.name == name))
            named = held if isinstance(held, str) else default
            held = {"name": named} if isinstance(named, str) else named
        if held is not None and not isinstance(held, dict):
            raise TypeError(f"{here} is {short(held)}; wanted a mapping of {', '.join(_hints(kind))}")
        node[name] = held or {}
        node, cls = node[name], kind
    try:
        node[last] = parse(value)
    except ValueError as error:
        raise ValueError(f"--set {dotted[:60]}: {error}") from error


def _default(f: dataclasses.Field[Any]) -> Any:
    return f.default if f.default_factory is MISSING else f.default_factory()


def tree_of(value: Any) -> Any:
    """The plain values of a Section, of which `read` makes an equal one."""
    if isinstance(value, Choice):
        return {"name": value.name, **value.options} if value.options else value.name
    if isinstance(value, Section):
        return {f.name: tree_of(getattr(value, f.name)) for f in dataclasses.fields(value)}  # type: ignore[arg-type]
    if isinstance(value, tuple):  # of Sections: what they leave open is left out
        return [{name: v for name, v in tree_of(part).items() if v is not None} for part in value]
    return value


def describe(cls: type, path: str = "") -> str:
    """A line a key: its name, its default, what it is, and the names it may have."""
    lines = []
    for f in dataclasses.fields(cls):
        kind, default, among = _kind(_hints(cls)[f.name]), _default(f), f.metadata["among"]
        if kind is not None and issubclass(kind, Section) and not isinstance(default, tuple):
            lines.append(describe(kind, f"{path}{f.name}."))
            continue
        names = ", ".join((among.known if isinstance(among, Registry) else among) or ())
        value = "" if default is MISSING else "=" + emit(tree_of(default), flow=True)
        lines.append(f"  {path + f.name + value:28} {f.metadata['text']}{f' ({names})' if names else ''}")
    return "\n".join(lines)
