"""Settings as text: YAML 1.2 (core schema), JSON and TOML, read without the traps, and checked against type hints."""

from __future__ import annotations

import difflib
import json
import math
import re
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import yaml

__all__ = ["emit", "fits", "nearest", "parse", "plain", "short", "words"]

MAX_LENGTH, MAX_DEPTH = 2**20, 20  # characters of a file; lists and mappings within one another
INTEGERS = range(-(2**63), 2**63)
NULL, BOOL, INT, FLOAT, TEXT = (f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str"))
# YAML 1.2.2, section 10.3.2; the first character, which PyYAML asks for, and the rest
CORE = (
    (NULL, r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    (BOOL, r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    (INT, r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (FLOAT, r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+0123456789.")),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        where = f"line {event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise ValueError(f"{where} has an anchor or an alias (& or *); wanted plain values: write it out, or quote it")
        if event.tag is not None:
            raise ValueError(f"{where} has the tag {event.tag!r}; wanted plain values: leave it out")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ValueError(f"{where} is nested more than {MAX_DEPTH} deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """It keeps PyYAML's resolvers beside those of CORE: a string that either version of YAML would misread is quoted."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _written(dumper: _Dumper, text: str) -> yaml.Node:
    return dumper.represent_scalar(TEXT, text, style=None if text.isprintable() else '"')  # other styles fold line breaks


_Dumper.add_representer(str, _written)
for _tag, _pattern, _first in CORE:
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), _first)


def _float(text: str, where: str = "the text has") -> float:
    value = float(text)
    if math.isinf(value) and not text.endswith("inf"):
        raise ValueError(f"{where} {text[:60]}, which is beyond the largest float; .inf is infinity")
    return value


def _scalar(tag: str, text: str, where: str) -> Any:
    if tag == NULL:
        return None
    if tag == BOOL:
        return text.lower() == "true"
    if tag == INT:
        if len(text) > 100:
            raise ValueError(f"{where} has an integer of {len(text)} characters; wanted one from -2^63 to 2^63 - 1")
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if tag == FLOAT:
        return _float(text.lower().replace(".inf", "inf").replace(".nan", "nan"), f"{where} has")
    return text


def _value(node: Any) -> Any:
    where = f"line {node.start_mark.line + 1}"
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node.tag, node.value, where)
    if isinstance(node, yaml.SequenceNode):
        return [_value(child) for child in node.value]
    lines: dict[str, int] = {}
    found: dict[str, Any] = {}
    for key, child in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode) or key.tag != TEXT:
            raise ValueError(f"line {line} has the key {getattr(key, 'value', '')!r}; wanted a name, which is a string")
        if key.value in lines:
            raise ValueError(
                f"line {line} has the key {key.value!r} again, after line {lines[key.value]}; wanted it once: drop one"
            )
        lines[key.value], found[key.value] = line, _value(child)
    return found


def _yaml(text: str) -> Any:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        return None if node is None else _value(node)
    finally:
        loader.dispose()


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {name!r} is there twice; wanted it once: drop one")
        found[name] = value
    return found


READERS: dict[str, Callable[[str], Any]] = {
    "yaml": _yaml,
    "json": lambda text: json.loads(text, object_pairs_hook=_once, parse_float=_float),
    "toml": lambda text: tomllib.loads(text, parse_float=_float),
}


def parse(text: str, form: str = "yaml") -> Any:
    """None, booleans, numbers, strings, lists and mappings of them from YAML 1.2; form: yaml, json or toml.

    1e-3 is a number, only true and false are booleans (no, off and y are strings), 017 is 17, and 0o17 is 15. ValueError for a key
    that comes twice (with its lines), for anchors, aliases, merges and tags, for NaN, and for text that is too long or too deep.
    """
    if len(text) > MAX_LENGTH:
        raise ValueError(f"the text has {len(text)} characters; wanted at most {MAX_LENGTH}: settings, not data")
    try:
        return plain(READERS[form](text))
    except RecursionError as error:
        raise ValueError(f"the text is nested more than {MAX_DEPTH} deep") from error
    except (yaml.YAMLError, json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"this is no {form.upper()}: {' '.join(str(error).split())}") from error


def emit(value: Any, *, flow: bool = False) -> str:
    """YAML 1.2 that `parse` reads back exactly: plain values, tuples as lists; flow: on one line."""
    how = {"Dumper": _Dumper, "sort_keys": False, "allow_unicode": True, "width": math.inf}
    text = yaml.dump(_listed(plain(value)), default_flow_style=flow or None, **how)
    return text.removesuffix("...\n").strip() if flow else text


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _listed(v) for name, v in value.items()}
    return [_listed(v) for v in value] if isinstance(value, (list, tuple)) else value


def plain(value: Any, name: str = "", depth: int = 0) -> Any:
    """Return `value` when settings can hold it; raise otherwise. name: its path, for the message."""
    here = name or "the text"
    if depth > MAX_DEPTH:
        raise ValueError(f"{here} is nested more than {MAX_DEPTH} deep")
    if isinstance(value, dict):
        for key, v in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{here} has the key {key!r}; wanted a name, which is a string")
            plain(v, f"{name}.{key}" if name else key, depth + 1)
    elif isinstance(value, (list, tuple)):
        for i, v in enumerate(value):
            plain(v, f"{name}[{i}]", depth + 1)
    elif isinstance(value, int):
        if value not in INTEGERS:
            raise ValueError(f"{here} is {short(value)}; wanted one from -2^63 to 2^63 - 1")
    elif isinstance(value, float):
        if math.isnan(value):
            raise ValueError(f"{here} is NaN; wanted a number")
    elif value is not None and not isinstance(value, str):
        raise TypeError(f"{here} is a {type(value).__name__}; wanted null, true or false, a number, a string, a list or a mapping")
    return value


def short(value: Any) -> str:
    """A plain value as a message has it."""
    if isinstance(value, int) and value not in INTEGERS:
        return f"an integer of {value.bit_length()} bits"
    text = {None: "null", True: "true", False: "false"}.get(value) if value is None or isinstance(value, bool) else None
    text = text or repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# --- against type hints --------------------------------------------------------------------------------------------------
KINDS: dict[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"), int: ((int,), "an integer"), float: ((int, float), "a number"), str: ((str,), "a string"),
    types.NoneType: ((types.NoneType,), "null"),
}  # fmt: skip
LISTS = (tuple, list, Sequence, typing.get_origin(Sequence[int]))


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain value is of this type hint: an integer is a number, 3.0 and true are no integers, no string is a number."""
    if hint in KINDS:
        return isinstance(value, KINDS[hint][0]) and (hint is bool or not isinstance(value, bool))
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if origin is typing.Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if (origin or hint) not in LISTS or not isinstance(value, (list, tuple)):
        return False
    if origin is tuple and Ellipsis not in parts:
        return len(value) == len(parts) and all(map(fits, value, parts))
    return not parts or all(fits(v, parts[0]) for v in value)


def words(hint: Any) -> str:
    """What a type hint wants of a plain value, in words; '' when no plain value fits."""
    if hint in KINDS:
        return KINDS[hint][1]
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        found = list(dict.fromkeys(filter(None, map(words, parts))))
        return "" if found == ["null"] else " or ".join(found)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, parts))
    if (origin or hint) not in LISTS:
        return ""
    inside = " or ".join(dict.fromkeys(words(part) for part in parts if part is not Ellipsis))
    if parts and not inside:
        return ""
    count = f" {len(parts)}" if origin is tuple and Ellipsis not in parts else ""
    return f"a list of{count} ({inside})" if parts else "a list"


def check(value: Any, hint: Any, name: str) -> Any:
    """Return `value` when it is of the hint, an integer as a float where floats alone are wanted; raise a TypeError otherwise."""
    if not fits(value, hint):
        kind = "" if value is None else f" ({type(value).__name__})"
        raise TypeError(f"{name} is {short(value)}{kind}; wanted {words(hint)}")
    floats = hint is float or (fits(0.5, hint) and isinstance(value, int) and not isinstance(value, bool))
    return float(value) if floats else value


def nearest(name: str, known: Iterable[str]) -> str:
    """'did you mean X? ' where X is near, then the names there are."""
    folded = {k.casefold(): k for k in known}
    near = difflib.get_close_matches(str(name)[:60].casefold(), folded, 1, 0.6)
    return (f"did you mean {folded[near[0]]}? " if near else "") + f"known are {', '.join(sorted(folded.values()))}"
