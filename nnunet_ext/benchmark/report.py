"""What a benchmark writes: JSON, Markdown and figures."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from nnunet_ext.benchmark.figures import depth_curves, ratio_bars
from nnunet_ext.benchmark.records import Report
from nnunet_ext.benchmark.table import markdown
from nnunet_ext.files import write_files


def to_json(report: Report, command: str) -> str:
    """Strict JSON of all records; docs/reference/benchmark.md lists the keys.

    Args:
        report: What was measured.
        command: Line that made it.
    """
    return json.dumps({"command": command, **asdict(report)}, indent=2, allow_nan=False)


def write(report: Report, command: str, folder: Path) -> list[Path]:
    """Write benchmark.json, benchmark.md, benchmark.png and, where depths were asked for, depth.png, together.

    Raises:
        UsageError: the folder can't be written.
    """
    texts = {"benchmark.json": to_json(report, command) + "\n", "benchmark.md": markdown(report, command)}
    files = {name: text.encode("utf-8") for name, text in texts.items()}
    files["benchmark.png"] = ratio_bars(report)
    if report.depth:
        files["depth.png"] = depth_curves(report)
    write_files(folder, files)
    return [folder / name for name in files]
