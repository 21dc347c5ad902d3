"""Write the tables of README and docs/benchmarks/results.md, their figure, and what docs/benchmarks/papers.md quotes.

python benchmarks/results.py

reads what was measured: the report of `nnunet-ext compare` on the trainings of benchmarks/learning.py, the phantom of
benchmarks/context.py, the counted benchmark of all methods and the steps on a GPU, each of the latest date.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.context import ROWS, rows_table
from benchmarks.methods_table import MISSING, REPOSITORY, inserted
from benchmarks.trade_off import Point, svg
from nnunet_ext import aims
from nnunet_ext.comparison.run_folders import suffix
from nnunet_ext.escaping import markdown_table
from nnunet_ext.files import write_bytes, write_text
from nnunet_ext.memory.tracker import GIB

BENCHMARKS = REPOSITORY / "docs" / "benchmarks"
README, RESULTS, PAPERS = REPOSITORY / "README.md", BENCHMARKS / "results.md", BENCHMARKS / "papers.md"
FIGURE = BENCHMARKS / "accuracy.svg"
HOST_PLANS = "nnUNetPlans"
TIMES = "\N{MULTIPLICATION SIGN}"
# Rows of the README, after default nnU-Net: recommended, then the best of each method.
SHOWN = (
    "ActivationCheckpointing",
    "HalfWidthBN",
    "HalfWidth",
    "FasterFusionBN",
    "Reversible",
    "InvertibleNoVAE",
    "ImplicitLite",
    "MeUNet",
    "MeUNetOnePass",
)


@dataclass(frozen=True, kw_only=True)
class Learned:
    """A training of benchmarks/learning.py.

    Args:
        trainer, plans: Without schedule and batch size.
        dice: Mean over cases of the mean of structures.
        structures: Structure -> Dice.
        difference: Points to default nnU-Net with its interval; empty for default nnU-Net.
        cost: Of the report.
    """

    trainer: str
    plans: str
    dice: float
    structures: dict[str, float]
    difference: str
    cost: dict[str, Any]

    @property
    def name(self) -> str:
        """In tables and figures."""
        method = self.trainer.removeprefix(aims.DEFAULT) or "default"
        plans = self.plans.removeprefix("nnUNet").removesuffix("Plans")
        return method if self.plans == HOST_PLANS else f"{method}, {plans}"


def latest(kind: str, file: str) -> Path:
    """The file in the folder of this kind whose date is the last."""
    return max(BENCHMARKS.glob(f"*-{kind}/{file}"))


def read(path: Path) -> Any:
    """Content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def learned(report: dict[str, Any]) -> list[Learned]:
    """Trainings of a comparison, in its order."""
    (evaluation,) = report["evaluations"]
    whole = evaluation["mean_of_structures"]
    dice = {(m["run"], m["structure"]): m["mean"] for m in evaluation["means"] if m["metric"] == "Dice"}
    differences = {
        d["run"]: f"{100 * d['mean']:+.1f} ({100 * d['low']:+.1f} to {100 * d['high']:+.1f})"
        for d in evaluation["differences"]
        if (d["metric"], d["structure"], d["baseline"]) == ("Dice", whole, report["baseline"])
    }
    return [
        Learned(
            trainer=run["trainer"].removesuffix(suffix(run["trainer"])),
            plans=re.sub(r"_batch\d+$", "", run["plans"]),
            dice=dice[run["label"], whole],
            structures={name: dice[run["label"], name] for name in evaluation["structures"]},
            difference=differences.get(run["label"], ""),
            cost=run["cost"],
        )
        for run in report["runs"]
    ]


def learning_table(found: Sequence[Learned]) -> str:
    """All trainings, the most accurate first."""
    first = found[0]
    header = ["", "", *first.structures, "mean", "points to default", "peak [GB]", "weights [M]", "GMAC"]
    rows = []
    for number, one in sorted(enumerate(found, 1), key=lambda pair: -pair[1].dice):
        cost = one.cost
        shown = [f"{cost['peak'] / GIB:.2f}", f"{cost['parameters'] / 1e6:.2f}", f"{cost['macs'] / 1e9:.1f}"]
        dice = [f"{value:.3f}" for value in (*one.structures.values(), one.dice)]
        rows.append([str(number), one.name, *dice, one.difference or MISSING, *shown])
    return markdown_table(header, rows)


def overview(
    found: Sequence[Learned], counted: dict[str, Any], tubes: dict[str, float], steps: Sequence[dict[str, Any]]
) -> str:
    """Default nnU-Net and at most nine others: accuracy and cost."""
    by_trainer = {one.trainer: one for one in found if one.plans == HOST_PLANS}
    ratios = {method["trainer"]: method["ratios"] for method in counted["methods"] if not method.get("budget")}
    compiled = {row["trainer"]: row["step_ms"] for row in steps if row["compiled"]}
    rows = []
    for method in ("", *SHOWN):
        trainer = f"{aims.DEFAULT}{method}"
        one, ratio = by_trainer.get(trainer), ratios[trainer]
        aim = ", ".join(aims.BY_TRAINER[trainer].recommended) if trainer in aims.BY_TRAINER else ""
        dice = MISSING if one is None else f"{one.dice:.3f}" + (f", {one.difference}" if one.difference else "")
        tube = f"{tubes[trainer]:.2f}" if trainer in tubes else MISSING
        costs = [f"{ratio[key]:.2f}{TIMES}" for key in ("peak_bytes", "parameters_deployed", "macs")]
        step = f"{compiled[trainer] / compiled[aims.DEFAULT]:.1f}{TIMES}" if trainer in compiled else MISSING
        rows.append([f"`{method or 'nnUNetTrainer'}`", f"**{aim}**" if aim else "", dice, tube, *costs, step])
    header = ["`nnUNetTrainer`...", "take for", "Dice", "tube", "peak", "weights", "operations", "GPU step"]
    return markdown_table(header, rows)


def filled(page: str, kind: str, figures: dict[str, str], known: Collection[str]) -> str:
    """A page with the figure of each name behind its comment, `<!-- kind:NAME -->FIGURE<!-- / -->`.

    Args:
        page, kind: Text and kind.
        figures: Name -> figure; others of those known are not yet trained.
        known: Names that there can be.

    Raises:
        ValueError: the page has another name.
    """

    def figure(match: re.Match[str]) -> str:
        if match[2] not in known:
            raise ValueError(f"{kind} knows no {match[2]}")
        return f"{match[1]}{figures.get(match[2], 'not yet trained')}<!-- / -->"

    return re.sub(rf"(<!-- {kind}:([^>]*?) -->).*?<!-- / -->", figure, page)


def pages() -> Iterator[tuple[Path, str]]:
    """The pages as they have to be."""
    found = learned(read(latest("learning", "report.json")))
    context, counted = read(latest("context", "context.json")), read(latest("methods", "benchmark.json"))
    tubes = {row["key"]: mean(row["thin"]) for row in context["results"]}
    yield README, inserted(README.read_text("utf-8"), "results", overview(found, counted, tubes, compiled_steps()))
    page = inserted(RESULTS.read_text("utf-8"), "learning", learning_table(found))
    yield RESULTS, inserted(page, "context", rows_table(context["results"]))
    dice = {one.trainer: f"{one.dice:.3f}" for one in found if one.plans == HOST_PLANS}
    papers = filled(PAPERS.read_text("utf-8"), "learning", dice, aims.BY_TRAINER)
    yield PAPERS, filled(papers, "context", {k: f"{x:.3f}" for k, x in tubes.items()}, [row.key for row in ROWS])


def compiled_steps() -> list[dict[str, Any]]:
    """Steps of the latest day on a GPU, those beside a teacher too, where default nnU-Net was compiled."""
    content = read(latest("gpu", "gpu.json"))
    return [*content["steps"], *content["taught"]]


def figure() -> bytes:
    """Accuracy against memory of all trainings."""
    found = learned(read(latest("learning", "report.json")))
    points = [Point(name=one.name, dice=one.dice, peak=one.cost["peak"]) for one in found]
    return svg(points, "Mean Dice, Hippocampus, 1,000 iterations")


def main() -> None:
    for page, text in pages():
        write_text(page, text)
    write_bytes(FIGURE, figure())


if __name__ == "__main__":
    main()
