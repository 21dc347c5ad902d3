"""Tables of a report: figures with their ratios to the baseline, and the notes that belong to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nnunet_ext import escaping
from nnunet_ext.benchmark.records import DEFAULT_NETWORKS, Method, Report, Spread
from nnunet_ext.memory.tracker import GIB
from nnunet_ext.printable import counted

MISSING = "\N{EN DASH}"
# A figure, and below it its ratio or spread.
Cell = tuple[str, ...]


@dataclass(frozen=True)
class BenchmarkTable:
    """Text of a table.

    Args:
        title: What it shows.
        header: One cell per column; the last line is the unit.
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


_MEMORY = (
    _Column("float16 held", "GB", "held_bytes", GIB),
    _Column("float16 peak", "GB", "peak_bytes", GIB),
    _Column("float16 expected", "GB", "expected_bytes", GIB),
    _Column("float32 held", "GB", "float32_held_bytes", GIB),
    _Column("float32 peak", "GB", "float32_peak_bytes", GIB),
)
_MEASURED = (
    _Column("held", "GB", "measured_held_bytes", GIB),
    _Column("peak", "GB", "measured_peak_bytes", GIB),
    _Column("reserved", "GB", "measured_reserved_bytes", GIB),
    _Column("compiled held", "GB", "compiled_held_bytes", GIB),
    _Column("compiled peak", "GB", "compiled_peak_bytes", GIB),
)
_SIZES = (
    _Column("weights", "M", "parameters", 1e6),
    _Column("deployed", "M", "parameters_deployed", 1e6),
    _Column("operations", "GMAC", "macs", 1e9),
    _Column("inference", "GB", "inference_peak_bytes", GIB),
    _Column("inference measured", "GB", "measured_inference_peak_bytes", GIB),
)
_TIMES = (
    _Column("training step", "s", "step_seconds"),
    _Column("compiled", "s", "compiled_step_seconds"),
    _Column("patch", "s", "patch_seconds"),
    _Column("case", "s", "case_seconds"),
    _Column("mirrored", "s", "case_seconds_mirrored"),
)


def tables(report: Report) -> list[BenchmarkTable]:
    """Memory of training as counted and as measured, sizes and prediction, times, depth; those that hold anything."""
    patch, batch = f"patch {shape(report.patch_size)}", f"batch {report.batch_size}"
    timed = f"patch {shape(report.time_patch_size)}"
    groups = (
        (f"Memory of a training step, counted: {patch}, {batch}", _MEMORY),
        (f"Memory of a training step, measured: {patch}, {batch}, {report.precision}, {report.device}", _MEASURED),
        (f"Size, and memory of inference in float16: {patch}", _SIZES),
        (f"Times: {timed}, {batch}, {report.precision}, {report.device}", _TIMES),
    )
    found = [_methods_table(title, report, columns) for title, columns in groups]
    depth = [_depth_table(f"Memory against depth, float16: {patch}, {batch}", report)] if report.depth else []
    return [table for table in found if len(table.header) > 1] + depth


def _methods_table(title: str, report: Report, columns: Sequence[_Column]) -> BenchmarkTable:
    kept = [column for column in columns if _is_shown(report, column)]
    rows = (((method.label,), *(column.cell(method) for column in kept)) for method in report.methods)
    header = (("trainer",), *((*column.title.split(), f"[{column.unit}]") for column in kept))
    return BenchmarkTable(title, header, tuple(rows))


def _is_shown(report: Report, column: _Column) -> bool:
    """What any method has, and the deployed form where it is another."""
    if column.key == "parameters_deployed":
        return any(method.parameters_deployed not in (None, method.parameters) for method in report.methods)
    return any(getattr(method, column.key) is not None for method in report.methods)


def _depth_table(title: str, report: Report) -> BenchmarkTable:
    header: tuple[Cell, ...] = (("trainer",), ("depth",), ("weights", "[M]"), ("held", "[GB]"), ("peak", "[GB]"))
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


def notes(report: Report) -> Iterator[str]:
    """Sentences that say what the figures are, and why some are missing."""
    for method in report.methods:
        if method.reason:
            yield f"{method.label}: {method.reason}."
    yield f"In parentheses: ratio to {report.baseline}, the first row."
    network = report.methods[0].network
    if network not in (None, *DEFAULT_NETWORKS):
        yield (
            f"These plans are for {network}, which {report.methods[0].trainer} builds from them: for a comparison "
            "with default nnU-Net give plans of its own planners."
        )
    yield from _memory_notes(report)
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


def _memory_notes(report: Report) -> Iterator[str]:
    yield (
        "Held: alive after the forward pass of a training step, beside weights and momentum. Peak: the most at any "
        "time of it, these included. Expected: peak and an allowance for CUDA. 1 GB is 2**30 bytes."
    )
    yield (
        "Counted on shapes: the trainer's own step, not compiled, in float16 autocast as nnU-Net trains on every GPU, "
        "and in float32."
    )
    if any(method.measured_peak_bytes or method.compiled_peak_bytes for method in report.methods):
        yield "Measured: the second of two such steps on the GPU, with workspaces; reserved is what PyTorch took of it."
    if any(method.budget and not method.compiled_peak_bytes for method in report.methods):
        yield (
            "Budget: share of what torch.compile would keep for the backward pass that it may keep "
            "(activation_memory_budget); its peak depends on the compiler, and is measured on a GPU only."
        )


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
        texts = [[*map(" ".join, row)] for row in (table.header, *table.rows)]
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
