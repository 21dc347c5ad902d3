"""What a planner chose and why, next to what nnU-Net's own network gets of the same GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_ext.errors import UsageError
from nnunet_ext.memory.count import TrainingMemory
from nnunet_ext.memory.tracker import GIB
from nnunet_ext.nnunet.plans import configuration, read_plans
from nnunet_ext.plans.memory_search import FILLED, Choice
from nnunet_ext.plans.rivals import Asked, Hosts, Planned, Rivals

if TYPE_CHECKING:
    from nnunet_ext.plans.memory_planner import MemoryPlanner


BATCH = "batch of nnU-Net"  # a limit


def figures(memory: TrainingMemory) -> dict[str, Any]:
    """Figures of a memory for the plans; 1 GB is 2**30 bytes."""
    parts = {name: round(size / GIB, 3) for name, size in memory.as_dict().items()}
    return {"expected_GB": round(memory.expected / GIB, 3), "parts_GB": parts}


def memory_entry(choice: Choice, target: int, trainer: str) -> dict[str, Any]:
    """What the plans note about a choice."""
    return {
        "target_GB": round(target / GIB, 3),
        "trainer": trainer,
        "limit": _limit(choice, target),
        **figures(choice.memory),
    }


def _limit(choice: Choice, target: int) -> str:
    """What keeps patch and batch from being larger."""
    if choice.memory.expected >= FILLED * target:
        return "memory"
    if not choice.candidate.covers_image:
        return "steps between patches"
    return choice.candidate.bound if choice.batch >= choice.candidate.most else "image"


_REASONS = {
    "memory": "the next larger one does not fit",
    "image": "the patch covers a typical image, and one more in the batch does not fit",
    "data set": "the patch covers a typical image, and the batch at most {share:g} % of the data set",
    BATCH: (
        "the patch covers a typical image, and a batch larger than that of nnU-Net's own planner would only make the "
        "steps of an epoch slower, whose number is fixed"
    ),
    "steps between patches": "no patch that the strides divide fills the target better",
}


def report(planner: MemoryPlanner, plans: Mapping[str, Any], asked: Mapping[str, Asked]) -> str:
    """A text on every configuration, next to nnU-Net's own network in the same target; the plans note it too."""
    hosts = Hosts(planner)
    target = planner.UNet_vram_target_GB
    lines = [
        f"\nPatch and batch for {target:g} GB, counted for {planner.trainer}; nnU-Net's own network beside it, as "
        "nnU-Net plans it (default), and filling the target by the same count (filled):"
    ]
    for name, noted in plans["configurations"].items():
        if "memory" not in noted:
            continue
        memory, plan = noted["memory"], configuration(plans, name)
        planned, limit = Planned(plan, memory["expected_GB"]), memory["limit"]
        reason = _REASONS[limit].format(share=100 * planner.max_dataset_covered)
        lines.append(f"  {name}: {_expected(planned)}; limit is the {limit}: {reason}")
        if plan.get("data_identifier") in asked:
            rivals = hosts.rivals(planned, asked[plan["data_identifier"]])
            memory["compared"] = rivals.entry(planned)
            lines += [f"    {line}" for line in _comparison(planned, rivals)]
    lines.append("  1 GB is 2**30 bytes; expected is the step's peak with an allowance for CUDA.\n")
    return "\n".join(lines)


def overwritten(path: Path, plans: Mapping[str, Any]) -> Iterator[str]:
    """Say that plans for another target lie under the name of new ones, and how both are kept.

    Args:
        path: File that the new plans will be written to.
        plans: New plans.
    """
    try:
        before = read_plans(path, "plan again")["configurations"] if path.is_file() else {}
    except UsageError:
        return  # no plans: nothing is lost
    for name, noted in plans["configurations"].items():
        old = before.get(name, {}).get("memory", {}).get("target_GB")
        new = noted.get("memory", {}).get("target_GB")
        if old is not None and new is not None and old != new:
            other = f"{plans['plans_name']}_{new:g}G"
            yield (
                f"{path.name} was planned for {old:g} GB and is overwritten; a training that it began can't go on. To "
                f"keep both, give each target a name, and plan {old:g} GB again: -gpu_memory_target {new:g} "
                f"-overwrite_plans_name {other}, then train with -p {other}."
            )
            return


def _comparison(planned: Planned, rivals: Rivals) -> Iterator[str]:
    named = {rivals.name: rivals.default, f"{rivals.name} filled": rivals.filled}
    for name, rival in named.items():
        if rival is None:
            yield f"{name}: no patch fits the target"
        elif rival is not planned:
            yield f"{name}: {_expected(rival)}"
    yield from rivals.sentences(planned)


def _expected(planned: Planned) -> str:
    plan, noted = planned.plan, planned.plan.get("me_unet")
    standard = f" (standard patch {_size(noted['standard_patch_size'])})" if noted else ""
    return (
        f"patch {_size(plan['patch_size'])}, batch {plan['batch_size']}{standard}: {planned.expected:.2f} GB expected"
    )


def _size(patch: Sequence[int]) -> str:
    return "x".join(map(str, patch))
