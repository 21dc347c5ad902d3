"""Options of a network beside the plans' own arguments, drawn by the types that its constructor states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import Parameter, signature
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hypothesis import strategies as st

_GIVEN = {"self", "input_channels", "num_classes", "deep_supervision"}
_LARGE = 64  # a default of more is always replaced, so that networks stay small


@st.composite
def network_options(
    draw: st.DrawFn, network_class: type[Any] | None, stages: int, dim: int, is_planned: bool
) -> dict[str, Any]:
    """Some of the options, each of its type; for plans of a planner only those that would make the network large."""
    found = {}
    for name, (hint, default) in options_of(network_class).items():
        is_large = isinstance(default, int) and default >= _LARGE
        if is_large:
            found[name] = draw(st.integers(8, 24))
        elif not is_planned and draw(st.integers(0, 3)) == 0:
            found[name] = draw(_value(hint, stages, dim))
    return found


def options_of(network_class: type[Any] | None) -> Mapping[str, tuple[Any, Any]]:
    """Type and default of each option of a constructor."""
    if network_class is None:
        return {}
    hints = get_type_hints(network_class.__init__)
    return {
        name: (hints.get(name, Any), parameter.default)
        for name, parameter in signature(network_class.__init__).parameters.items()
        if name not in _GIVEN and parameter.kind is Parameter.KEYWORD_ONLY
    }


def _value(hint: Any, stages: int, dim: int) -> st.SearchStrategy[Any]:
    """Values of a type, none of them large."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return st.one_of([_value(part, stages, dim) for part in get_args(hint)])
    if origin is Literal:
        return st.sampled_from(get_args(hint))
    if isinstance(origin, type) and issubclass(origin, Sequence):
        length = st.sampled_from([stages, stages, dim, stages + 1, 0])
        return length.flatmap(lambda n: st.lists(st.integers(1, 4), min_size=n, max_size=n))
    simple: dict[Any, st.SearchStrategy[Any]] = {
        bool: st.booleans(),
        int: st.sampled_from([1, 1, 2, 2, 3, 4, 8, 0, -1]),
        float: st.sampled_from([0.0, 0.1, 0.5, 1.0, 2.0, -0.5]),
        NoneType: st.none(),
    }
    return simple.get(hint, st.none())
