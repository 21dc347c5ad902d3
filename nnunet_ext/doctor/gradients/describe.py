"""Tells which modules compute the same, and which are of one kind, without running them."""

from __future__ import annotations

from dataclasses import is_dataclass
from typing import Any

from torch import nn

_BETWEEN = "; "
_PLAIN = (bool, int, float, str, type(None))


def description(module: nn.Module) -> str:
    """Structure and options of a module: equal where two compute the same."""
    lines = [repr(module)]
    for name, part in module.named_modules():
        lines.append(f"{name} {type(part).__qualname__} {_options(part)}")
    return "\n".join(lines)


def kind(module: nn.Module) -> str:
    """Classes of a module's parts that are not PyTorch's, and their options that are no numbers.

    Equal where two run the same code on other sizes, in 2D and 3D.
    """
    parts = [part for part in module.modules() if not type(part).__module__.startswith("torch.")]
    classes = {type(part).__qualname__ for part in parts}
    options = {
        f"{name}={value}"
        for part in parts
        for name, value in _options(part)
        if isinstance(value, str) or is_dataclass(value)
    }
    return f"{' '.join(sorted(classes))}{_BETWEEN}{' '.join(sorted(options))}"


def classes_of(kind_: str) -> str:
    """The classes alone."""
    return kind_.partition(_BETWEEN)[0]


def _options(part: nn.Module) -> list[tuple[str, Any]]:
    found = {name: value for name, value in vars(part).items() if not name.startswith("_") and _is_option(value)}
    return sorted(found.items(), key=lambda item: item[0])


def _is_option(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(isinstance(entry, _PLAIN) for entry in value)
    is_record = is_dataclass(value) and not isinstance(value, type)
    return isinstance(value, _PLAIN) or (is_record and " at 0x" not in repr(value))
