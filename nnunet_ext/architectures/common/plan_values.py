"""Values of plans against the types that networks state for them: plans are JSON, which holds anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, wraps
from inspect import Parameter, signature
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, ParamSpec, Union, get_args, get_origin, get_type_hints

import numpy as np

from nnunet_ext.architectures.common.plan_sizes import check_channels

P = ParamSpec("P")
_WORDS = {bool: "true or false", int: "a whole number below 2^31", float: "a number", NoneType: "null", str: "a text"}
_CHANNELS = ("input_channels", "num_classes")
_SHOWN = 80  # characters of a value in a message
_INFINITY = float("inf")
_LARGEST = 2**31  # whole numbers from here on are none that PyTorch takes everywhere


def options_checked(init: Callable[P, None]) -> Callable[P, None]:
    """Let a network's constructor refuse arguments of another type than it states, and impossible channels.

    Args:
        init: Constructor that takes input_channels and num_classes, with annotations of bool, int, float, `Literal`,
            sequences, mappings, classes and unions.

    Raises:
        ValueError: names argument, type and value.
    """
    names = list(signature(init).parameters)

    @wraps(init)
    def checked(*args: P.args, **kwargs: P.kwargs) -> None:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        check_channels(**{name: value for name, value in given.items() if name in _CHANNELS})
        check_values(_hints_of(init), kwargs)
        init(*args, **kwargs)

    return checked


def check_values(hints: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """See that values have the types that are stated for their names; other names are left alone.

    Raises:
        ValueError: names argument, type and value.
    """
    for name, value in values.items():
        if name in hints and not _fits(value, hints[name]):
            raise ValueError(
                f"{name} must be {_said(hints[name])}, got {value!r:.{_SHOWN}}: correct the plans, or plan the data "
                "set again."
            )


def check_finite(name: str, options: Mapping[str, Any]) -> None:
    """Refuse options of a layer that hold NaN or infinity, which Python's JSON may.

    Raises:
        ValueError: names the options.
    """
    if not _is_finite_throughout(options):
        raise ValueError(
            f"The numbers of {name} must be finite, got {dict(options)!r:.{_SHOWN}}: use what nnU-Net plans."
        )


@cache
def _hints_of(init: Callable[..., None]) -> dict[str, Any]:
    kinds = signature(init).parameters
    return {name: hint for name, hint in get_type_hints(init).items() if _is_option(kinds.get(name))}


def _is_option(parameter: Parameter | None) -> bool:
    return parameter is not None and parameter.kind is not Parameter.VAR_KEYWORD


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is one of a type; true and false are no numbers, numbers of NumPy are."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in inner)
    if origin is Literal:
        return any(type(value) is type(known) and value == known for known in inner)
    if origin is type:
        return isinstance(value, type)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return isinstance(value, (list, tuple, np.ndarray)) and all(_fits(entry, inner[0]) for entry in value)
    return _is_plain(value, hint)


def _is_plain(value: Any, kind: Any) -> bool:
    if kind is bool:
        return isinstance(value, (bool, np.bool_))
    if isinstance(value, (bool, np.bool_)):
        return False
    if kind is int:
        return isinstance(value, Integral) and abs(int(value)) < _LARGEST
    if kind is float:
        return isinstance(value, Real) and _is_finite(value)
    return isinstance(kind, type) and isinstance(value, kind)


def _is_finite(number: Any) -> bool:
    return bool(-_INFINITY < number < _INFINITY)


def _is_finite_throughout(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_finite_throughout(entry) for entry in value.values())
    if isinstance(value, (list, tuple)):
        return all(_is_finite_throughout(entry) for entry in value)
    return not isinstance(value, Real) or _is_finite(value)


def _said(hint: Any) -> str:
    """A type in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_said(part) for part in inner))
    if origin is Literal:
        return " or ".join(f'"{known}"' if isinstance(known, str) else f"{known}" for known in inner)
    if origin is type:
        return "a class, by its dotted path and named in _kw_requires_import"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "names with values"
    if isinstance(origin, type) and issubclass(origin, Sequence):
        if inner[0] is str:
            return "a list of names"
        return "a list of numbers" if inner[0] in (int, float) else "a list of numbers or of lists of them"
    return _WORDS.get(hint, getattr(hint, "__name__", str(hint)))
