"""Tables of a report: figures with their ratios to the baseline, and the notes that belong to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from nnunet_ext import escaping
from nnunet_ext.benchmark.records import Method, Report, Spread
from nnunet_ext.memory.tracker import GIB
from nnunet_ext.printable import counted

MISSING = "\N{EN DASH}"
_DEFAULT_NETWORKS = ("PlainConvUNet", "ResidualEncoderUNet")
# A figure, and below it its ratio or spread.
Cell = tuple[str, ...]


@dataclass(frozen=True)
class BenchmarkTable:
    """Text of a table.

    Args:
        title: What it shows.
        header: One cell per column; the second line is the unit.
        rows: Cells; the first is a name.
    """

    title: str
    header: tuple[Cell, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class _Column:
    """A quantity of `Method`: title, unit, key, what the figure is divided by."""

    title: str
    unit: str
    key: str
    divisor: float = 1.0

    def cell(self, method: Method) -> Cell:
        value = getattr(method, self.key)
        if value is None:
            return (MISSING,)
        ratio = method.ratios.get(self.key)
        compared = "" if ratio is None else f"({ratio:.2f}x)"
        if isinstance(value, Spread):
            return f"{number(value.median)} {compared}".strip(), f"{number(value.min)}-{number(value.max)}"
        return (number(value / self.divisor), compared) if compared else (number(value / self.divisor),)


_SIZES = (
    _Column("weights", "M", "parameters", 1e6),
    _Column("deployed", "M", "parameters_deployed", 1e6),
    _Column("operations", "GMAC", "macs", 1e9),
    _Column("held", "GiB", "held_bytes", GIB),
    _Column("peak", "GiB", "peak_bytes", GIB),
    _Column("reserved", "GiB", "reserved_bytes", GIB),
    _Column("inference", "GiB", "inference_peak_bytes", GIB),
)
_TIMES = (
    _Column("training step", "s", "step_seconds"),
    _Column("compiled", "s", "compiled_step_seconds"),
    _Column("patch", "s", "patch_seconds"),
    _Column("case", "s", "case_seconds"),
    _Column("mirrored", "s", "case_seconds_mirrored"),
)


def tables(report: Report) -> list[BenchmarkTable]:
    """Sizes and memory, times, depth; those that hold anything."""
    size = f"patch {shape(report.patch_size)}, batch {report.batch_size}, {report.precision}"
    found = [_methods_table(f"Size and memory: {size}", report, _SIZES, _is_shown)]
    if any(_has_values(report, column) for column in _TIMES):
        patch = shape(report.time_patch_size)
        title = f"Times: patch {patch}, batch {report.batch_size}, {report.precision}, {report.device}"
        found.append(_methods_table(title, report, _TIMES, _has_values))
    return [*found, *([_depth_table(f"Memory against depth: {size}", report)] if report.depth else [])]


def _methods_table(
    title: str, report: Report, columns: Any, shown: Callable[[Report, _Column], bool]
) -> BenchmarkTable:
    kept = [column for column in columns if shown(report, column)]
    rows = ((_name(method.trainer), *(column.cell(method) for column in kept)) for method in report.methods)
    return BenchmarkTable(title, (("trainer",), *((column.title, f"[{column.unit}]") for column in kept)), tuple(rows))


def _has_values(report: Report, column: _Column) -> bool:
    return any(getattr(method, column.key) is not None for method in report.methods)


def _is_shown(report: Report, column: _Column) -> bool:
    """All but reserved memory on the CPU, and the deployed form where it is the same."""
    if column.key == "parameters_deployed":
        return any(method.parameters_deployed not in (None, method.parameters) for method in report.methods)
    return column.key != "reserved_bytes" or _has_values(report, column)


def _depth_table(title: str, report: Report) -> BenchmarkTable:
    header: tuple[Cell, ...] = (("trainer",), ("depth",), ("weights", "[M]"), ("held", "[GiB]"), ("peak", "[GiB]"))
    rows = (
        (
            (point.trainer,),
            (str(point.depth),),
            (number(point.parameters / 1e6),),
            (number(point.held_bytes / GIB),),
            (number(point.peak_bytes / GIB),),
        )
        for point in report.depth
    )
    return BenchmarkTable(title, header, tuple(rows))


def _name(trainer: str) -> Cell:
    """Two lines where that saves width: nnUNetTrainer, then what is special."""
    prefix = "nnUNetTrainer"
    return (prefix, trainer.removeprefix(prefix)) if trainer.startswith(prefix) and trainer != prefix else (trainer,)


def notes(report: Report) -> Iterator[str]:
    """Sentences that say what the figures are, and why some are missing."""
    for method in report.methods:
        if method.reason:
            yield f"{method.trainer}: {method.reason}."
    yield "In parentheses: ratio to the first row."
    network = report.methods[0].network
    if network not in (None, *_DEFAULT_NETWORKS):
        yield (
            f"These plans are for {network}, which {report.methods[0].trainer} builds from them: for a comparison "
            "with default nnU-Net give plans of its own planners."
        )
    yield _memory_note({method.memory for method in report.methods})
    if not report.repeats:
        return
    yield (
        f"Times are medians of {counted(report.repeats, 'interleaved repeat')}, with minimum and maximum; a training "
        "step is forward, backward and optimiser with a simple loss, not compiled; "
        "a patch is predicted in batches of one."
    )
    if any(method.compiled_step_seconds for method in report.methods):
        yield (
            "Compiled is the same step after torch.compile, as nnU-Net trains on CUDA by default, each network in "
            "turns of its own."
        )
    else:
        yield "nnU-Net compiles in training on CUDA, which changes the ratios: --compiled measures that too."
    if report.time_patch_size != report.patch_size:
        yield "Times are of a smaller patch than the plans', so no time of a case is computed from them."
    elif report.tiles_per_case is not None:
        yield (
            f"Times of a case are computed, not measured: {counted(report.tiles_per_case, 'tile')} for an image of "
            f"median size, times the time of a patch; mirrored {report.passes_mirrored} times that."
        )


def _memory_note(kinds: set[str]) -> str:
    counted = "counted on shapes, without weights, momentum, workspaces and the device's own"
    measured = "measured on the GPU, with weights and momentum"
    if kinds == {"counted"}:
        return f"Memory is {counted}."
    rest = "" if kinds == {"measured"} else f"; of what doesn't run there {counted}"
    return f"Memory is {measured}{rest}."


def markdown(report: Report, command: str) -> str:
    """The report as a document.

    Args:
        report: What was measured.
        command: Line that made it.
    """
    lines = [
        f"# Benchmark: {escaping.markdown(f'{report.plans}, {report.configuration}')}",
        "",
        escaping.code_block(command),
        "",
        headline(report),
        "",
    ]
    for table in tables(report):
        lines += [f"## {table.title}", ""]
        texts = [[*map(" ".join, table.header)]]
        texts += [["".join(row[0]), *map(" ".join, row[1:])] for row in table.rows]
        header, *rows = ([escaping.markdown_cell(text) for text in line] for line in texts)
        lines += [escaping.markdown_table(header, rows), ""]
    return "\n".join([*lines, *(f"- {escaping.markdown(note)}" for note in notes(report)), ""])


def headline(report: Report) -> str:
    """Machine, versions and network's ends in one line."""
    ends = f"{counted(report.input_channels, 'channel')} in, {report.num_classes} out"
    return f"{report.device}, torch {report.torch}, nnunetv2 {report.nnunetv2}; {ends}"


def shape(size: tuple[int, ...]) -> str:
    """Voxels per axis as text."""
    return "x".join(map(str, size))


def number(value: float) -> str:
    """Three significant digits, no exponent for large ones."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")
