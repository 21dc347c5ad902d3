"""The table, the recommendation and the commands as text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nnunet_ext import aims
from nnunet_ext.advise.choice import Choice, label
from nnunet_ext.advise.records import DEFAULT_PLANNER, Advice, Row
from nnunet_ext.memory.tracker import GIB

_PREFIX = "nnUNetTrainer"
_CASCADE = "nnUNetTrainerMeCascade"
HEADER = ("trainer\nplanner", "patch\nbatch", "GB", "cover\n[%]", "size\n[M]", "step\n[x]", "predict\n[x]")


@dataclass(frozen=True)
class Commands:
    """What to paste: plan, preprocess, train, predict; each a list of parts that belong on one line where they fit."""

    advice: Advice
    row: Row

    @property
    def plans(self) -> str:
        """Name of the plans that nothing else has."""
        return f"{self.row.plans}_{self.advice.target:g}G"

    def __iter__(self) -> Iterator[list[str]]:
        """Each command in parts that stay together."""
        number, row = self.advice.number, self.row
        planner = [] if row.planner == DEFAULT_PLANNER else [f"-pl {row.planner}"]
        target = f"-gpu_memory_target {self.advice.target:g}"
        yield [f"nnUNetv2_plan_experiment -d {number}", *planner, target, f"-overwrite_plans_name {self.plans}"]
        yield [f"nnUNetv2_preprocess -d {number}", f"-plans_name {self.plans}", f"-c {self.advice.configuration}"]
        used = [f"-p {self.plans}", f"-tr {row.trainer}"]
        for stage in self._stages():
            yield [f"nnUNetv2_train {number} {stage} 0", *used]
        if row.trainer.startswith(_CASCADE):
            yield [f"nnunet-ext cascade-predict -i IN -o OUT -d {number}", *used]
        else:
            yield ["nnUNetv2_predict -i IN -o OUT -f 0", f"-d {number} -c {self.advice.configuration}", *used]

    def _stages(self) -> list[str]:
        base = self.advice.configuration
        if not self.row.trainer.startswith(_CASCADE):
            return [base]
        return [f"{base[:2]}_me_context", f"{base[:2]}_post_concat"]


def title(advice: Advice) -> str:
    """What the table is of."""
    image = _size(tuple(round(n) for n in advice.default.image))
    return (
        f"{advice.dataset}, {advice.configuration}, for {advice.aim} ({aims.TITLES[advice.aim]}); planned for "
        f"{advice.target:g} GB ({advice.gpu}); typical image {image}"
    )


def cells(advice: Advice, row: Row) -> list[str]:
    """A row of the table; what a figure is of stands in `notes`."""
    name = _name(row)
    if row.reason:
        return [name, *["-"] * (len(HEADER) - 1)]
    patch = f"{_size(row.patch)}\n{row.batch}" + (f"\nP {_size(row.standard_patch)}" if row.standard_patch else "")
    weights = [f"{row.parameters / 1e6:.1f}", f"{row.parameters_deployed / 1e6:.1f}"]
    known = row.measured_step
    step = f"~{advice.step(row):.2f}" + ("" if known is None else f"\n{known:.2f} m")
    time, is_measured = advice.prediction(row)
    memory = f"{row.expected / GIB:.1f}" + ("" if advice.fits(row) else " !")
    return [
        name,
        patch,
        memory,
        f"{100 * row.coverage:.3g}",
        "\n".join(dict.fromkeys(weights)),
        step,
        f"{time:.2f} m" if is_measured else f"~{time:.2f}",
    ]


def _name(row: Row) -> str:
    label = row.trainer.removeprefix(_PREFIX) or row.trainer
    is_continued = row.planner.startswith(label)
    return f"{label}\n{'...' + row.planner.removeprefix(label) if is_continued else row.planner}"


def notes(advice: Advice) -> Iterator[str]:
    """Sentences that say what the figures are."""
    for row in advice.rows:
        if row.reason:
            yield f"{row.trainer} with {row.planner}: {row.reason}"
    if advice.aim == "memory":
        yield "All on nnU-Net's own plans for this card: the same patch, and the memory that each trainer needs for it."
    yield (
        "Patch: voxels, below it the batch; P: what meU-net trains all levels on. GB: 2**30 bytes that a step is "
        "expected to need; !: more than the card has."
    )
    yield (
        "Cover: share of a typical image, the median size after resampling, in a patch; no axis counts more than "
        "whole. Size: weights in training, below it as deployed where that is another."
    )
    yield (
        "Step, predict: times default nnU-Net, its plan for this card. ~ is predicted from counted operations; m is "
        "measured: step on one H100 with 128x128x128 for both, predict on a CPU (docs/benchmarks). A fast GPU waits "
        "for the many small operations of recomputing networks, so that these take longer than predicted."
    )


def verdict(choice: Choice) -> str:
    """The recommendation in a line."""
    row = choice.row
    return "Stay with default nnU-Net." if row.is_default else f"Take {label(row)}."


def _size(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size))
