"""Network arguments as plans.json may hold them: those of a planner, those of a person, and broken ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from typing import Any, Literal

from hypothesis import strategies as st

from tests.fuzz.options import network_options

Kind = Literal["planned", "varied", "free", "broken"]
JSON = dict[str, Any]
IMPORTED = ["conv_op", "norm_op", "dropout_op", "nonlin"]
_MOST_VOXELS = 2048  # of a patch, so that a case takes a fraction of a second
_MOST_STRIDE = 256  # of all axes of the coarsest stage together
_JUNK: list[Any] = [None, True, False, -1, 0, 1.5, 2.0, "3", "", "x", [], {}, [None], [[]], {"a": 1}, 10**7, 10**30]
_JUNK += [float("nan"), float("inf"), 1e300]
_PATHS: list[Any] = [
    "torch.nn.NoSuch",
    "no.such.Module",
    "torch.nn",
    "torch.nn.Linear",
    "torch.nn.Conv1d",
    "torch.nn.ConvTranspose3d",
    "torch.nn.GroupNorm",
    "torch.nn.LayerNorm",
    "torch.nn.InstanceNorm1d",
    "torch.nn.InstanceNorm2d",
    "torch.nn.InstanceNorm3d",
    "torch.relu",
    "",
]


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """One case.

    Args:
        kind: "planned": as nnU-Net's planners write them, which must work; "varied": these with other layers; "free":
            other values of the right types; "broken": with something wrong.
        arguments: Content of `arch_kwargs`.
        imported: Content of `_kw_requires_import`.
        residual: Whether these are ResEnc plans.
        patch: Voxels per axis.
        batch, channels, classes: Sizes of the batch, of the image and of the logits.
        deep_supervision: Whether the network gives logits of all levels.
    """

    kind: Kind
    arguments: JSON
    imported: list[str]
    residual: bool
    patch: tuple[int, ...]
    batch: int
    channels: int
    classes: int
    deep_supervision: bool


@st.composite
def network_plans(
    draw: st.DrawFn,
    network_class: type[Any] | None,
    *,
    kinds: Sequence[Kind] = ("planned", "free", "free", "broken", "broken"),
    least_stages: int = 2,
) -> Drawn:
    """Plans for a network and a patch to run it on; `network_class` None: without options of a network."""
    kind: Kind = draw(st.sampled_from(kinds))
    is_planned, residual = kind in ("planned", "varied"), draw(st.booleans())
    dim = draw(st.sampled_from([2, 3]))
    strides = draw(_planned_strides(dim, least_stages) if is_planned else _strides(dim))
    arguments = {
        **draw(_sizes(dim, strides, residual, is_planned)),
        **draw(_operations(dim, kind)),
        **draw(network_options(network_class, len(strides), dim, is_planned)),
    }
    imported = list(IMPORTED)
    divisors = [prod(axis) for axis in zip(*strides, strict=True)] if strides else [1] * dim
    patch = draw(_patches(divisors, is_planned))
    if kind == "broken":
        for _ in range(draw(st.sampled_from([1, 1, 2]))):
            draw(_broken(arguments, imported))
    drawn = Drawn(
        kind=kind,
        arguments=json.loads(json.dumps(arguments)),
        imported=imported,
        residual=residual,
        patch=patch,
        batch=2 if is_planned else draw(st.sampled_from([2, 2, 1])),
        channels=draw(st.integers(1, 5)),
        classes=draw(st.integers(2 if is_planned else 1, 6)),
        deep_supervision=draw(st.booleans()),
    )
    if kind == "broken" and draw(st.integers(0, 7)) == 0:
        name = draw(st.sampled_from(["channels", "classes", "arguments", "imported"]))
        return replace(drawn, **{name: draw(st.sampled_from(_JUNK))})
    return drawn


@st.composite
def _planned_strides(draw: st.DrawFn, dim: int, least_stages: int) -> list[list[int]]:
    """As nnU-Net's planners: 1, then 2 along the axes that are long enough, at least one of them."""
    stages = draw(st.integers(least_stages, 5))
    others = _within([draw(st.integers(0, stages - 1)) for _ in range(dim - 1)], 9 - stages)
    halvings = [*others, stages - 1]
    first = [stages - 1 - n if draw(st.booleans()) else 0 for n in halvings]
    return [[1] * dim] + [
        [2 if at <= i < at + n else 1 for at, n in zip(first, halvings, strict=True)] for i in range(stages - 1)
    ]


def _within(halvings: list[int], most: int) -> list[int]:
    while sum(halvings) > most:
        halvings[halvings.index(max(halvings))] -= 1
    return halvings


@st.composite
def _strides(draw: st.DrawFn, dim: int) -> list[list[int]]:
    """Any that a person may write; rarely into the first stage."""
    stages = draw(st.sampled_from([1, 2, 2, 3, 3, 4, 4, 5, 6, 7]))
    steps = st.lists(st.sampled_from([1, 1, 2, 2, 2, 3, 4]), min_size=dim, max_size=dim)
    found = [draw(steps) if draw(st.integers(0, 15)) == 0 else [1] * dim]
    found += [draw(steps) for _ in range(stages - 1)]
    so_far = accumulate((prod(stride) for stride in found), lambda a, b: a * b)
    return [stride if reached <= _MOST_STRIDE else [1] * dim for stride, reached in zip(found, so_far, strict=True)]


@st.composite
def _sizes(draw: st.DrawFn, dim: int, strides: list[list[int]], residual: bool, is_planned: bool) -> JSON:
    """Features, kernels and depths; a number for a list now and then, as networks take it."""
    stages = len(strides)
    depths = st.integers(1, 3)
    if is_planned:
        base = draw(st.sampled_from([4, 8]))
        features: Any = [min(32, base * 2**i) for i in range(stages)]
        kernels: Any = [[1 if draw(st.integers(0, 3)) == 0 else 3 for _ in range(dim)] for _ in strides]
    else:
        odd = [1, 3, 7] if draw(st.integers(0, 3)) == 0 else []
        features = draw(_per_stage(st.sampled_from([2, 4, 6, 8, 12, 16, *odd]), stages))
        kernel = st.sampled_from([1, 3, 3, 3, 3, 3, 3, 3, 5] + ([2, 4] if draw(st.integers(0, 7)) == 0 else []))
        kernels = draw(_per_stage(st.one_of(kernel, st.lists(kernel, min_size=dim, max_size=dim)), stages))
    encoder = draw(st.lists(depths, min_size=stages, max_size=stages) if is_planned else _per_stage(depths, stages))
    decoder = draw(st.lists(depths, min_size=max(0, stages - 1), max_size=max(0, stages - 1)))
    return {
        "n_stages": stages,
        "features_per_stage": features,
        "kernel_sizes": kernels,
        "strides": strides,
        "n_blocks_per_stage" if residual else "n_conv_per_stage": encoder,
        "n_conv_per_stage_decoder": decoder,
    }


def _per_stage(values: st.SearchStrategy[Any], stages: int) -> st.SearchStrategy[Any]:
    several = st.lists(values, min_size=stages, max_size=stages)
    return st.one_of(several, several, several, values.filter(lambda value: isinstance(value, int)))


@st.composite
def _operations(draw: st.DrawFn, dim: int, kind: Kind) -> JSON:
    """Norm, dropout and nonlinearity by the names that plans hold."""
    norms: list[tuple[str | None, Any]] = [(f"torch.nn.modules.instancenorm.InstanceNorm{dim}d", {"affine": True})] * 3
    norms += [(f"torch.nn.BatchNorm{dim}d", {"eps": 1e-5, "affine": True})]
    dropouts: list[tuple[str | None, Any]] = [(None, None)] * 3
    nonlins: list[tuple[str | None, Any]] = [("torch.nn.LeakyReLU", {"inplace": True})] * 2
    if kind != "planned":
        norms += [(None, None), (f"torch.nn.InstanceNorm{dim}d", None), ("torch.nn.Identity", {})]
        norms += [(f"torch.nn.InstanceNorm{dim}d", {"track_running_stats": True})]
        norms += [(f"torch.nn.BatchNorm{dim}d", {"momentum": None})]
        norms += [(f"torch.nn.BatchNorm{dim}d", {"track_running_stats": False, "affine": False})]
        dropouts += [(f"torch.nn.Dropout{dim}d", {"p": draw(st.sampled_from([0, 0.3, 0.9]))})]
        dropouts += [("torch.nn.Dropout", {"p": 0.5, "inplace": True})]
        nonlins += [(None, None), ("torch.nn.ReLU", None), ("torch.nn.PReLU", {}), ("torch.nn.GELU", {})]
        nonlins += [("torch.nn.ELU", {"inplace": True}), ("torch.nn.RReLU", {"inplace": True})]
        nonlins += [("torch.nn.Softplus", {})]
    if kind in ("free", "broken"):  # which nnU-Net's own networks do not take, or never learn from
        dropouts += [("torch.nn.Dropout", None), (f"torch.nn.Dropout{dim}d", {"p": 1})]
    found: JSON = {"conv_op": f"torch.nn.modules.conv.Conv{dim}d", "conv_bias": draw(st.booleans())}
    for name, choices in (("norm_op", norms), ("dropout_op", dropouts), ("nonlin", nonlins)):
        found[name], found[f"{name}_kwargs"] = draw(st.sampled_from(choices))
    return found


@st.composite
def _patches(draw: st.DrawFn, divisors: Sequence[int], is_planned: bool) -> tuple[int, ...]:
    """Multiples of the strides; of plans that a person wrote also others."""
    least = 2 if is_planned else 1  # strides are drawn so that the smallest patch is small
    times = [draw(st.integers(least, least + 2)) for _ in divisors]
    while prod(divisors) * prod(times) > _MOST_VOXELS and max(times) > least:
        times[times.index(max(times))] -= 1
    patch = [n * d for n, d in zip(times, divisors, strict=True)]
    if not is_planned and draw(st.integers(0, 9)) == 0:
        axis = draw(st.integers(0, len(patch) - 1))
        patch[axis] = max(1, patch[axis] + draw(st.sampled_from([-1, 1, 2])))
    return tuple(patch)


@st.composite
def _broken(draw: st.DrawFn, arguments: JSON, imported: list[str]) -> None:
    """Make one thing wrong."""
    name = draw(st.sampled_from(sorted(arguments) or ["n_stages"]))
    value, junk = arguments.get(name), draw(st.sampled_from(_JUNK))
    way = draw(st.sampled_from(["junk", "junk", "entry", "entry", "length", "missing", "unknown", "import", "keyword"]))
    if way == "entry" and isinstance(value, list) and value:
        at = draw(st.integers(0, len(value) - 1))
        is_nested = isinstance(value[at], list) and value[at] and draw(st.booleans())
        entry = [junk, *value[at][1:]] if is_nested else junk
        arguments[name] = [*value[:at], entry, *value[at + 1 :]]
    elif way == "length" and isinstance(value, list):
        arguments[name] = draw(st.sampled_from([value[:-1], [*value, *value[-1:]], [*value, junk], [value]]))
    elif way == "missing":
        arguments.pop(name, None)
    elif way == "unknown":
        arguments[draw(st.sampled_from(["window", "embed_dim", "pool", "input_channels", "deep_supervision"]))] = junk
    elif way == "import":
        if draw(st.integers(0, 3)) == 0:
            imported[:] = draw(st.lists(st.sampled_from([*IMPORTED, "n_stages", "no_such"]), max_size=5))
        else:
            arguments[draw(st.sampled_from(IMPORTED))] = draw(st.sampled_from(_PATHS))
    elif way == "keyword":
        keyword = draw(st.sampled_from(["eps", "affine", "p", "inplace", "momentum", "negative_slope", "no_such"]))
        arguments[draw(st.sampled_from(["norm_op", "dropout_op", "nonlin"])) + "_kwargs"] = {keyword: junk}
    else:
        arguments[name] = junk
