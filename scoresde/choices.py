"""Named parts of a configuration: a name from a registry with its own options, checked before anything is built."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .strict import check, nearest, plain, words

__all__ = ["Choice", "Registry", "build"]

OPEN = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclass(frozen=True)
class Choice:
    """A name and its options: in a file `VP`, or `{name: VP, beta_max: 10.0}`. Lists among the options become tuples."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"name is {self.name!r} ({type(self.name).__name__}); wanted a string")
        if not isinstance(self.options, Mapping) or "name" in self.options:
            raise TypeError(f"options is {self.options!r}; wanted a mapping of names, of which 'name' is none")
        object.__setattr__(self, "options", {name: _frozen(v) for name, v in plain(dict(self.options), "options").items()})


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


@dataclass(frozen=True)
class Registry:
    """What may be named for a part: `known` by name, each with the options that its signature has besides the arguments `given`.

    Of a function the options are bound (functools.partial), for the run to call it; a class, or a partial of one, is called.
    """

    known: Mapping[str, Callable[..., Any]]
    given: tuple[str, ...] = ()
    extra: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @staticmethod
    def of(
        *modules: Any, given: Sequence[str] = (), calls: Sequence[str] = (), extra: Mapping[str, Mapping[str, Any]] | None = None
    ) -> Registry:
        """Of all that the modules export and plain values can make.

        given: parameters that the run supplies; calls: with them, functions whose first parameters are these, else classes; extra: type
        hints of options beyond a signature, by name, for the run to take out.
        """
        found = {}
        for module in modules:
            for name in module.__all__:
                kind = getattr(module, name)
                if _is_function(kind, calls) if calls else isinstance(kind, type) and not inspect.isabstract(kind):
                    found[name] = kind
        all_of = Registry(found, tuple(calls or given), extra or {})
        return dataclasses.replace(all_of, known={name: kind for name, kind in found.items() if all_of._buildable(name)})

    def _parameters(self, name: str) -> dict[str, inspect.Parameter]:
        return {p.name: p for p in _signature(self.known[name]) if p.kind in OPEN and p.name not in self.given}

    def _buildable(self, name: str) -> bool:
        try:
            left = self._parameters(name).values()
        except (NameError, ValueError):  # of a class without a signature of its own
            return False
        return all(p.default is not inspect.Parameter.empty or words(p.annotation) for p in left)

    def options(self, name: str) -> dict[str, Any]:
        """Type hints of the options of `name` that plain values can be."""
        found = {p.name: p.annotation for p in self._parameters(name).values() if words(p.annotation)}
        return found | dict(self.extra.get(name, {}))

    def check(self, choice: Any, path: str) -> Choice:
        """Return the Choice when its name is known and its options are there, of their types; raise otherwise."""
        if not isinstance(choice, Choice):
            raise TypeError(f"{path} is a {type(choice).__name__}; wanted a Choice: Choice('{next(iter(self.known))}')")
        if choice.name not in self.known:
            raise ValueError(f"{path}.name is {choice.name[:60]!r}; {nearest(choice.name, self.known)}")
        options = self.options(choice.name)
        for name, value in choice.options.items():
            if name not in options:
                raise ValueError(f"{path}.{name[:60]} is no option of {choice.name}; {nearest(name, options)}")
            check(value, options[name], f"{path}.{name}")
        for name, parameter in self._parameters(choice.name).items():
            if parameter.default is inspect.Parameter.empty and name not in choice.options:
                raise ValueError(f"{path}.{name} is missing; {choice.name} wants {words(parameter.annotation)}")
        return choice


@functools.cache
def _signature(kind: Callable[..., Any]) -> tuple[inspect.Parameter, ...]:
    return tuple(inspect.signature(kind, eval_str=True).parameters.values())


def _is_function(kind: Any, calls: Sequence[str]) -> bool:
    return inspect.isfunction(kind) and tuple(inspect.signature(kind).parameters)[: len(calls)] == tuple(calls)


def build(choice: Choice, registry: Registry, path: str, **given: Any) -> Any:
    """The object that a Choice means: of a class, with its options and what the run gives; a function with its options bound.

    path: where it stands in the configuration; what the part raises becomes a ValueError that names it.
    """
    registry.check(choice, path)
    kind = registry.known[choice.name]
    if inspect.isfunction(kind):
        return functools.partial(kind, **choice.options) if choice.options else kind
    try:
        return kind(**given, **choice.options)
    except (ArithmeticError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {choice.name}: {error}") from error
