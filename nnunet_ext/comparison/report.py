"""The report of a comparison: report.md, report.html, report.json, cases.csv, figures and tables for papers."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any

from nnunet_ext import style
from nnunet_ext.comparison import figures, latex, overlay, statistics, tables, worst_cases
from nnunet_ext.comparison.accuracy import MEAN, Evaluation
from nnunet_ext.comparison.compare import Comparison, Status
from nnunet_ext.comparison.json_content import as_json
from nnunet_ext.comparison.tables import Table
from nnunet_ext.errors import UsageError
from nnunet_ext.escaping import code_block, csv_cell, html, markdown, markdown_cell
from nnunet_ext.files import read_json, write_files, writing
from nnunet_ext.printable import counted

_TEMPLATES = Path(__file__).with_name("templates")
_FIGURES, _TABLES = _FOLDERS = ("figures", "tables")  # below the report's
_DIGESTS = "files_sha256"
_KINDS: tuple[style.Kind, ...] = ("png", "svg", "pdf")
_LARGE = 300_000  # bytes of an SVG that a page holds whether a PNG has fewer or not


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure.

    Args:
        name: Name of its files, without ending.
        caption: What it shows.
        width: Inches.
        files: Ending -> content.
        uri: The picture itself, as a page holds it.
        narrow: The same, drawn for a phone; None where `uri` is narrow enough.
    """

    name: str
    caption: str
    width: float
    files: Mapping[style.Kind, bytes]
    uri: str
    narrow: str | None


def _figure(name: str, caption: str, draw: Callable[..., Any | None]) -> Figure | None:
    """Draw for a page and, where that is wider than a phone, for a phone; None where there is nothing to draw."""
    wide = draw(width=style.PAGE)
    if wide is None:
        return None
    files = {kind: style.rendered(wide, kind) for kind in _KINDS}
    width = wide.get_figwidth()
    narrow = _uri(draw(width=style.COLUMN)) if width > style.COLUMN else None
    return Figure(name=name, caption=caption, width=width, files=files, uri=_uri(wide, files), narrow=narrow)


def _uri(figure: Any, files: Mapping[style.Kind, bytes] = MappingProxyType({})) -> str:
    """The picture itself, as a page holds it: an SVG, or the PNG where it is smaller than a large SVG."""
    mime, content = "svg+xml", files.get("svg") or style.rendered(figure, "svg")
    if len(content) > _LARGE:
        png = files.get("png") or style.rendered(figure, "png")
        mime, content = ("png", png) if len(png) < len(content) else (mime, content)
    return f"data:image/{mime};base64,{base64.b64encode(content).decode()}"


@dataclass(frozen=True)
class Section:
    """A part of the report: sentences, then tables and figures in their order."""

    title: str
    sentences: tuple[str, ...]
    items: tuple[Table | Figure, ...]


def write(
    comparison: Comparison,
    folder: Path,
    command: str = "",
    on_status: Status = lambda _: None,
    only_figures: bool = False,
) -> Path:
    """Write the report, which replaces all of an earlier one. The same input gives the same bytes.

    Args:
        comparison: What was found.
        folder: Folder to write to; it is made.
        command: Command line, for the report.
        on_status: Called with what is being done.
        only_figures: Write the figures alone, straight into `folder`.

    Returns:
        Path of report.html, or the folder of the figures.

    Raises:
        UsageError: the folder can't be written.
    """
    warnings = list(comparison.warnings)
    sections = []
    for evaluation in comparison.evaluations:
        on_status(f"drawing {evaluation.name}")
        sections.append(_accuracy(comparison, evaluation, warnings))
    if comparison.request.runs:
        on_status("drawing cost")
        sections.append(_cost(comparison))
    pictures = [item for section in sections for item in section.items if isinstance(item, Figure)]
    drawn = {f"{figure.name}.{kind}": content for figure in pictures for kind, content in figure.files.items()}
    if only_figures:
        write_files(folder, drawn)
        return folder
    rows = [evaluation.scores.assign(evaluation=evaluation.name) for evaluation in comparison.evaluations]
    context: dict[str, Any] = {
        "title": _title(comparison),
        "first_line": comparison.gate.first_line(comparison.evaluations),
        "conclusions": [line for evaluation in comparison.evaluations for line in conclusions(comparison, evaluation)],
        "summary": tables.summary(comparison),
        "gate": tables.gate(comparison),
        "warnings": warnings,
        "runs": tables.runs(comparison),
        "sections": sections,
        "method": _method(comparison),
        "command": command,
        "versions": _versions(),
    }
    files = {f"{_FIGURES}/{name}": content for name, content in drawn.items()}
    shown = [*context.values(), *(item for section in sections for item in section.items)]
    named = [item for item in shown if isinstance(item, Table) and item.name]
    files |= {f"{_TABLES}/{table.name}.tex": latex.table(table).encode("utf-8") for table in named}
    content = {
        **as_json(comparison),
        "warnings": warnings,
        "figures": [figure.name for figure in pictures],
        _DIGESTS: {name: _digest(content) for name, content in files.items()},
    }
    texts = {
        "cases.csv": _csv(rows),
        "report.md": _render("report.md.jinja", context),
        "report.html": _render("report.html.jinja", context),
        "report.json": json.dumps(content, indent=2, allow_nan=False) + "\n",
    }
    files |= {name: text.encode("utf-8") for name, text in texts.items()}
    with writing(folder):
        for own in _FOLDERS:
            if (folder / own).is_symlink():  # to a folder with files of others
                (folder / own).unlink()
    write_files(folder, files, gone=_old_files(folder) - files.keys())
    return folder / "report.html"


def _render(template: str, context: dict[str, Any]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    def escaped(escape: Callable[[str], str]) -> Callable[[Any], Markup]:
        """What the templates themselves make is `Markup`; all other text may be of others."""
        return lambda value: value if isinstance(value, Markup) else Markup(escape(str(value)))

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        finalize=escaped(html if template.endswith(".html.jinja") else markdown),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"cell": escaped(markdown_cell), "code": escaped(code_block)}
    return environment.get_template(template).render(context)


def _title(comparison: Comparison) -> str:
    runs = comparison.request.runs
    name = runs[0].plans.get("dataset_name") if runs else comparison.request.dataset.get("name")
    return f"{name or 'Predictions'}: {', '.join(comparison.request.labels)}"


def conclusions(comparison: Comparison, evaluation: Evaluation) -> list[str]:
    """One sentence per run and baseline: its mean Dice, its difference, the verdict where there is one."""
    sentences = []
    for found in evaluation.comparands:
        if found.metric != "Dice" or found.structure is not MEAN:
            continue
        d, verdict = found.difference, comparison.gate.judge(evaluation, found)
        span = f" ({tables.signed(100 * d.low)} to {tables.signed(100 * d.high)})" if d.n > 1 else ""
        run, baseline = (tables.number(evaluation.mean(label).mean, 4) for label in found.pair)
        sentences.append(
            f"{found.run}, {evaluation.name}: mean Dice {run} against {baseline} of {found.baseline}; difference "
            f"{tables.signed(100 * d.mean)}{span} points over {counted(d.n, 'case')}"
            f"{f': {verdict}' if verdict and verdict.word else ''}."
        )
    return sentences


def _accuracy(comparison: Comparison, evaluation: Evaluation, warnings: list[str]) -> Section:
    prefix = evaluation.name.replace(" ", "-")
    margin = comparison.gate.margin if _has_verdicts(comparison) else None
    items: list[Table | Figure | None] = []
    for metric in evaluation.metrics:
        if metric != "IoU":  # it follows from Dice, and is in cases.csv
            items += _metric(comparison, evaluation, metric, prefix)
    if len(evaluation.labels) > 1:
        forest = "Mean difference of Dice to the baseline with its 95 % interval"
        forest += "." if margin is None else "; grey: the margin."
        above = "Mean Dice of each case: above the line the run is better than the baseline."
        items += [
            _figure(f"{prefix}-differences", forest, partial(figures.differences, evaluation, margin)),
            _figure(f"{prefix}-paired", above, partial(figures.paired_cases, evaluation)),
        ]
    cost = partial(figures.accuracy_and_cost, evaluation, comparison.costs)
    items += [
        tables.second(comparison, evaluation),
        tables.ranks(evaluation),
        tables.absences(evaluation),
        _figure(f"{prefix}-cost", "Mean Dice against cost; upper left is better.", cost),
        tables.worst(evaluation),
    ]
    scans, found = worst_cases.scans(comparison, evaluation)
    warnings += found
    caption = "the worst case of a run, in slices through its smallest structure."
    items += [
        _figure(f"{prefix}-worst-{place}", f"{s.name}, {caption}", partial(overlay.overlay, s))
        for place, s in enumerate(scans, start=1)
    ]
    cases, structures = counted(len(evaluation.cases), "case"), ", ".join(evaluation.structures)
    text = f"{cases} that all runs have; structures: {structures}."
    shown = tuple(item for item in items if item is not None)
    return Section(f"Accuracy, {evaluation.name}", (text,), shown)


def _metric(comparison: Comparison, evaluation: Evaluation, metric: str, prefix: str) -> list[Table | Figure | None]:
    boxes = (
        f"{metric} of {counted(len(evaluation.cases), 'case')}: quartiles, median, whiskers of at most 1.5 times their "
        "distance; beside each box every case as a point."
    )
    drawn = _figure(f"{prefix}-{metric.lower()}", boxes, partial(figures.box_plots, evaluation, metric))
    return [tables.accuracy(comparison, evaluation, metric), drawn]


def _cost(comparison: Comparison) -> Section:
    caption = "Learning curves as nnU-Net logs them: mean of the folds, thin lines single folds."
    items = [
        tables.cost(comparison.costs),
        _figure("learning-curves", caption, partial(figures.learning_curves, comparison.trainings)),
        tables.plans(comparison),
    ]
    return Section("Cost and training", (), tuple(item for item in items if item is not None))


def _method(comparison: Comparison) -> list[str]:
    """How the figures were made, in sentences."""
    request = comparison.request
    sentences = [
        "Cases: only those that every run has. Dice and IoU are not defined where neither reference nor prediction has "
        "a structure; such a case does not count for this structure and run (nnU-Net's rule), and a paired difference "
        "takes the cases in which both runs have a value.",
        "Mean: of the structures' means, as in nnU-Net's foreground mean; differences, ranks and worst cases are of "
        "each case's mean over its structures.",
        f"Differences: run minus baseline ({request.baseline}); interval: Student's, of the mean of the paired "
        "differences; p: Wilcoxon signed-rank test, two-sided, zero differences discarded, after Holm's correction "
        "over all runs for the mean, over all runs and structures for the single structures, each metric and baseline "
        "apart.",
        *_of_verdicts(comparison),
        "One training per fold: intervals tell how far the result depends on the cases, not on another training.",
    ]
    if request.tolerance is not None:
        sentences.append(
            f"Surfaces: NSD at {request.tolerance:g} mm and HD95 in mm, by DeepMind's surface-distance. Where only one "
            "of reference and prediction has the structure NSD is 0 and HD95 not defined (see the number of missed "
            "structures)."
        )
    return sentences


def _of_verdicts(comparison: Comparison) -> list[str]:
    if not _has_verdicts(comparison):
        return []
    return [
        f"Verdict, by the margin of {comparison.gate.margin:g} in Dice points: superior, the interval lies above zero "
        f"and p is below {statistics.SIGNIFICANT:.2f}; non-inferior, it lies above minus the margin; inferior, below "
        f"it; else inconclusive. With fewer than {statistics.FEWEST_CASES} cases there is none."
    ]


def _has_verdicts(comparison: Comparison) -> bool:
    judged = (comparison.gate.judge(e, c) for e in comparison.evaluations for c in e.comparands)
    return any(verdict is not None and verdict.word for verdict in judged)


def _versions() -> str:
    names = ("nnunet-ext", "nnunetv2", "torch", "scipy", "surface-distance")
    return ", ".join(f"{name} {_version(name)}" for name in names)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "(not installed)"


def _csv(parts: Sequence[Any]) -> str:
    import pandas as pd

    table = pd.concat(parts, ignore_index=True)
    first = ["evaluation", "run", "fold", "case", "structure", "compared"]
    ordered = table[[*first, *(name for name in table if name not in first)]]
    ordered = ordered.assign(**{name: ordered[name].map(csv_cell) for name in first if name != "compared"})
    return str(ordered.to_csv(index=False, lineterminator="\n"))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _old_files(folder: Path) -> set[str]:
    """Names of the figures and tables of an earlier report in this folder, as far as they are unchanged.

    Its report.json may be anybody's: what it names is one of its files only where the content is.
    """
    try:
        content = read_json(folder / "report.json", "delete it")
        digests = {str(name): digest for name, digest in content[_DIGESTS].items()}
    except (UsageError, KeyError, AttributeError):
        return set()
    named = {name for name in digests if name in {f"{own}/{Path(name).name}" for own in _FOLDERS}}
    return {name for name in named if _is_unchanged(folder / name, digests[name])}


def _is_unchanged(path: Path, digest: Any) -> bool:
    try:
        return path.is_file() and _digest(path.read_bytes()) == digest
    except (OSError, ValueError):  # gone or unreadable; no name of a file
        return False
