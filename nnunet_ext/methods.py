"""What belongs to one architecture, read from source without importing it, and what was measured of it.

A trainer or planner belongs to the architectures that its module names in code: by itself, or through a
registered trainer or planner that it names (the one it extends).

``measured.json`` holds, for each architecture that benchmarks measured, ratios to nnU-Net's own network on
the same plans and data (below one is less memory or time)::

    {"ReversibleUNet": {"parameters": 0.5, "held": 0.25, "peak": 0.3, "step_time": 1.4,
                        "device": "NVIDIA H100", "date": "2026-01-31", "command": "python benchmarks/..."}}

``parameters``: number of weights. ``held``: bytes kept between forward and backward pass. ``peak``: most
bytes alive during a training step. ``step_time``: seconds of a training step. A number that was not measured
is missing or null; ``device``, ``date`` and ``command`` say where the others come from.
"""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass, fields
from importlib import resources
from typing import Any

from nnunet_ext import registry
from nnunet_ext.registry import Entry


@dataclass(frozen=True)
class Measured:
    """Ratios to nnU-Net's own network, None where not measured, and where they come from."""

    parameters: float | None = None
    held: float | None = None
    peak: float | None = None
    step_time: float | None = None
    device: str = ""
    date: str = ""
    command: str = ""


@dataclass(frozen=True)
class Method:
    """An architecture with the names that train and plan it.

    Args:
        name: what the first line of its docstring says before a colon or full stop.
        architecture: its entry.
        trainers, planners: names that belong to it.
        measured: ratios to nnU-Net's own network.
    """

    name: str
    architecture: Entry
    trainers: tuple[str, ...]
    planners: tuple[str, ...]
    measured: Measured


def methods() -> list[Method]:
    """One record for every usable architecture, sorted by name.

    Raises:
        ValueError: ``measured.json`` does not have the documented shape.
    """
    trainers, planners = _architectures_of("trainers"), _architectures_of("planners")
    numbers = measured()
    return [
        Method(
            registry.summary(entry).partition(":")[0].rstrip("."),
            entry,
            tuple(name for name, architectures in trainers.items() if entry.name in architectures),
            tuple(name for name, architectures in planners.items() if entry.name in architectures),
            numbers.get(entry.name, Measured()),
        )
        for entry in registry.entries("architectures")
        if not entry.refused
    ]


def measured() -> dict[str, Measured]:
    """Contents of ``measured.json`` by name of the architecture.

    Raises:
        ValueError: the file does not have the documented shape.
    """
    return parse_measured(resources.files("nnunet_ext").joinpath("measured.json").read_text(encoding="utf-8"))


def parse_measured(text: str) -> dict[str, Measured]:
    """Read the documented JSON.

    Raises:
        ValueError: an unknown key, or a value of the wrong type.
    """
    return {name: _measured(name, record) for name, record in json.loads(text).items()}


def _measured(name: str, record: dict[str, Any]) -> Measured:
    types = {
        field.name: str if field.default == "" else (float, int, type(None)) for field in fields(Measured)
    }
    for key, value in record.items():
        if key not in types:
            raise ValueError(f"measured.json: {name} has {key!r}, known are {', '.join(types)}.")
        if not isinstance(value, types[key]):
            raise ValueError(f"measured.json: {key} of {name} can't be {value!r}.")
    return Measured(**record)


def _architectures_of(kind: str) -> dict[str, frozenset[str]]:
    """Name of each usable trainer or planner -> names of the architectures that it belongs to."""
    architectures = frozenset(registry.names("architectures"))
    usable = [entry for entry in registry.entries(kind) if not entry.refused]
    named = {entry.name: names_in(registry.source(entry)) for entry in usable}

    def reachable(name: str, seen: frozenset[str]) -> frozenset[str]:
        found = named[name] & architectures
        for other in (named[name] & named.keys()) - seen:
            found |= reachable(other, seen | {other})
        return found

    return {name: reachable(name, frozenset({name})) for name in named}


def names_in(tree: ast.AST) -> frozenset[str]:
    """Identifiers of the code, and ends of dotted paths in its strings; comments and prose don't count."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.alias):
            names.add(node.name.rpartition(".")[2])
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.update(re.findall(r"^[\w.]+\.(\w+)$", node.value))
    return frozenset(names)
